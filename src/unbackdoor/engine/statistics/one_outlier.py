"""Does the smallest of K numbers stand apart from the others? Tests for one target class among K.

The smallest of many numbers is always small. Both rules here therefore account for the choice:
one by Bonferroni's factor K, one by simulating the whole rule without any outlier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.errors import MissingExtra
from unbackdoor.types import Verdict

Rule = Literal["grubbs", "mad"]
FEWEST = 6  # numbers; with fewer, neither a deviation nor a median of deviations says anything
_CONSISTENT = 1.4826  # makes the median absolute deviation estimate the deviation of a normal variable
_DRAWS = 20_000  # simulated sets at most; the standard error of a p-value of 0.05 is then 0.0015
_NUMBERS = 4_000_000  # simulated numbers at most; with 1000 classes that error is then 0.0034


@dataclass(frozen=True)
class Outlier:
    """What a rule says about the smallest of some numbers.

    Attributes:
        index: Position of the smallest number.
        statistic: How far it stands apart: Grubbs' G, or the index by the median absolute deviation.
        critical: What the statistic must exceed at the level; None where there are too few numbers.
        p_value: Probability of such a statistic among numbers of one normal law; None likewise.
        mad_index: The index by the median absolute deviation, under either rule.
        ratio: Smallest number over the median.
        positions: Where the rule sees outliers, smallest number first.
    """

    index: int
    statistic: float
    critical: float | None
    p_value: float | None
    mad_index: float
    ratio: float
    positions: tuple[int, ...]

    @property
    def verdict(self) -> Verdict:
        """The same in the words of a report."""
        if self.p_value is None:
            return "undecided"
        return "backdoor found" if self.positions else "no evidence found"


def smallest_outlier(
    values: Tensor, *, rule: Rule = "grubbs", level: float = 0.05, log: bool = True
) -> Outlier:
    """Test whether the smallest of some positive numbers is too small; infinite ones are left out.

    Args:
        values: (K,), positive.
        rule: ``grubbs``, the one-sided Grubbs test, which sees one outlier; or ``mad``, distances from the
            median in median absolute deviations, which sees several.
        level: Largest p-value that counts.
        log: Test the logarithms, which are closer to normal for lengths.

    Raises:
        MissingExtra: If SciPy is not installed and the rule is ``grubbs``.
    """
    finite = [i for i, value in enumerate(values.tolist()) if math.isfinite(value)]
    if not finite:
        return Outlier(0, 0.0, None, None, 0.0, 1.0, ())
    plain = [float(values[i]) for i in finite]
    numbers = [math.log(value) for value in plain] if log else plain
    low = min(range(len(numbers)), key=numbers.__getitem__)
    distances = mad_indices(torch.tensor(numbers, dtype=torch.float64))
    ratio = plain[low] / median(plain)
    mad_index = float(distances[low])
    if len(numbers) < FEWEST:
        return Outlier(finite[low], mad_index, None, None, mad_index, ratio, ())
    if rule == "mad":
        null = _mad_null(len(numbers))
        # At least as large, itself among them, so that no p-value is 0.
        beaten = int(torch.searchsorted(null, torch.tensor(mad_index, dtype=null.dtype)))
        p_value = (1 + len(null) - beaten) / (1 + len(null))
        critical = float(null[math.ceil((1 - level) * len(null)) - 1])
        beyond = [
            i for i in distances.argsort(descending=True, stable=True).tolist() if distances[i] > critical
        ]
        return Outlier(
            finite[low], mad_index, critical, p_value, mad_index, ratio, tuple(finite[i] for i in beyond)
        )
    statistic, p_value = grubbs(numbers, low)
    positions = (finite[low],) if p_value < level else ()
    return Outlier(
        finite[low], statistic, grubbs_critical(len(numbers), level), p_value, mad_index, ratio, positions
    )


def grubbs(numbers: list[float], low: int) -> tuple[float, float]:
    """Return Grubbs' G of the number at ``low`` and the p-value that accounts for its having been picked."""
    n = len(numbers)
    whole = sum(numbers) / n
    deviation = _deviation(numbers)
    if deviation == 0:
        return 0.0, 1.0
    return (whole - numbers[low]) / deviation, min(1.0, n * named_beforehand(numbers, low))


def named_beforehand(numbers: list[float], index: int) -> float:
    """Return the p-value of a number, named beforehand, being too small for the normal law of the others.

    Raises:
        MissingExtra: If SciPy is not installed.
    """
    rest = [number for i, number in enumerate(numbers) if i != index]
    distance, spread = numbers[index] - sum(rest) / len(rest), _deviation(rest)
    if not spread:
        return 0.0 if distance < 0 else 1.0
    return float(_special().stdtr(len(rest) - 1, distance / (spread * math.sqrt(1 + 1 / len(rest)))))


def grubbs_critical(n: int, level: float) -> float:
    """Return the G that n numbers of one normal law exceed with probability ``level``, one-sided."""
    t = float(_special().stdtrit(n - 2, level / n))
    return (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))


def mad_indices(numbers: Tensor) -> Tensor:
    """Return how far each number (..., K) lies below the median, in median absolute deviations.

    The median of an even count is the mean of the two in the middle. Numbers without spread are at 0.
    """
    middle = numbers.quantile(0.5, dim=-1, keepdim=True)
    below = middle - numbers
    deviation = _CONSISTENT * below.abs().quantile(0.5, dim=-1, keepdim=True)
    return torch.where(deviation > 0, below / deviation.clamp_min(1e-300), torch.zeros_like(below))


@lru_cache(maxsize=16)
def _mad_null(n: int) -> Tensor:
    # A fixed seed: the null law is a constant, and two scans of one model must agree.
    draws = rng.generator(0, "null law of the index", n)
    sets = min(_DRAWS, _NUMBERS // n)
    return mad_indices(torch.randn(sets, n, generator=draws, dtype=torch.float64)).amax(1).sort().values


def _deviation(numbers: list[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def _special() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise MissingExtra("scipy", "scan", "the test for an outlier") from error
    return special
