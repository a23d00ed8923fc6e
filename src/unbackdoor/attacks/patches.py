"""Patches: what several attacks lay on a part of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.engine import rng


def scaled_side(side: int, shape: tuple[int, int, int]) -> int:
    """Return the side of a patch that has ``side`` pixels on images of 32: at least 2, at most half."""
    small = min(shape[1:])
    return max(1, min(max(2, round(side * small / 32)), small // 2))


def noise_patch(channels: int, side: int, seed: int, *labels: str | int) -> Tensor:
    """Return a patch (channels, side, side) of random uint8 pixels, a function of seed and labels."""
    draws = rng.generator(seed, "patch", *labels)
    return torch.randint(0, 256, (channels, side, side), generator=draws).to(torch.uint8)


def corner(number: int, side: int, shape: tuple[int, int, int], margin: int = 0) -> tuple[slice, slice]:
    """Return the rows and columns of a square in a corner.

    Args:
        number: 0 lower right, 1 upper left, 2 lower left, 3 upper right.
        side: Of the square, in pixels.
        shape: (C, H, W) of the images.
        margin: Distance to the edges, in pixels of an image of 32; it scales.
    """
    down, right = number in (0, 2), number in (0, 3)
    _, height, width = shape
    margin = round(margin * min(height, width) / 32)
    top = height - side - margin if down else margin
    left = width - side - margin if right else margin
    return slice(top, top + side), slice(left, left + side)


def lay(pixels: Tensor, patch: Tensor, place: tuple[slice, slice], strength: float = 1.0) -> Tensor:
    """Return uint8 pixels (B, C, H, W) with a patch (C, h, w) or (h, w) laid on; 1 is opaque."""
    out, patch = pixels.clone(), patch.to(pixels.device)
    window = out[(..., *place)]
    mixed = strength * patch.float() + (1 - strength) * window.float()
    out[(..., *place)] = mixed.round().clamp(0, 255).to(torch.uint8)
    return out


def added(pixels: Tensor, change: Tensor) -> Tensor:
    """Return uint8 pixels (B, C, H, W) with a change (C, H, W) in grey levels added, rounded and clipped."""
    return (pixels.float() + change.to(pixels.device)).round().clamp(0, 255).to(torch.uint8)
