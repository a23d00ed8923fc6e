"""One small perturbation for every image, within a budget that can be fitted to the network.

A fixed budget is no measure of strength: five grey levels flip nearly all predictions of one network and none
of another. The share of flipped predictions is one, and it needs no knowledge of any attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GAIN = 0.2  # rate of the adaptation: where nothing flips and the target is 0.8, the budget grows by 17 %


class Perturbations:
    """Perturbations in pixel space, minimised by a few AdamW steps at a time.

    Args:
        shape: (N, C, H, W) of the images.
        device: Where to compute.
        budget: Steps x step size, in [0, 1] pixels.
        steps: AdamW steps of each call.
        bounded: Hold every perturbation to the budget, and every perturbed image to [0, 1].
        warm: Go on from where the image's last call stopped; else from 0.
        weight_decay: Of AdamW.

    Attributes:
        budget: As it is now; moved by :meth:`adapt` alone.
    """

    def __init__(
        self,
        shape: torch.Size,
        device: torch.device,
        *,
        budget: float,
        steps: int,
        bounded: bool,
        warm: bool,
        weight_decay: float = 0.0,
    ) -> None:
        self.budget = budget
        self.steps, self.bounded, self.weight_decay = steps, bounded, weight_decay
        self._bank = torch.zeros(shape, device=device) if warm else None

    def minimise(self, rows: Tensor, pixels: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Return perturbations (B, C, H, W) that lower the loss.

        Args:
            rows: (B,) which images these are.
            pixels: (B, C, H, W) in [0, 1].
            loss: Maps perturbed pixels to a number.
        """
        size = self.budget
        delta = torch.zeros_like(pixels)
        if self._bank is not None:
            delta.copy_(self._bank[rows].clamp_(-size, size))
        delta.requires_grad_()
        optimizer = torch.optim.AdamW([delta], lr=size / self.steps, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            (delta.grad,) = torch.autograd.grad(loss(pixels + delta), [delta])
            optimizer.step()
            if self.bounded:
                with torch.no_grad():
                    delta.clamp_(-size, size).add_(pixels).clamp_(0, 1).sub_(pixels)
        if self._bank is not None:
            self._bank[rows] = delta.detach()
        return delta.detach()

    def adapt(self, flipped: float, *, target_rate: float, smallest: float, largest: float) -> None:
        """Raise the budget where too few predictions flipped, lower it where too many did.

        Args:
            flipped: Share of predictions that the latest perturbations changed.
            target_rate: Share that is aimed at.
            smallest: Limit of the budget from below: perturbations that are as faint as adversarial noise
                find that noise and nothing that was planted.
            largest: Limit of the budget.
        """
        moved = self.budget * math.exp(GAIN * (target_rate - flipped))
        self.budget = min(max(moved, smallest), largest)
