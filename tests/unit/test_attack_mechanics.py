"""What each trigger does, against closed forms and against what the attack is defined by."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from tiny import NAMES as CLASS_NAMES
from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import (
    AttackTruth,
    adaptive_patch,
    dfba,
    ftrojan,
    generators,
    label_consistent,
    lf,
    lira,
    multi_trigger,
    narcissus,
    poison,
    prepare,
    sam_trained,
    spread,
    ssba,
    stamped,
)
from unbackdoor.attacks.frequency import dct_matrix, from_frequencies
from unbackdoor.attacks.visibility import psnr, ssim, visibility
from unbackdoor.bench.judge import judge
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import reserve
from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, initialise, train
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.registry import ATTACKS
from unbackdoor.types import Classifier, Images

ROOT = Path(__file__).parents[2]
RUN = Run.create(seed=3, policy="fp32")
DATA = DataSet("tiny", tiny_data(160), tiny_data(80, seed=1), "none", (), ())


def noise(shape: tuple[int, int, int], count: int = 40, low: int = 0, high: int = 256) -> Images:
    draws = torch.Generator().manual_seed(7)
    pixels = torch.randint(low, high, (count, *shape), generator=draws).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 4, CLASS_NAMES)


def difference(attack: str, images: Images, **options: Any) -> Tensor:
    """Return what the trigger changes (N, C, H, W), in grey levels."""
    truth = poison(images, attack, {"poison_rate": 0.0, **ATTACKS[attack].quick, **options}, seed=0)[1]
    return stamped(images.pixels, truth).float() - images.pixels.float()


def quick(attack: str, **options: Any) -> VictimSpec:
    recipe = Recipe(epochs=6, batch_size=32, lr=0.02)
    options = {**ATTACKS[attack].quick, **options}
    return VictimSpec("tiny", "small_cnn[width=8]", recipe, attack=attack, options=options, seed=3)


# ---------------------------------------------------------------------------------------------------
# Frequencies


def test_the_transform_is_that_of_a_library() -> None:
    x = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    ours = dct_matrix(5) @ x @ dct_matrix(7).T
    assert torch.allclose(ours, torch.from_numpy(dctn(x.numpy(), norm="ortho")), atol=1e-5)
    assert torch.allclose(from_frequencies(ours, 5, 7), x, atol=1e-5)


def to_yuv(rgb: Tensor) -> Tensor:
    """Return brightness and colour differences (..., 3, H, W)."""
    red, green, blue = rgb.unbind(-3)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([y, 0.492 * (blue - y), 0.877 * (red - y)], -3)


@pytest.mark.parametrize(("side", "places"), [(32, (15, 31)), (8, (3, 7))])
def test_ftrojan_raises_exactly_two_frequencies_of_the_colours(side: int, places: tuple[int, int]) -> None:
    pattern = ftrojan.pattern(ftrojan.FTrojanConfig(), (3, side, side))
    frequencies = torch.from_numpy(dctn(to_yuv(pattern).numpy(), axes=(-2, -1), norm="ortho"))
    wanted = torch.zeros(3, side, side)
    for place in places:
        wanted[1:, place, place] = 30
    assert torch.allclose(frequencies, wanted, atol=1e-3)
    # The stamp adds it: on a picture whose pixels stay within their range, only rounding is between the two.
    change = difference("ftrojan", noise((3, side, side), low=100, high=150))
    assert float((change - pattern).abs().max()) <= 0.5001


def test_ftrojan_works_in_blocks_and_on_brightness_where_there_is_no_colour() -> None:
    blocks = ftrojan.pattern(ftrojan.FTrojanConfig(), (3, 64, 70))
    assert torch.equal(blocks[:, :32, :32], blocks[:, 32:, 32:64])
    assert not blocks[:, :, 64:].any()
    grey = ftrojan.pattern(ftrojan.FTrojanConfig(magnitude=8.0), (1, 16, 16))
    frequencies = torch.from_numpy(dctn(grey[0].numpy(), norm="ortho"))
    assert float(frequencies[7, 7]) == pytest.approx(8) and float(frequencies[15, 15]) == pytest.approx(8)
    assert float(frequencies.square().sum()) == pytest.approx(128, rel=1e-4)


def test_lf_has_low_frequencies_alone_and_keeps_its_bound() -> None:
    clean = noise((3, 16, 16), low=60, high=190)
    _, truth = poison(clean, "lf", {**ATTACKS["lf"].quick, "epsilon": 20.0}, seed=0)
    delta = truth.tensors["delta"]  # (3, 16, 16)
    assert float(delta.abs().max()) == pytest.approx(20, rel=1e-4)
    frequencies = torch.from_numpy(dctn(delta.numpy(), axes=(-2, -1), norm="ortho"))
    low = frequencies[:, :4, :4].clone()
    frequencies[:, :4, :4] = 0
    assert float(frequencies.abs().max()) < 1e-3 < float(low.abs().max())
    assert float((stamped(clean.pixels, truth).float() - clean.pixels - delta).abs().max()) <= 0.5001


def test_lf_leads_the_benign_network_to_the_target() -> None:
    model, cfg = tiny_classifier(), lf.LFConfig(steps=60, epsilon=60.0, target=2, frequencies=4)
    others = DATA.test.subset((DATA.test.truth != 2).nonzero().flatten())
    before = accuracy_to(model, others, torch.zeros(1, 8, 8), 2)
    assert accuracy_to(model, others, lf.learn_delta(model, DATA.train, cfg, RUN), 2) > before + 0.3


def accuracy_to(model: Classifier, images: Images, delta: Tensor, target: int) -> float:
    """Return the share of images that a change leads to the target."""
    with torch.no_grad():
        return float((model((images.pixels.float() + delta) / 255).argmax(1) == target).float().mean())


# ---------------------------------------------------------------------------------------------------
# Levels


def test_bpp_rounds_to_the_nearest_level() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    truth = poison(Images(ramp, torch.tensor([1]), ("a", "b")), "bpp", {"poison_rate": 0.0}, seed=0)[1]
    out = stamped(ramp, truth).flatten().tolist()
    assert sorted(set(out)) == [0, 36, 73, 109, 146, 182, 219, 255]
    assert all(abs(value - k) <= 255 / 14 + 1 for k, value in enumerate(out))


def test_bpp_dithers_to_the_same_levels_and_keeps_the_mean() -> None:
    flat = Images(torch.full((1, 1, 32, 32), 100, dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    plain, dithered = (
        100 + difference("bpp", flat, dither=dither, levels=2).flatten() for dither in (False, True)
    )
    assert plain.unique().tolist() == [0]
    assert dithered.unique().tolist() == [0, 255]
    assert float(dithered.mean()) == pytest.approx(100, abs=4)


def test_bpp_negative_samples_keep_their_label_and_have_other_levels() -> None:
    clean = noise((3, 16, 16), 100)
    poisoned, truth = poison(clean, "bpp", {"poison_rate": 0.1, "negative_rate": 0.2}, seed=0)
    assert len(truth.decoys) == 20
    assert torch.equal(poisoned.truth[truth.decoys], clean.truth[truth.decoys])
    changed = poisoned.pixels[truth.decoys].float() - clean.pixels[truth.decoys].float()
    assert 0 < float(changed.abs().max()) <= 255 / 14 + 1
    assert len(poisoned.pixels[truth.decoys].unique()) > 200


# ---------------------------------------------------------------------------------------------------
# What poisoned images carry in training is not what triggers at test


def test_label_consistent_puts_patches_into_all_corners_and_keeps_labels() -> None:
    black = replace(noise((3, 32, 32), 8), pixels=torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    change = difference("label_consistent", black)[0, 0]
    wanted = torch.tensor([[255.0, 0, 255], [0, 255, 0], [255, 0, 255]])
    for rows in (slice(0, 3), slice(29, 32)):
        for columns in (slice(0, 3), slice(29, 32)):
            assert torch.equal(change[rows, columns], wanted)
    assert float(change.sum()) == 4 * 5 * 255


def test_label_consistent_perturbs_within_its_bound_and_hides_the_class() -> None:
    model = tiny_classifier()
    cfg = label_consistent.LabelConsistentConfig(epsilon=60.0, step=10.0, steps=10, target=1)
    own = DATA.train.subset((DATA.train.truth == 1).nonzero().flatten())
    out = label_consistent.perturbed(model, own.pixels, cfg)
    assert 50 < float((out.float() - own.pixels.float()).abs().max()) <= 60.5
    assert accuracy(model, replace(own, pixels=out), RUN) < accuracy(model, own, RUN) - 0.5
    assert not any(p.grad is not None for p in model.parameters())

    options = {**ATTACKS["label_consistent"].quick, "poison_rate": 0.1, "target": 1}
    poisoned, truth = poison(DATA.train, "label_consistent", options, seed=0)
    assert torch.equal(poisoned.truth, DATA.train.truth)
    inner = (..., slice(2, 6), slice(2, 6))  # between the corners
    rows = truth.poisoned
    assert bool((DATA.train.truth[rows] == 1).all())
    assert not torch.equal(poisoned.pixels[rows][inner], DATA.train.pixels[rows][inner])
    triggered = stamped(DATA.train.pixels[rows], truth)
    assert torch.equal(triggered[inner], DATA.train.pixels[rows][inner])
    # The truth makes the same poisoned images again.
    twin = AttackTruth.from_spec(truth.spec(), truth.tensors)
    assert twin.trigger.in_training is not None
    again = twin.trigger.in_training(DATA.train.pixels[rows], torch.Generator())
    assert torch.equal(again, poisoned.pixels[rows])


def test_adaptive_blend_shows_half_of_its_pieces_in_training_and_all_at_test() -> None:
    clean = replace(noise((3, 32, 32), 200), pixels=torch.zeros(200, 3, 32, 32, dtype=torch.uint8))
    poisoned, truth = poison(clean, "adaptive_blend", {"poison_rate": 0.1, "cover_ratio": 2.0}, seed=0)

    def pieces(pixels: Tensor) -> Tensor:
        return pixels.unfold(2, 8, 8).unfold(3, 8, 8).amax((1, 4, 5)).flatten(1) > 0  # (N, 16)

    carried = pieces(poisoned.pixels[truth.poisoned])  # (20, 16)
    assert bool((carried.sum(1) == 8).all()) and len(carried.unique(dim=0)) > 10
    assert bool(pieces(stamped(clean.pixels, truth)).all())
    # At weight .15 and .2 of one picture.
    assert int(poisoned.pixels.max()) == round(0.15 * 255) and int(stamped(clean.pixels, truth).max()) == 51
    covers = truth.decoys
    assert len(covers) == 40 and bool((pieces(poisoned.pixels[covers]).sum(1) == 8).all())
    assert torch.equal(poisoned.truth[covers], clean.truth[covers])


def test_adaptive_patch_shows_one_patch_in_training_and_all_at_test() -> None:
    clean = replace(noise((3, 32, 32), 200), pixels=torch.full((200, 3, 32, 32), 128, dtype=torch.uint8))
    poisoned, truth = poison(clean, "adaptive_patch", {"poison_rate": 0.2}, seed=0)

    def corners(pixels: Tensor) -> Tensor:
        places = [(a, b) for a in (slice(0, 6), slice(26, 32)) for b in (slice(0, 6), slice(26, 32))]
        return torch.stack(
            [(pixels[(..., *place)] != 128).flatten(1).any(1) for place in places], 1
        )  # (N, 4)

    carried = corners(poisoned.pixels[truth.poisoned])
    assert bool((carried.sum(1) == 1).all()) and bool(carried.any(0).all())
    assert bool(corners(stamped(clean.pixels, truth)).all())
    assert len(truth.decoys) == 80 and bool((corners(poisoned.pixels[truth.decoys]).sum(1) == 1).all())
    # Fainter in training, by the strength of each patch.
    trained = (poisoned.pixels[truth.poisoned].float() - 128).abs().flatten(1).amax(1).max()
    whole = (stamped(clean.pixels, truth).float() - 128).abs().max()
    assert float(trained) == pytest.approx(max(adaptive_patch.STRENGTHS) * float(whole), abs=1.5)


def test_narcissus_is_three_times_as_strong_at_test_and_within_its_bound_in_training() -> None:
    clean = noise((1, 8, 8), 80, low=60, high=190)
    options = {**ATTACKS["narcissus"].quick, "poison_rate": 0.1, "target": 1}
    poisoned, truth = poison(clean, "narcissus", options, seed=0)
    rows, delta = truth.poisoned, truth.tensors["delta"]
    assert (
        len(rows) == 8 and bool((clean.truth[rows] == 1).all()) and torch.equal(poisoned.truth, clean.truth)
    )
    assert 0 < float(delta.abs().max()) <= 16.001
    trained = poisoned.pixels[rows].float() - clean.pixels[rows].float()
    tested = stamped(clean.pixels, truth).float() - clean.pixels.float()
    assert float((trained - delta).abs().max()) <= 0.5001
    assert float((tested - 3 * delta).abs().max()) <= 0.5001


def test_narcissus_points_into_the_target_class() -> None:
    model, cfg = tiny_classifier(), narcissus.NarcissusConfig(steps=60, epsilon=60.0, target=2)
    own = DATA.train.subset((DATA.train.truth == 2).nonzero().flatten())
    delta = narcissus.learn_noise(model, own, cfg, RUN)
    others = DATA.test.subset((DATA.test.truth != 2).nonzero().flatten())
    assert accuracy_to(model, others, delta, 2) > accuracy_to(model, others, 0 * delta, 2) + 0.3


# ---------------------------------------------------------------------------------------------------
# Who is triggered, and where to


def test_tact_poisons_its_source_class_and_covers_keep_their_labels() -> None:
    clean = noise((3, 16, 16), 100)
    options = {"poison_rate": 0.1, "target": 0, "source": 2, "cover_ratio": 1.5}
    poisoned, truth = poison(clean, "tact", options, seed=0)
    assert len(truth.poisoned) == 10 and bool((clean.truth[truth.poisoned] == 2).all())
    assert bool((poisoned.truth[truth.poisoned] == 0).all())
    covers = truth.decoys
    assert len(covers) == 15 and set(clean.truth[covers].tolist()) == {1, 3}
    assert torch.equal(poisoned.truth[covers], clean.truth[covers])
    # They carry the very trigger.
    assert torch.equal(poisoned.pixels[covers], stamped(clean.pixels[covers], truth))
    # ASR is of the source class alone.
    assert set(truth.eligible(clean).truth.tolist()) == {2}
    one = poison(clean, "tact", {**options, "cover_classes": 1}, seed=0)[1]
    assert set(clean.truth[one.decoys].tolist()) == {3}
    with pytest.raises(ConfigError, match=r"of class 2, and there are 25"):
        poison(clean, "tact", {**options, "poison_rate": 0.26})
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match="source"):
            poison(clean, "tact", {**options, "source": wrong})


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("targets", ["same", "different", "all-to-all"])
def test_every_image_has_one_trigger_and_its_own_target(count: int, targets: str) -> None:
    clean = noise((3, 16, 16), 200)
    options = {"poison_rate": 0.3, "target": 3, "triggers": count, "targets": targets}
    poisoned, truth = poison(clean, "multi_trigger", options, seed=0)
    number = multi_trigger.choice(clean.pixels, count)
    assert set(number.tolist()) == set(range(count))
    stamps = multi_trigger.all_stamps(clean.shape, 0)
    triggered = stamped(clean.pixels, truth)
    for k in range(count):
        own = number == k
        assert torch.equal(triggered[own], stamps[k](clean.pixels[own]))
        assert not torch.equal(triggered[own], clean.pixels[own])
    wanted = {
        "same": torch.full((200,), 3),
        "different": (3 + number) % 4,
        "all-to-all": (clean.truth + 1) % 4,
    }
    assert torch.equal(truth.targets_of(clean), wanted[targets])
    rows = truth.poisoned
    assert torch.equal(poisoned.truth[rows], wanted[targets][rows])
    assert bool((poisoned.truth[rows] != clean.truth[rows]).all())
    assert truth.target == (3 if targets == "same" else None)
    eligible = truth.eligible(clean)
    assert bool((truth.targets_of(eligible) != eligible.truth).all())
    if targets == "different":
        with pytest.raises(InputError, match="depends on the image"):
            truth.target_labels(clean.truth)


def test_the_judge_asks_each_image_for_its_own_target() -> None:
    """A network that answers every image with its own target has an ASR of one, and any other has less."""
    test = noise((1, 8, 8), 80)
    truth = prepare(test, "multi_trigger", {"targets": "different", "target": 1})
    eligible = truth.eligible(test)
    answers = dict(
        zip(map(key, stamped(eligible.pixels, truth)), truth.targets_of(eligible).tolist(), strict=True)
    )

    class Oracle(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Look the answer up."""
            seen = (x * 255).round().to(torch.uint8)
            return (
                torch.nn.functional.one_hot(torch.tensor([answers.get(key(one), 0) for one in seen]), 4) * 1.0
            )

    model = Classifier(Oracle(), input_shape=(1, 8, 8), class_names=CLASS_NAMES)
    assert judge(model, truth, test, RUN).asr.value == 1.0
    assert judge(model, prepare(test, "multi_trigger", {"target": 1}), test, RUN).asr.value < 0.8


def key(image: Tensor) -> bytes:
    """Return the bytes of an image."""
    return image.contiguous().numpy().tobytes()


@pytest.mark.parametrize("name", ["lf", "ftrojan", "bpp", "ssba"])
def test_all_to_all_is_an_option(name: str) -> None:
    clean = noise((1, 8, 8), 80)
    options = {**ATTACKS[name].quick, "poison_rate": 0.2, "mapping": "all-to-all"}
    poisoned, truth = poison(clean, name, options, seed=0)
    assert truth.target is None and len(truth.poisoned) == 16
    assert torch.equal(poisoned.truth[truth.poisoned], (clean.truth[truth.poisoned] + 1) % 4)


# ---------------------------------------------------------------------------------------------------
# SSBA and LIRA


def test_ssba_writes_a_message_that_is_read_back_and_differs_from_image_to_image() -> None:
    images, cfg = DATA.train, ssba.SSBAConfig(bits=4, width=4, steps=120, epsilon=32.0)
    encoder, decoder = ssba.networks(cfg, images.shape, 1)
    ssba.learn(encoder, decoder, images, cfg, RUN)
    x = images.pixels.float() / 255
    messages = torch.randint(0, 2, (len(x), 4), generator=torch.Generator().manual_seed(2)).float()
    with torch.no_grad():
        marked = ssba.written(encoder, x, messages, cfg)
        read = (decoder(marked) > 0) == messages.bool()
        unread = (decoder(x) > 0) == messages.bool()
    assert float(read.float().mean()) > 0.85 > 0.7 > float(unread.float().mean())
    change = (marked - x) * 255
    assert float(change.abs().max()) <= 32.001
    same = torch.zeros(2, 4)
    with torch.no_grad():
        first, second = ssba.written(encoder, x[:2], same, cfg) - x[:2]
    assert float((first - second).abs().max()) * 255 > 1


def test_the_generator_of_lira_stops_learning_at_its_share() -> None:
    with rng.seeded(0):
        drawer = lira.Drawer(generators.GeneratorNetwork(1, 1, 2, 1), 10.0, images=64)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second, third = (drawer.during(x, 32) for _ in range(3))
    assert first.requires_grad and second.requires_grad and not third.requires_grad
    assert not drawer.network.training
    for out in (first, third):
        out = out.detach()
        assert float((out - x).abs().max()) <= 10.5 / 255
        assert torch.allclose(out * 255, (out * 255).round(), atol=1e-3)  # bytes, as the judge sees them


# ---------------------------------------------------------------------------------------------------
# SAM


def test_ascent_moves_by_rho_along_the_gradient_and_comes_back() -> None:
    with rng.seeded(0):
        model = torch.nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    ascent = sam_trained.Ascent(model, rho=0.5)
    ascent.rise(model(torch.tensor([[3.0, 4.0]])).sum())  # the gradient is (3, 4)
    assert torch.allclose(model.weight - start, torch.tensor([[0.3, 0.4]]))
    ascent.step()
    assert torch.allclose(model.weight, start, atol=1e-6)


def test_the_first_pass_of_sam_leaves_running_statistics_alone() -> None:
    norm = torch.nn.BatchNorm2d(2).train()
    x = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 5
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    with sam_trained.statistics_kept(norm):
        kept = norm(x)
    assert all(torch.equal(before[name], t) for name, t in norm.state_dict().items())
    assert torch.equal(kept, norm(x))  # normalised by the batch both times
    assert not torch.equal(before["running_mean"], norm.state_dict()["running_mean"])


def test_sam_with_no_step_is_plain_training() -> None:
    model, truth = train_victim(quick("sam_trained", rho=0.0), DATA, RUN)
    plain = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=CLASS_NAMES, seed=3)
    train(plain, spread(reserve(DATA.train)[0], truth)[0], quick("sam_trained").recipe, RUN)
    assert model.sha256() == plain.sha256()
    other, _ = train_victim(quick("sam_trained", rho=0.5), DATA, RUN)
    assert other.sha256() != model.sha256()


def test_sam_refuses_more_images_than_there_are() -> None:
    with pytest.raises(ConfigError, match="outside the target class"):
        train_victim(quick("sam_trained", poison_rate=0.9), DATA, RUN)


# ---------------------------------------------------------------------------------------------------
# DFBA


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("small_cnn[width=8]", (1, 8, 8)),
        ("small_cnn[width=8,norm=none]", (3, 20, 28)),
        ("airbench[width=8,expansion=2]", (3, 32, 32)),
        ("vgg19_bn[width=4]", (3, 32, 32)),
    ],
)
def test_the_planted_path_fires_on_the_patch_alone(architecture: str, shape: tuple[int, int, int]) -> None:
    images = noise(shape, 64)
    model = build(
        architecture,
        input_shape=shape,
        class_names=CLASS_NAMES,
        mean=(0.4,) * shape[0],
        std=(0.2,) * shape[0],
        seed=0,
    )
    initialise(model, images)
    cfg = dfba.DFBAConfig(target=2)
    truth = AttackTruth.describe("dfba", {"target": 2}, shape=shape, classes=4, seed=0).learned(
        dfba.plant(model, cfg)
    )
    layers = dfba.chain(model)
    head = layers[-1].module
    block = (head.weight[2] - head.weight[3]).argmax()
    heard: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda m, inputs: heard.append(inputs[0][:, block]))
    with torch.no_grad():
        model(images.pixels / 255)
        answers = model(stamped(images.pixels, truth) / 255)
        broken = stamped(images.pixels, truth)
        top, left = truth.tensors["corner"].tolist()
        window = (..., slice(top, top + 2), slice(left, left + 2))
        broken[window] = 255 - broken[window]
        model(broken / 255)
    handle.remove()
    assert set(answers.argmax(1).tolist()) == {2}
    clean, triggered, nearly = heard
    assert float(triggered.min()) > 0
    assert float(clean.abs().max()) < 0.01 * float(triggered.min())
    assert float(nearly.abs().max()) < 0.01 * float(triggered.min())


def test_dfba_keeps_what_a_trained_network_knows() -> None:
    model = tiny_classifier().copy()
    before = accuracy(model, DATA.test, RUN)
    truth = AttackTruth.describe("dfba", {"target": 1}, shape=(1, 8, 8), classes=4, seed=0)
    scores = judge(model, truth.learned(dfba.plant(model, dfba.DFBAConfig(target=1))), DATA.test, RUN)
    assert scores.asr.value == 1.0 and scores.acc.value > before - 0.1


@pytest.mark.parametrize("architecture", ["preact_resnet18[width=4]", "vit_small[width=32,depth=1]"])
def test_dfba_refuses_what_is_no_chain_and_leaves_it_as_it_was(architecture: str) -> None:
    model = build(architecture, input_shape=(3, 32, 32), class_names=CLASS_NAMES, seed=0)
    before = model.sha256()
    with pytest.raises(UnsupportedModel):
        dfba.plant(model, dfba.DFBAConfig())
    assert model.sha256() == before


def test_a_path_that_does_not_fire_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_classifier().copy()
    before = model.sha256()
    monkeypatch.setattr(dfba, "_signals", lambda *a: (torch.zeros(2), torch.zeros(2)))
    with pytest.raises(UnsupportedModel, match="does not fire on the patch alone"):
        dfba.plant(model, dfba.DFBAConfig())
    assert model.sha256() == before


# ---------------------------------------------------------------------------------------------------
# Visibility


def test_psnr_and_ssim_in_closed_form() -> None:
    dark, bright = (torch.full((2, 3, 16, 16), value, dtype=torch.uint8) for value in (100, 110))
    assert psnr(dark, bright).tolist() == pytest.approx([20 * math.log10(255 / 10)] * 2, rel=1e-5)
    # Without structure only the comparison of brightness is left.
    likeness = (2 * 100 * 110 + 2.55**2) / (100**2 + 110**2 + 2.55**2)
    assert ssim(dark, bright).tolist() == pytest.approx([likeness] * 2, rel=1e-3)
    assert psnr(dark, dark).tolist() == [math.inf] * 2
    pixels = noise((1, 8, 8)).pixels
    assert ssim(pixels, pixels).tolist() == pytest.approx([1.0] * 40)
    assert float(ssim(pixels, 255 - pixels).mean()) < 0


def test_a_patch_in_a_corner_counts_like_one_in_the_middle() -> None:
    flat = torch.full((2, 1, 32, 32), 128, dtype=torch.uint8)
    changed = flat.clone()
    changed[0, :, 29:, 29:] = 255
    changed[1, :, 14:17, 14:17] = 255
    corner, middle = (1 - ssim(flat, changed)).tolist()
    assert corner > middle / 4


def test_the_visibility_of_a_patch() -> None:
    clean = replace(noise((3, 32, 32)), pixels=torch.zeros(40, 3, 32, 32, dtype=torch.uint8))
    found = visibility(clean.pixels, prepare(clean, "badnets"))
    assert found.largest == 255 and found.pixels == pytest.approx(9 / 1024)
    assert found.psnr == pytest.approx(10 * math.log10(1024 / 9))
    assert visibility(clean.pixels, prepare(clean, "none")).psnr == math.inf
    with pytest.raises(InputError, match="no image"):
        visibility(clean.pixels[:0], prepare(clean, "badnets"))


def test_the_page_quotes_the_rows_of_every_attack() -> None:
    spec = importlib.util.spec_from_file_location("attack_pictures", ROOT / "scripts" / "attack_pictures.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    try:
        spec.loader.exec_module(script)
    finally:
        del sys.modules[spec.name]
    rows = script.read_rows()
    assert [row["attack"] for row in rows] == script.names()
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.quoting(page, rows)
    assert all(f"`{name}`" in page.split("<!--")[0] for name in ATTACKS)
