"""Every rate and score that a report may carry, defined once.

Rates are in 0..1. ACC is measured on the whole test set; ASR and RA on triggered images whose true class
is not already the attacker's class, so that a perfect repair scores an ASR near zero and not near 1/K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
        total: Images that were tested.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """``hits / total``, or NaN where no image was tested."""
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


def agreement(predicted: Tensor, labels: Tensor) -> Rate:
    """Return the share of predictions (N,) equal to the labels (N,)."""
    if predicted.shape != labels.shape:
        raise InputError(
            "predictions and labels differ", expected=tuple(labels.shape), got=tuple(predicted.shape)
        )
    return Rate(int((predicted == labels).sum()), len(labels))


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


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive scores higher than a negative; a tie counts one half.

    Args:
        scores: (N,) finite; high means positive.
        positive: (N,) bool; at least one of each.

    Raises:
        InputError: If a score is not finite, or one of the two kinds is missing.

    Paper: Mann & Whitney, Annals of Mathematical Statistics 18 (1947).

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, False, True, True]))
        0.875
    """
    scores, positive = _scored(scores, positive)
    below, up_to = _places(scores[~positive].sort().values, scores[positive])
    wins = below.sum() + 0.5 * (up_to - below).sum()
    return float(wins / (positive.sum() * (~positive).sum()))


def tpr_at_fpr(scores: Tensor, positive: Tensor, fpr: float = 0.01) -> float:
    """Return the share of positives above the lowest threshold that flags at most ``fpr`` of the negatives.

    Equal scores are flagged together, and nothing is interpolated: with fewer than 1/fpr negatives none of
    them may be flagged.

    Args:
        scores: (N,) finite; high means positive.
        positive: (N,) bool; at least one of each.
        fpr: Accepted share of flagged negatives, in 0..1.

    Raises:
        InputError: If a score is not finite, one of the two kinds is missing, or ``fpr`` is out of range.

    Example:
        >>> tpr_at_fpr(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, False, True, True]), 0.0)
        0.5
    """
    if not 0 <= fpr <= 1:
        raise InputError("the share does not fit", expected="0..1", got=fpr)
    scores, positive = _scored(scores, positive)
    negatives = scores[~positive].sort().values
    # Negatives at or above each positive's score: flagged with it if the threshold is there.
    below, _ = _places(negatives, scores[positive])
    # The last term is for rounding: 0.01 of 100 is one image.
    flagged = len(negatives) - below
    return float((flagged <= fpr * len(negatives) + 1e-9).double().mean())


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the precision-recall curve, as a mean over positives, without interpolation.

    For each positive, the precision where its score is the threshold; equal scores are flagged together.

    Args:
        scores: (N,) finite; high means positive.
        positive: (N,) bool; at least one of each.

    Raises:
        InputError: If a score is not finite, or one of the two kinds is missing.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        0.8333333333333333
    """
    scores, positive = _scored(scores, positive)
    positive_scores = scores[positive].sort().values
    above = len(positive_scores) - _places(positive_scores, positive_scores)[0]  # positives at or above each
    false = (~positive).sum() - _places(scores[~positive].sort().values, positive_scores)[0]
    return float((above / (above + false)).mean())


def _places(ordered: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of the ordered are below each value, and how many are at most it."""
    below = torch.searchsorted(ordered, values)
    return below.double(), torch.searchsorted(ordered, values, right=True).double()


def _scored(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    scores, positive = scores.detach().double().cpu(), positive.cpu().bool()
    if scores.dim() != 1 or scores.shape != positive.shape:
        raise InputError(
            "scores and marks differ",
            expected=f"two of shape (N,), here {tuple(scores.shape)}",
            got=tuple(positive.shape),
        )
    if not bool(torch.isfinite(scores).all()):
        raise InputError(
            "a score is not a finite number", where=f"row {int((~scores.isfinite()).nonzero()[0])}"
        )
    if not bool(positive.any()) or bool(positive.all()):
        raise InputError(
            "one of the two kinds is missing",
            expected="at least one positive and one negative",
            got=f"{int(positive.sum())} positives of {len(positive)}",
        )
    return scores, positive
