"""Rates and scores against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbackdoor.errors import InputError
from unbackdoor.metrics import Rate, agreement, defense_effectiveness, robust_improvement, wilson

share = st.floats(0, 1)


def test_wilson_by_hand() -> None:
    # n = 10, p = 0.8, z = 1.96: centre (0.8 + 0.19208) / 1.38416, half 1.96 sqrt(0.016 + 0.009604) / 1.38416.
    low, high = wilson(8, 10, z=1.96)
    assert low == pytest.approx(0.490162, abs=1e-5)
    assert high == pytest.approx(0.943318, abs=1e-5)


@given(st.integers(1, 10_000), st.data())
def test_wilson_holds_the_share(total: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, total))
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total <= high <= 1


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 50).low == 0
    assert wilson(50, 50).high == 1
    with pytest.raises(InputError):
        wilson(3, 2)


def test_rate_of_nothing_is_nan() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert Rate(3, 4).value == 0.75


def test_agreement_counts() -> None:
    assert agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])) == Rate(2, 3)
    with pytest.raises(InputError):
        agreement(torch.tensor([1]), torch.tensor([1, 2]))


def test_der_signs_by_hand() -> None:
    # ASR falls by 0.9, ACC by 0.1: (0.9 - 0.1 + 1) / 2.
    assert defense_effectiveness(acc_before=0.9, acc=0.8, asr_before=1.0, asr=0.1) == pytest.approx(0.9)
    # Losing accuracy and gaining nothing is worse than doing nothing.
    assert defense_effectiveness(acc_before=0.9, acc=0.7, asr_before=1.0, asr=1.0) == pytest.approx(0.4)
    # A gain of accuracy and a rise of ASR are not counted.
    assert defense_effectiveness(acc_before=0.8, acc=0.9, asr_before=0.5, asr=0.6) == 0.5
    assert robust_improvement(acc_before=0.9, acc=0.8, ra_before=0.0, ra=0.8) == pytest.approx(0.85)


@given(share, share, share, share)
def test_der_is_bounded_and_monotone(before: float, after: float, asr_before: float, asr: float) -> None:
    value = defense_effectiveness(acc_before=before, acc=after, asr_before=asr_before, asr=asr)
    assert 0 <= value <= 1
    worse = defense_effectiveness(acc_before=before, acc=after * 0.9, asr_before=asr_before, asr=asr)
    assert worse <= value + 1e-12
