"""PSBD: drop channels in the network; the class of a clean image gets unsure, that of a trigger stays.

The score is how little the probability of the network's own class falls under dropout, with its sign so that
what stays sure is high.

Paper:   Li, Chen, Liu & Liu, "PSBD: prediction shift uncertainty unlocks backdoor detection", CVPR 2025,
         arXiv 2406.05826.
Needs:   clean images: one part chooses the rate of the dropout, scores are compared with the held-out part.
Departs: dropout is in front of every convolution and linear layer but the first, not behind residual
         additions, so that any network has it. Whole channels fall, for all images of a pass alike, so that a
         score depends on no other input. The rate is the one at which closest to 0.8 of the clean images
         change their class; the paper looks at the training set too. An input has a p-value, not a quartile.
Cost:    rates x passes forwards of clean images, passes + 1 of the inputs.
Blind:   backdoors that share their channels with the clean task; networks with few channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unbackdoor.engine.call_order import called_layers
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, classes_of, conformal_p_values, judged
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit

_RATES = tuple(round(0.1 * k, 1) for k in range(1, 10))
_KINDS = (nn.Conv2d, nn.Linear)


class PSBDConfig(ScreenerConfig):
    """Options of the dropout."""

    passes: int = option(
        10, "passes with channels dropped", source="this project; the paper: 3, pixel by pixel", ge=1, le=1000
    )
    shift: float = option(
        0.8, "share of clean images that are to change their class", source="the paper", gt=0, lt=1
    )


@screener("psbd", config=PSBDConfig, paper="arXiv:2406.05826", needs={"images"}, quick={"passes": 3})
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: PSBDConfig, *, run: Run) -> Screening:
    """Score inputs by how sure the network stays of their class while channels fall.

    Raises:
        UnsupportedModel: If no layer could lose channels.
    """
    require_fit(model, inputs)
    layers = layers_of(model)
    fit_class = classes_of(model, data.fit, run)
    shifts: dict[float, float] = {}
    for rate in run.progress(_RATES, "rates of dropout", len(_RATES)):
        changed = [
            (_dropped(model, layers, rate, k, data.fit, run).argmax(1) != fit_class).float().mean()
            for k in range(min(cfg.passes, 3))
        ]
        shifts[rate] = float(torch.stack(changed).mean())
    rate = min(_RATES, key=lambda r: (abs(shifts[r] - cfg.shift), r))
    scores, predicted = _kept(model, layers, rate, inputs, cfg, run)
    clean_scores, _ = _kept(model, layers, rate, data.select, cfg, run)
    return judged(
        scores,
        conformal_p_values(scores, clean_scores),
        predicted,
        cfg.alpha,
        len(clean_scores),
        rate=rate,
        clean_images_that_change_their_class=shifts[rate],
    )


def layers_of(model: Classifier) -> list[nn.Module]:
    """Return the layers whose inputs lose channels: all convolutions and linear layers but the first called.

    That is of the image's own channels, and taken where there is no other.

    Raises:
        UnsupportedModel: If there is none at all.
    """
    layers = list(dict.fromkeys(called_layers(model, _KINDS)))
    if not layers:
        raise UnsupportedModel("the network has no layer whose inputs could fall")
    return layers[1:] or layers


@contextmanager
def dropping(layers: list[nn.Module], rate: float, draws: torch.Generator) -> Iterator[None]:
    """Take a share of the channels from the inputs of these layers inside the block, for all images alike."""
    handles = []
    for layer in layers:
        width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        assert isinstance(width, int)
        kept = (torch.rand(width, generator=draws) >= rate).float() / (1 - rate)
        places = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        handles.append(layer.register_forward_pre_hook(_multiplier(kept.view(places))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiplier(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * mask.to(inputs[0]), *inputs[1:])

    return multiply


def _dropped(
    model: Classifier, layers: list[nn.Module], rate: float, number: int, images: Images, run: Run
) -> Tensor:
    """Return probabilities (N, K) of one pass; the same channels fall for every set of images."""
    draws = run.generator("dropout", str(rate), number)
    with dropping(layers, rate, draws), mode(model, training=False):
        return predict(model, images, run).softmax(1)


def _kept(
    model: Classifier, layers: list[nn.Module], rate: float, images: Images, cfg: PSBDConfig, run: Run
) -> tuple[Tensor, Tensor]:
    """Return how little the probability of the own class falls (N,), at most about 0, and the class (N,)."""
    own = classes_of(model, images, run)
    with mode(model, training=False):
        before = predict(model, images, run).softmax(1).gather(1, own[:, None])[:, 0]
    after = torch.zeros(len(images))
    for number in range(cfg.passes):
        after += _dropped(model, layers, rate, number, images, run).gather(1, own[:, None])[:, 0]
    return after / cfg.passes - before, own
