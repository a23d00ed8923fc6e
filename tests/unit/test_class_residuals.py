"""One p-value for each class, and what one that stands apart leaves to the others."""

from __future__ import annotations

import pytest
import torch

from unbackdoor.engine.statistics.class_residuals import family_p_value, residual_p_values
from unbackdoor.engine.statistics.one_outlier import grubbs


def test_the_smallest_times_their_number_is_grubbs_test() -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(3)).double()
    p_values = residual_p_values(values)
    assert p_values is not None
    low = int(values.argmin())
    assert int(p_values.argmin()) == low
    assert family_p_value(p_values) == pytest.approx(grubbs(values.tolist(), low)[1], rel=1e-9)


def test_single_p_values_are_uniform_where_no_class_stands_apart() -> None:
    draws = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).double()
    p_values = torch.stack([p for row in draws if (p := residual_p_values(row)) is not None]).flatten()
    shares = torch.tensor([float((p_values <= level).double().mean()) for level in (0.01, 0.05, 0.5)])
    assert torch.allclose(shares, torch.tensor([0.01, 0.05, 0.5]), atol=0.01)


def test_a_class_far_below_is_the_only_one_and_its_distance_is_not_lost() -> None:
    values = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.2, -0.1, 0.15, -9.0])
    p_values = residual_p_values(values)
    assert p_values is not None and float(p_values[7]) < 1e-6
    assert float(p_values[:7].min()) > 0.1


def test_units_and_origin_do_not_matter_and_equal_numbers_say_nothing() -> None:
    values = torch.tensor([0.4, 0.3, -0.2, 0.1, 0.2, -0.1, -1.0]).double()
    first, second = residual_p_values(values), residual_p_values(1e-4 * values + 1e-3)
    assert first is not None and second is not None and torch.allclose(first, second, rtol=1e-6)
    alike = residual_p_values(torch.full((8,), 0.7))
    assert alike is not None and torch.equal(alike, torch.full((8,), 0.5).double())


def test_a_spread_that_counting_has_is_not_undercut() -> None:
    values = torch.tensor([2.0] * 9 + [1.0])
    wide, narrow = residual_p_values(values, least_spread=1.0), residual_p_values(values)
    assert wide is not None and narrow is not None
    assert float(wide[9]) > 0.1 and float(narrow[9]) < 1e-9


def test_few_classes_have_none() -> None:
    assert residual_p_values(torch.arange(5.0)) is None
