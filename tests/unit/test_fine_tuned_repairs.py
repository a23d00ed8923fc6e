"""Repairs by fine-tuning take a planted backdoor away, at a margin that a no-op and a random prune fail."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import AttackTruth, poison
from unbackdoor.bench.judge import judge
from unbackdoor.defenses import ban, ft_sam, i_bau, nad, pam, sau
from unbackdoor.defenses.bti_dbf.generator import Generator
from unbackdoor.defenses.bti_dbf.method import BTIDBFConfig, benign_mask
from unbackdoor.engine.descent import Batch
from unbackdoor.engine.heads import find_affine_head
from unbackdoor.engine.rng import seeded
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.registry import DEFENSES
from unbackdoor.testing.examples import odd_classifier, on_quadrants
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Classifier, CleanData, Images, Purified

RUN = Run.create(seed=0, policy="fp32")
DATA = CleanData.split(tiny_data(120, seed=1))
TEST = tiny_data(200, seed=7)
# Where the published settings are for five times as many images, the rate is raised or there are more rounds.
EFFECTIVE: dict[str, dict[str, Any]] = {
    "fst": {},
    "d3": {},
    "ft_sam": {},
    "sau": {"rounds": 20, "lr": 0.001},
    "i_bau": {"rounds": 15},
    "nad": {"lr": 0.1, "epochs": 40},
    "ban": {},
    "bti_dbf": {"rounds": 2, "generator_width": 8, "lr": 0.001},
    "pam": {"rounds": 1, "batch_size": 32, "starts": 4},
}


@cache
def victim() -> tuple[Classifier, AttackTruth]:
    """Four white pixels in a corner call for class 0."""
    images, truth = poison(tiny_data(320), "badnets", {"size": 2, "poison_rate": 0.2}, seed=0)
    model = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=images.class_names, seed=0)
    train(model, images, Recipe(epochs=16, batch_size=32, optimizer="adamw", lr=0.003), RUN)
    return model, truth


@cache
def repaired(method: str) -> Purified:
    return call(method, victim()[0], DATA, options=EFFECTIVE.get(method), precision="fp32")


def effective(method: str) -> bool:
    """Half of the attack's success gone, at no more than 5 points of accuracy."""
    model, truth = victim()
    before = judge(model, truth, TEST, RUN)
    assert before.asr.value > 0.9 and before.acc.value > 0.95
    after = judge(repaired(method).model, truth, TEST, RUN)
    return after.asr.value <= before.asr.value - 0.5 and after.acc.value >= before.acc.value - 0.05


@pytest.mark.parametrize("method", EFFECTIVE)
def test_the_backdoor_falls(method: str) -> None:
    assert effective(method)


@pytest.mark.parametrize("method", ["none", "random_prune", "ft"])
def test_a_control_does_not_pass_for_a_repair(method: str) -> None:
    assert not effective(method)


# ---------------------------------------------------------------------------------------------------
# FT-SAM


def test_the_ascent_of_two_weights_by_hand() -> None:
    weights = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([-4.0]))]
    for weight, gradient in zip(weights, (1.0, 2.0), strict=True):
        weight.grad = torch.tensor([gradient])
    # |w| g = (3, 8), of length sqrt(73); w^2 g = (9, 32).
    moves = ft_sam.ascent(weights, rho=2.0)
    assert [float(move) for move in moves] == pytest.approx([18 / math.sqrt(73), 64 / math.sqrt(73)])


def test_a_weight_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([5.0]))
    used.grad = torch.tensor([-1.0])
    assert [float(move) for move in ft_sam.ascent([used, unused], rho=0.5)] == [-1.0, 0.0]
    used.grad.zero_()
    assert [float(move) for move in ft_sam.ascent([used, unused], rho=0.5)] == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------
# SAU


def test_the_divergence_of_opposite_and_of_equal_predictions() -> None:
    sure = torch.tensor([[50.0, 0.0], [0.0, 0.0]])
    assert sau.divergence(sure, sure).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert sau.divergence(sure, sure.flip(1)).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


def test_the_shared_risk_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 0.0]])  # p(0) = 3/4, 3/4, 1/2
    labels, fooled = torch.tensor([0, 1, 0]), torch.tensor([True, True, False])
    # -log(1/4) and -log(3/4), over three images.
    expected = (math.log(4) + math.log(4 / 3)) / 3
    assert float(sau.shared_risk(logits, labels, fooled)) == pytest.approx(expected, abs=1e-5)


def test_a_sure_answer_has_a_finite_risk_with_a_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    risk = sau.shared_risk(logits, torch.tensor([0]), torch.tensor([True]))
    assert 10 < float(risk.detach()) < 20
    half = torch.tensor([[8.0, 0.0]], requires_grad=True)
    sau.shared_risk(half, torch.tensor([0]), torch.tensor([True])).backward()
    assert half.grad is not None and float(half.grad[0, 0]) > 0.4


def batch_of(images: Images) -> Batch:
    return Batch(images.pixels / 255, images.truth, torch.arange(len(images)), 0, 0)


def test_the_shared_perturbation_fools_both_networks_within_its_bound() -> None:
    model, _ = victim()
    batch, cfg = batch_of(tiny_data(40, seed=3)), sau.SAUConfig(bound=0.4)
    other = model.copy()
    with torch.no_grad():
        other.network.get_parameter("fc.bias")[1] += 0.1
    with torch.no_grad():
        clean = model(batch.pixels).argmax(1)
    delta = sau.shared_perturbation(other, model, batch, clean, cfg, RUN)
    assert float(delta.abs().max()) <= 0.4 + 1e-6
    with torch.no_grad():
        one, two = (net(batch.pixels + delta).argmax(1) for net in (model, other))
    assert float(((one == two) & (one != batch.labels)).float().mean()) > 0.5
    assert all(p.requires_grad and p.grad is None for p in other.parameters())


# ---------------------------------------------------------------------------------------------------
# I-BAU


def test_the_hypergradient_is_the_derivative_through_the_perturbation() -> None:
    """On a network where the best perturbation is unique, against differences of the whole minimax."""
    with seeded(0):
        model = on_quadrants(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    batch = batch_of(tiny_data(12, seed=3))
    cfg = i_bau.IBAUConfig(norm_weight=0.2, map_lr=0.5, products=60)
    chosen = torch.arange(12) < 6
    weight = model.network.get_parameter("1.weight")
    start = weight.detach().clone()

    def best() -> Tensor:
        delta = torch.zeros(1, 1, 8, 8)
        for _ in range(60):
            delta.requires_grad_()
            loss = i_bau.inner_loss(model, batch.pixels, batch.labels, delta, cfg, RUN)
            delta = delta.detach() - 0.5 * torch.autograd.grad(loss, delta)[0]
        return delta

    def value(moved: Tensor) -> float:
        with torch.no_grad():
            weight.copy_(moved)
        patch = best() * chosen[:, None, None, None]
        out = float(F.cross_entropy(model(batch.pixels + patch), batch.labels).detach())
        with torch.no_grad():
            weight.copy_(start)
        return out

    delta = best()
    loss = i_bau.minimax(model, batch, delta, chosen, cfg, RUN)
    (gradient,) = torch.autograd.grad(loss, weight)
    patch = delta * chosen[:, None, None, None]
    (plain,) = torch.autograd.grad(F.cross_entropy(model(batch.pixels + patch), batch.labels), weight)
    assert float(loss.detach()) == pytest.approx(value(start), rel=1e-5)
    direction = gradient - plain  # what the perturbation's own change adds
    assert float(direction.norm()) > 0.01 * float(plain.norm())
    direction = direction / direction.norm()
    slope = (value(start + 0.04 * direction) - value(start - 0.04 * direction)) / 0.08
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.03)
    assert abs(float((plain * direction).sum()) - slope) > 0.1 * abs(slope)


def test_one_image_of_a_step_has_the_perturbation_at_the_least() -> None:
    draws = torch.Generator().manual_seed(0)
    assert [int(i_bau.patched(n, 0.01, draws).sum()) for n in (3, 100, 256)] == [1, 1, 2]


# ---------------------------------------------------------------------------------------------------
# NAD


def test_the_map_of_attention_by_hand() -> None:
    channels = torch.tensor([[[[1.0, -2.0]], [[3.0, 4.0]]]])  # (1, 2, 1, 2)
    expected = [10 / math.sqrt(500), 20 / math.sqrt(500)]  # 1 + 9 and 4 + 16
    assert nad.attention(channels, 2.0)[0].tolist() == pytest.approx(expected)
    tokens = channels.flatten(2).transpose(1, 2)  # (1, T, D)
    assert nad.attention(tokens, 2.0)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("resnet18[width=4]", ["network.layer2", "network.layer3", "network.layer4"]),
        ("vit_small[width=16,depth=6]", ["network.blocks.1", "network.blocks.3", "network.blocks.5"]),
    ],
)
def test_the_stages_of_a_network(architecture: str, stages: list[str]) -> None:
    model = build(architecture, input_shape=(3, 32, 32), class_names="abcd")
    assert nad.attention_stages(model) == stages


def test_a_network_without_maps_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no map to look at"):
        nad.attention_stages(odd_classifier("linear layers"))


# ---------------------------------------------------------------------------------------------------
# BAN


NOISY = {
    "conv-bn": {"network.bn1.weight", "network.bn1.bias"},
    "conv": {"network.conv1.weight", "network.conv1.bias"},
    "transformer": {"network.norm.weight", "network.blocks.0.norm1.bias"},
}


@pytest.mark.parametrize("family", sorted(NOISY))
def test_noise_goes_from_a_draw_one_step_up_the_loss(family: str) -> None:
    model, batch = tiny_classifier(family), batch_of(tiny_data(40, seed=3))
    names, cfg = ban.noisy_parameters(model), ban.BANConfig(eps=0.2)
    assert NOISY[family] <= set(names) and not any("fc" in name or "head" in name for name in names)
    noise = ban.adversarial_noise(model, names, batch, cfg, RUN)
    draws, drawn = RUN.generator("noise", 0), {}
    for name in names:
        drawn[name] = 0.2 * (2 * torch.rand(noise[name].shape, generator=draws) - 1)
    moved = torch.cat([(noise[name] - drawn[name]).flatten() for name in names]).abs()
    assert torch.allclose(moved[moved > 1e-6], torch.tensor(0.2), atol=1e-6)
    with torch.no_grad():
        before, after = (float(ban.noisy_loss(model, n, batch, RUN)) for n in (drawn, noise))
    assert after > before


def test_noise_moves_no_stored_statistics() -> None:
    model, batch = tiny_classifier("conv-bn"), batch_of(tiny_data(40, seed=3))
    before = {k: v.clone() for k, v in model.network.state_dict().items() if "running" in k}
    model.train()
    ban.noisy_loss(model, {"network.bn1.weight": torch.full((8,), 0.5)}, batch, RUN)
    assert all(torch.equal(v, model.network.state_dict()[k]) for k, v in before.items())


def test_a_network_without_neurons_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"no neuron to put noise on.*network\.1"):
        ban.noisy_parameters(odd_classifier("head only"))


# ---------------------------------------------------------------------------------------------------
# BTI-DBF


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 13), (3, 32, 32), (1, 1, 2)])
def test_the_generator_is_the_identity_at_first_and_can_learn(shape: tuple[int, int, int]) -> None:
    with seeded(0):
        generator = Generator(shape[0], 4)
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    out = generator(pixels)
    assert torch.equal(out, pixels)
    out.square().sum().backward()
    assert generator.last.weight.grad is not None and bool(generator.last.weight.grad.any())


def test_the_mask_keeps_the_features_that_classify() -> None:
    model, data = planted((2,)), CleanData.split(block_data(80))
    head = find_affine_head(model)
    cfg = BTIDBFConfig(mask_epochs=60, mask_lr=0.1)
    mask = benign_mask(model, head, data, cfg, RUN, 0)
    drawn = torch.randn(13, generator=RUN.generator("mask", 0)).tanh() / 2 + 0.5
    # The complement's loss has no bound, and may hold a single class for itself.
    assert int((mask[:8] > 0.9).sum()) >= 7, "the eight blocks make the eight classes"
    assert torch.allclose(mask[8:12], drawn[8:12], atol=1e-4), "clean images say nothing of the corners"


def test_the_class_of_the_backdoor_is_called() -> None:
    assert repaired("bti_dbf").evidence["target"] == victim()[1].target == 0


# ---------------------------------------------------------------------------------------------------
# PAM


def test_the_way_back_of_two_weights_by_hand() -> None:
    weights = [nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))]
    origin = [torch.tensor([4.0]), torch.tensor([-2.0])]  # 3 and -4 away, of length 5
    moves = pam.way_back(weights, origin, rho=2.0)
    assert [float(move) for move in moves] == pytest.approx([1.2, -1.6])
    same = pam.way_back(weights, [w.detach() for w in weights], rho=2.0)
    assert [float(move) for move in same] == [0.0, 0.0], "the first step is one of plain descent"


def corner(label: int, value: float, place: int = 0) -> RecoveredTrigger:
    mask = torch.zeros(8, 8)
    mask[place, :2] = 1.0
    return RecoveredTrigger(label, torch.full((1, 8, 8), value), mask)


@pytest.mark.parametrize(("count", "stamped"), [(3, 1), (10, 3), (25, 6)])
def test_a_fifth_of_a_step_and_one_image_has_a_trigger(count: int, stamped: int) -> None:
    batch = batch_of(tiny_data(count, seed=3))
    drawn = [pam.with_triggers(batch, [corner(0, 1.0)], 0.2, RUN.generator("a")) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1]), "both passes of a step see the same images"
    assert int((drawn[0] != batch.pixels).flatten(1).any(1).sum()) == stamped


def test_several_triggers_share_the_images() -> None:
    batch = batch_of(tiny_data(40, seed=3))
    triggers = [corner(0, 2.0), corner(1, 2.0, place=7)]  # brighter than any pixel, so that all are seen
    pixels = pam.with_triggers(batch, triggers, 1.0, RUN.generator("a"))
    top, bottom = ((pixels[:, 0, row, :2] == 1).all(1) for row in (0, 7))
    assert bool((top | bottom).all()) and int(top.sum()) >= 20 and int(bottom.sum()) >= 20


def test_each_gradient_is_taken_on_the_way_back_to_the_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = victim()
    seen: list[float] = []

    def noted(weights: Any, origin: Any, rho: float) -> list[Tensor]:
        moves = real(weights, origin, rho)
        to_origin = [v.detach() - w.detach() for w, v in zip(weights, origin, strict=True)]
        seen.append(float(torch.stack([move.norm() for move in moves]).norm()))
        assert all(bool((move * way >= 0).all()) for move, way in zip(moves, to_origin, strict=True))
        ours = dict(model.named_parameters()).values()
        assert all(torch.equal(v.cpu(), p) for v, p in zip(origin, ours, strict=True))
        return moves

    real = pam.way_back
    monkeypatch.setattr(pam, "way_back", noted)
    cfg = pam.PAMConfig(epochs=1, rho=0.3, batch_size=40)
    out, _ = pam.unlearned(model, model, [corner(0, 1.0)], DATA, cfg, RUN, 0)
    assert seen == pytest.approx([0.0, 0.3, 0.3])
    assert out.sha256() != model.sha256()


def test_what_is_suspected_is_what_pam_repairs() -> None:
    model, _ = victim()
    mask = torch.zeros(8, 8)
    mask[6:, 6:] = 1.0  # the attacker's own place
    works = RecoveredTrigger(0, torch.ones(1, 8, 8), mask)
    idle = RecoveredTrigger(2, torch.zeros(1, 8, 8), torch.zeros(8, 8))
    options = {**DEFENSES["pam"].quick, "rounds": 1}
    suspicion = Suspicion.of_triggers([idle, works])
    out = call("pam", model, DATA, options=options, precision="fp32", suspicion=suspicion)
    assert out.evidence["targets"] == [0, 2], "what works comes first, and a search gives the other"
    assert "recovered before" in out.evidence["remarks"][1] and out.evidence["held_out_success"][0] > 0.9
    alone = Suspicion.of_triggers([idle])
    out = call("pam", model, DATA, options=options, precision="fp32", suspicion=alone)
    assert out.evidence["targets"] == [2] and "searched anew" in out.evidence["remarks"][1]
    asked = call("pam", model, DATA, options={**options, "target": 1}, precision="fp32", suspicion=suspicion)
    assert asked.evidence["targets"] == [1]
    assert repaired("pam").evidence["targets"] == [0], "without a suspicion, the class reached first"


def test_pam_refuses_a_class_that_there_is_none_of() -> None:
    with pytest.raises(ConfigError, match=r"target: expected 0\.\.3, got 4"):
        call("pam", victim()[0], DATA, options={"target": 4}, precision="fp32")


# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EFFECTIVE)
def test_every_method_has_its_row_on_the_page(method: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "defenses.md"
    assert f"| `{method}` |" in page.read_text(encoding="utf-8")
