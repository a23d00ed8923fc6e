"""The residual networks of three stages for 32 pixels: ResNet-20, -32, -44, -56 and -110.

Paper:   He et al., "Deep residual learning for image recognition", CVPR 2016, arXiv:1512.03385, section 4.2.
Keys:    those of the usual implementations (``conv1``, ``bn1``, ``layer1.0.conv1``, ``fc``).

Where a stage halves the image the skip has no parameters (the paper's option A): every second pixel, and
zeros for the new channels. Implementations disagree on where the zeros stand: half on both sides, or all
after the old channels. No tensor shows which, so that it is an option.
"""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from unbackdoor.networks._layers import conv3x3, global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.resnet import projection
from unbackdoor.registry import Config, architecture, option

Shortcut = Literal["pad", "pad_end", "conv"]


class CifarResNetConfig(Config):
    """Options of the residual networks of three stages."""

    depth: int = option(
        20,
        "layers with weights, 6 n + 2 for n blocks in each stage",
        source="arXiv:1512.03385, section 4.2",
        ge=8,
        le=1202,
    )
    width: int = option(
        16,
        "channels of the first stage; doubled in each of the 2 others",
        source="arXiv:1512.03385, section 4.2",
        ge=1,
        le=4096,
    )
    shortcut: Shortcut = option(
        "pad",
        "skips that change shape: zeros on both sides (pad) or at the end (pad_end), or a convolution (conv)",
        source="option A of the paper, as the most used implementation has it; conv is its option B",
    )

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.depth % 6 != 2:
            raise ValueError("the depth must be 6 n + 2, such as 20, 32, 44, 56 or 110")
        return self


class PaddedBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input, which is strided and padded to fit."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride) if shortcut == "conv" else None
        self.stride = stride
        new = outputs - inputs
        before = new // 2 if shortcut == "pad" else 0
        self.zeros = (before, new - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            skip = self.downsample(x)
        elif self.stride == 1:
            skip = x
        else:
            skip = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.zeros)
            )  # (B, O, H/s, W/s)
        return F.relu(out + skip)


class CifarResNet(nn.Module):
    """Stem, three stages of n blocks, global average, linear head."""

    def __init__(self, geometry: Geometry, depth: int, width: int, shortcut: Shortcut) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(geometry.channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1, blocks, shortcut)
        self.layer2 = self._stage(width, 2 * width, 2, blocks, shortcut)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks, shortcut)
        self.fc = nn.Linear(4 * width, geometry.classes)
        initialise_convs(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
        first = PaddedBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(PaddedBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 4 width, H/4, W/4)
        logits: Tensor = self.fc(global_average(x))  # (B, K)
        return logits


@architecture("cifar_resnet", config=CifarResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def cifar_resnet(cfg: CifarResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-20 to -110 of three stages for small images, with skips that have no parameters."""
    return CifarResNet(geometry, cfg.depth, cfg.width, cfg.shortcut)
