"""Adam over some rows of a tensor, where rows leave the search one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

_BETAS = 0.5, 0.9  # the public code of Neural Cleanse


class RowAdam:
    """Adam on rows of a tensor, in place; rows that are not named stay as they are.

    Args:
        values: (G, ...), one row for each of what is looked for.
        lr: Step size.
    """

    def __init__(self, values: Tensor, lr: float) -> None:
        self.values, self.lr, self.steps = values, lr, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """Step down the gradient (A, ...) of the rows (A,), which must have taken all steps so far."""
        self.steps += 1
        rows = rows.to(self.values.device)
        first, second = _BETAS
        mean = self.mean[rows].lerp(gradient, 1 - first)
        square = self.square[rows].lerp(gradient**2, 1 - second)
        self.mean[rows], self.square[rows] = mean, square
        mean, square = mean / (1 - first**self.steps), square / (1 - second**self.steps)
        # Guarded against division by zero and by nothing else: faint masks have faint gradients.
        self.values[rows] -= self.lr * mean / (square.sqrt() + 1e-20)
