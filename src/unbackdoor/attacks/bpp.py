"""BppAttack: the trigger is fewer colours: every pixel is rounded to one of a few levels.

Some training images carry noise of the same size and keep their label (negative samples), so that the network
learns the levels and not that something is wrong with an image.

Paper:   Wang, Zhai & Ma, "BppAttack: stealthy and efficient Trojan attacks against deep neural networks via
         image quantization and contrastive adversarial learning", CVPR 2022, arXiv 2205.13383.
Departs: the images are poisoned once before training; the noise of a negative sample is drawn evenly within
         half a level, where the public code takes the rounding errors of another image. The contrastive
         training with adversarial examples is left out, as in BackdoorBench.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.truth import MappedConfig, Trigger
from unbackdoor.registry import attack, option


class BppConfig(MappedConfig):
    """Options of BppAttack."""

    levels: int = option(8, "levels of a channel", source="BackdoorBench, squeeze_num", ge=2, le=128)
    dither: bool = option(
        False, "hand the rounding error on to the next pixels (Floyd-Steinberg)", source="BackdoorBench"
    )
    negative_rate: float = option(
        0.1, "share of all training images that are negative samples", source="BackdoorBench", ge=0, le=1
    )


@attack("bpp", config=BppConfig, paper="arXiv:2205.13383")
def bpp(cfg: BppConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the rounding to levels, with noise as decoys."""

    def decoy(pixels: Tensor, draws: torch.Generator) -> Tensor:
        noise = (torch.rand(pixels.shape, generator=draws) - 0.5) * 255 / (cfg.levels - 1)
        return (pixels.float() + noise).round().clamp(0, 255).to(torch.uint8)

    return Trigger(
        stamp=lambda pixels: quantised(pixels, cfg.levels, dither=cfg.dither),
        mapping=cfg.mapping,
        decoy=decoy,
        decoy_rate=cfg.negative_rate,
    )


def quantised(pixels: Tensor, levels: int, *, dither: bool = False) -> Tensor:
    """Return uint8 pixels (B, C, H, W) whose values are round(255 k / (levels - 1))."""

    def nearest(values: Tensor) -> Tensor:
        return (values / 255 * (levels - 1)).round().clamp(0, levels - 1) * 255 / (levels - 1)

    values = pixels.float()
    if not dither:
        return nearest(values).round().to(torch.uint8)
    height, width = values.shape[2:]
    values = values.permute(2, 3, 0, 1).contiguous()  # (H, W, B, C)
    for i in range(height):
        for j in range(width):
            rounded = nearest(values[i, j])
            error = values[i, j] - rounded
            values[i, j] = rounded
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + down < height and 0 <= j + right < width:
                    values[i + down, j + right] += error * share / 16
    return values.permute(2, 3, 0, 1).round().to(torch.uint8).contiguous()
