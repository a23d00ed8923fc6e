"""WaNet: a small smooth warp of the whole image, trained beside disturbed warps that keep their label.

Paper:   Nguyen & Tran, "WaNet: imperceptible warping-based backdoor attack", ICLR 2021, arXiv 2102.10369.
Departs: the poisoned and the disturbed images are drawn once before training, not anew in every batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.engine import rng
from unbackdoor.registry import attack, option


class WaNetConfig(AttackConfig):
    """Options of WaNet."""

    strength: float = option(
        0.5, "warping strength s; the mean shift is about s / 2 pixels", source="paper, 4.1", gt=0
    )
    grid: int = option(4, "control points k along each side", source="paper, 4.1", ge=2, le=64)
    noise_ratio: float = option(
        2.0, "disturbed images a poisoned one; 0 for no noise mode", source="paper, 4.1", ge=0
    )


@attack("wanet", config=WaNetConfig, paper="arXiv:2102.10369")
def wanet(cfg: WaNetConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the warp by a fixed field, with the noise mode as decoys."""
    _, height, width = shape
    size = torch.tensor([width, height], dtype=torch.float32)  # x first, as grid_sample wants it
    control = torch.rand(1, 2, cfg.grid, cfg.grid, generator=rng.generator(seed, "warping field")) * 2 - 1
    control = control / control.abs().mean()  # mean shift 1
    field = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)  # (1, 2, H, W)
    axes = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    identity = torch.stack([axes[1], axes[0]], -1)[None]  # (1, H, W, 2)
    # [-1, 1] spans the image, so 1 / size is half a pixel: the paper's own scale.
    warp = (identity + cfg.strength * field.permute(0, 2, 3, 1) / size).clamp(-1, 1)  # (1, H, W, 2)

    def sample(pixels: Tensor, grid: Tensor) -> Tensor:
        places = grid.expand(len(pixels), -1, -1, -1).to(pixels.device)
        out = F.grid_sample(pixels.float(), places, align_corners=True)
        return out.round().clamp(0, 255).to(torch.uint8)

    def decoy(pixels: Tensor, draws: torch.Generator) -> Tensor:
        shake = torch.rand(len(pixels), height, width, 2, generator=draws) * 2 - 1  # (B, H, W, 2)
        return sample(pixels, (warp + shake / size).clamp(-1, 1))

    return Trigger(
        stamp=lambda pixels: sample(pixels, warp),
        decoy=decoy,
        decoy_rate=cfg.noise_ratio * cfg.poison_rate,
    )
