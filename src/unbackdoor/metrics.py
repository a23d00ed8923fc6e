"""Every rate and score that a report may carry, defined once.

Rates are in 0..1. ACC is measured on the whole test set; ASR and RA on triggered images whose true class
is not already the attacker's class, so that a perfect repair scores an ASR near zero and not near 1/K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from unbackdoor.errors import InputError


class Interval(NamedTuple):
    """A confidence interval, both ends in 0..1."""

    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """A share of images, with the counts it comes from.

    Attributes:
        hits: Images that count.
        total: Images that were looked at.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """``hits / total``, or NaN where nothing was looked at."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> Interval:
        """The 95 % Wilson interval."""
        return wilson(self.hits, self.total)


def wilson(hits: int, total: int, z: float = 1.959964) -> Interval:
    """Return the Wilson score interval of a share.

    Args:
        hits: Number of successes, 0..total.
        total: Number of trials; 0 gives the whole unit interval.
        z: Normal quantile; 1.96 for 95 %.

    Paper: Wilson, JASA 22 (1927).
    """
    if not 0 <= hits <= total:
        raise InputError("counts do not fit", expected="0 <= hits <= total", got=f"{hits} of {total}")
    if total == 0:
        return Interval(0.0, 1.0)
    p = hits / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At the ends the formula is 0 or 1 up to rounding; say it exactly.
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return Interval(low, 1.0 if hits == total else min(1.0, centre + half))


def agreement(predicted: Tensor, wanted: Tensor) -> Rate:
    """Return the share of predictions (N,) equal to the wanted labels (N,)."""
    if predicted.shape != wanted.shape:
        raise InputError(
            "predictions and labels differ", expected=tuple(wanted.shape), got=tuple(predicted.shape)
        )
    return Rate(int((predicted == wanted).sum()), len(wanted))


def defense_effectiveness(*, acc_before: float, acc: float, asr_before: float, asr: float) -> float:
    """Return DER in 0..1: 0.5 for "nothing gained or lost", 1 for ASR from 1 to 0 at no loss of ACC.

    DER = (max(0, ASR_before - ASR) - max(0, ACC_before - ACC) + 1) / 2. A lost point of ACC counts against
    the repair; the public helper that adds it has the sign wrong.

    Paper: Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization",
    ICCV 2023.
    """
    return (max(0.0, asr_before - asr) - max(0.0, acc_before - acc) + 1) / 2


def robust_improvement(*, acc_before: float, acc: float, ra_before: float, ra: float) -> float:
    """Return RIR in 0..1: like DER, with the gain in RA in the place of the fall in ASR."""
    return (max(0.0, ra - ra_before) - max(0.0, acc_before - acc) + 1) / 2
