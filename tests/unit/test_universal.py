"""Universal perturbations: the bound holds, the projection is the nearest point, nothing stalls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_classifier, tiny_data
from unbackdoor.defenses.awm.few_images import shuffled
from unbackdoor.defenses.awm.universal_perturbation import Universal, project_l1, search
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier

RUN = Run.create(seed=0, policy="fp32")
DATA = tiny_data(40, seed=1)


def rows(count: int = 40) -> list[Tensor]:
    return shuffled(count, 16, 5, RUN.generator("rows"))


def saturated(factor: float = 1000.0) -> Classifier:
    """The tiny classifier with logits so large that its cross-entropy underflows."""
    model = tiny_classifier("conv-bn")
    with torch.no_grad():
        model.network.fc.weight *= factor
        model.network.fc.bias *= factor
    return model


def own_labels(model: nn.Module):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return replace(DATA, labels=model(DATA.pixels.float() / 255).argmax(1))


def test_projection_by_hand() -> None:
    # |3| + |-1| + |0.5| = 4.5; shrinking by 1 leaves 2, 0 and 0; a shrink of 0.75 would leave 2.5 in sum.
    values = torch.tensor([[[[3.0, -1.0, 0.5]]], [[[0.2, -0.3, 0.1]]]])  # (2, 1, 1, 3)
    out = project_l1(values, 2.0)
    assert torch.allclose(out[0].flatten(), torch.tensor([2.0, 0.0, 0.0]))
    assert torch.equal(out[1], values[1])  # inside already
    assert torch.allclose(project_l1(values, 2.5)[0].flatten(), torch.tensor([2.25, -0.25, 0.0]))
    assert torch.equal(project_l1(torch.zeros(1, 1, 2, 2), 1.0), torch.zeros(1, 1, 2, 2))


def test_projection_is_the_nearest_point() -> None:
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(3, 1, 4, 5, generator=draws)
    out = project_l1(values, 4.0)
    assert torch.allclose(out.flatten(1).abs().sum(1), torch.full((3,), 4.0), atol=1e-5)
    assert torch.allclose(project_l1(out, 4.0), out, atol=1e-6)
    # The nearest point of a convex set: no other point of the ball lies on the far side of it.
    for _ in range(50):
        other = torch.randn(3, 20, generator=draws)
        other = 4.0 * other / other.abs().sum(1, keepdim=True)
        inner = ((values - out).flatten(1) * (other - out.flatten(1))).sum(1)
        assert float(inner.max()) <= 1e-4


@pytest.mark.parametrize("objective", ["margin", "cross-entropy"])
def test_the_bound_holds_and_labels_move(objective: str) -> None:
    model = tiny_classifier("conv-bn").requires_grad_(False)
    images = own_labels(model)
    # A mean of 0.3 moves an 8 x 8 image whose classes lie 0.4 apart in a quarter of it.
    out = search(model, images, rows(), RUN, RUN.generator("x"), tau=19.2, objective=objective)  # type: ignore[arg-type]
    assert out.values.shape == (1, 1, 8, 8)
    assert not out.values.requires_grad
    assert 0 < out.norm <= 19.2 * 1.0001
    assert out.fooling(model, images, RUN, RUN.generator("y")) > 0.2
    assert all(p.grad is None for p in model.parameters())


def test_a_saturated_network_stalls_cross_entropy_and_not_the_margin() -> None:
    """The flaw of the released code, on record: its search stays at zero, and says nothing."""
    model = saturated().requires_grad_(False)
    images = own_labels(model)
    stalled = search(model, images, rows(), RUN, RUN.generator("x"), tau=19.2, objective="cross-entropy")
    assert stalled.norm == 0.0
    alive = search(model, images, rows(), RUN, RUN.generator("x"), tau=19.2, objective="margin")
    assert alive.norm > 19.2 / 2
    assert alive.fooling(model, images, RUN, RUN.generator("y")) > 0.2


def test_steps_of_fixed_length_do_not_depend_on_the_scale_of_the_logits() -> None:
    plain, scaled = tiny_classifier("conv-bn").requires_grad_(False), saturated(1024.0).requires_grad_(False)
    images = own_labels(plain)
    one, other = (search(m, images, rows(), RUN, RUN.generator("x"), tau=5.0).values for m in (plain, scaled))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_constant_network_yields_zero_and_not_nan() -> None:
    model = tiny_classifier("conv-bn").requires_grad_(False)
    model.network.fc.weight.zero_()
    out = search(model, DATA, rows(), RUN, RUN.generator("x"), tau=5.0)
    assert torch.equal(out.values, torch.zeros(1, 1, 8, 8))
    assert out.fooling(model, own_labels(model), RUN, RUN.generator("y")) == 0.0


def test_one_for_each_target_leads_to_its_target() -> None:
    model = tiny_classifier("conv-bn").requires_grad_(False)
    images = own_labels(model)
    draws = RUN.generator("x")
    out = search(model, images, rows(), RUN, draws, tau=19.2, targets=4)
    assert out.values.shape == (4, 1, 8, 8)
    assert bool((out.values.flatten(1).abs().sum(1) <= 19.2 * 1.0001).all())
    aims = out.aims(images.truth, draws)
    assert bool((aims != images.truth).all())
    assert set(aims.tolist()) == {0, 1, 2, 3}
    assert out.fooling(model, images, RUN, draws) > 0.3
    nothing = Universal(torch.zeros(4, 1, 8, 8))
    assert nothing.fooling(model, images, RUN, draws) == 0.0


def test_applied_pixels_stay_in_range_unless_told_otherwise() -> None:
    delta = Universal(torch.full((1, 1, 8, 8), 0.7))
    pixels = torch.full((2, 1, 8, 8), 0.5)
    aims = torch.zeros(2, dtype=torch.int64)
    assert float(delta.applied(pixels, aims).max()) == 1.0
    assert float(delta.applied(pixels, aims, clamp=False).max()) == pytest.approx(1.2)
