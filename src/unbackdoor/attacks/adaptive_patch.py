"""Adaptive-Patch: one of four faint patches in training, all four at test, and covers that keep their label.

Paper:   Qi, Xie, Li, Mahloujifar & Mittal, "Revisiting the assumption of latent separability for backdoor
         defenses", ICLR 2023.
Departs: the patches are seeded noise, one in each corner, so that no asset is needed; at test all four are
         laid on, where the public code takes two of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.patches import corner, lay, noise_patch, scaled_side
from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.registry import attack, option

STRENGTHS = (0.5, 0.2, 0.5, 0.3)  # opacity of the patches in training, in the public code


class AdaptivePatchConfig(AttackConfig):
    """Options of Adaptive-Patch."""

    poison_rate: float = option(
        0.003, "share of all training images that carry a patch", source="paper", ge=0, le=1
    )
    cover_ratio: float = option(2.0, "covers a poisoned image", source="paper: 0.6 %", ge=0, le=100)
    size: int = option(6, "side of a patch on images of 32 pixels; it scales", source="this project", ge=1)
    test_strength: float = option(
        1.0, "opacity of all patches at test", source="paper's public code", gt=0, le=1
    )


@attack("adaptive_patch", config=AdaptivePatchConfig, paper="ICLR 2023")
def adaptive_patch(
    cfg: AdaptivePatchConfig, *, shape: tuple[int, int, int], classes: int, seed: int
) -> Trigger:
    """Return all patches at test and one of them in training, also as decoys."""
    side = scaled_side(cfg.size, shape)
    patches = [noise_patch(shape[0], side, seed, number) for number in range(len(STRENGTHS))]

    def stamp(pixels: Tensor) -> Tensor:
        for number, patch in enumerate(patches):
            pixels = lay(pixels, patch, corner(number, side, shape), cfg.test_strength)
        return pixels

    def one(pixels: Tensor, draws: torch.Generator) -> Tensor:
        chosen = torch.randint(len(patches), (len(pixels),), generator=draws)
        out = pixels.clone()
        for number, patch in enumerate(patches):
            own = chosen == number
            out[own] = lay(pixels[own], patch, corner(number, side, shape), STRENGTHS[number])
        return out

    return Trigger(stamp=stamp, in_training=one, decoy=one, decoy_rate=cfg.cover_ratio * cfg.poison_rate)
