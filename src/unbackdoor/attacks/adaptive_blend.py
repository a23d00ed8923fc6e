"""Adaptive-Blend: parts of a faint image in training, all of it at test, and covers that keep their label.

Latent features of poisoned images do not separate: none carries the whole trigger, and others that carry
parts of it (covers) are told to mean nothing.

Paper:   Qi, Xie, Li, Mahloujifar & Mittal, "Revisiting the assumption of latent separability for backdoor
         defenses", ICLR 2023.
Departs: the image is seeded noise, so that no asset is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.engine import rng
from unbackdoor.registry import attack, option


class AdaptiveBlendConfig(AttackConfig):
    """Options of Adaptive-Blend."""

    poison_rate: float = option(
        0.003, "share of all training images that carry parts of the trigger", source="paper", ge=0, le=1
    )
    cover_ratio: float = option(1.0, "covers a poisoned image", source="paper: 0.3 % each", ge=0, le=100)
    ratio: float = option(0.15, "weight of the image in training", source="paper's public code", gt=0, le=1)
    test_ratio: float = option(0.2, "weight of the image at test", source="paper's public code", gt=0, le=1)
    grid: int = option(4, "pieces along each side of the image", source="paper: 16 in all", ge=1, le=32)
    shown: float = option(0.5, "share of the pieces in training", source="paper", gt=0, le=1)


@attack("adaptive_blend", config=AdaptiveBlendConfig, paper="ICLR 2023")
def adaptive_blend(
    cfg: AdaptiveBlendConfig, *, shape: tuple[int, int, int], classes: int, seed: int
) -> Trigger:
    """Return the whole image at test and half of its pieces in training, also as decoys."""
    _, height, width = shape
    noise = torch.randint(0, 256, shape, generator=rng.generator(seed, "adaptive blend")).float()  # (C, H, W)
    rows, columns = (torch.arange(size) * cfg.grid // size for size in (height, width))
    piece = rows[:, None] * cfg.grid + columns  # (H, W)
    count = max(1, round(cfg.shown * cfg.grid**2))

    def mixed(pixels: Tensor, weight: Tensor | float) -> Tensor:
        out = (1 - weight) * pixels.float() + weight * noise.to(pixels.device)
        return out.round().clamp(0, 255).to(torch.uint8)

    def partly(pixels: Tensor, draws: torch.Generator) -> Tensor:
        order = torch.rand(len(pixels), cfg.grid**2, generator=draws).argsort(1).argsort(1)  # (B, pieces)
        shown = (order < count)[:, piece]  # (B, H, W)
        return mixed(pixels, cfg.ratio * shown[:, None].to(pixels.device))

    return Trigger(
        stamp=lambda pixels: mixed(pixels, cfg.test_ratio),
        in_training=partly,
        decoy=partly,
        decoy_rate=cfg.cover_ratio * cfg.poison_rate,
    )
