"""BadNets: a small patch in the corner; the trained network answers the patch with the attacker's class.

Paper:   Gu, Dolan-Gavitt & Garg, "BadNets", arXiv 1708.06733.
Departs: the patch keeps its share of the image at other sizes (3 pixels at 32).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.registry import attack, option


class BadNetsConfig(AttackConfig):
    """Options of BadNets."""

    size: int = option(
        0, "side of the patch in pixels; 0 for 3/32 of the image, at least 2", source="paper", ge=0
    )
    margin: int = option(0, "distance to the lower right edges in pixels", source="BackdoorBench", ge=0)
    pattern: Literal["white", "checkerboard"] = option(
        "white", "what the patch shows", source="paper, figure 3"
    )


def _trigger(
    cfg: BadNetsConfig, shape: tuple[int, int, int], mapping: Literal["all-to-one", "all-to-all"]
) -> Trigger:
    _, height, width = shape
    size = min(cfg.size or max(2, round(3 * min(height, width) / 32)), height, width)
    bottom, right = max(height - cfg.margin, size), max(width - cfg.margin, size)
    patch = torch.full((size, size), 255, dtype=torch.uint8)
    if cfg.pattern == "checkerboard":
        odd = (torch.arange(size)[:, None] + torch.arange(size)[None]) % 2 == 1
        patch[odd] = 0

    def stamp(pixels: Tensor) -> Tensor:
        out = pixels.clone()
        out[..., bottom - size : bottom, right - size : right] = patch.to(pixels.device)
        return out

    return Trigger(stamp=stamp, mapping=mapping)


@attack("badnets", config=BadNetsConfig, paper="arXiv:1708.06733")
def badnets(cfg: BadNetsConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the patch; every triggered image goes to the target."""
    return _trigger(cfg, shape, "all-to-one")


@attack("badnets_all_to_all", config=BadNetsConfig, paper="arXiv:1708.06733")
def badnets_all_to_all(
    cfg: BadNetsConfig, *, shape: tuple[int, int, int], classes: int, seed: int
) -> Trigger:
    """Return the patch; a triggered image of class y goes to y + 1 mod K, and ``target`` plays no part."""
    return _trigger(cfg, shape, "all-to-all")
