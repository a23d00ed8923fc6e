"""FTrojan: two frequencies of the colour channels are raised; the eye sees brightness, and little of colour.

Paper:   Wang, Yao, Xu, An, Tong & Wang, "An invisible black-box backdoor attack through frequency domain",
         ECCV 2022, arXiv 2111.10991.
Departs: of images of another size than 32 pixels the frequencies keep their share of the window, which is at
         most the image. Images that are not in colour carry the trigger in their brightness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.frequency import from_frequencies
from unbackdoor.attacks.patches import added
from unbackdoor.attacks.truth import MappedConfig, Trigger
from unbackdoor.registry import attack, option

U_OF_BLUE, V_OF_RED = 0.492, 0.877  # U = .492 (B - Y), V = .877 (R - Y); Y = .299 R + .587 G + .114 B


class FTrojanConfig(MappedConfig):
    """Options of FTrojan."""

    magnitude: float = option(
        30.0, "what is added to each coefficient, in grey levels", source="BackdoorBench", gt=0, le=10_000
    )
    window: int = option(
        0, "side of the blocks that are transformed; 0 for 32, or the image", source="BackdoorBench", ge=0
    )


@attack("ftrojan", config=FTrojanConfig, paper="arXiv:2111.10991")
def ftrojan(cfg: FTrojanConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return x' = x + a fixed pattern, because the transforms of colour and of frequency are linear."""
    change = pattern(cfg, shape)
    return Trigger(stamp=lambda pixels: added(pixels, change), mapping=cfg.mapping)


def pattern(cfg: FTrojanConfig, shape: tuple[int, int, int]) -> Tensor:
    """Return what the stamp adds (C, H, W), in grey levels; blocks that do not fit whole are left out."""
    channels, height, width = shape
    side = min(cfg.window or 32, height, width)
    coefficients = torch.zeros(side, side)
    for place in {max(side // 2 - 1, 0), side - 1}:  # 15 and 31 of 32: a middle and the highest frequency
        coefficients[place, place] = cfg.magnitude
    block = from_frequencies(coefficients, side, side)
    plane = torch.zeros(height, width)
    rows, columns = height // side, width // side
    plane[: rows * side, : columns * side] = block.repeat(rows, columns)
    change = torch.zeros(shape)
    if channels < 3:
        change[0] = plane
        return change
    change[0], change[2] = plane / V_OF_RED, plane / U_OF_BLUE
    change[1] = -(0.299 * change[0] + 0.114 * change[2]) / 0.587  # so that Y stays
    return change
