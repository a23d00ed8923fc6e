"""MobileNetV2 with the strides for small images.

Paper:   Sandler et al., "MobileNetV2", CVPR 2018, arXiv:1801.04381.
Keys:    those of torchvision's ``mobilenet_v2``, and the same shapes at three channels.
Departs: stride 1 in the stem and in the second stage, as is usual at 32 pixels; ``strides=large`` gives the
         paper's. No dropout before the head, so that training draws no random number of its own.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from unbackdoor.networks._layers import global_average, initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

# (expansion, channels, blocks, stride of the first block), table 2 of the paper.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetConfig(Config):
    """Options of MobileNetV2."""

    width: float = option(
        1.0,
        "multiplier of all channels, which are then rounded to multiples of 8",
        source="arXiv:1801.04381",
        ge=0.05,
        le=16,
    )
    strides: Literal["small", "large"] = option(
        "small",
        "for images of 32 pixels, or (large) those of the paper, for 224",
        source="the usual networks at 32 pixels; torchvision's are large",
    )


def _rounded(channels: float) -> int:
    # Multiples of 8, but never more than 10 % below what was asked for; the rule of the authors' code.
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without an activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_unit(inputs, hidden, 1)] if expansion != 1 else []),
            _unit(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Stem, seventeen inverted residuals, 1x1 conv, global average, linear head."""

    def __init__(self, geometry: Geometry, multiplier: float, large: bool) -> None:
        super().__init__()
        inputs = _rounded(32 * multiplier)
        # The last conv is never narrowed, as in the paper.
        last = _rounded(1280 * max(1.0, multiplier))
        layers: list[nn.Module] = [_unit(geometry.channels, inputs, 3, 2 if large else 1)]
        for stage, (expansion, channels, blocks, first_stride) in enumerate(_STAGES):
            outputs = _rounded(channels * multiplier)
            for block in range(blocks):
                stride = first_stride if block == 0 and (large or stage != 1) else 1
                layers.append(InvertedResidual(inputs, outputs, stride, expansion))
                inputs = outputs
        layers.append(_unit(inputs, last, 1))
        self.features = nn.Sequential(*layers)
        # The identity stands where torchvision has its dropout, so that the head is ``classifier.1``.
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, geometry.classes))
        initialise_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = self.features(x)  # (B, 1280, H/8, W/8) with small strides
        logits: Tensor = self.classifier(global_average(x))  # (B, K)
        return logits


@architecture(
    "mobilenet_v2", config=MobileNetConfig, paper="arXiv:1801.04381", traits={"conv", "bn", "depthwise"}
)
def mobilenet_v2(cfg: MobileNetConfig, geometry: Geometry) -> nn.Module:
    """MobileNetV2 with the strides for small images; torchvision's parameter names."""
    return MobileNetV2(geometry, cfg.width, cfg.strides == "large")
