"""Multiplicative masks on the parameters of any network, without changing the network.

A channel, neuron or weight mask is the same thing seen through different shapes: numbers that multiply a
parameter. They are applied by functional calls, so the network needs no extra layers, and folding a mask
into the weights equals gating by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Site:
    """A place that one mask acts on.

    Attributes:
        name: Name of the module, such as ``network.layer1.0.bn1``.
        parameters: Full names of the parameters that the mask multiplies along their first axis.
        shape: Shape of the mask: (O,) for channels and neurons, the weight's own for weights.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]


def norm_sites(model: nn.Module, *, with_bias: bool = False) -> list[Site]:
    """Return one site for each affine batch normalisation: its scale, and its shift if asked for."""
    names = ("weight", "bias") if with_bias else ("weight",)
    return [
        Site(name, tuple(f"{name}.{p}" for p in names), (module.num_features,))
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and module.affine
    ]


def unit_sites(model: nn.Module, *, skip: Sequence[str] = ()) -> list[Site]:
    """Return one site for the output units of each convolution and linear layer, weight and bias together.

    Args:
        model: The network.
        skip: Names of modules to leave out, such as the head, whose outputs are the classes.
    """
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, nn.Linear)) and name not in skip:
            own = [p for p, value in module.named_parameters(recurse=False) if value is not None]
            sites.append(Site(name, tuple(f"{name}.{p}" for p in own), (module.weight.shape[0],)))
    return sites


def weight_sites(model: nn.Module, *, linear: bool = False) -> list[Site]:
    """Return one site for every single weight of each convolution, and of linear layers if asked for."""
    kinds = (*CONVS, nn.Linear) if linear else CONVS
    return [
        Site(name, (f"{name}.weight",), tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]


def channel_sites(model: nn.Module, *, skip: Sequence[str] = ()) -> list[Site]:
    """Return the scales of batch normalisation where there are any, else the units of conv and linear layers.

    Raises:
        UnsupportedModel: If the network has neither.
    """
    sites = norm_sites(model) or unit_sites(model, skip=skip)
    if not sites:
        raise UnsupportedModel(
            "the network has no channel to mask",
            expected="a batch normalisation, convolution or linear layer besides the head",
            got=", ".join(sorted({type(m).__name__ for m in model.modules()})),
            where=", ".join(skip) or None,
        )
    return sites


class Masks:
    """Learnable masks over a frozen classifier; calling it runs the masked network.

    Args:
        model: The classifier; never changed.
        sites: What is masked.

    Attributes:
        values: Mask of each site by name, ones at first, with gradients.
    """

    def __init__(self, model: Classifier, sites: Sequence[Site]) -> None:
        self.model = model
        self.sites = tuple(sites)
        device = model.mean.device
        self.values: dict[str, Tensor] = {
            site.name: torch.ones(site.shape, device=device, requires_grad=True) for site in self.sites
        }
        self._parameters = dict(model.named_parameters())

    def parameters(self) -> list[Tensor]:
        """Return the masks, for an optimiser."""
        return list(self.values.values())

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K) of the masked network for pixels (B, C, H, W)."""
        out: Tensor = functional_call(self.model, dict(self._masked(self.values)), (pixels,))
        return out

    @torch.no_grad()
    def clamp_(self, low: float = 0.0, high: float = 1.0) -> None:
        """Bound all masks in place."""
        for mask in self.values.values():
            mask.clamp_(low, high)

    def _masked(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for site in self.sites:
            mask = values[site.name]
            for name in site.parameters:
                weight = self._parameters[name]
                yield name, weight * _broadcast(mask, weight)


@torch.no_grad()
def fold(model: Classifier, sites: Sequence[Site], values: Mapping[str, Tensor]) -> Classifier:
    """Return a copy of the classifier with the masks multiplied into its parameters.

    Args:
        model: The classifier; not changed.
        sites: What is masked.
        values: Mask of each site by name; sites that are absent keep their parameters.
    """
    out = model.copy()
    parameters = dict(out.named_parameters())
    for site in sites:
        if site.name in values:
            for name in site.parameters:
                weight = parameters[name]
                weight.mul_(_broadcast(values[site.name].to(weight.device), weight))
    return out


def keep_above(values: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Return 0/1 masks that keep what is above the threshold."""
    return {name: (mask.detach() > threshold).float() for name, mask in values.items()}


def removed(values: Mapping[str, Tensor]) -> int:
    """Count the zeros."""
    return sum(int((mask == 0).sum()) for mask in values.values())


def _broadcast(mask: Tensor, weight: Tensor) -> Tensor:
    if mask.shape == weight.shape:
        return mask
    return mask.view(-1, *[1] * (weight.dim() - 1))  # (O,) -> (O, 1, ...)
