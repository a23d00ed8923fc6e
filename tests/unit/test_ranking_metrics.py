"""AUROC and TPR at a fixed FPR against numbers worked out by hand, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbackdoor.errors import InputError
from unbackdoor.metrics import auroc, average_precision, tpr_at_fpr


def both(negatives: list[float], positives: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor([*negatives, *positives])
    return scores, torch.arange(len(scores)) >= len(negatives)


def test_auroc_by_hand() -> None:
    assert auroc(*both([1, 2], [3, 4])) == 1.0
    assert auroc(*both([3, 4], [1, 2])) == 0.0
    assert auroc(*both([5, 5, 5], [5, 5])) == 0.5
    # Pairs: 2 beats 1, loses to 3; 3 beats 1, ties with 3: (1 + 0 + 1 + 0.5) / 4.
    assert auroc(*both([1, 3], [2, 3])) == 0.625


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_auroc_is_the_share_of_pairs(negatives: list[int], positives: list[int]) -> None:
    pairs = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    value = auroc(*both([float(n) for n in negatives], [float(p) for p in positives]))
    assert value == pytest.approx(pairs / len(negatives) / len(positives))


def test_average_precision_by_hand() -> None:
    assert average_precision(*both([1, 2], [3, 4])) == 1.0
    assert average_precision(*both([3, 4], [1, 2])) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert average_precision(*both([5, 5, 5], [5, 5])) == pytest.approx(2 / 5)
    assert average_precision(*both([1, 3], [2, 3])) == pytest.approx((1 / 2 + 2 / 3) / 2)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_average_precision_is_that_of_the_definition(negatives: list[int], positives: list[int]) -> None:
    area, before = 0.0, 0.0  # sum of (R_n - R_n-1) P_n over falling thresholds
    for threshold in sorted({*negatives, *positives}, reverse=True):
        hits = sum(p >= threshold for p in positives)
        recall = hits / len(positives)
        area += (recall - before) * hits / (hits + sum(n >= threshold for n in negatives))
        before = recall
    value = average_precision(*both([float(n) for n in negatives], [float(p) for p in positives]))
    assert value == pytest.approx(area)


def test_tpr_by_hand() -> None:
    negatives = [float(i) for i in range(100)]
    # One false alarm is allowed: everything from 99 on is flagged, 98 would flag two.
    assert tpr_at_fpr(*both(negatives, [98.0, 98.5, 99.0, 200.0]), 0.01) == 0.75
    assert tpr_at_fpr(*both(negatives, [98.0, 98.5, 99.0, 200.0]), 0.0) == 0.25
    assert tpr_at_fpr(*both(negatives, [-1.0]), 1.0) == 1.0


def test_equal_scores_are_flagged_together() -> None:
    assert tpr_at_fpr(*both([0.0, 1.0, 1.0, 1.0], [1.0, 1.0]), 0.5) == 0.0
    assert tpr_at_fpr(*both([0.0, 1.0, 1.0, 1.0], [1.0, 1.0]), 0.75) == 1.0


def test_what_cannot_be_ranked_is_refused() -> None:
    for function in (auroc, tpr_at_fpr):
        with pytest.raises(InputError, match="one of the two kinds is missing"):
            function(torch.ones(3), torch.ones(3, dtype=torch.bool))
        with pytest.raises(InputError, match="row 1"):
            function(torch.tensor([0.0, float("nan")]), torch.tensor([True, False]))
        with pytest.raises(InputError, match="differ"):
            function(torch.ones(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="does not fit"):
        tpr_at_fpr(*both([0.0], [1.0]), 1.5)
