"""VGG-19 with batch norm, and one linear layer as its head.

Paper:   Simonyan & Zisserman, "Very deep convolutional networks", ICLR 2015, arXiv:1409.1556.
Keys:    those of torchvision's ``vgg19_bn`` in ``features``; the head is ``classifier``.
Departs: global average and one linear layer instead of three, as is usual at 32 pixels. Below 32 pixels
         the poolings that would halve a side of one pixel are left out.
"""

from __future__ import annotations

from torch import Tensor, nn

from unbackdoor.networks._layers import global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

# (convolutions, channels in multiples of the width) of the five stages; each ends in a pooling.
_STAGES = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))


class VGGConfig(Config):
    """Options of VGG-19-BN."""

    width: int = option(
        64,
        "channels of the first stage; the later ones have 2, 4, 8 and 8 times as many",
        source="arXiv:1409.1556, table 1, column E",
        ge=1,
        le=4096,
    )


class VGG(nn.Module):
    """Sixteen convolutions with batch norm in five pooled stages, global average, linear head."""

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, side = geometry.channels, min(geometry.height, geometry.width)
        for convs, factor in _STAGES:
            for _ in range(convs):
                outputs = factor * width
                # The bias is redundant before a batch norm; torchvision's weights have it.
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            # An identity in the place of a left-out pooling keeps the numbers in the keys.
            layers.append(nn.MaxPool2d(2) if side >= 2 else nn.Identity())
            side //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, geometry.classes)
        initialise_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = self.features(x)  # (B, 8 width, H/32, W/32), at least one pixel
        logits: Tensor = self.classifier(global_average(x))  # (B, K)
        return logits


@architecture("vgg19_bn", config=VGGConfig, paper="arXiv:1409.1556", traits={"conv", "bn"})
def vgg19_bn(cfg: VGGConfig, geometry: Geometry) -> nn.Module:
    """VGG-19 with batch norm and a single linear layer as head."""
    return VGG(geometry, cfg.width)
