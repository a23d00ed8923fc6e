"""IMS: its gates, its game against the literal one, its budget, and what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import ARCHITECTURES, tiny_classifier, tiny_data
from unbackdoor.defenses.ims.gates import gate_sites
from unbackdoor.defenses.ims.invertible_gates import InvertibleGates
from unbackdoor.defenses.ims.method import REFERENCE, AlternatingOptimisation, IMSConfig, purify
from unbackdoor.defenses.ims.perturbations import Perturbations
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.rng import seeded
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, CleanData, Images

RUN = Run.create(seed=0, policy="fp32")
SHORT: dict[str, Any] = {"start_rounds": 2, "free_rounds": 2, "sparse_rounds": 2, "steps": 2}
PIXELS = tiny_data(12).pixels.float() / 255


def config(**options: Any) -> IMSConfig:
    out = DEFENSES["ims"].configure({**SHORT, **options})
    assert isinstance(out, IMSConfig)
    return out


def data(count: int = 40) -> CleanData:
    return CleanData.split(tiny_data(count, seed=1))


# ---------------------------------------------------------------------------------------------------
# Gates


def test_both_gates_sum_to_one_and_the_selection() -> None:
    model = tiny_classifier("conv-bn")
    gates = InvertibleGates(model, gate_sites(model), 20.0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.a.uniform_(generator=draws)
        gates.s.uniform_(generator=draws)
    torch.testing.assert_close(gates.values() + gates.values(inverse=True), 1 + gates.s)
    gates.average_(0.5, 0)  # the first value stands for itself
    torch.testing.assert_close(gates.mean_values(), gates.values())
    torch.testing.assert_close(gates.mean_values(inverse=True), gates.values(inverse=True))
    with torch.no_grad():
        gates.a.uniform_(generator=draws)
    before = gates.mean_values().clone()
    gates.average_(0.9, 1)
    torch.testing.assert_close(gates.mean_values(), (before + gates.values()) / 2)


@pytest.mark.parametrize(
    ("a", "s", "forward", "inverse"), [(0, 1, 1, 1), (1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 1)]
)
def test_the_four_corners(a: float, s: float, forward: float, inverse: float) -> None:
    model = tiny_classifier("conv-bn")
    gates = InvertibleGates(model, gate_sites(model), 20.0)
    with torch.no_grad():
        gates.a.fill_(a)
        gates.s.fill_(s)
    assert (gates.values() - forward).abs().max() < 1e-4
    assert (gates.values(inverse=True) - inverse).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_starts_at_the_model_and_ends_as_it_was_gated(kind: str) -> None:
    model = tiny_classifier(kind)
    before = model.sha256()
    with frozen(model):
        game = AlternatingOptimisation(model, data().all, config(lr=0.3), RUN)
        gates = game.gates
        for inverse in (False, True):
            start = gates.network(gates.values(inverse=inverse))(PIXELS)
            torch.testing.assert_close(start, model(PIXELS), rtol=0, atol=1e-3)
        game.stage("selecting", 2, 10.0, perturbed=False)
        game.stage("masking", 2, 0.0)
        with torch.no_grad():  # far from where two rounds lead
            gates.a.uniform_(generator=torch.Generator().manual_seed(0))
            gates.s.uniform_(generator=torch.Generator().manual_seed(1))
        gates.average_(0.5, 1)
        last = gates.network(gates.mean_values())(PIXELS)
    assert not torch.allclose(last, model(PIXELS), atol=1e-3)
    torch.testing.assert_close(gates.folded()(PIXELS), last, rtol=1e-4, atol=1e-4)
    assert model.sha256() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_at_the_start_only_the_inverse_moves_and_only_the_selection() -> None:
    model = tiny_classifier("conv-bn")
    game = AlternatingOptimisation(model, data().all, config(), RUN)
    terms, _ = game.losses(torch.arange(20), perturbed=False)
    gradients = torch.autograd.grad(sum(terms.values(), torch.zeros(())), [game.gates.a, game.gates.s])
    assert gradients[0].abs().max() == 0
    assert gradients[1].abs().max() > 0
    (quiet,) = torch.autograd.grad(game.losses(torch.arange(20), False)[0]["keep clean"], [game.gates.s])
    assert quiet.abs().max() < 1e-3  # 1 - sigmoid(10), and not 0


# ---------------------------------------------------------------------------------------------------
# The literal game


def literal(model: Classifier, images: Images, rounds: tuple[int, int, int], steps: int) -> dict[str, Tensor]:
    """The released procedure as its description reads: hooks, all diagnostics, losses from probabilities."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    a = {name: torch.ones(m.out_channels, requires_grad=True) for name, m in convs.items()}
    s = {name: torch.ones(m.out_channels, requires_grad=True) for name, m in convs.items()}
    gate_mode = ["none"]

    def gate(name: str) -> Tensor:
        kept = torch.sigmoid(20 * ((a[name] if gate_mode[0] == "forward" else 1 - a[name]) - 0.5))
        return kept + s[name] * (1 - kept)

    handles = [
        m.register_forward_hook(
            lambda m, i, out, name=name: out if gate_mode[0] == "none" else out * gate(name).view(-1, 1, 1)
        )
        for name, m in convs.items()
    ]

    def probabilities(kind: str, pixels: Tensor) -> Tensor:
        gate_mode[0] = kind
        return F.softmax(model(pixels), dim=1)

    def agrees(p: Tensor, q: Tensor) -> Tensor:
        return -((p * q).sum(1) + 1e-8).log().mean()

    def disagrees(p: Tensor, q: Tensor) -> Tensor:
        return -(1 - (p * q).sum(1) + 1e-8).log().mean()

    def perturbation(x: Tensor) -> Tensor:
        delta = torch.zeros_like(x, requires_grad=True)
        optimizer = torch.optim.AdamW([delta], lr=0.001)
        for _ in range(steps):
            optimizer.zero_grad()
            there = probabilities("inverse", x + delta)
            plain = probabilities("none", x + delta)
            clean = probabilities("none", x)
            probabilities("forward", x + delta)  # computed and never used
            (agrees(there, plain) + disagrees(plain, clean)).backward(inputs=[delta])
            optimizer.step()
            delta.data.clamp_(-1, 1)
        return delta.detach()

    everything = [*a.values(), *s.values()]
    count = sum(len(v) for v in s.values())
    stages = (("selecting", 10.0, False), ("masking", 0.0, True), ("sparsifying", 10.0, True))
    for number, (label, weight, perturbed) in zip(rounds, stages, strict=True):
        optimizer = torch.optim.AdamW(everything, lr=0.02)
        for i in range(number):
            rows = torch.randperm(len(images), generator=RUN.generator(label, i))[:256]
            x = images.pixels[rows].float() / 255
            delta = perturbation(x)
            clean, moved = probabilities("none", x).detach(), probabilities("none", x + delta).detach()
            loss = agrees(probabilities("forward", x), clean) + disagrees(probabilities("inverse", x), clean)
            if perturbed:
                there = probabilities("inverse", x + delta)
                loss = loss + agrees(probabilities("forward", x + delta), clean)
                loss = loss + agrees(there, moved) + disagrees(there, clean)
            loss = loss + weight * torch.cat([(1 - v).abs() for v in s.values()]).sum() / count
            optimizer.zero_grad()
            loss.backward(inputs=everything)
            optimizer.step()
            for value in everything:
                value.data.clamp_(0, 1)
    for handle in handles:
        handle.remove()
    return {"a": torch.cat(list(a.values())).detach(), "s": torch.cat(list(s.values())).detach()}


class _Counting(nn.Module):
    """Counts the images that go through a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        out: Tensor = self.network(x)
        return out


def counting(model: Classifier) -> tuple[Classifier, _Counting]:
    counter = _Counting(model.copy().network)
    twin = Classifier(
        counter, input_shape=(1, 8, 8), class_names=model.class_names, mean=(0.35,), std=(0.25,)
    )
    return twin.eval(), counter


@pytest.mark.parametrize("kind", ["conv-bn", "conv"])
def test_the_lean_game_goes_where_the_literal_one_goes_in_half_the_passes(kind: str) -> None:
    images, rounds, steps = tiny_data(24, seed=1), (4, 6, 6), 5
    lean, literal_side = (counting(tiny_classifier(kind)) for _ in range(2))
    cfg = config(**{**REFERENCE, "steps": steps, "budget": 0.001 * steps})
    with frozen(lean[0]):
        game = AlternatingOptimisation(lean[0], images, cfg, RUN)
        lean[1].images = 0
        game.stage("selecting", rounds[0], 10.0, perturbed=False)
        game.stage("masking", rounds[1], 0.0)
        game.stage("sparsifying", rounds[2], 10.0)
    expected = literal(literal_side[0], images, rounds, steps)
    assert (1 - expected["s"]).max() > 0.05  # it has gone somewhere
    torch.testing.assert_close(game.gates.s.detach(), expected["s"], rtol=0, atol=1e-4)
    torch.testing.assert_close(game.gates.a.detach(), expected["a"], rtol=0, atol=1e-4)
    # Of a round without perturbations 2 forward passes, of one with them 2 a step, 1, and 4.
    assert lean[1].images == 24 * (4 * 2 + 12 * (2 * steps + 5))
    assert lean[1].images < 0.6 * literal_side[1].images


def test_presets_are_what_they_say() -> None:
    part = DEFENSES["ims"]
    default, reference = part.configure().model_dump(), part.configure(preset="reference").model_dump()
    assert part.configure(preset="robust").model_dump() == default
    kept = {"sparsity": 10.0, "sharpness": 20.0, "budget": 0.02, "largest_budget": 0.25}
    assert {name: v for name, v in default.items() if reference[name] == v} == kept
    # The schedule of the released configuration, and its hidden budget: 20 steps of 0.001.
    assert [reference[f"{name}_rounds"] for name in ("start", "free", "sparse")] == [100, 200, 200]
    assert reference["budget"] / reference["steps"] == pytest.approx(0.001)
    assert (reference["lr"], reference["weight_decay"], reference["patience"]) == (0.02, 0.01, 25)
    vit = part.configure(preset="reference-vit").model_dump()
    assert {name for name, v in vit.items() if reference[name] != v} == {"sparsity"}


def test_patience_ends_a_stage() -> None:
    model = tiny_classifier("conv-bn")
    game = AlternatingOptimisation(model, data().all, config(patience=2, lr=1e-6), RUN)
    assert game.stage("selecting", 50, 10.0, perturbed=False)["rounds"] == 4  # one that counts and three


# ---------------------------------------------------------------------------------------------------
# Perturbations


def perturbed(deltas: Perturbations, calls: int = 1, pixels: Tensor = PIXELS) -> Tensor:
    rows, out = torch.arange(len(pixels)), pixels
    for _ in range(calls):
        out = deltas.minimise(rows, pixels, lambda x: -x.sum())
    return out


def test_perturbations_keep_to_the_budget_and_the_image_range() -> None:
    shape, here = PIXELS.shape, torch.device("cpu")
    free = Perturbations(shape, here, budget=0.6, steps=5, bounded=False, warm=False)
    assert perturbed(free).max() == pytest.approx(0.6, rel=1e-3)
    assert (PIXELS + perturbed(free)).max() > 1
    held = Perturbations(shape, here, budget=0.6, steps=5, bounded=True, warm=False)
    assert perturbed(held).max() <= 0.6 + 1e-6
    assert (PIXELS + perturbed(held)).max() <= 1 + 1e-6
    dark = torch.zeros(shape)
    cold, warm = (Perturbations(shape, here, budget=0.1, steps=4, bounded=True, warm=w) for w in (0, 1))
    cold.budget = warm.budget = 0.1
    for deltas, reached in ((cold, 0.1), (warm, 0.1)):
        assert perturbed(deltas, 3, dark).max() == pytest.approx(reached, rel=1e-3)
    loose = Perturbations(shape, here, budget=0.1, steps=4, bounded=False, warm=False)
    assert perturbed(loose, 3, dark).max() == pytest.approx(0.1, rel=1e-3)  # it begins anew each time
    warm.budget = 0.05  # what is remembered shrinks with the budget
    assert perturbed(warm, 1, dark).max() <= 0.05 + 1e-6


def test_the_budget_follows_the_flip_rate_within_its_limits() -> None:
    deltas = Perturbations(PIXELS.shape, torch.device("cpu"), budget=0.02, steps=1, bounded=True, warm=False)
    sizes = []
    for flipped in (0.0, 0.4, 0.8, 1.0):
        deltas.budget = 0.02
        deltas.adapt(flipped, target_rate=0.8, smallest=0.004, largest=0.25)
        sizes.append(deltas.budget)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] == pytest.approx(0.02)
    for flipped, end in ((0.0, 0.25), (1.0, 0.004)):
        for _ in range(200):
            deltas.adapt(flipped, target_rate=0.8, smallest=0.004, largest=0.25)
        assert deltas.budget == pytest.approx(end)


def test_a_network_that_nothing_flips_gets_a_larger_budget() -> None:
    model = tiny_classifier("conv-bn")
    options = {"start_rounds": 0, "free_rounds": 12, "sparse_rounds": 0, "steps": 3}
    fixed = AlternatingOptimisation(model, data().all, config(**options, flip_rate=0.0), RUN).stage(
        "masking", 12, 0.0
    )
    moved = AlternatingOptimisation(model, data().all, config(**options), RUN).stage("masking", 12, 0.0)
    assert max(fixed["flip_rates"]) == 0
    assert fixed["budgets"] == [0.02] * 12
    assert moved["budgets"][-1] > 0.08
    assert moved["flip_rates"][-1] > 0.2
    assert moved["last"][0]["largest_delta"] <= moved["budgets"][-1] + 1e-6


def test_the_hidden_budget_of_the_reference_is_reported() -> None:
    model = tiny_classifier("conv-bn")
    cfg = config(**{**REFERENCE, "free_rounds": 1})
    last = AlternatingOptimisation(model, data().all, cfg, RUN).stage("masking", 1, 0.0)["last"][0]
    assert 0.005 < last["largest_delta"] < 0.0215


# ---------------------------------------------------------------------------------------------------
# What it needs


def test_labels_are_evidence_only() -> None:
    model, labelled = tiny_classifier("conv-bn"), data()
    bare = replace(
        labelled, fit=replace(labelled.fit, labels=None), select=replace(labelled.select, labels=None)
    )
    with_them, without = (call("ims", model, d, options=SHORT) for d in (labelled, bare))
    assert with_them.model.sha256() == without.model.sha256()
    assert "inverse_accuracy" in with_them.evidence
    assert "inverse_accuracy" not in without.evidence


@pytest.mark.parametrize("what", ["one class", "one image", "constant images", "one answer"])
def test_images_of_one_answer_are_refused(what: str) -> None:
    """What would be learned keeps that answer and no other."""
    model, images = tiny_classifier("conv-bn"), tiny_data(8)
    if what == "one class":
        images = tiny_data(16).subset(torch.arange(0, 16, 4))
    elif what == "one image":
        images = images.subset([0, 0, 0, 0])
    elif what == "constant images":
        images = replace(images, pixels=torch.full_like(images.pixels, 128))
    else:
        with torch.no_grad():
            model.network.fc.bias[2] += 1000
    with pytest.raises(MethodFailed, match=r"every clean image to one class: .* got class \d for all"):
        call("ims", model, CleanData.split(images), options=SHORT)


def test_no_round_changes_nothing() -> None:
    model = tiny_classifier("transformer")
    none = {"start_rounds": 0, "free_rounds": 0, "sparse_rounds": 0}
    out = call("ims", model, data(), options=none)
    assert out.model.sha256() == model.sha256()
    assert out.evidence["closed"] == 0


class _Broken(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x) * float("nan")
        return out


def test_logits_that_are_no_numbers_are_a_failure() -> None:
    model = tiny_classifier("conv-bn")
    broken = Classifier(_Broken(model.network), input_shape=(1, 8, 8), class_names=model.class_names)
    with pytest.raises(MethodFailed, match="selecting, round 1"):
        call("ims", broken, data(), options=SHORT)


def test_a_network_of_one_class_or_without_channels_is_refused() -> None:
    with seeded(0):
        networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)) for outputs in (1, 4)]
    one = Classifier(networks[0], input_shape=(1, 8, 8), class_names="a")
    images = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a",))
    with pytest.raises(UnsupportedModel, match="cannot disagree"):
        purify(one, CleanData.split(images), config(), run=RUN)
    plain = Classifier(networks[1], input_shape=(1, 8, 8), class_names="abcd")
    with pytest.raises(UnsupportedModel, match="no channel to gate"):
        purify(plain, data(), config(), run=RUN)


def test_the_weight_of_the_clean_task_follows_the_agreement() -> None:
    model = tiny_classifier("conv-bn")
    options = {"start_rounds": 0, "free_rounds": 30, "sparse_rounds": 0, "steps": 2, "lr": 0.2}
    game = AlternatingOptimisation(model, data().all, config(**options), RUN)
    row = game.stage("masking", 30, 0.0)["last"][0]
    assert 0 <= row["agreement"] <= 1
    assert 1 <= game.clean_weight <= 100
    fixed = AlternatingOptimisation(model, data().all, config(**options, agreement=0.0), RUN)
    fixed.stage("masking", 30, 0.0)
    assert fixed.clean_weight == 1
