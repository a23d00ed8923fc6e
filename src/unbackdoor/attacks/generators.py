"""Networks that draw triggers, for attacks whose trigger differs from image to image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.attacks.truth import Tensors
from unbackdoor.data.batches import to_float


class GeneratorNetwork(nn.Module):
    """Encoder and decoder from images (B, C, H, W) to values (B, O, H, W) in 0..1.

    Args:
        inputs: Channels C of the images.
        outputs: Channels O.
        width: Channels of the first level; every further one has twice as many.
        levels: How often the size is halved.
    """

    def __init__(self, inputs: int, outputs: int, width: int, levels: int) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            nn.Sequential(*_unit(before, size), *_unit(size, size))
            for before, size in zip([inputs, *sizes], sizes, strict=False)
        )
        self.middle = nn.Sequential(*_unit(sizes[-1], sizes[-1]))
        self.up = nn.ModuleList(
            nn.Sequential(*_unit(size, size), *_unit(size, after))
            for size, after in zip(sizes[::-1], [*sizes[-2::-1], width], strict=True)
        )
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return values (B, O, H, W) in 0..1."""
        x, shapes = pixels, []
        for block in self.down:
            x = block(x)
            shapes.append(x.shape[2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block, shape in zip(self.up, reversed(shapes), strict=True):
            x = block(F.interpolate(x, tuple(shape), mode="bilinear"))
        values: Tensor = self.last(x)
        return values.tanh() / 2 + 0.5


def _unit(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()


def levels_of(shape: tuple[int, int, int]) -> int:
    """Return how often a generator halves images (C, H, W): to a side of 4 pixels, three times at most."""
    return min(max(int(math.log2(min(shape[1:]) / 4)), 1), 3)


def named(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return weights and buffers on the CPU, their names behind a prefix."""
    return {prefix + name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}


def without(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def drawn(pixels: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Return uint8 pixels (B, C, H, W) that a function of pixels in [0, 1] makes, in fp32."""
    device = pixels.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        out = draw(to_float(pixels, device, channels_last=False))
    return (out * 255).round().clamp(0, 255).to(torch.uint8)
