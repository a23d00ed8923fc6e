"""Do the smallest few of K numbers stand apart from the others? A test for one or more target classes.

With two targets, the second hides the first from a test for one outlier: it widens the spread that the
smallest number is measured in. So for every count r from 1 to a third of the numbers, the r-th smallest is
measured in the spread of those above it, and the most significant r counts. The law of that
statistic without any outlier is simulated: the same rule on normal numbers. So the p-value accounts for the
choice of the class and for that of r.

The largest numbers may be unknown (censored), as long as they are larger than all others. Location and spread
are then estimated from the known numbers in their order: a line through them over the normal scores of their
ranks. Only ranks and known numbers are used, so that the simulation stays exact.

Paper:   many outliers: Rosner, "Percentage points for a generalized ESD many-outlier procedure",
         Technometrics 25, 1983. Normal scores of censored samples: Gupta, Biometrika 39, 1952.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.statistics.one_outlier import FEWEST

_DRAWS = 20_000  # simulated sets at most; the standard error of a p-value of 0.05 is then 0.0015
_NUMBERS = 4_000_000  # simulated numbers at most


@dataclass(frozen=True)
class Outliers:
    """The smallest of some numbers as outliers: the outcome of the test.

    Attributes:
        positions: The numbers that stand apart, smallest first; empty where none does.
        index: Position of the smallest number.
        statistic: Distance of the r-th smallest from the centre of the others in their spread, at the most
            significant r.
        critical: What it must exceed at that r and the level; None where there are too few numbers.
        p_value: Probability of so significant a distance without any outlier; None likewise.
    """

    positions: tuple[int, ...]
    index: int
    statistic: float
    critical: float | None
    p_value: float | None


def smallest_few(values: Tensor, *, level: float = 0.05, most: int | None = None) -> Outliers:
    """Test whether the smallest numbers are too small.

    Args:
        values: (K,); infinite ones are unknown, but larger than all others.
        level: Largest p-value that counts.
        most: Largest number of outliers to test for; by default a third of the finite numbers.

    Returns:
        The outcome; without a p-value where fewer than
        :data:`~unbackdoor.engine.statistics.one_outlier.FEWEST` are finite.
    """
    order = values.double().argsort(stable=True)  # infinite ones last
    finite = int(torch.isfinite(values).sum())
    if finite < FEWEST:
        return Outliers((), int(order[0]), 0.0, None, None)
    max_outliers = max(1, finite // 3 if most is None else min(most, finite - FEWEST + 1))
    numbers = values.double()[order[:finite]]  # (m,)
    distances = _distances(numbers[None], len(values), max_outliers)[0]  # (R,)
    null, least = _null(len(values), finite, max_outliers)  # (N, R) sorted downwards, (N,) sorted
    draws = len(least)
    # At least as large, itself among them, so that no p-value is 0.
    beaten = torch.stack([(null[:, r] >= distances[r]).sum() for r in range(max_outliers)])
    single = (1 + beaten) / (1 + draws)  # (R,)
    best = float(single.min())
    p_value = (1 + int((least <= best + 1e-12).sum())) / (1 + draws)
    # What a single p-value must reach, so that the least of all reaches it with probability level at most.
    limit = float(least[max(math.floor(level * (1 + draws)) - 1, 0)])
    critical = null[max(math.floor(limit * (1 + draws)) - 1, 0)]  # (R,)
    beyond = p_value <= level
    # The most significant count: one too many measures a usual number, one too few is masked.
    chosen = int((distances / critical).argmax() if beyond else single.argmin())
    positions = tuple(int(i) for i in order[: chosen + 1]) if beyond else ()
    return Outliers(positions, int(order[0]), float(distances[chosen]), float(critical[chosen]), p_value)


def _distances(numbers: Tensor, total: int, max_outliers: int) -> Tensor:
    """Return for sorted numbers (N, m) how far the r-th of each is below those above it, (N, R)."""
    out = []
    count = numbers.shape[1]
    for r in range(1, max_outliers + 1):
        rest = numbers[:, r:]  # (N, m - r)
        places = torch.arange(1, count - r + 1, dtype=torch.float64)
        scores = torch.special.ndtri((places - 0.375) / (total - r + 0.25))  # Blom's approximation
        centred = scores - scores.mean()
        spread = (rest * centred).sum(1) / (centred**2).sum()  # (N,) slope of the line
        centre = rest.mean(1) - spread * scores.mean()
        gap = centre - numbers[:, r - 1]
        # Equal numbers have no spread: one below them is as far as can be, and one among them not at all.
        far = (gap / spread.clamp_min(1e-12)).clamp_max(1e6)
        out.append(torch.where(gap > 1e-12, far, torch.zeros_like(gap)))
    return torch.stack(out, 1)


@lru_cache(maxsize=32)
def _null(total: int, finite: int, max_outliers: int) -> tuple[Tensor, Tensor]:
    # A fixed seed: the null law is a constant, and two scans of one model must agree.
    draws = rng.generator(0, "null law of the extremes", total, finite, max_outliers)
    sets = min(_DRAWS, _NUMBERS // total)
    numbers = torch.randn(sets, total, generator=draws, dtype=torch.float64).sort(1).values[:, :finite]
    distances = _distances(numbers, total, max_outliers)  # (N, R)
    ranks = distances.argsort(0, descending=True).argsort(0)  # 0 for the largest
    least = ((2 + ranks) / (1 + sets)).amin(1).sort().values  # as for a number from outside: itself and one
    return distances.sort(0, descending=True).values, least
