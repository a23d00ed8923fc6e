"""A head that is learned anew: its norm, its pull, its layers, and the loop that carries it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import ARCHITECTURES, tiny_classifier, tiny_data
from unbackdoor.engine import feature_shift
from unbackdoor.engine.descent import Batch, at_bearable_rate, descend, enough_passes
from unbackdoor.engine.feature_shift import (
    HeadRelearning,
    estimate_statistics,
    head_layers,
    relearn_head,
)
from unbackdoor.engine.inference import accuracy, logits_of
from unbackdoor.engine.rng import seeded
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.testing.examples import odd_classifier, on_quadrants
from unbackdoor.types import Classifier, CleanData

RUN = Run.create(seed=3, policy="fp32")
IMAGES = tiny_data(80, seed=1)


def weight_of(model: Classifier) -> Tensor:
    return head_layers(model)[-1].weight.detach().clone()


# ---------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
def test_with_cross_entropy_it_is_the_trainer(family: str, batch_norm: str) -> None:
    recipe = Recipe(epochs=2, lr=0.01, batch_size=39, schedule="cosine", augmentation="crop+flip")
    own, plain = tiny_classifier(family), tiny_classifier(family)

    def loss(batch: Batch) -> Tensor:
        assert torch.equal(IMAGES.truth[batch.rows], batch.labels)
        return F.cross_entropy(logits_of(own, batch.pixels, RUN), batch.labels)

    losses = descend(own, IMAGES, recipe, loss, RUN, augmentation="crop+flip", batch_norm=batch_norm)  # type: ignore[arg-type]
    assert losses == train(plain, IMAGES, recipe, RUN, batch_norm=batch_norm).losses  # type: ignore[arg-type]
    assert own.sha256() == plain.sha256()


def test_a_network_with_rates_of_its_own_keeps_them() -> None:
    recipe = Recipe(epochs=4, lr=0.01, batch_size=40, schedule="constant")
    own, plain = (
        build("airbench[width=4]", input_shape=(1, 16, 16), class_names="abcd", seed=0) for _ in range(2)
    )
    images = replace(IMAGES, pixels=IMAGES.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(logits_of(own, batch.pixels, RUN), batch.labels)

    assert descend(own, images, recipe, loss, RUN) == train(plain, images, recipe, RUN).losses
    assert own.sha256() == plain.sha256()


def head_only(pixels: int = 64) -> Classifier:
    with seeded(0):
        model = on_quadrants(nn.Sequential(nn.Flatten(), nn.Linear(pixels, 4)))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / 4)
    return model


def test_gradients_are_taken_at_the_displaced_weights_and_steps_from_the_others() -> None:
    model = head_only()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(epochs=1, lr=0.5, batch_size=80, momentum=0, weight_decay=0, schedule="constant")

    def loss(batch: Batch) -> Tensor:  # its gradient is the weight itself
        return sum(((p**2).sum() for p in model.parameters()), torch.zeros(())) / 2

    descend(model, IMAGES, recipe, loss, RUN, displace=lambda weights: [p.grad * 3 for p in weights])  # type: ignore[operator]
    for parameter, start in zip(model.parameters(), before, strict=True):
        assert torch.allclose(parameter, start - 0.5 * 4 * start, atol=1e-6)


def test_displaced_batches_move_no_stored_statistics() -> None:
    recipe = Recipe(epochs=1, lr=1e-12, batch_size=80, momentum=0, weight_decay=0, schedule="constant")
    moved = []
    for displaced in (False, True):
        model = tiny_classifier("conv-bn")
        descend(
            model,
            IMAGES,
            recipe,
            lambda batch, model=model: F.cross_entropy(model(batch.pixels), batch.labels),  # type: ignore[misc]
            RUN,
            displace=(lambda weights: [torch.ones_like(p) for p in weights]) if displaced else None,
        )
        moved.append({k: v for k, v in model.network.state_dict().items() if "running" in k})
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_the_gradient_is_clipped_over_all_weights() -> None:
    model = head_only()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    recipe = Recipe(epochs=1, lr=1, batch_size=80, momentum=0, weight_decay=0, schedule="constant")
    descend(model, IMAGES, recipe, lambda batch: 100 * model(batch.pixels).sum(), RUN, clip=0.25)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.25, rel=1e-4)


def test_passes_suffice_for_the_steps() -> None:
    assert enough_passes(80, 40, epochs=2, min_steps=7) == 4
    assert enough_passes(80, 39, epochs=2, min_steps=1) == 2
    assert enough_passes(80, 39, epochs=2, min_steps=7) == 3  # 39, 39 and 2
    assert enough_passes(79, 39, epochs=2, min_steps=7) == 4  # 39 and 39: one image makes no batch
    assert enough_passes(2, 128, epochs=1, min_steps=200) == 200


def broken(_: object = None) -> Classifier:
    raise MethodFailed("training diverged")


def spoiled(share: float) -> Classifier:
    """A classifier that is right on about this share of the images."""
    model = tiny_classifier("conv")
    with torch.no_grad():
        model.network.get_parameter("fc.bias")[: round(4 * (1 - share))] -= 1000
    return model


def test_the_first_rate_that_is_borne_is_kept_and_else_the_best() -> None:
    model = tiny_classifier("conv")
    for outcomes, used in [
        ([1.0], 0), ([None, 1.0], 1), ([0.5, 0.75, 0.5, 0.75], 1), ([0.25, 0.25, 1.0], 2),
        ([None, None, 0.5, None], 2),
    ]:  # fmt: skip
        rates: list[float] = []

        def tuned(
            rate: float, outcomes: Sequence[float | None] = outcomes, rates: list[float] = rates
        ) -> Classifier:
            rates.append(rate)
            share = outcomes[len(rates) - 1]
            return broken() if share is None else spoiled(share)

        out, evidence = at_bearable_rate(model, IMAGES, 0.3, tuned, RUN)
        assert len(rates) == len(outcomes)
        assert evidence["lr"] == pytest.approx(0.3 * 0.1**used)
        assert evidence["fitted_accuracy"] == accuracy(out, IMAGES, RUN)
    with pytest.raises(MethodFailed, match="diverged"):
        at_bearable_rate(model, IMAGES, 0.3, broken, RUN)


# ---------------------------------------------------------------------------------------------------
# The pull and the norm


def one_step(model: Classifier, settings: HeadRelearning, first: Tensor) -> Tensor:
    """The step on a network that is a linear layer, by hand: cross-entropy, pull, projection."""
    weight, bias = weight_of(model), torch.zeros(4)
    x = IMAGES.pixels.flatten(1) / 255  # (N, 64)
    wanted = F.one_hot(IMAGES.truth, 4).float()
    p = (x @ first.T + bias).softmax(1)  # (N, 4)
    counted = -(wanted * p.log()).sum(1) > settings.hinge  # (N,)
    gradient = settings.clean_weight * ((p - wanted) * counted[:, None]).T @ x / len(x)
    strength = settings.strength / (float(weight.square().sum()) if settings.relative else 1)
    if settings.term == "inner-product":
        gradient = gradient + strength * weight
    else:
        gradient = gradient - strength * (first - weight) / (first - weight).norm()
    moved = first - settings.lr * gradient
    return moved * weight.norm() / moved.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": 0.2},
        {"strength": 30.0, "relative": True},
        {"strength": 2.0, "term": "distance", "clean_weight": 0.5, "hinge": 1.4},
        {"strength": 1.0, "initial": "opposite"},
    ],
)
def test_one_step_by_hand(changes: dict[str, object]) -> None:
    settings = HeadRelearning(epochs=1, min_steps=1, batch_size=80, lr=0.5, momentum=0, **changes)  # type: ignore[arg-type]
    model = head_only()
    weight = weight_of(model)
    first = -weight
    if settings.initial == "random":
        first = torch.rand(weight.shape, generator=RUN.generator("head", 0)) - 0.5
        first = first * weight.norm() / first.norm()
    out = relearn_head(model, IMAGES, settings, RUN)
    assert torch.equal(weight_of(model), weight)
    assert torch.allclose(weight_of(out), one_step(model, settings, first), atol=1e-5)


def test_the_norm_is_kept_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[list[float]] = []
    project = feature_shift.project

    def watched(layers: Sequence[nn.Linear], wanted: Sequence[float]) -> None:
        project(layers, wanted)
        norms.append([float(layer.weight.detach().norm()) for layer in layers])

    monkeypatch.setattr(feature_shift, "project", watched)
    model = odd_classifier("linear layers")
    before = float(weight_of(model).norm())
    settings = HeadRelearning(epochs=1, min_steps=6, batch_size=32, lr=0.1, weight_decay=0.1)
    relearn_head(model, IMAGES, settings, RUN)
    assert len(norms) == 1 + 6, "once for the first weights and once for each step"
    assert torch.tensor(norms).flatten().tolist() == pytest.approx([before] * 7, rel=1e-5)


def test_the_stronger_the_pull_the_further_the_head_goes() -> None:
    model, found = tiny_classifier("conv"), []
    for strength in (0.0, 0.5, 5.0):
        settings = HeadRelearning(min_steps=40, strength=strength)
        new, old = weight_of(relearn_head(model, IMAGES, settings, RUN)), weight_of(model)
        found.append(float(F.cosine_similarity(new.flatten(), old.flatten(), dim=0)))
    assert found[0] > found[1] > found[2]
    assert found[2] < -0.9


# ---------------------------------------------------------------------------------------------------
# Targets, first weights, statistics


def test_soft_targets_are_learned_in_the_place_of_labels() -> None:
    settings = HeadRelearning(min_steps=60, strength=0.05)
    model = tiny_classifier("conv")
    labels = F.one_hot(IMAGES.truth, 4)
    plain = relearn_head(model, IMAGES, settings, RUN)
    assert relearn_head(model, IMAGES, settings, RUN, targets=labels).sha256() == plain.sha256()
    turned = relearn_head(model, IMAGES, settings, RUN, targets=labels.roll(1, 1) * 0.8 + 0.05)
    others = replace(IMAGES, labels=(IMAGES.truth + 1) % 4)
    assert accuracy(turned, others, RUN) > 0.9


@pytest.mark.parametrize("count", [40, 200])  # fewer images than the 64 features, and more
@pytest.mark.parametrize("initial", ["prototypes", "least-squares"])
def test_first_weights_from_the_features(initial: str, count: int) -> None:
    model, images = head_only(), tiny_data(count, seed=5)
    targets = F.one_hot(images.truth, 4).float()
    settings = HeadRelearning(initial=initial)  # type: ignore[arg-type]
    old, layers = weight_of(model), head_layers(model)
    feature_shift.restart(model, layers, images, targets, settings, RUN)
    x = images.pixels.flatten(1).double() / 255
    x = x - x.mean(0)
    if initial == "prototypes":
        wanted = torch.stack([x[images.truth == k].mean(0) for k in range(4)])
    else:
        ridge = 0.1 * float(x.square().sum()) / min(count, 64)
        wanted = torch.linalg.solve(x.T @ x + ridge * torch.eye(64), x.T @ (targets.double() - 0.25)).T
    wanted = wanted / wanted.norm() * old.norm()
    assert torch.allclose(weight_of(model).double(), wanted, atol=1e-4)
    assert not layers[-1].bias.any()  # type: ignore[union-attr]
    assert accuracy(model, images, RUN) > 0.9


@pytest.mark.parametrize("at_once", [500, 79])  # in one pass, and in two of 40 and not of 79 and 1
def test_statistics_are_those_of_the_images(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shift, "EVALUATION_BATCH", at_once)
    model = tiny_classifier("conv-bn")
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    estimate_statistics(model, IMAGES, RUN)
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(IMAGES.pixels / 255)
    handle.remove()
    assert torch.allclose(first.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(first.running_var, seen[0].var((0, 2, 3)), rtol=1e-2)  # type: ignore[arg-type]
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in model.modules())


# ---------------------------------------------------------------------------------------------------
# Heads


def deep(*between: Callable[[], nn.Module]) -> Classifier:
    with seeded(0):
        return on_quadrants(
            nn.Sequential(
                nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(),
                *(make() for make in between), nn.Linear(8, 4),
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "last", "all_layers"),
    [
        (deep(lambda: nn.Linear(8, 8), nn.Dropout), (4, 8), [(8, 16), (8, 8), (4, 8)]),
        (deep(lambda: nn.BatchNorm1d(8)), (4, 8), [(4, 8)]),
        (odd_classifier("linear layers"), (4, 8), [(4, 8)]),
        (odd_classifier("head only"), (4, 64), [(4, 64)]),
        (odd_classifier("1x1 head"), (4, 12, 1, 1), [(4, 12, 1, 1)]),
        (tiny_classifier("transformer"), (4, 32), [(4, 32)]),
        (tiny_classifier("conv-bn"), (4, 16), [(4, 16)]),
    ],
)
def test_the_layers_of_the_head(
    model: Classifier, last: tuple[int, ...], all_layers: list[tuple[int, ...]]
) -> None:
    assert [tuple(layer.weight.shape) for layer in head_layers(model)] == [last]
    assert [tuple(layer.weight.shape) for layer in head_layers(model, "all")] == all_layers


def test_every_layer_of_the_head_is_learned_anew_and_keeps_its_norm() -> None:
    model = deep(lambda: nn.Linear(8, 8))
    settings = HeadRelearning(min_steps=3, layers="all", initial="prototypes", batch_size=80)
    out = relearn_head(model, IMAGES, settings, RUN)
    for old, new in zip(head_layers(model, "all"), head_layers(out, "all"), strict=True):
        assert torch.allclose(new.weight.norm(), old.weight.norm(), rtol=1e-5)
        assert F.cosine_similarity(new.weight.flatten(), old.weight.flatten(), dim=0) < 0.5


def test_a_head_that_cannot_learn_is_refused() -> None:
    model = tiny_classifier("conv")
    model.network.get_parameter("fc.weight").requires_grad_(False)
    with pytest.raises(UnsupportedModel, match=r"head cannot learn.*network\.fc"):
        relearn_head(model, IMAGES, HeadRelearning(), RUN)


@pytest.mark.parametrize("method", ["fst", "d3"])
@pytest.mark.parametrize(
    "network", ["1x1 head", "linear layers", "flattened with view, and features beside the logits"]
)
def test_every_kind_of_head_is_learned(method: str, network: str) -> None:
    out = call(method, odd_classifier(network), CleanData.split(IMAGES), precision="fp32")
    assert accuracy(out.model, tiny_data(80, seed=4), RUN) > 0.8
    assert math.isfinite(out.evidence["lr"])
