"""Soft masks on single weights, cheap enough to learn by the million.

The masked weights are kept in a copy of the network, so that a phase in which the masks rest pays nothing for
them, and a step pays one product forward and one backward in place of an autograd graph over every weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unbackdoor.engine.heads import head_name
from unbackdoor.engine.masks import Site, weight_sites
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier


def maskable_weights(model: Classifier, *, linear: bool) -> list[Site]:
    """Return one site for every convolution, and for linear layers besides the head if asked for.

    Raises:
        UnsupportedModel: If there is none; the linear layers that could be masked instead are named.
    """
    head = head_name(model) if linear else None
    sites = [site for site in weight_sites(model, linear=linear) if site.name != head]
    if sites:
        return sites
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    raise UnsupportedModel(
        "the network has no weight to mask",
        expected="a convolution" + (", or a linear layer besides the head" if linear else ""),
        got="linear layers only" if others else "neither convolutions nor linear layers",
        where=", ".join(others) or type(model.network).__name__,
        remedy="Set include_linear" if others and not linear else None,
    )


class WeightMasks:
    """A copy of a classifier whose weights are always mask times weight; the masks learn, nothing else does.

    Args:
        model: The classifier; not changed.
        sites: Weights to mask, each site with one parameter (see ``masks.weight_sites``).
        lr: Step of Adam.
        eps: Its epsilon.
        sparsity: L1 weight. The masks are not negative, so its gradient is this constant.

    Attributes:
        network: The masked classifier, in evaluation mode; none of its parameters requires gradients.
        values: Mask of each site, in [0, 1], ones at first.
    """

    def __init__(
        self, model: Classifier, sites: Sequence[Site], *, lr: float, eps: float, sparsity: float
    ) -> None:
        self.network = model.copy().requires_grad_(False)
        for p in self.network.parameters():
            if p.dim() == 4:  # convolutions are faster so, and a whole module is refused for Conv3d
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        self._masked = [self.network.get_parameter(site.parameters[0]) for site in sites]
        self._weights = [weight.detach().clone() for weight in self._masked]
        self.values = [torch.ones_like(weight) for weight in self._weights]
        self._sparsity = sparsity
        # Fused: one sweep over each tensor, without temporaries of its size.
        self._adam = torch.optim.Adam(self.values, lr=lr, eps=eps, fused=True)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let gradients reach the masked weights inside the block."""
        try:
            for weight in self._masked:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in self._masked:
                weight.requires_grad_(False).grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Take one step down the gradient that the last backward pass left, and clamp to [0, 1]."""
        for value, masked, weight in zip(self.values, self._masked, self._weights, strict=True):
            # The chain rule of masked = mask x weight, in place of the gradient that is done with.
            slope = torch.zeros_like(weight) if masked.grad is None else masked.grad.mul_(weight)
            value.grad, masked.grad = slope.add_(self._sparsity), None
        self._adam.step()
        for value, masked, weight in zip(self.values, self._masked, self._weights, strict=True):
            value.grad = None
            torch.mul(value.clamp_(0, 1), weight, out=masked.data)

    def decay(self, factor: float) -> None:
        """Multiply the learning rate."""
        for group in self._adam.param_groups:
            group["lr"] *= factor
