"""Many p-values held against one level."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from scipy import special

from unbackdoor.audit.evidence import agreements, holm


def test_holm_holds_the_level_over_all_checks() -> None:
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert holm([]) == []
    assert holm([0.9, 0.9]) == [1.0, 1.0]


def test_agreement_takes_two_checks_that_noticed_one_single_class() -> None:
    assert agreements([0.01, 0.01], [[1], [2]]) == []
    assert agreements([0.01, 0.3], [[1], [1]]) == []
    assert agreements([0.01, 0.01], [[1, 2], [1, 2]]) == []
    assert agreements([0.01, 0.01], [[], []]) == []
    first, second = agreements([0.1, 0.01, 0.05, 0.01], [[1], [2], [1], [2]])
    assert (first.label, first.places) == (2, (1, 3))
    assert (second.label, second.places) == (1, (2, 0))
    assert first.p_value == pytest.approx(1.3 * 4 / 200)


def test_a_check_agrees_on_a_class_that_is_not_its_own_first() -> None:
    nan = float("nan")
    tables = [[0.001, 0.02, 0.9, 0.9], [0.5, 0.001, nan, 0.9], ()]
    (agreed,) = agreements([0.004, 0.003, 0.9], [[0], [1], [1]], tables)
    assert (agreed.label, agreed.places) == (1, (1, 0))
    # The second check compares three classes, and the first four.
    assert agreed.p_value == pytest.approx(1.3 * 3 / (1 / 0.003 + 1 / 0.08))
    assert agreements([0.004, 0.003], [[0], [1]]) == []


def test_no_p_value_of_zero_divides() -> None:
    assert agreements([0.0, 0.1], [[0], [0]])[0].p_value < 1e-200


@pytest.mark.parametrize("checks", [2, 5])
@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 0.95])
def test_the_level_holds_where_checks_depend_on_each_other(
    checks: int, classes: int, correlation: float
) -> None:
    draws, level = 20_000, 0.05
    rng = np.random.default_rng([checks, classes, round(100 * correlation)])
    z = correlation**0.5 * rng.standard_normal((draws, 1))
    z = z + (1 - correlation) ** 0.5 * rng.standard_normal((draws, checks))  # (draws, checks)
    # Of the draws only those matter in which a check noticed something.
    bound = NormalDist().inv_cdf(0.8)
    named = rng.integers(0, classes, (draws, checks))
    cdf = NormalDist().cdf
    alarms = 0
    for values, labels in zip(z, named, strict=True):
        if (values > bound).any():
            p_values = [1 - cdf(v) for v in values]
            joint = agreements(p_values, [[int(k)] for k in labels])
            alarms += min([*holm(p_values), *(a.p_value for a in joint)]) <= level
    # Three standard deviations of a share of 5 % of the draws.
    assert alarms / draws <= level + 3 * (level * (1 - level) / draws) ** 0.5


@pytest.mark.parametrize("checks", [2, 9])
@pytest.mark.parametrize("classes", [6, 10, 43])
@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.95])
def test_the_level_holds_where_every_check_has_a_p_value_for_every_class(
    checks: int, classes: int, correlation: float
) -> None:
    draws, level = 3_000, 0.05
    rng = np.random.default_rng([checks, classes, round(100 * correlation)])
    z = correlation**0.5 * rng.standard_normal((draws, 1, classes))
    z = z + (1 - correlation) ** 0.5 * rng.standard_normal((draws, checks, classes))
    mean = (z.sum(2, keepdims=True) - z) / (classes - 1)  # of the other classes
    square = ((z**2).sum(2, keepdims=True) - z**2 - (classes - 1) * mean**2) / (classes - 2)
    residual = (z - mean) / np.sqrt(square * (1 + 1 / (classes - 1)))
    tables = special.stdtr(classes - 2, residual)  # (draws, checks, classes)
    smallest = np.minimum(1, classes * tables.min(2))
    alarms = 0
    for p_values, table in zip(smallest, tables, strict=True):
        if p_values.min() <= 0.2:
            joint = agreements(p_values.tolist(), [()] * checks, table.tolist())
            alarms += min([*holm(p_values.tolist()), *(a.p_value for a in joint)]) <= level
    # Three standard deviations of a share of 5 % of the draws.
    assert alarms / draws <= level + 3 * (level * (1 - level) / draws) ** 0.5
