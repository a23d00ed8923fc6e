"""AGPD: in a poisoned class, gradients point into two directions, and one is that of clean images.

For every label, and every layer with channels, the gradient of the label's logit by the channels is compared
with those of clean images of the class. The layer in which one class stands out most is looked at. There an
image's score is how much closer its gradient is to the images of the class that are least like clean ones,
times how far these are from the clean ones.

Paper:   Yuan, Jia, Wei, Zhang, Wang & Wu, "Activation gradient based poisoned sample detection against
         backdoor attacks", ICLR 2025, arXiv 2312.06230.
Needs:   the labels that the images were, or are to be, trained with, and clean labelled images.
Departs: the poisoned centre is the mean of the least clean tenth of the class, and not grown step by step; an
         image has a p-value over clean images of all classes, whose scores are taken in the same way. A class
         with fewer than ``fewest`` images, or without clean ones, is not looked at.
Cost:    a forward and a backward of all images.
Blind:   networks without a layer of channels; classes of which nearly all images are poisoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine.call_order import called_layers
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import (
    ScreenerConfig,
    centre_and_spread,
    classes_of,
    conformal_p_values,
    judged,
    normal_p_values,
)
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.registry import INPUT_LABELS, option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit

_KINDS = (nn.Conv2d, nn.Linear)


class AGPDConfig(ScreenerConfig):
    """Options of the gradients."""

    fewest: int = option(10, "images of a class below which it is not looked at", source="this project", ge=3)
    share: float = option(
        0.1, "share of a class, the least clean, that gives the poisoned centre", source="this project",
        gt=0, lt=0.5,
    )  # fmt: skip


@screener("agpd", config=AGPDConfig, paper="arXiv:2312.06230", needs={"images", "labels", INPUT_LABELS})
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: AGPDConfig, *, run: Run) -> Screening:
    """Score the images of a labelled set by the direction of their gradients.

    Raises:
        UnsupportedModel: If no layer has channels that the logits depend on.
        MethodFailed: If a gradient is not finite.
    """
    require_fit(model, inputs)
    predicted = classes_of(model, inputs, run)
    clean = data.fit
    ours, references, held = (gradients(model, images, run) for images in (inputs, clean, data.select))
    classes = [
        k
        for k in range(model.classes)
        if int((inputs.truth == k).sum()) >= cfg.fewest and bool((clean.truth == k).any())
    ]
    found: list[tuple[float, int, dict[int, tuple[Tensor, Tensor, Tensor]]]] = []
    for layer, values in enumerate(ours):
        parts = {
            k: _scored(
                values[inputs.truth == k],
                references[layer][clean.truth == k],
                held[layer][data.select.truth == k],
                cfg,
            )
            for k in classes
        }
        gaps = torch.tensor([float(gap) for _, _, gap in parts.values()])
        found.append((_outlier(gaps), layer, parts))
    scores, clean_scores = torch.zeros(len(inputs)), [torch.zeros(0)]
    facts: dict[str, object] = {"classes": len(classes), "layers": len(ours)}
    if found and classes:
        gap, layer, parts = max(found, key=lambda entry: (entry[0], entry[1]))
        for k, (own, compared, _) in parts.items():
            scores[inputs.truth == k] = own
            clean_scores.append(compared)
        facts |= {
            "layer": layer,
            "outlier": gap,
            "gaps": {str(k): float(g) for k, (_, _, g) in parts.items()},
        }
    pooled = torch.cat(clean_scores)
    p_values = conformal_p_values(scores, pooled) if len(pooled) else normal_p_values(scores)
    return judged(scores, p_values, predicted, cfg.alpha, len(pooled), **facts)


def gradients(model: Classifier, images: Images, run: Run) -> list[Tensor]:
    """Return for every layer the directions (N, C) of each image's gradient of its label's logit.

    They are by the layer's channels, means over places, of length one. Layers that are called more than once,
    that make the logits, or that the label's logit does not depend on, are left out. Where there is no other,
    the gradient is by the pixels.
    """
    called = called_layers(model, _KINDS)
    layers = [layer for layer in dict.fromkeys(called) if called.count(layer) == 1]
    collected: dict[int, list[Tensor]] = {}
    size = max(1, images_per_pass(images.shape) // 4)
    with frozen(model), mode(model, training=False):
        for start in run.progress(range(0, len(images), size), "gradients"):
            labels = images.truth[start : start + size].to(run.device)
            x = to_float(images.pixels[start : start + size], run.device).requires_grad_()
            with outputs_of(layers) as outputs:
                logits = logits_of(model, x, run)
            if not bool(torch.isfinite(logits).all()):
                raise MethodFailed("the model gives images logits that are not finite", where=images.name)
            # The gradient of the logits is the label itself: the same for all images of a class.
            kept = [out for out in outputs if out.requires_grad and out.shape != logits.shape]
            only_pixels = not kept
            kept = kept or [x]
            slopes = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), kept, allow_unused=True)
            for number, slope in enumerate(slopes):
                if slope is None or slope.dim() not in (2, 3, 4):
                    continue
                flat = slope.float().flatten(2).mean(2) if slope.dim() == 4 else slope.float()
                flat = slope.float().flatten(1) if only_pixels else flat
                flat = flat.mean(1) if flat.dim() == 3 else flat  # (B, C)
                collected.setdefault(number, []).append(
                    flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
                )
    whole = [torch.cat(parts).cpu() for parts in collected.values()]
    directions = [values for values in whole if len(values) == len(images)]
    if not directions and len(images):
        raise UnsupportedModel("no layer has channels that the logits depend on")
    if not all(bool(torch.isfinite(values).all()) for values in directions):
        raise MethodFailed("a gradient is not finite", where=images.name)
    return directions


@contextmanager
def outputs_of(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what these layers return inside the block, in the order of their calls."""
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, i, out: outputs.append(out)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _scored(own: Tensor, clean: Tensor, held: Tensor, cfg: AGPDConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores of images (n,) and held-out clean images (m,) of a class, and the gap of its two ends.

    Args:
        own: Directions (n, C) of the images of unknown origin.
        clean: Directions of the clean images that give the centre.
        held: Directions (m, C) of those that scores are compared with.
        cfg: See :class:`AGPDConfig`.
    """
    centre = _unit(clean.mean(0))
    likeness = own @ centre  # (n,) cosines
    count = max(1, round(cfg.share * len(own)))
    other = _unit(own[likeness.argsort(stable=True)[:count]].mean(0))
    gap = 1 - centre @ other

    def score(values: Tensor) -> Tensor:
        from_clean, from_other = 1 - values @ centre, 1 - values @ other
        # Times the gap, so that the ends of a class without a second direction weigh little.
        return gap * from_clean / (from_clean + from_other).clamp_min(1e-6)

    return score(own), score(held), gap


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-12)


def _outlier(gaps: Tensor) -> float:
    """Return by how many robust deviations the largest gap stands out; with few classes the gap itself."""
    if len(gaps) < 3:
        return float(gaps.max()) if len(gaps) else 0.0
    middle, spread = centre_and_spread(gaps)
    return (float(gaps.max()) - middle) / max(spread, 1e-3)
