"""Pre-activation ResNet-18 with the 3x3 stem for small images.

Paper:   He et al., "Identity mappings in deep residual networks", ECCV 2016, arXiv:1603.05027.
Keys:    those of the common CIFAR implementation (``shortcut.0``, ``linear``) that BackdoorBench uses too.
Departs: that implementation leaves out the last norm and ReLU; ``final_norm=false`` gives it exactly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.networks._layers import conv1x1, conv3x3, global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option


class PreActResNetConfig(Config):
    """Options of PreAct-ResNet-18."""

    width: int = option(
        64,
        "channels of the first stage; doubled in each of the 3 others",
        source="arXiv:1603.05027; ResNet-18 of arXiv:1512.03385",
        ge=1,
        le=4096,
    )
    final_norm: bool = option(
        True,
        "batch norm and ReLU between the last block and the pooling",
        source="arXiv:1603.05027, appendix; BackdoorBench has none",
    )


class PreActBlock(nn.Module):
    """Norm, ReLU, conv, twice, added to a path that stays linear."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = (
            nn.Sequential(conv1x1(inputs, outputs, stride)) if stride != 1 or inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        # The projection sees the activated input, the identity the raw one, as in the paper.
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + skip


class PreActResNet(nn.Module):
    """Stem, four stages of two blocks, global average, linear head."""

    def __init__(self, geometry: Geometry, width: int, final_norm: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(geometry.channels, width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width) if final_norm else None
        self.linear = nn.Linear(8 * width, geometry.classes)
        initialise_convs(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(inputs, outputs, stride), PreActBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))  # (B, 8 width, H/8, W/8)
        if self.bn is not None:
            x = F.relu(self.bn(x))
        logits: Tensor = self.linear(global_average(x))  # (B, K)
        return logits


@architecture("preact_resnet18", config=PreActResNetConfig, paper="arXiv:1603.05027", traits={"conv", "bn"})
def preact_resnet18(cfg: PreActResNetConfig, geometry: Geometry) -> nn.Module:
    """PreAct-ResNet-18 for small images, the standard network of the backdoor literature."""
    return PreActResNet(geometry, cfg.width, cfg.final_norm)
