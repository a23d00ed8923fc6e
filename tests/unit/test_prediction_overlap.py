"""Agreement and disagreement keep their value and their gradient at every margin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from unbackdoor.defenses.ims.prediction_overlap import agree, disagree, log_complement


def log_probs(*logits: float, classes: int = 10) -> torch.Tensor:
    row = torch.zeros(1, classes)
    row[0, : len(logits)] = torch.tensor(logits)
    return F.log_softmax(row, dim=1)


def test_they_are_what_the_equations_say() -> None:
    draws = torch.Generator().manual_seed(0)
    p, q = (F.log_softmax(3 * torch.randn(20, 7, generator=draws), dim=1) for _ in "pq")
    overlap = (p.double().exp() * q.double().exp()).sum(1)
    assert agree(p, q).item() == pytest.approx(-overlap.log().mean().item(), rel=1e-5)
    assert disagree(p, q).item() == pytest.approx(-(1 - overlap).log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("margin", [1.0, 10.0, 20.0, 25.0, 60.0, 300.0])
def test_saturated_predictions_keep_value_and_gradient(margin: float) -> None:
    # Both sure of class 0: 1 - O = 2 (1 - q) q + (1 - q)^2 8/9 with 1 - q = 9 / (e^margin + 9).
    rest = 9 / (math.exp(margin) + 9)
    exact = -math.log(2 * rest * (1 - rest) + rest**2 * 8 / 9) if margin < 60 else margin - math.log(18)
    logits = torch.zeros(1, 10)
    logits[0, 0] = margin
    logits.requires_grad_()
    loss = disagree(F.log_softmax(logits, dim=1), log_probs(margin))
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [logits])
    if margin >= 10:
        assert gradient[0, 0].item() == pytest.approx(0.5, abs=2e-3)
    # The other way round: sure of different classes, the overlap is e^-margin twice.
    if margin >= 10:
        assert agree(log_probs(margin), log_probs(0, margin)).item() == pytest.approx(
            margin - math.log(2), rel=1e-3
        )


def test_the_stated_value_at_margin_20() -> None:
    assert disagree(log_probs(20.0), log_probs(20.0)).item() == pytest.approx(17.11, abs=0.005)
    assert agree(log_probs(), log_probs()).item() == pytest.approx(math.log(10), rel=1e-6)


def test_gradients_are_right_and_finite_with_ties() -> None:
    draws = torch.Generator().manual_seed(1)
    p, q = (torch.randn(4, 5, generator=draws, dtype=torch.float64, requires_grad=True) for _ in "pq")
    for loss in (agree, disagree):
        assert torch.autograd.gradcheck(
            lambda a, b, loss=loss: loss(F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)), (p, q)
        )
    tied = torch.zeros(2, 2, requires_grad=True)
    loss = disagree(F.log_softmax(tied, dim=1), F.log_softmax(tied, dim=1))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, [tied])
    assert torch.isfinite(gradient).all()


def test_the_complement_of_a_certainty_is_not_nothing() -> None:
    complement = log_complement(log_probs(100.0))
    assert complement[0, 0].item() == pytest.approx(math.log(9) - 100, rel=1e-6)
    assert complement[0, 1:].abs().max() < 1e-40
