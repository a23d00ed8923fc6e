"""Wide residual networks, WRN-16-k and of other depths.

Paper: Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016, arXiv:1605.07146.
"""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from unbackdoor.networks._layers import conv1x1, conv3x3, global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option


class WideResNetConfig(Config):
    """Options of WRN-16-k."""

    width: int = option(
        1,
        "widening factor k; the three stages have 16 k, 32 k and 64 k channels",
        source="arXiv:2101.05930 (NAD), whose network is WRN-16-1",
        ge=1,
        le=256,
    )


class DeepWideResNetConfig(WideResNetConfig):
    """Options of WRN-d-k."""

    depth: int = option(
        28,
        "layers with weights, 6 n + 4 for n blocks in each stage",
        source="arXiv:1605.07146",
        ge=10,
        le=1000,
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.depth % 6 != 4:
            raise ValueError("the depth must be 6 n + 4, such as 16, 22, 28 or 40")
        return self


class WideBlock(nn.Module):
    """Norm, ReLU, conv, twice; where the shape changes, the skip is a 1x1 conv of the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = conv1x1(inputs, outputs, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + skip


class WideResNet(nn.Module):
    """Stem, three stages of n blocks, norm, global average, linear head: 6 n + 4 layers with weights."""

    def __init__(self, geometry: Geometry, factor: int, blocks: int = 2) -> None:
        super().__init__()
        widths = (16 * factor, 32 * factor, 64 * factor)
        # The stem is not widened.
        self.conv1 = conv3x3(geometry.channels, 16)
        self.layer1 = self._stage(16, widths[0], 1, blocks)
        self.layer2 = self._stage(widths[0], widths[1], 2, blocks)
        self.layer3 = self._stage(widths[1], widths[2], 2, blocks)
        self.bn = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], geometry.classes)
        initialise_convs(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = WideBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # (B, 64 k, H/4, W/4)
        x = F.relu(self.bn(x))
        logits: Tensor = self.fc(global_average(x))  # (B, K)
        return logits


@architecture("wrn16", config=WideResNetConfig, paper="arXiv:1605.07146", traits={"conv", "bn"})
def wrn16(cfg: WideResNetConfig, geometry: Geometry) -> nn.Module:
    """WRN-16-k; k, the widening factor, is the width."""
    return WideResNet(geometry, cfg.width)


@architecture("wrn", config=DeepWideResNetConfig, paper="arXiv:1605.07146", traits={"conv", "bn"})
def wrn(cfg: DeepWideResNetConfig, geometry: Geometry) -> nn.Module:
    """WRN-d-k of any depth, such as WRN-28-10 or WRN-40-2."""
    return WideResNet(geometry, cfg.width, (cfg.depth - 4) // 6)
