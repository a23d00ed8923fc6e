"""Exact probabilities for verdicts; plain arithmetic, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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


def largest_of_gamma(values: Tensor, *, sets: int = 20_000) -> float:
    """Return the p-value of the largest of some positive numbers, the others being of one gamma law.

    The statistic is that of MM-BD: the law is fitted to all numbers but the largest, and gives the
    probability that the largest of K of its numbers is so large. This probability is too small, because the
    fit rests on few numbers and leaves out the largest. Its null law is therefore simulated: the same
    statistic on numbers drawn from the law fitted to all of them.

    Args:
        values: (K,), float64, at least three; what is not positive is lifted to a thousandth of the largest.
        sets: Simulated sets.
    """
    top = float(values.max())
    if len(values) < 3 or not math.isfinite(top) or top <= 0:
        return 1.0
    numbers = values.clamp_min(1e-3 * top)[None]  # (1, K)
    if float(numbers.max() - numbers.min()) <= 1e-12 * top:
        return 1.0  # all alike
    shape, _ = _gamma(numbers)
    # A fixed seed, so that two scans of one model agree; the scale of the numbers cancels.
    draws = np.random.Generator(np.random.PCG64(len(values)))
    null = torch.from_numpy(draws.gamma(float(shape), size=(sets, len(values)))).clamp_min(1e-300)
    own, others = _gamma_tail(numbers), _gamma_tail(null)
    return (1 + int((others <= own).sum())) / (1 + sets)


def _gamma(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return shape and scale (N,) of gamma laws for numbers (N, K), in closed form.

    Paper: Ye & Chen, "Closed-form estimators for the gamma distribution derived from likelihood equations",
    The American Statistician 71, 2017.
    """
    logs, mean = numbers.log(), numbers.mean(1)
    scale = ((numbers * logs).mean(1) - mean * logs.mean(1)).clamp_min(1e-300)
    return mean / scale, scale


def _gamma_tail(numbers: Tensor) -> Tensor:
    """Return the probability (N,) that a number of the law of the others exceeds the largest one."""
    ordered = numbers.sort(1).values
    shape, scale = _gamma(ordered[:, :-1])
    # The tail itself and not 1 - (1 - tail)^K: the order is the same, and small values are not lost.
    tail: Tensor = torch.special.gammaincc(shape, ordered[:, -1] / scale)
    return tail
