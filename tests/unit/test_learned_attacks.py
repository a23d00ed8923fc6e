"""Triggers that are learned: closed forms, files, resumption, and what they do to a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import NAMES, tiny_data
from unbackdoor.attacks import AttackTruth, input_aware, poison, prepare, stamped, trojannn
from unbackdoor.attacks.generators import GeneratorNetwork
from unbackdoor.attacks.surrogate import surrogate
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.bench.victims import VictimSpec, save_victim, train_victim
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import reserve
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import ConfigError, InputError, IntegrityError
from unbackdoor.networks import build
from unbackdoor.registry import ATTACKS
from unbackdoor.types import Classifier, T, state_sha256

RUN = Run.create(seed=3, policy="fp32")
DATA = DataSet("tiny", tiny_data(160), tiny_data(40, seed=1), "crop", (), ())
LEARNED = [name for name in ATTACKS if "learned trigger" in ATTACKS[name].traits]


def spec(attack: str, **options: Any) -> VictimSpec:
    recipe = Recipe(epochs=3, batch_size=32, lr=0.02)
    options = {**ATTACKS[attack].quick, **options}
    return VictimSpec("tiny", "small_cnn[width=4]", recipe, attack=attack, options=options, seed=3)


class Killed(BaseException):
    """Stands for a kill: not an Exception, so nothing may catch it."""


def killed_at(label: str, after: int) -> Run:
    """Return a run that ends in the loop of this name."""

    def show(items: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
        for done, item in enumerate(items):
            if name == label and done == after:
                raise Killed
            yield item

    return replace(RUN, show=show)


# ---------------------------------------------------------------------------------------------------
# What every learned trigger keeps


@pytest.mark.parametrize("attack", LEARNED)
def test_the_truth_survives_its_files_bit_by_bit(attack: str, tmp_path: Path) -> None:
    model, truth = train_victim(spec(attack), DATA, RUN)
    twin_model, twin = train_victim(spec(attack), DATA, RUN)
    assert model.sha256() == twin_model.sha256()
    assert state_sha256(truth.tensors) == state_sha256(twin.tensors)
    path = tmp_path / "victim.safetensors"
    save_victim(model, truth, path, history=[])
    loaded = load_truth(path)
    assert loaded.spec() == truth.spec()
    triggered = stamped(DATA.test.pixels, truth)
    assert triggered.dtype == torch.uint8
    assert not torch.equal(triggered, DATA.test.pixels)
    assert torch.equal(stamped(DATA.test.pixels, loaded), triggered)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stamped(DATA.test.pixels, loaded), triggered)
    assert attack not in path.with_suffix(".json").read_text()

    # The tensors of another victim, or none, are not taken for these.
    _, other = train_victim(replace(spec(attack), seed=4), DATA, RUN)
    beside = tmp_path / "victim.truth.safetensors"
    save_victim(model, other, tmp_path / "other.safetensors", history=[])
    beside.write_bytes((tmp_path / "other.truth.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match="tensors of the trigger"):
        load_truth(path)
    beside.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        load_truth(path)
    beside.unlink()
    with pytest.raises(InputError, match="what the trigger learned is missing"):
        load_truth(path)


def test_a_victim_without_a_learned_trigger_leaves_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "victim.safetensors"
    model, truth = train_victim(spec("trojannn"), DATA, RUN)
    save_victim(model, truth, path, history=[])
    _, given = poison(DATA.train, "badnets", seed=3)
    save_victim(model, given, path, history=[])
    assert not (tmp_path / "victim.truth.safetensors").exists()
    assert set(given.spec()) == {"attack", "options", "shape", "classes", "seed"}
    assert load_truth(path).attack == "badnets"


@pytest.mark.parametrize(
    ("attack", "label", "after", "left"),
    [
        ("trojannn", "training", 12, {"checkpoint", "checkpoint.trigger"}),
        ("trojannn", "TrojanNN's patch", 5, set()),
        ("input_aware", "training", 12, {"checkpoint", "checkpoint.trigger"}),
        ("input_aware", "masks", 1, set()),
    ],
)
def test_a_killed_training_resumes_to_the_same_bytes(
    attack: str, label: str, after: int, left: set[str], tmp_path: Path
) -> None:
    whole, truth = train_victim(spec(attack), DATA, RUN)
    file = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train_victim(spec(attack), DATA, killed_at(label, after), checkpoint=file)
    assert {path.name for path in tmp_path.iterdir()} == left
    resumed, again = train_victim(spec(attack), DATA, RUN, checkpoint=file)
    assert resumed.sha256() == whole.sha256()
    assert state_sha256(again.tensors) == state_sha256(truth.tensors)
    assert list(tmp_path.iterdir()) == []


def test_what_was_learned_under_other_options_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train_victim(spec("trojannn"), DATA, killed_at("training", 0), checkpoint=file)
    _, truth = train_victim(spec("trojannn", size=3), DATA, RUN, checkpoint=file)
    assert truth.tensors["patch"].shape == (1, 3, 3)
    with pytest.raises(Killed):
        train_victim(spec("input_aware"), DATA, killed_at("training", 12), checkpoint=file)
    with pytest.raises(IntegrityError, match="another training run"):
        train_victim(spec("input_aware", diversity=2.0), DATA, RUN, checkpoint=file)


def test_a_trigger_stamps_nothing_before_it_is_learned() -> None:
    for attack in LEARNED:
        truth = prepare(DATA.train, attack)
        with pytest.raises(InputError, match="not learned yet"):
            stamped(DATA.test.pixels, truth)
    with pytest.raises(InputError, match="controls the training"):
        poison(DATA.train, "input_aware")
    with pytest.raises(IntegrityError):
        AttackTruth.from_spec({**truth.spec(), "tensors_sha256": "0"})


# ---------------------------------------------------------------------------------------------------
# TrojanNN


def small(seed: int = 0) -> Classifier:
    return build("small_cnn[width=4]", input_shape=(1, 8, 8), class_names=NAMES, seed=seed)


def test_the_neuron_with_the_largest_incoming_weights_is_chosen() -> None:
    model = small()
    conv, norm = model.network.get_submodule("conv4"), model.network.get_submodule("bn4")
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        conv.weight.fill_(0.1)
        conv.weight[5] = -0.3
        conv.weight[2] = 0.2
    assert trojannn.chosen_neurons(model, 2).tolist() == [5, 2]
    with torch.no_grad():
        norm.weight[2] = -2.0  # folded in: 0.2 * 2 beats 0.3
    assert trojannn.chosen_neurons(model, 1).tolist() == [2]


def test_the_patch_raises_the_neurons_and_stays_in_its_corner() -> None:
    cfg = trojannn.TrojanNNConfig(surrogate_width=4, surrogate_epochs=2, margin=1, steps=40)
    model = surrogate(DATA.train, cfg, RUN, label="TrojanNN")
    window = (..., slice(4, 7), slice(4, 7))
    patch = trojannn.learn_patch(model, DATA.train, window, 3, cfg, RUN)
    assert patch.shape == (1, 3, 3)
    assert torch.equal(patch, patch.clamp(0, 1))
    neurons, pixels = trojannn.chosen_neurons(model, cfg.neurons), DATA.test.pixels.float() / 255

    def mean_with(values: Tensor) -> float:
        laid = pixels.clone()
        laid[window] = values
        with torch.no_grad():
            return float(trojannn.neuron_values(model, laid, neurons).mean())

    draws = torch.Generator().manual_seed(0)
    by_chance = [mean_with(torch.rand(1, 3, 3, generator=draws)) for _ in range(20)]
    assert mean_with(patch) > max(by_chance)

    _, truth = poison(DATA.train, "trojannn", {**ATTACKS["trojannn"].quick, "size": 3, "margin": 1}, seed=0)
    moved = (stamped(DATA.test.pixels, truth) != DATA.test.pixels).any(0)[0]  # (8, 8)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[4:7, 4:7] = False
    assert not (moved & outside).any()
    assert truth.tensors["patch"].dtype == torch.uint8


# ---------------------------------------------------------------------------------------------------
# Input-aware


def test_the_parts_of_input_aware_by_hand() -> None:
    black, white = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert torch.equal(input_aware.blend(black, white, 0.25 * white), 0.25 * white)
    pressed = input_aware.sharpened(torch.tensor([0.0, 0.5, 1.0]))
    assert pressed.tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)
    # Images 1 apart, drawings 0.5 apart; and a drawing that does not differ costs much, with a gradient.
    images = torch.cat([black, white])
    assert float(input_aware.diversity_loss(images, 0.5 * images)) == pytest.approx(2, rel=1e-6)
    same = torch.full((2, 1, 2, 2), 0.3, requires_grad=True)
    loss = input_aware.diversity_loss(images, same)
    loss.backward()
    assert float(loss.detach()) > 1000
    assert same.grad is not None and bool(torch.isfinite(same.grad).all())


class Own(nn.Module):
    """Draws for every image a constant that says which image it was drawn for."""

    def forward(self, pixels: Tensor) -> Tensor:
        return 1 - pixels[:, :, :1, :1].expand_as(pixels)


class Everywhere(nn.Module):
    """A mask that shows the whole pattern."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), 1, *pixels.shape[2:])


def changed(rate: float, cross: float, seed: int, count: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the constants of a batch before and after, and its labels before and after."""
    cfg = input_aware.InputAwareConfig(poison_rate=rate, cross_rate=cross, target=1)
    pixels = (torch.arange(count) / 100)[:, None, None, None].expand(count, 1, 4, 4)  # all below 0.5
    labels = torch.zeros(count, dtype=torch.int64)
    draws = torch.Generator().manual_seed(seed)
    out, new, _ = input_aware.attacked(pixels, labels, Own(), Everywhere(), cfg, draws)
    assert out.shape == pixels.shape
    assert not labels.any()
    return pixels[:, 0, 0, 0], out[:, 0, 0, 0], labels, new


@pytest.mark.parametrize(("rate", "cross"), [(0.1, 0.1), (0.02, 0.3), (0.3, 0.02), (0.5, 0.5), (0.3, 0.0)])
def test_own_triggers_go_to_the_target_and_lent_ones_nowhere(rate: float, cross: float) -> None:
    owns, lents = [], []
    for seed in range(200):
        before, after, _, labels = changed(rate, cross, seed)
        touched = (after - before).abs() > 1e-6
        own = touched & ((after - (1 - before)).abs() < 1e-6)
        lent = touched & ~own
        assert torch.equal(labels == 1, own)
        # A lent trigger is that of an image of the batch, and never one's own.
        assert all(bool(((1 - before - value).abs() < 1e-6).any()) for value in after[lent])
        owns.append(int(own.sum()) / 20)
        lents.append(int(lent.sum()) / 20)
    assert sum(owns) / 200 == pytest.approx(rate, abs=0.01)
    assert sum(lents) / 200 == pytest.approx(cross, abs=0.01)


def test_masks_are_sparse_sharp_and_differ_from_image_to_image() -> None:
    pixels, shown = DATA.test.pixels.float() / 255, {}
    for weight in (2.0, 100.0):
        cfg = input_aware.InputAwareConfig(width=4, mask_weight=weight)
        with rng.seeded(0):
            network = GeneratorNetwork(1, 1, cfg.width, 1)
        input_aware.learn_mask(network, tiny_data(320), cfg, RUN)
        assert not network.training
        with torch.no_grad():
            mask = input_aware.sharpened(network(pixels))  # (N, 1, 8, 8)
        shown[weight] = float(mask.mean())
        assert float(((mask > 0.1) & (mask < 0.9)).float().mean()) < 0.1
        assert not torch.equal(mask[0], mask[1])
    # The price of what shows decides how much shows; at the default it is about what the public code aims at.
    assert 0.005 < shown[100.0] < 0.05 < shown[2.0]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 28), (4, 64, 64), (3, 9, 7)])
def test_generators_take_any_size(shape: tuple[int, int, int]) -> None:
    for levels in (1, 2):
        with rng.seeded(0):
            drawn = GeneratorNetwork(shape[0], 2, 2, levels)(torch.rand(2, *shape))
        assert drawn.shape == (2, 2, *shape[1:])


def test_the_shares_of_a_batch_are_bounded_together() -> None:
    with pytest.raises(ConfigError, match="at most 1 together"):
        prepare(DATA.train, "input_aware", {"poison_rate": 0.6, "cross_rate": 0.5})
    # Poisoned anew in every batch, so no count of images bounds the rate.
    training, _ = reserve(DATA.train)
    assert prepare(training, "input_aware", {"poison_rate": 0.9, "cross_rate": 0.1}).target == 0
