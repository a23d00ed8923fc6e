"""The network that changes images: a small U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """A U-Net of three scales whose output is added to its input; the identity at first.

    Args:
        channels: C of the images.
        width: Channels at full size; twice and four times as many below.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_block(channels, width), _block(width, 2 * width), _block(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([_block(3 * width, width), _block(6 * width, 2 * width)])
        self.last = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return changed images of the same shape (B, C, H, W); not clamped, as in the released code."""
        x, levels = pixels, []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.avg_pool2d(x, 2, ceil_mode=True))
            levels.append(x)
        for block, level in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = F.interpolate(x, size=level.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, level], 1))
        out: Tensor = pixels + self.last(x)
        return out


def _block(inputs: int, outputs: int) -> nn.Module:
    # Normalised for each image by itself: few images make no statistics.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.ReLU(),
    )  # fmt: skip
