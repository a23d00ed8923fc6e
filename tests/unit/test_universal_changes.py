"""Every form of a change stays within its size and within [0, 1], and says the same as a stored trigger."""

from __future__ import annotations

import math

import pytest
import torch

from unbackdoor.engine.universal_changes import (
    FORMS,
    Form,
    UniversalChange,
    mask_of_size,
    of_rms,
    window_side,
)

SHAPE = (3, 16, 12)


def change(form: Form, size: float = 0.0, place: tuple[int, int] = (0, 0)) -> UniversalChange:
    draws = torch.Generator().manual_seed(3)
    return UniversalChange(
        form, 1, FORMS[form].start(SHAPE, draws), size or FORMS[form].sizes(SHAPE)[1], place
    )


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", list(FORMS))
def test_pixels_stay_in_range_and_keep_their_shape(form: Form) -> None:
    pixels = images()
    changed = change(form).apply(pixels)
    assert changed.shape == pixels.shape
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert not torch.equal(changed, pixels)


@pytest.mark.parametrize("form", list(FORMS))
def test_a_gradient_flows_to_the_parameters_of_every_row(form: Form) -> None:
    draws = torch.Generator().manual_seed(0)
    raw = torch.stack([FORMS[form].start(SHAPE, draws) for _ in range(3)]).requires_grad_()
    places = torch.tensor([[0, 0], [3, 2], [10, 4]])
    FORMS[form].apply(
        images()[None] * 0.5 + 0.25, raw, FORMS[form].sizes(SHAPE)[0], places
    ).square().sum().backward()
    assert raw.grad is not None
    assert all(float(row.abs().sum()) > 0 for row in raw.grad)


def test_a_mask_has_its_size_even_where_pixels_are_full() -> None:
    raw = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    for size in (0.5, 6.0, 40.0):
        mask = mask_of_size(raw, size)
        assert torch.allclose(mask.flatten(1).sum(1), torch.full((4,), size), rtol=1e-4)
        assert float(mask.max()) <= 1


def test_a_root_mean_square_is_of_each_row() -> None:
    rows = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rms = of_rms(rows, 0.25).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(rms, torch.full((3,), 0.25))


def test_a_window_changes_its_square_and_nothing_else() -> None:
    side, pixels = window_side(SHAPE), images()
    moved = (change("window", place=(9, 4)).apply(pixels) != pixels).any(0).any(0)  # (H, W)
    expected = torch.zeros(SHAPE[1:], dtype=torch.bool)
    expected[9 : 9 + side, 4 : 4 + side] = True
    assert torch.equal(moved, expected)


def test_a_warp_moves_content_by_its_size() -> None:
    # A picture that is its own column number shows by how many pixels each place was moved sideways.
    ramp = torch.arange(SHAPE[2]).float().expand(1, *SHAPE) / SHAPE[2]
    still = UniversalChange("warp", 0, torch.zeros(2, 6, 6), 1.0).apply(ramp)
    assert torch.allclose(still, ramp, atol=1e-5)
    sideways = torch.stack([torch.ones(6, 6), torch.zeros(6, 6)])
    moved = UniversalChange("warp", 0, sideways, math.sqrt(0.5) * 2, (0, 0)).apply(ramp)
    inner = (moved - ramp)[..., 2:-3] * SHAPE[2]
    assert torch.allclose(inner, torch.full_like(inner, 2.0), atol=1e-4)


@pytest.mark.parametrize("form", ["patch", "window", "blend", "frequency"])
def test_what_can_be_drawn_is_the_same_as_a_stored_trigger(form: Form) -> None:
    pixels = images() * 0.5 + 0.25  # away from the ends, where an addition is cut off
    one = change(form)
    trigger = one.trigger(SHAPE)
    assert trigger is not None and trigger.label == 1 and not trigger.faults(SHAPE, 2)
    assert torch.allclose(trigger.apply(pixels), one.apply(pixels), atol=1e-4)


def test_a_warp_is_no_mask_and_no_addition() -> None:
    assert change("warp").trigger(SHAPE) is None and change("colour").trigger(SHAPE) is None
