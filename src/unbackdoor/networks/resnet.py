"""Residual networks of four stages: ResNet-18, -34, -50, -101 and -152.

Paper:   He et al., "Deep residual learning for image recognition", CVPR 2016, arXiv:1512.03385.
Keys:    those of torchvision's ``resnet18`` and its sisters; with a 3x3 stem the shape of ``conv1`` differs.
Departs: 3x3 stem at stride 1 and no max-pool, as is usual at 32 pixels; ``stem=7x7+pool`` gives the paper's.
         A bottleneck's stride stands in its 3x3 convolution, as in the usual implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.networks._layers import conv1x1, conv3x3, global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

Stem = Literal["3x3", "3x3+pool", "7x7", "7x7+pool"]
# Blocks in each of the four stages, and whether they are bottlenecks.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class ResNetConfig(Config):
    """Options of the residual networks of four stages."""

    width: int = option(
        64,
        "channels of the first stage; doubled in each of the 3 others",
        source="arXiv:1512.03385, table 1",
        ge=1,
        le=4096,
    )
    stem: Stem = option(
        "3x3",
        "the first layers: a 3x3 convolution, or 7x7 at stride 2, with or without a max-pool after it",
        source="the usual networks at 32 pixels; torchvision's, for 224 pixels, is 7x7+pool",
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = projection(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        skip = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + skip)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm, added to the input; the last is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        skip = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + skip)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return the 1x1 convolution with batch norm of a skip whose shape changes; None where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Stem, four stages of blocks, global average, linear head."""

    def __init__(
        self, geometry: Geometry, width: int, stem: Stem, blocks: Sequence[int], bottleneck: bool
    ) -> None:
        super().__init__()
        wide = stem.startswith("7x7")
        self.conv1 = (
            nn.Conv2d(geometry.channels, width, 7, stride=2, padding=3, bias=False)
            if wide
            else conv3x3(geometry.channels, width)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.pooled = stem.endswith("pool")
        kind = Bottleneck if bottleneck else BasicBlock
        inputs, stages = width, []
        for stage, count in enumerate(blocks):
            planes = width << stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers = []
            for stride in strides:
                layers.append(kind(inputs, planes, stride))
                inputs = planes * kind.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, geometry.classes)
        initialise_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self.pooled:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, D, H/8, W/8) after the 3x3 stem
        logits: Tensor = self.fc(global_average(x))  # (B, K)
        return logits


def _build(depth: int, cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    blocks, bottleneck = DEPTHS[depth]
    return ResNet(geometry, cfg.width, cfg.stem, blocks, bottleneck)


@architecture("resnet18", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet18(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-18 with the 3x3 stem for small images; torchvision's parameter names."""
    return _build(18, cfg, geometry)


@architecture("resnet34", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet34(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-34, likewise."""
    return _build(34, cfg, geometry)


@architecture("resnet50", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet50(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-50, of bottleneck blocks."""
    return _build(50, cfg, geometry)


@architecture("resnet101", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet101(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-101, of bottleneck blocks."""
    return _build(101, cfg, geometry)


@architecture("resnet152", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet152(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-152, of bottleneck blocks."""
    return _build(152, cfg, geometry)
