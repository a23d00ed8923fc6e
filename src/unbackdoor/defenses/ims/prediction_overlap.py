"""How much two predictions agree: the overlap O = sum over classes of p q, in log-space.

The overlap is the probability that two independent draws from the predictions coincide. Computed as
``1 - O`` from fp32 probabilities, the disagreement of saturated predictions loses all digits (at a margin of
25 its gradient is 360 times too small); in log-space every margin keeps its value and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def agree(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean of -log O, small where both predictions put their weight on the same class.

    Args:
        p: fp32 log-probabilities (B, K).
        q: The same for the other prediction.
    """
    return -torch.logsumexp(p + q, dim=1).mean()


def disagree(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean of -log(1 - O), small where the predictions share no class; needs K of at least 2.

    Args:
        p: fp32 log-probabilities (B, K).
        q: The same for the other prediction.
    """
    return -torch.logsumexp(p + log_complement(q), dim=1).mean()


def log_complement(q: Tensor) -> Tensor:
    """Return log(1 - q) for log-probabilities (B, K), exact even where one class has all the weight."""
    top = q.argmax(1, keepdim=True)  # (B, 1)
    others = q.scatter(1, top, -torch.inf)
    # Only the top class can exceed 1/2. Its complement is the sum of the others; log1p is exact for theirs.
    return torch.log1p(-others.exp()).scatter(1, top, torch.logsumexp(others, dim=1, keepdim=True))
