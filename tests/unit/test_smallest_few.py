"""The test for a few small numbers: exact without outliers, open to several, fit for unknown numbers."""

from __future__ import annotations

import pytest
import torch

from unbackdoor.engine.statistics.exact_tests import largest_of_gamma
from unbackdoor.engine.statistics.several_outliers import smallest_few


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the values with all but the smallest few unknown."""
    limit = values.sort().values[count - 1]
    return torch.where(values <= limit, values, torch.inf)


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 8), (43, 15)])
def test_false_alarms_are_as_many_as_asked_for(total: int, count: int) -> None:
    found = [smallest_few(known(numbers(total, seed), count)).p_value for seed in range(400)]
    alarms = sum(p is not None and p <= 0.05 for p in found)
    assert 8 <= alarms <= 34  # 20 expected; four deviations


def test_one_and_several_are_named() -> None:
    values = numbers(10, 0)
    for classes in ([3], [3, 7], [7, 3, 1]):
        low = values.clone()
        low[classes] = torch.tensor([-20.0, -19.0, -18.5], dtype=torch.float64)[: len(classes)]
        found = smallest_few(low)
        assert found.positions == tuple(classes)
        assert found.p_value is not None and found.p_value < 0.001
        assert found.critical is not None and found.statistic > found.critical


def test_scale_and_place_do_not_matter() -> None:
    values = known(numbers(20, 5), 9)
    assert smallest_few(values).p_value == smallest_few(7 * values - 3).p_value


def test_the_unknown_do_not_hide_an_outlier() -> None:
    values = numbers(43, 1)
    values[30] = -15
    assert smallest_few(known(values, 15)).positions == (30,)


@pytest.mark.parametrize("values", [torch.ones(10), torch.tensor([1.0, 2, 3, 4, 5] + [torch.inf] * 5)])
def test_nothing_is_said_where_nothing_can_be(values: torch.Tensor) -> None:
    found = smallest_few(values)
    assert found.positions == ()
    assert found.p_value in (None, 1.0)


def test_equal_numbers_but_one() -> None:
    values = torch.ones(10)
    values[4] = 0
    assert smallest_few(values).positions == (4,)
    assert smallest_few(2 - values).positions == ()


@pytest.mark.parametrize("shape", [1.0, 5.0])
def test_the_fit_of_the_gamma_law_is_paid_for(shape: float) -> None:
    draws = torch.distributions.Gamma(torch.tensor(shape, dtype=torch.float64), 3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sets = draws.sample((150, 10))
    alarms = sum(largest_of_gamma(row, sets=2000) <= 0.05 for row in sets)
    assert alarms <= 17  # 7.5 expected; the plug-in law would raise about 25
    row = sets[0].clone()
    row[2] = 100 * row.max()
    assert largest_of_gamma(row) < 0.001


@pytest.mark.parametrize("values", [[1.0] * 8, [0.0] * 8, [-1.0, -2.0, -3.0], [1.0, 2.0]])
def test_the_gamma_law_says_nothing_where_it_cannot(values: list[float]) -> None:
    assert largest_of_gamma(torch.tensor(values, dtype=torch.float64)) == 1.0
