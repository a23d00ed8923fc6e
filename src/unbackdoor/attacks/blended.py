"""Blended: a faint image laid over the whole picture.

Paper:   Chen, Liu, Li, Lu & Song, "Targeted backdoor attacks", arXiv 1712.05526.
Departs: the blended image is seeded uniform noise (the paper's second choice), so that no asset is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.engine import rng
from unbackdoor.registry import attack, option


class BlendedConfig(AttackConfig):
    """Options of Blended."""

    ratio: float = option(
        0.2, "weight of the laid-over image", source="paper, section 5; BackdoorBench", gt=0, le=1
    )


@attack("blended", config=BlendedConfig, paper="arXiv:1712.05526")
def blended(cfg: BlendedConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return x' = (1 - ratio) x + ratio * noise."""
    noise = torch.randint(0, 256, shape, generator=rng.generator(seed, "blended noise")).float()  # (C, H, W)

    def stamp(pixels: Tensor) -> Tensor:
        mixed = (1 - cfg.ratio) * pixels.float() + cfg.ratio * noise.to(pixels.device)
        return mixed.round().clamp(0, 255).to(torch.uint8)

    return Trigger(stamp=stamp)
