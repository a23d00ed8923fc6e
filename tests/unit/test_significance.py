"""Exact probabilities against numbers worked out by hand."""

from __future__ import annotations

import itertools

import pytest

from unbackdoor.engine.statistics.exact_tests import conformal, critical_count, crowding
from unbackdoor.errors import InputError


def test_crowding_by_hand() -> None:
    assert crowding(2, 2, 10) == pytest.approx(1 / 10)
    assert crowding(3, 3, 2) == pytest.approx(1 / 4)
    # Birthdays: 1 - 365 * 364 * ... * 343 / 365^23.
    assert crowding(2, 23, 365) == pytest.approx(0.507297, abs=1e-6)
    assert crowding(0, 5, 3) == crowding(1, 5, 3) == 1.0


@pytest.mark.parametrize("most", range(6))
def test_crowding_by_counting_all_draws(most: int) -> None:
    draws = list(itertools.product(range(3), repeat=5))
    crowded = sum(max(one.count(k) for k in range(3)) >= most for one in draws)
    assert crowding(most, 5, 3) == pytest.approx(crowded / len(draws), abs=1e-12)


def test_critical_count_is_the_smallest_that_is_rare_enough() -> None:
    needed = critical_count(8, 10, 0.0125)
    assert needed is not None
    assert crowding(needed, 8, 10) <= 0.0125 < crowding(needed - 1, 8, 10)
    assert critical_count(2, 2, 0.05) is None


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError):
        crowding(3, 2, 10)


def test_conformal_counts_ties_against_the_finding() -> None:
    assert conformal(0.5, [0.1, 0.5, 0.7]) == 0.75
    assert conformal(0.9, [0.1] * 19) == pytest.approx(0.05)
    assert conformal(0.9, []) == 1.0
