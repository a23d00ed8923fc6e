"""Four convolutions: a network for tests, demonstrations and tiny images, with or without batch norm."""

from __future__ import annotations

import itertools
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.networks._layers import global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option


class SmallCNNConfig(Config):
    """Options of the small CNN."""

    width: int = option(
        64,
        "channels of the first two convolutions; the last two have twice as many",
        source="this package",
        ge=1,
        le=4096,
    )
    norm: Literal["batch", "none"] = option(
        "batch", "what follows each convolution: a batch norm, or nothing", source="this package"
    )


class SmallCNN(nn.Module):
    """Two convolutions, pooling, two convolutions, global average, linear head."""

    def __init__(self, geometry: Geometry, width: int, batch_norm: bool) -> None:
        super().__init__()
        sizes = (geometry.channels, width, width, 2 * width, 2 * width)
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(i, o, 3, padding=1, bias=not batch_norm) for i, o in itertools.pairwise(sizes)
        )
        self.bn1, self.bn2, self.bn3, self.bn4 = (
            nn.BatchNorm2d(o) if batch_norm else nn.Identity() for o in sizes[1:]
        )
        self.fc = nn.Linear(2 * width, geometry.classes)
        initialise_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(x, 2)  # (B, width, H/2, W/2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        logits: Tensor = self.fc(global_average(x))  # (B, K)
        return logits


@architecture("small_cnn", config=SmallCNNConfig, paper="", traits={"conv", "bn"})
def small_cnn(cfg: SmallCNNConfig, geometry: Geometry) -> nn.Module:
    """Four-layer CNN, with batch norm or (``norm=none``) without."""
    return SmallCNN(geometry, cfg.width, cfg.norm == "batch")
