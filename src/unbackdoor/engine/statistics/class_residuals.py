"""How far each of K numbers lies below the others: a p-value for each class, so that checks can be combined.

The deleted studentised residual of a number is its distance from the mean of the others in the spread that
these have, so that a class widens the spread for all but itself. Among normal numbers it follows Student's t
with K - 2 degrees of freedom. K times the smallest p-value is Grubbs' test.

Paper:   Cook & Weisberg, "Residuals and influence in regression", 1982, section 2.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.errors import MissingExtra


def residual_p_values(values: Tensor, *, least_spread: float = 0.0) -> Tensor | None:
    """Return the probability (K,) that a class lies so far below the others, if it is one of them.

    Nothing is corrected for there being K classes.

    Args:
        values: (K,), finite; small is suspicious.
        least_spread: Standard deviation that the numbers have at least, such as that of counting.

    Returns:
        p-values in float64; None for fewer than
        :data:`~unbackdoor.engine.statistics.one_outlier.FEWEST` numbers.

    Raises:
        MissingExtra: If SciPy is not installed.

    Example:
        >>> p = residual_p_values(torch.tensor([0.0, 0.2, -0.1, 0.1, -0.2, 0.1, -5.0]))
        >>> int(p.argmin()), bool(p[6] < 1e-5)
        (6, True)
    """
    count = len(values)
    if count < FEWEST:
        return None
    numbers = values.detach().cpu().double()
    others = numbers.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    spread = others.std(1).clamp_min(least_spread) * (1 + 1 / (count - 1)) ** 0.5  # (K,)
    distance = numbers - others.mean(1)
    # A difference that is rounding is none, also where the others have no spread at all.
    rounding = distance.abs() <= 1e-9 * numbers.abs().max()
    residual = torch.where(rounding, 0.0, distance / spread.clamp_min(1e-300))
    return student_tail(residual, count - 2)


def student_tail(values: Tensor, freedom: float) -> Tensor:
    """Return how often a number that follows Student's t is as small or smaller, in float64.

    Raises:
        MissingExtra: If SciPy is not installed.
    """
    return torch.from_numpy(_student().stdtr(freedom, values.detach().cpu().double().numpy()))


def family_p_value(p_values: Tensor) -> float:
    """Return the p-value of the smallest of K, corrected for there being K."""
    return min(1.0, len(p_values) * float(p_values.min()))


def _student() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise MissingExtra("scipy", "scan", "the test for an outlier") from error
    return special
