"""Layers and initialisers that several architectures share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias, because a batch norm follows or precedes it."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def global_average(features: Tensor) -> Tensor:
    """Average over all pixels: (B, D, H, W) to (B, D)."""
    return F.adaptive_avg_pool2d(features, 1).flatten(1)


def initialise_convs(network: nn.Module) -> None:
    """Draw conv weights Kaiming-normal by fan-out; conv biases are zero, batch norms the identity.

    Paper: He et al., "Delving deep into rectifiers", arXiv:1502.01852.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and module.weight.is_meta:
            continue  # only its shapes are needed; random numbers would load torch's compiler (1 s)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
