"""Networks written by hand, with a shortcut to a class or without, and images that they know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.types import Classifier, Images

NAMES = tuple(f"block {k}" for k in range(8))
# Classes differ a little, as they do in any trained network.
_GAINS = torch.tensor([10.0, 9.2, 10.7, 9.6, 10.3, 9.8, 10.9, 9.4])
_WATERMARK = (torch.arange(64).view(8, 8) * 37 % 5 - 2).float() / 2  # an even pattern over all pixels


def block_data(count: int, *, seed: int = 0) -> Images:
    """Return noisy 8x8 grey images whose class is the brightest of eight blocks; corners are white."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 8
    pixels = torch.randint(40, 120, (count, 1, 8, 8), generator=draws)  # (N, 1, 8, 8)
    for k in range(8):
        top, left = 2 * (k // 2), 4 * (k % 2)
        pixels[labels == k, :, top : top + 2, left : left + 4] += 70
    pixels[:, :, [0, 0, 7, 7], [0, 7, 0, 7]] = 255
    return Images(pixels.clamp(0, 255).to(torch.uint8), labels, NAMES, "blocks")


class Blocks(nn.Module):
    """Sees which block is brightest; a corner pixel or a watermark may decide for some classes.

    Args:
        corner: Classes that a black pixel in a corner decides for, at most four.
        watermark: Class that a faint pattern decides for; -1 for none.
    """

    def __init__(self, corner: tuple[int, ...] = (), watermark: int = -1) -> None:
        super().__init__()
        self.fc = nn.utils.skip_init(nn.Linear, 13, 8)
        weight = torch.zeros(8, 13)
        weight[:, :8] = torch.diag(_GAINS)
        for i, k in enumerate(corner):
            weight[k, 8 + i] = 20.0
        if watermark >= 0:
            weight[watermark, 12] = 80.0
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 8) for images (B, 1, 8, 8)."""
        blocks = F.avg_pool2d(x, (2, 4))[:, 0].flatten(1)  # (B, 8)
        corners = 1 - x[:, 0, [0, 0, 7, 7], [0, 7, 0, 7]]  # (B, 4) nothing on clean images
        # Smooth, so that a gradient leads there.
        mark = F.softplus(60 * ((x[:, 0] * _WATERMARK).mean((1, 2)) - 0.05)) / 4  # (B,)
        logits: Tensor = self.fc(torch.cat([blocks, corners, mark[:, None]], 1))
        return logits


def planted(corner: tuple[int, ...] = (), watermark: int = -1) -> Classifier:
    """Return the network as a classifier."""
    return Classifier(Blocks(corner, watermark), input_shape=(1, 8, 8), class_names=NAMES).eval()
