"""ResNet-18 with the 3x3 stem for small images.

Paper:   He et al., "Deep residual learning for image recognition", CVPR 2016, arXiv:1512.03385.
Keys:    those of torchvision's ``resnet18``; only the shape of ``conv1`` differs.
Departs: 3x3 stem at stride 1 and no max-pool, as is usual at 32 pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.models._layers import conv1x1, conv3x3, global_average, initialise_convs
from unbackdoor.models.geometry import Geometry
from unbackdoor.registry import Config, architecture, option


class ResNetConfig(Config):
    """Options of ResNet-18."""

    width: int = option(
        64,
        "channels of the first stage; doubled in each of the 3 others",
        source="arXiv:1512.03385, table 1",
        ge=1,
        le=4096,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        skip = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + skip)


class ResNet(nn.Module):
    """Stem, four stages of two blocks, global average, linear head."""

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(geometry.channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, geometry.classes)
        initialise_convs(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 8 width, H/8, W/8)
        logits: Tensor = self.fc(global_average(x))  # (B, K)
        return logits


@architecture("resnet18", config=ResNetConfig, paper="arXiv:1512.03385", traits={"conv", "bn"})
def resnet18(cfg: ResNetConfig, geometry: Geometry) -> nn.Module:
    """ResNet-18 with the 3x3 stem for small images; torchvision's parameter names."""
    return ResNet(geometry, cfg.width)
