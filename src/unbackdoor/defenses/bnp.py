"""Batch-norm pruning: cut the channels whose stored statistics are not those of clean images.

The stored statistics of a batch norm were averaged over the training set, triggered images included. A
channel that answers to the trigger has another mean and variance there than on clean images.

Paper:   Zheng, Tang, Li & Liu, "Pre-activation distributions expose backdoor neurons", NeurIPS 2022, BNP.
Needs:   clean images, labels only for the preset ``held-out``; without images, noise takes their place.
Changes: batch-norm scales, set to zero; with ``shift`` the shifts too.
Departs: the divergence is that of two normal laws as it stands in the books, of clean images from stored
         statistics, and over all images at once; the public code looks at one batch of 500, BackdoorBench
         leaves the factor 1/2 off the logarithm. Preset ``backdoorbench`` zeroes the shifts as well. Preset
         ``noise`` takes images of uniform noise; these fit no channel's statistics, so that its answer is a
         guess. Preset ``held-out`` chooses the threshold with clean images.
Cost:    1 forward over the images.
Blind:   what one threshold fits: at the published one it takes a patch out of one small network and leaves it
         in the next, where ``held-out`` does better;
         backdoors that were put in without moving the stored statistics, or after which these were taken
         anew; networks without batch norm (refused); layers of fewer than 11 channels at the published
         threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.engine.channel_pruning import OutlierPruningConfig, prune_outliers
from unbackdoor.engine.channels import Scores
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.masks import NORMS, Site, norm_sites
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.registry import defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


class BNPConfig(OutlierPruningConfig):
    """Options of batch-norm pruning."""

    inputs: Literal["auto", "images", "noise"] = option(
        "auto",
        "what the stored statistics are compared on; auto: the images, and noise where there are none",
        source="the paper: images; noise: for owners who have none",
    )
    noise_images: int = option(500, "images of noise", source="as the public code's batch", ge=2, le=100_000)
    shift: bool = option(False, "zero the shift of a channel too", source="reference code: the scale alone")


@defense(
    "bnp",
    config=BNPConfig,
    paper="NeurIPS 2022",
    presets={
        "backdoorbench": {"shift": True},
        "noise": {"inputs": "noise"},
        "held-out": {"choice": "held-out"},
    },
    families={"conv-bn"},
)
def purify(model: Classifier, data: CleanData, cfg: BNPConfig, *, run: Run) -> Purified:
    """Cut the channels whose statistics diverge most from the stored ones."""
    sites = [
        site
        for site in norm_sites(model, with_bias=cfg.shift)
        if model.get_submodule(site.name).running_var is not None
    ]
    if not sites:
        raise UnsupportedModel(
            "the network has no stored batch statistics to compare",
            expected="batch norms with running statistics",
            got=", ".join(sorted({type(module).__name__ for module in model.network.modules()})),
            where=model.architecture or type(model.network).__name__,
        )
    if cfg.inputs == "images" and not len(data):
        raise InputError("there is no image to take statistics of", expected="clean images", got=0)
    noise = cfg.inputs == "noise" or not len(data)
    images = noise_like(data.fit, cfg.noise_images, run) if noise else data.fit
    out = prune_outliers(model, sites, divergences(model, sites, images, run), cfg, data, run)
    return Purified(out.model, {"inputs": "noise" if noise else "images", **out.evidence})


def noise_like(images: Images, count: int, run: Run) -> Images:
    """Return images of uniform noise in the shape of others, without labels."""
    pixels = torch.randint(0, 256, (count, *images.shape), generator=run.generator("noise"))
    return Images(pixels.to(torch.uint8), None, images.class_names, "noise")


def divergences(model: Classifier, sites: list[Site], images: Images, run: Run) -> Scores:
    """Return KL(statistics on the images || stored statistics) of each channel (O,), both as normal laws."""
    sums = {site.name: _Sums() for site in sites}

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: sums[name].add(inputs[0].detach())

    handles = [model.get_submodule(s.name).register_forward_pre_hook(adder(s.name)) for s in sites]
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        for handle in handles:
            handle.remove()
    out: Scores = {}
    for site in sites:
        norm = model.get_submodule(site.name)
        assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
        if not sums[site.name].count:  # never called
            out[site.name] = torch.zeros(site.shape)
            continue
        mean, variance = sums[site.name].moments()
        stored_mean, stored = norm.running_mean.double().cpu(), norm.running_var.double().cpu() + norm.eps
        out[site.name] = normal_divergence(mean, variance + norm.eps, stored_mean, stored).float()
    return out


def normal_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(other_mean, other_variance)) elementwise."""
    ratio = (variance + (mean - other_mean).square()) / other_variance
    return 0.5 * (ratio - 1 - (variance / other_variance).log())


@dataclass
class _Sums:
    """Sums over images and places, of values and of their squares."""

    count: int = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, values: Tensor) -> None:
        flat = values.double().movedim(1, 0).flatten(1).cpu()  # (O, B * places)
        self.count += flat.shape[1]
        self.first = self.first + flat.sum(1)
        self.second = self.second + flat.square().sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.first / self.count
        return mean, (self.second / self.count - mean.square()).clamp_min(0)
