"""A shallow, wide network that learns small images in minutes on a processor.

Paper:   Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498 (airbench94), after
         Page, "How to train your ResNet", 2018-2019.
Departs: the constant 1/9 that scales the logits there is folded into the weights of the head and its learning
         rate, so that the network ends in a plain linear layer; the last pooling is over all pixels, which is
         the same at 32 pixels and takes any size.
Cost:    width 64, expansion 4: .71 GFLOP forward and backward for an image of 32 pixels (docs/training.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

PATCH = 2  # side of the whitened patches
_PATCHES = 200_000  # patches that the covariance is estimated from at most
_LOGIT_SCALE = 1 / 9  # of the reference code
_WHITENING_EPOCHS = 3  # of the reference code: the bias of the first convolution learns in these alone
_BIAS_RATE = 64.0  # of the reference code: how much faster the biases of batch norms learn


class AirbenchConfig(Config):
    """Options of the network."""

    width: int = option(64, "channels of the first group", source="arXiv:2404.00498", ge=1, le=4096)
    expansion: int = option(
        4,
        "the second and third group have so many times the width; 2 in the cheaper airbench93",
        source="arXiv:2404.00498",
        ge=1,
        le=16,
    )


class Group(nn.Module):
    """Convolution, max-pooling, batch norm, GELU; convolution, batch norm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _identity_conv(inputs, outputs), _norm(outputs)
        self.conv2, self.bn2 = _identity_conv(outputs, outputs), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H/2, W/2) for (B, inputs, H, W)."""
        x = self.conv1(x)
        x = F.gelu(self.bn1(F.max_pool2d(x, [min(2, side) for side in x.shape[2:]])))
        return F.gelu(self.bn2(self.conv2(x)))


class Airbench(nn.Module):
    """A whitening convolution that never learns, three groups, a global maximum, and a linear head."""

    def __init__(self, geometry: Geometry, width: int, expansion: int) -> None:
        super().__init__()
        whitened = 2 * geometry.channels * PATCH**2
        self.whiten = nn.Conv2d(geometry.channels, whitened, PATCH)
        self.whiten.weight.requires_grad_(False)
        if not self.whiten.weight.is_meta:
            nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]  # it has one
        self.group1 = Group(whitened, width)
        self.group2 = Group(width, expansion * width)
        self.group3 = Group(expansion * width, expansion * width)
        self.head = nn.Linear(expansion * width, geometry.classes, bias=False)
        if not self.head.weight.is_meta:
            with torch.no_grad():
                self.head.weight.mul_(_LOGIT_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = F.gelu(self.whiten(x))  # (B, 8 C, H-1, W-1)
        x = self.group3(self.group2(self.group1(x)))  # (B, expansion width, H/8, W/8)
        logits: Tensor = self.head(x.amax((2, 3)))  # (B, K)
        return logits

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Set the first convolution to the principal directions of small patches, scaled to unit variance.

        Args:
            images: Normalised training images (N, C, H, W).
        """
        channels = images.shape[1]
        patches = F.unfold(images.float(), PATCH).transpose(1, 2).reshape(-1, channels * PATCH**2)
        patches = patches[:: -(-len(patches) // _PATCHES)]
        covariance = patches.T @ patches / len(patches)  # (D, D)
        values, vectors = torch.linalg.eigh(covariance)
        filters = (vectors / torch.sqrt(values.clamp_min(0) + 5e-4)).T.flip(0)  # (D, D), largest first
        filters = filters.reshape(-1, channels, PATCH, PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def learning_rates(self, epoch: int) -> dict[str, float]:
        """Return by what factors parameters learn faster than the recipe says, by name; others have 1."""
        biases = {
            name: _BIAS_RATE for name, _ in self.named_parameters() if ".bn" in name and name.endswith("bias")
        }
        early = 1.0 if epoch < _WHITENING_EPOCHS else 0.0
        return {**biases, "head.weight": _LOGIT_SCALE**2, "whiten.bias": early}


def _identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    if not conv.weight.is_meta:
        nn.init.dirac_(conv.weight[: min(inputs, outputs)])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)  # the scale is learned by the next convolution
    return norm


@architecture("airbench", config=AirbenchConfig, paper="arXiv:2404.00498", traits={"conv", "bn"})
def airbench(cfg: AirbenchConfig, geometry: Geometry) -> nn.Module:
    """Shallow, wide network of airbench; learns in minutes with the recipe ``fast``."""
    return Airbench(geometry, cfg.width, cfg.expansion)
