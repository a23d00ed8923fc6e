"""Adversarial feature-map pruning: cut the maps through which a barely visible change spoils the predictions.

For each feature map the images are changed by one step so that this map changes most. Maps on which such a
step costs the network most of its right answers are the ones that a trigger can use; the worst of each layer
are cut.

Paper:   Huang & Bu, "Adversarial feature map pruning for backdoor", ICLR 2024, arXiv 2307.11565.
Needs:   clean images and labels.
Changes: units of convolutions and their norms, set to zero, then all weights; cut maps stay cut.
Departs: many maps go through the network at once, where the public code takes one after the other. Pixels
         are clamped to [0, 1], and not normalised values. Layers of fewer than 64 maps lose one; the paper's
         share of 1 / 64 of them is none. A learning rate that destroys the network is lowered
         (engine/fine_tuning.py).
Cost:    maps x (2 forward + 1 backward) over ``images`` images, then epochs x (1 forward + 1 backward).
Blind:   networks with fewer than two convolutions (refused); triggers far larger than the step. On small
         networks it weakens a patch, and its published share does not remove it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine.channel_pruning import cut_evidence, filter_sites
from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode
from unbackdoor.engine.masks import CONVS, Site, fold
from unbackdoor.engine.precision import resolve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


class FMPConfig(Config):
    """Options of adversarial feature-map pruning."""

    images: int = option(32, "images that the maps are judged on", source="reference code", ge=1)
    radius: float = option(
        1 / 255, "largest change of a pixel, of 0..1, of start and step", source="reference code", gt=0, le=1
    )
    share: float = option(
        1 / 64,
        "share of each layer's maps that is cut, one at the least",
        source="the paper, p = 64",
        gt=0,
        lt=1,
    )
    epochs: int = option(
        10, "passes of the fine-tuning; 0 for none", source="reference code", ge=0, le=10_000
    )
    lr: float = option(0.01, "peak learning rate of the fine-tuning", source="reference code", gt=0, le=1)
    batch_size: int = option(128, "images a step of the fine-tuning", source="this project", ge=2)


@defense(
    "fmp",
    config=FMPConfig,
    paper="arXiv:2307.11565",
    needs={"images", "labels"},
    quick={"images": 8, "epochs": 6, "batch_size": 16},
    families={"conv-bn", "conv"},
)
def purify(model: Classifier, data: CleanData, cfg: FMPConfig, *, run: Run) -> Purified:
    """Score every feature map, cut the worst of each layer, fine-tune."""
    sites = [s for s in filter_sites(model) if isinstance(model.get_submodule(s.name), CONVS)]
    if len(sites) < 2:
        raise UnsupportedModel(
            "the network has hardly any feature map",
            expected="two convolutions or more besides the head",
            got=", ".join(site.name for site in sites) or "none",
            where=model.architecture or type(model.network).__name__,
        )
    draws = run.generator("images")
    images = data.fit.subset(torch.randperm(len(data.fit), generator=draws)[: cfg.images])
    exact = replace(run, precision=resolve("fp32", run.device))  # bf16 rounds a step of 1 / 255 away
    with frozen(model), mode(model, training=False):
        scores = {
            site.name: map_accuracies(model, site, images, cfg, exact)
            for site in run.progress(sites, "feature maps")
        }
    cut = {name: kept(score, cfg.share) for name, score in scores.items()}
    out = fold(model, sites, cut)
    evidence: dict[str, Any] = {
        **cut_evidence(sites, cut),
        "least_right": {name: float(score.min()) for name, score in scores.items()},
    }
    if cfg.epochs:
        recipe = Recipe(epochs=cfg.epochs, lr=cfg.lr, batch_size=cfg.batch_size, schedule="cosine")
        tuned = fine_tune(out, data.all, recipe, run, augmentation=data.augmentation)
        out, evidence["lr"] = fold(tuned.model, sites, cut), tuned.lr
    return Purified(out, evidence)


def kept(accuracies: Tensor, share: float) -> Tensor:
    """Return the 0/1 mask (O,) without the share of maps, one at the least, whose accuracy is lowest."""
    count = max(1, int(share * len(accuracies)))
    mask = torch.ones(len(accuracies))
    mask[accuracies.argsort(stable=True)[:count]] = 0.0
    return mask


def map_accuracies(model: Classifier, site: Site, images: Images, cfg: FMPConfig, run: Run) -> Tensor:
    """Return the accuracy (O,) on the images after one step that changes each map of a layer most."""
    pixels, labels = to_float(images.pixels, run.device), images.truth.to(run.device)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        outputs.append(out)

    def maps_of(x: Tensor) -> Tensor:
        outputs.clear()
        logits_of(model, x, run)
        # A layer that is called several times counts by its last call; one that never is has no map.
        return outputs[-1].float() if outputs else x.new_zeros(len(x), site.shape[0], 1, 1)

    handle = model.get_submodule(site.name).register_forward_hook(keep)
    try:
        with torch.no_grad():
            clean = maps_of(pixels)  # (N, O, h, w)
        draws = run.generator("start", site.name)
        noise = (2 * torch.rand(pixels.shape, generator=draws) - 1).to(run.device) * cfg.radius
        start = (pixels + noise).clamp(0, 1)
        found = []
        together = max(1, images_per_pass(model.input_shape) // len(pixels))
        for part in torch.arange(site.shape[0]).split(together):
            x = start.repeat(len(part), 1, 1, 1).requires_grad_()  # (M * N, C, H, W)
            moved = maps_of(x).unflatten(0, (len(part), -1))  # (M, N, O, h, w)
            own = moved[torch.arange(len(part)), :, part]  # (M, N, h, w)
            change = (own - clean[:, part].movedim(1, 0)).square().sum()
            (gradient,) = torch.autograd.grad(change, x) if change.requires_grad else (torch.zeros_like(x),)
            step = x.detach() + cfg.radius * gradient.sign() - pixels.repeat(len(part), 1, 1, 1)
            adversarial = pixels.repeat(len(part), 1, 1, 1) + step.clamp(-cfg.radius, cfg.radius)
            with torch.no_grad():
                answers = logits_of(model, adversarial.clamp(0, 1), run).argmax(1)
            found.append((answers.view(len(part), -1) == labels).float().mean(1).cpu())
    finally:
        handle.remove()
    return torch.cat(found)  # (O,)
