"""The shortest latent shifts against closed forms, duality and other solvers."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine.heads import find_affine_head
from unbackdoor.engine.inference import predict
from unbackdoor.engine.latent_shift import (
    Solution,
    gap_quantiles,
    largest_gaps,
    latent_shifts,
    least_shifts,
    logit_gaps,
    shifted_loss,
    still_moved,
)
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Objective
from unbackdoor.errors import InputError, MethodFailed, MissingExtra, UnsupportedModel
from unbackdoor.types import Classifier, Images

pytest.importorskip("scipy", reason="the solver is SciPy's (extra: scan)")

Array = npt.NDArray[np.float64]
RUN = Run.create(seed=0, policy="fp32")


def problem(classes: int, features: int, *, seed: int = 0, images: int = 50) -> tuple[Array, Array, Array]:
    """Return W (K, D), b (K,) and features (N, D) of a made-up head."""
    draws = np.random.default_rng(seed)
    weight = draws.normal(size=(classes, features))
    bias = draws.normal(size=classes)
    labels = np.arange(images) % classes
    return weight, bias, draws.normal(size=(images, features)) + 2 * weight[labels]


def gaps_of(logits: Array) -> Array:
    return largest_gaps(torch.from_numpy(logits)).numpy()


def check_optimal(weight: Array, gaps: Array, k: int, solution: Solution) -> None:
    """KKT conditions and the absence of a duality gap: together they prove the optimum."""
    others = np.arange(len(weight)) != k
    rows, wanted = (weight[k] - weight)[others], gaps[k][others]
    slack, duals = rows @ solution.shift - wanted, solution.duals[others]
    scale = np.abs(gaps).max()
    assert slack.min() > -1e-9 * scale
    assert duals.min() >= 0
    assert np.abs(slack * duals).max() < 1e-9 * scale * max(1.0, duals.max())
    assert rows.T @ duals == pytest.approx(solution.shift, abs=1e-9 * np.abs(solution.shift).max())
    assert duals @ wanted == pytest.approx(solution.norm**2, rel=1e-9)
    assert np.linalg.norm(solution.shift) == pytest.approx(solution.norm, rel=1e-9)


SIZES = [(2, 5), (4, 3), (6, 6), (10, 64), (30, 8), (60, 200)]


@pytest.mark.parametrize(("classes", "features"), SIZES)
def test_every_solution_is_proved_optimal(classes: int, features: int) -> None:
    for seed in range(3):
        weight, bias, phi = problem(classes, features, seed=seed)
        gaps = gaps_of(phi @ weight.T + bias)
        solutions = least_shifts(weight, gaps)
        reached = [k for k, solution in enumerate(solutions) if np.isfinite(solution.norm)]
        assert reached
        for k in reached:
            check_optimal(weight, gaps, k, solutions[k])


@pytest.mark.parametrize("classes", [3, 4, 6])
def test_it_agrees_with_trying_every_set_of_active_constraints(classes: int) -> None:
    for seed in range(5):
        weight, bias, phi = problem(classes, 7, seed=seed)
        gaps = gaps_of(phi @ weight.T + bias)
        for k, solution in enumerate(least_shifts(weight, gaps)):
            rows = np.delete(weight[k] - weight, k, axis=0)
            wanted = np.delete(gaps[k], k)
            best = np.inf
            for count in range(1, classes):
                for active in map(list, itertools.combinations(range(classes - 1), count)):
                    shift = np.linalg.pinv(rows[active]) @ wanted[active]  # shortest with these at equality
                    if (rows @ shift - wanted).min() > -1e-9:
                        best = min(best, float(np.linalg.norm(shift)))
            assert solution.norm == pytest.approx(best, rel=1e-9)


def test_it_agrees_with_an_independent_solver() -> None:
    from scipy.optimize import minimize

    for seed in range(4):
        weight, bias, phi = problem(5, 6, seed=seed)
        gaps = gaps_of(phi @ weight.T + bias)
        for k, solution in enumerate(least_shifts(weight, gaps)):
            rows, wanted = np.delete(weight[k] - weight, k, axis=0), np.delete(gaps[k], k)
            found = minimize(
                lambda s: 0.5 * s @ s,
                np.zeros(6),
                jac=lambda s: s,
                method="SLSQP",
                constraints={
                    "type": "ineq",
                    "fun": lambda s, a=rows, r=wanted: a @ s - r,
                    "jac": lambda s, a=rows: a,
                },
                options={"ftol": 1e-10, "maxiter": 500},
            )
            assert found.success
            assert solution.shift == pytest.approx(found.x, abs=1e-3)


def test_all_constraints_of_all_images_say_the_same_as_the_table() -> None:
    from scipy.optimize import nnls

    weight, bias, phi = problem(4, 6, images=12)
    gaps = gaps_of(phi @ weight.T + bias)
    for k, solution in enumerate(least_shifts(weight, gaps)):
        rows = np.concatenate([np.delete(weight[k] - weight, k, axis=0)] * len(phi))  # (N (K - 1), D)
        logits = phi @ weight.T + bias
        wanted = np.delete(logits - logits[:, k : k + 1], k, axis=1).ravel()
        system = np.vstack([rows.T, wanted])
        target = np.eye(7)[-1]
        residual = system @ nnls(system, target, maxiter=10_000)[0] - target
        assert solution.shift == pytest.approx(-residual[:-1] / residual[-1], rel=1e-6)


def test_two_classes_by_hand() -> None:
    weight = np.array([[1.0, 0.0], [0.0, 2.0]])
    gaps = np.array([[0.0, 3.0], [4.0, 0.0]])
    first, second = least_shifts(weight, gaps)
    # One constraint a . s >= r: s = r a / |a|^2 with a = (1, -2) and (-1, 2).
    assert first.shift == pytest.approx([0.6, -1.2])
    assert second.shift == pytest.approx([-0.8, 1.6])
    assert first.duals == pytest.approx([0, 0.6])


@pytest.mark.parametrize("classes", [3, 7, 20])
def test_neural_collapse_by_sorting(classes: int) -> None:
    # Rows of a simplex: (w_k - w_i) . (w_k - w_j) = c (1 + [i = j]). Then lambda_j = max(0, R_j - tau) / c
    # with tau = sum of the active R / (number of them + 1), which sorting finds.
    draws = np.random.default_rng(classes)
    turn = np.linalg.qr(draws.normal(size=(classes + 4, classes)))[0]  # (D, K), orthonormal columns
    weight = 1.7 * (np.eye(classes) - 1 / classes) @ turn.T
    c = 1.7**2
    gaps = draws.uniform(-1, 5, size=(classes, classes))
    for k, solution in enumerate(least_shifts(weight, gaps)):
        wanted = np.delete(gaps[k], k)
        descending = np.sort(wanted)[::-1]
        taus = np.cumsum(descending) / (np.arange(1, classes) + 1)
        tau = taus[np.flatnonzero(descending > taus)[-1]]
        assert np.delete(solution.duals, k) == pytest.approx(np.maximum(0, wanted - tau) / c, abs=1e-9)


def test_what_changes_nothing_and_what_scales() -> None:
    weight, bias, phi = problem(6, 9)
    gaps = gaps_of(phi @ weight.T + bias)
    plain = np.stack([s.shift for s in least_shifts(weight, gaps)])
    common = weight + np.random.default_rng(1).normal(size=9) * 100
    assert np.stack([s.shift for s in least_shifts(common, gaps)]) == pytest.approx(plain, abs=1e-8)
    # A temperature: W, b and with them the gaps, times c.
    for c in (1e-6, 1e6):
        hot = np.stack([s.shift for s in least_shifts(c * weight, gaps_of(c * (phi @ weight.T + bias)))])
        assert hot == pytest.approx(plain, rel=1e-7, abs=1e-9)
    # Gaps alone, or features alone, scale the shift.
    assert np.stack([s.shift for s in least_shifts(weight, 1e4 * gaps)]) == pytest.approx(1e4 * plain)
    # The bias moves the gaps by b_j - b_k and does nothing else.
    assert gaps == pytest.approx(gaps_of(phi @ weight.T) + bias[None, :] - bias[:, None])


def test_a_class_inside_the_hull_of_the_others_is_out_of_reach() -> None:
    weight = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [-0.2, 0.1]])
    gaps = np.full((4, 4), 2.0)
    solutions = least_shifts(weight, gaps)
    assert [np.isinf(s.norm) for s in solutions] == [False, False, False, True]
    assert np.isinf(solutions[3].shift).all()
    for k in range(3):
        check_optimal(weight, gaps, k, solutions[k])


def test_degenerate_classifiers_are_refused() -> None:
    weight, _, _ = problem(4, 5)
    always = np.tile(np.array([5.0, 0.0, 0.0, 0.0]), (10, 1))
    with pytest.raises(MethodFailed, match=r"every clean image to one class.*class 0"):
        least_shifts(weight, gaps_of(always))
    with pytest.raises(UnsupportedModel, match="the same weights"):
        least_shifts(np.ones((4, 5)), np.ones((4, 4)))


def test_a_solver_that_gives_up_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    def tired(*_: object, **__: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(scipy.optimize, "nnls", tired)
    weight, bias, phi = problem(4, 5)
    with pytest.raises(MethodFailed, match=r"class 0.*Maximum number"):
        least_shifts(weight, gaps_of(phi @ weight.T + bias))


# ---------------------------------------------------------------------------------------------------
# The table


def test_blocks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(703, 7, generator=torch.Generator().manual_seed(0))
    by_hand = (logits[:, None, :] - logits[:, :, None]).amax(0)  # [k, j] = max of z_j - z_k
    assert torch.equal(largest_gaps(logits), by_hand)
    monkeypatch.setattr("unbackdoor.engine.latent_shift._BLOCK", 70)
    assert torch.equal(largest_gaps(logits), by_hand)
    model, data = tiny_classifier("conv-bn"), tiny_data(60)
    whole = logit_gaps(model, data, RUN)
    monkeypatch.setattr("unbackdoor.engine.latent_shift.EVALUATION_BATCH", 7)
    assert torch.allclose(logit_gaps(model, data, RUN), whole, rtol=0, atol=1e-4)
    assert whole.dtype == torch.float64
    assert torch.equal(whole.diag(), torch.zeros(4, dtype=torch.float64))


def test_quantiles_end_in_the_maximum_and_are_order_statistics() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gap_quantiles(logits, 1.0), largest_gaps(logits))
    expected = (logits[:, None, :] - logits[:, :, None]).sort(0).values[35]  # the 36th of 40 covers 90 %
    assert torch.equal(gap_quantiles(logits, 0.9), expected)
    model, data = tiny_classifier("conv-bn"), tiny_data(60)
    assert (logit_gaps(model, data, RUN, quantile=0.9) <= logit_gaps(model, data, RUN)).all()


def test_the_gaps_are_exact_whatever_the_precision_of_the_run() -> None:
    model, data = tiny_classifier("conv-bn"), tiny_data(20)
    assert torch.equal(logit_gaps(model, data, Run.create(policy="bf16")), logit_gaps(model, data, RUN))


# ---------------------------------------------------------------------------------------------------
# On networks


@pytest.mark.parametrize("kind", ["conv-bn", "conv", "transformer"])
def test_a_little_more_than_the_shift_wins_every_image(kind: str) -> None:
    model, data = tiny_classifier(kind), tiny_data(60, seed=1)
    bare = Images(data.pixels, None, data.class_names)
    latent = latent_shifts(model, bare, RUN)
    for k in range(4):
        with latent.head.shifted(1.001 * latent.shifts[k].float()):
            assert (predict(model, data, RUN).argmax(1) == k).all()
        with latent.head.shifted(0.99 * latent.shifts[k].float()):
            assert not (predict(model, data, RUN).argmax(1) == k).all()
    assert latent.gaps.shape == (4, 4)
    again = latent_shifts(model, bare, RUN)
    assert torch.equal(again.shifts, latent.shifts)


def test_moved_logits_are_those_of_a_shifted_network() -> None:
    model, data = tiny_classifier("conv-bn"), tiny_data(20)
    latent = latent_shifts(model, data, RUN)
    with latent.head.shifted(latent.shifts[2].float()):
        shifted = predict(model, data, RUN)
    assert torch.allclose(shifted, predict(model, data, RUN) + latent.moved_logits(2), atol=1e-3)
    share = (shifted + 1e-3 * F.one_hot(torch.tensor(2), 4)).argmax(1)[data.truth != 2] == 2
    assert share.all()
    assert 0 <= still_moved(model, latent, 2, data, RUN) <= 1


def head_of(weight: torch.Tensor) -> Classifier:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    return Classifier(nn.Sequential(nn.Flatten(), linear), input_shape=(1, 8, 8), class_names=NAMES).eval()


def test_what_cannot_be_used_is_refused() -> None:
    model, data = tiny_classifier("conv-bn"), tiny_data(60)
    with pytest.raises(InputError, match=r"fewer images than classes.*at least 4 images, got 3"):
        latent_shifts(model, data.subset([0, 1, 2]), RUN)
    with pytest.raises(MethodFailed, match="every clean image to one class"):
        latent_shifts(model, data.subset((data.truth == 1).nonzero().flatten()), RUN)
    draws = torch.Generator().manual_seed(0)
    broken = head_of(torch.randn(4, 64, generator=draws))
    broken.network.register_forward_hook(lambda m, i, out: out if len(out) < 10 else out / 0 * 0)
    with pytest.raises(InputError, match="not finite"):
        logit_gaps(broken, data, RUN)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[scan\]"):
        latent_shifts(tiny_classifier("conv-bn"), tiny_data(20), RUN)


def test_the_loss_by_hand() -> None:
    model = head_of(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    head = find_affine_head(model)
    shifts = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 1, 2, 3])
    clean = F.cross_entropy(logits, labels)
    moved = logits + head.weight.detach() @ shifts[2].float()

    def loss(aim: int | None, *, balanced: bool) -> Objective:
        return shifted_loss(head, shifts, aim, RUN, beta=2.0, balanced=balanced)

    rest = torch.tensor([0, 2, 4])
    left_out = loss(2, balanced=False)
    assert torch.allclose(left_out(logits, labels, 0), clean + 2 * F.cross_entropy(moved[rest], labels[rest]))
    only = torch.tensor([2, 2])
    assert torch.equal(left_out(logits[:2], only, 0), F.cross_entropy(logits[:2], only))
    kept = torch.where((labels == 2)[:, None], logits, moved)
    expected = (clean + 2 * F.cross_entropy(kept, labels)) / 3
    assert torch.allclose(loss(2, balanced=True)(logits, labels, 0), expected)
    every = loss(None, balanced=True)
    assert torch.equal(every(logits, labels, 3), every(logits, labels, 3))
    assert not torch.equal(every(logits, labels, 3), every(logits, labels, 4))
    shifts[2] = torch.inf
    assert torch.allclose(loss(2, balanced=True)(logits, labels, 0), clean)
