"""Exact probabilities for verdicts; plain arithmetic, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unbackdoor.errors import InputError


def crowding(most: int, draws: int, classes: int) -> float:
    """Return the probability that some class is drawn at least ``most`` times in uniform draws.

    P(max < m) = R! / K^R times the coefficient of x^R in (sum of x^j / j! for j < m)^K.

    Args:
        most: Count of the most frequent class, 0..draws.
        draws: Number R of independent draws.
        classes: Number K of equally likely classes.

    Example:
        >>> crowding(2, 2, 10)
        0.1
    """
    if not 0 <= most <= draws or classes < 1:
        raise InputError("counts do not fit", expected="0 <= most <= draws", got=f"{most} of {draws}")
    # Scaled by 1 / K^j at once, so that nothing overflows.
    factor = [1 / (math.factorial(j) * classes**j) for j in range(min(most, draws + 1))]
    product = [1.0] + [0.0] * draws
    for _ in range(classes):
        product = [
            sum(factor[j] * product[n - j] for j in range(min(len(factor), n + 1))) for n in range(draws + 1)
        ]
    return min(1.0, max(0.0, 1 - math.factorial(draws) * product[draws]))


def critical_count(draws: int, classes: int, level: float) -> int | None:
    """Return the smallest count whose :func:`crowding` is at most ``level``; None if there is none."""
    return next((m for m in range(1, draws + 1) if crowding(m, draws, classes) <= level), None)


def conformal(value: float, references: Sequence[float]) -> float:
    """Return the p-value of a large value: (1 + references at least as large) / (references + 1).

    It is at most ``level`` with probability at most ``level`` where value and references are exchangeable.
    """
    return (1 + sum(reference >= value for reference in references)) / (len(references) + 1)
