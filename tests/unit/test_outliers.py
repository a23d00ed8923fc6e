"""The outlier tests: by hand, by simulation, and where they must keep silent."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from unbackdoor.engine.statistics.one_outlier import Rule, grubbs_critical, mad_indices, smallest_outlier
from unbackdoor.errors import MissingExtra

pytest.importorskip("scipy", reason="Grubbs' test needs SciPy (extra: scan)")
PLAIN = [10.0, 11, 9, 10.5, 9.5, 10.2, 9.8, 10.1, 9.9, 4]


def test_one_low_number_is_found_under_either_rule() -> None:
    for rule in ("grubbs", "mad"):
        for log in (True, False):
            said = smallest_outlier(torch.tensor(PLAIN), rule=rule, log=log)
            assert said.index == 9
            assert said.positions == (9,)
            assert said.p_value is not None
            assert said.p_value < 0.01
            assert said.critical is not None
            assert said.statistic > said.critical
            assert said.ratio == pytest.approx(4 / 9.95)


def test_a_high_number_is_never_suspicious() -> None:
    values = torch.tensor([10.0, 11, 9, 10.5, 9.5, 10.2, 9.8, 10.1, 9.9, 40])
    for rule in ("grubbs", "mad"):
        assert smallest_outlier(values, rule=rule).positions == ()


def test_grubbs_by_hand() -> None:
    said = smallest_outlier(torch.tensor(PLAIN, dtype=torch.float64), log=False)
    mean = sum(PLAIN) / 10
    deviation = math.sqrt(sum((v - mean) ** 2 for v in PLAIN) / 9)
    assert said.statistic == pytest.approx((mean - 4) / deviation)
    # The published one-sided table at 5 %, to its two digits.
    for n, critical in ((6, 1.82), (10, 2.18), (20, 2.56), (43, 2.90), (100, 3.21), (200, 3.43)):
        assert grubbs_critical(n, 0.05) == pytest.approx(critical, abs=6e-3)


def test_the_statistic_and_the_p_value_agree_at_the_limit() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        said = smallest_outlier(torch.randn(10, generator=draws).exp(), level=0.3)
        assert said.critical is not None
        assert (said.statistic > said.critical) == bool(said.positions)


@pytest.mark.parametrize(("rule", "classes"), [("grubbs", 10), ("grubbs", 43), ("mad", 10), ("mad", 43)])
def test_clean_sets_are_flagged_as_often_as_the_level_says(rule: Rule, classes: int) -> None:
    draws = torch.Generator().manual_seed(1)
    sets = 1000
    values = torch.randn(sets, classes, generator=draws, dtype=torch.float64).mul(0.1).exp()
    flagged = sum(bool(smallest_outlier(row, rule=rule).positions) for row in values)
    # Three standard errors of a share of 5 %; Bonferroni's bound is exact at such levels to the third digit.
    assert abs(flagged / sets - 0.05) < 3 * math.sqrt(0.05 * 0.95 / sets)


def test_the_usual_limit_of_two_would_flag_a_third_of_all_clean_sets() -> None:
    draws = torch.Generator().manual_seed(2)
    values = torch.randn(4000, 10, generator=draws, dtype=torch.float64)
    share = float((mad_indices(values).amax(1) > 2).double().mean())
    assert 0.28 < share < 0.38


def test_several_low_numbers_hide_each_other_from_one_rule_and_not_from_the_other() -> None:
    values = torch.tensor([*PLAIN, 10.3, 9.7, 10.4, 9.6, 10.2, 9.9, 4.1, 3.9])
    assert smallest_outlier(values, rule="mad").positions == (17, 9, 16)
    grubbs = smallest_outlier(values)
    assert grubbs.p_value is not None
    mad = smallest_outlier(values, rule="mad").p_value
    assert mad is not None
    assert grubbs.p_value > mad


def test_five_numbers_are_too_few() -> None:
    for values in ([1.0, 10, 10.1, 9.9, 10.2], [1.0, 10, math.inf, 10.1, 9.9, 10.2]):
        said = smallest_outlier(torch.tensor(values))
        assert said.p_value is None
        assert said.critical is None
        assert said.positions == ()
        assert said.index == 0
    nothing = smallest_outlier(torch.full((8,), math.inf))
    assert nothing.p_value is None


def test_infinite_numbers_are_left_out_and_positions_kept() -> None:
    values = torch.tensor([math.inf, *PLAIN])
    said = smallest_outlier(values)
    assert said.index == 10
    assert said.positions == (10,)
    assert said.p_value == smallest_outlier(torch.tensor(PLAIN)).p_value


def test_equal_numbers_are_no_outliers() -> None:
    for rule in ("grubbs", "mad"):
        said = smallest_outlier(torch.full((8,), 3.0), rule=rule)
        assert said.positions == ()
        assert said.statistic == 0


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[scan\]"):
        smallest_outlier(torch.tensor(PLAIN))
    assert smallest_outlier(torch.tensor(PLAIN), rule="mad").positions == (9,)
