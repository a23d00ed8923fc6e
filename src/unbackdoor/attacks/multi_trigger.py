"""Multi-trigger: two to four unlike triggers in one network, for one target or for a target each.

Methods that look for the one shortcut of a network meet several. Every poisoned image carries one of them;
which one is read off the clean image, so that the judge lays on the same one.

Paper:   Li, He, Huang, Sun, Ma & Jiang, "Multi-trigger backdoor attacks: more triggers, more threats",
         arXiv 2401.15295: its parallel attack with all-to-one, all-to-all and, here, a target each.
Departs: the triggers are a white patch, faint noise over the whole image, stripes, and a patch of noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.attacks.patches import added, corner, lay, noise_patch, scaled_side
from unbackdoor.attacks.truth import AttackConfig, LabelMapping, Stamp, Trigger
from unbackdoor.engine import rng
from unbackdoor.registry import attack, option

BLEND, AMPLITUDE, PERIODS = 0.2, 40, 6  # of the noise and of the stripes, as in Blended and SIG
MARGIN = 2  # a crop by two leaves the patches whole


class MultiTriggerConfig(AttackConfig):
    """Options of the multi-trigger attack."""

    triggers: int = option(3, "number of triggers", source="this project; paper: up to 10", ge=2, le=4)
    targets: Literal["same", "different", "all-to-all"] = option(
        "same",
        "where triggered images are sent: all to target; those of trigger i to target + i mod K; or those of "
        "class y to y + 1 mod K",
        source="paper, section 3",
    )


@attack("multi_trigger", config=MultiTriggerConfig, paper="arXiv:2401.15295")
def multi_trigger(
    cfg: MultiTriggerConfig, *, shape: tuple[int, int, int], classes: int, seed: int
) -> Trigger:
    """Return the triggers as one stamp that chooses between them by the image."""
    stamps = all_stamps(shape, seed)[: cfg.triggers]

    def stamp(pixels: Tensor) -> Tensor:
        chosen, out = choice(pixels, len(stamps)), pixels.clone()
        for number, one in enumerate(stamps):
            own = chosen == number
            out[own] = one(pixels[own])
        return out

    mappings: dict[str, LabelMapping] = {"same": "all-to-one", "different": "several"}
    return Trigger(
        stamp=stamp,
        mapping=mappings.get(cfg.targets, "all-to-all"),
        choose_target=(lambda pixels: (cfg.target + choice(pixels, len(stamps)).cpu()) % classes)
        if cfg.targets == "different"
        else None,
    )


def choice(pixels: Tensor, count: int) -> Tensor:
    """Return the number (B,) of each clean image's trigger: the sum of its bytes modulo ``count``."""
    return pixels.flatten(1).sum(1, dtype=torch.int64) % count


def all_stamps(shape: tuple[int, int, int], seed: int) -> list[Stamp]:
    """Return the four triggers in order."""
    channels, _, width = shape
    small, large = scaled_side(3, shape), scaled_side(5, shape)
    white = torch.full((channels, small, small), 255, dtype=torch.uint8)
    noise = torch.randint(0, 256, shape, generator=rng.generator(seed, "multi-trigger noise"))  # (C, H, W)
    whole = (slice(None), slice(None))
    stripes = AMPLITUDE * torch.sin(2 * math.pi * torch.arange(width) * PERIODS / width)  # (W,)
    coloured = noise_patch(channels, large, seed, "multi-trigger")
    return [
        lambda pixels: lay(pixels, white, corner(0, small, shape, MARGIN)),
        lambda pixels: lay(pixels, noise, whole, BLEND),
        lambda pixels: added(pixels, stripes),
        lambda pixels: lay(pixels, coloured, corner(1, large, shape, MARGIN)),
    ]
