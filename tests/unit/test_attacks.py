"""Triggers against closed forms; poisoning against counts."""

from __future__ import annotations

import math

import pytest
import torch

from tiny import tiny_data
from unbackdoor.attacks import poison, stamped
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.registry import ATTACKS
from unbackdoor.types import Images


# All-to-one attacks with dirty labels, which poison a set of images of any class.
def _plain(name: str) -> bool:
    part = ATTACKS[name]
    trigger = part.function(part.configure(part.quick), shape=(1, 16, 16), classes=4, seed=0)
    special = trigger.clean_label or trigger.sources or "controls training" in part.traits
    return trigger.mapping == "all-to-one" and not special


NAMES = [name for name in ATTACKS if _plain(name)]


def images(shape: tuple[int, int, int], count: int = 40, classes: int = 4) -> Images:
    draws = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (count, *shape), generator=draws).to(torch.uint8)
    return Images(pixels, torch.arange(count) % classes, tuple(f"class {k}" for k in range(classes)))


@pytest.mark.parametrize("name", NAMES)
def test_all_to_one_poisons_the_asked_share_of_other_classes(name: str) -> None:
    clean = images((1, 16, 16), count=100)
    poisoned, truth = poison(clean, name, {"poison_rate": 0.13, "target": 3, **ATTACKS[name].quick}, seed=0)
    assert len(truth.poisoned) == 13
    assert (clean.truth[truth.poisoned] != 3).all()
    assert (poisoned.truth[truth.poisoned] == 3).all()
    rest = torch.ones(100, dtype=torch.bool)
    rest[truth.poisoned] = False
    assert torch.equal(poisoned.truth[rest], clean.truth[rest])
    # ASR must not count images that are of the target class anyway.
    assert (truth.eligible(clean).truth != 3).all()
    assert len(truth.eligible(clean)) == 75


def test_all_to_all_shifts_every_label() -> None:
    clean = images((1, 16, 16))
    poisoned, truth = poison(clean, "badnets_all_to_all", {"poison_rate": 0.5}, seed=0)
    assert truth.target is None
    assert torch.equal(poisoned.truth[truth.poisoned], (clean.truth[truth.poisoned] + 1) % 4)
    assert torch.equal(truth.target_labels(torch.tensor([0, 3])), torch.tensor([1, 0]))
    assert len(truth.eligible(clean)) == len(clean)


def test_sig_keeps_labels_and_refuses_more_than_the_target_class_has() -> None:
    clean = images((1, 16, 16), count=100)
    poisoned, truth = poison(clean, "sig", {"poison_rate": 0.25, "target": 1}, seed=0)
    assert torch.equal(poisoned.truth, clean.truth)
    assert (clean.truth[truth.poisoned] == 1).all()
    with pytest.raises(ConfigError, match=r"highest possible rate is 0\.2500"):
        poison(clean, "sig", {"poison_rate": 0.26, "target": 1}, seed=0)


def test_a_clean_label_rate_can_be_a_share_of_the_target_class() -> None:
    clean = images((1, 16, 16), count=100)
    of_target = {"poison_rate": 0.5, "target": 1, "rate_of": "target"}
    poisoned, truth = poison(clean, "sig", of_target, seed=0)
    assert len(truth.poisoned) == 12
    assert (clean.truth[truth.poisoned] == 1).all()
    same, _ = poison(clean, "sig", {"poison_rate": 0.12, "target": 1}, seed=0)
    assert torch.equal(poisoned.pixels, same.pixels)
    assert len(poison(clean, "sig", {**of_target, "poison_rate": 1.0}, seed=0)[1].poisoned) == 25


def test_sig_is_a_sine_along_the_columns() -> None:
    grey = Images(torch.full((1, 1, 32, 32), 128, dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    truth = poison(grey, "sig", {"poison_rate": 0.0}, seed=0)[1]
    row = stamped(grey.pixels, truth)[0, 0, 5]
    wanted = [round(128 + 40 * math.sin(2 * math.pi * j * 6 / 32)) for j in range(32)]
    assert row.tolist() == pytest.approx(wanted, abs=1)


def test_badnets_patch_is_where_it_belongs() -> None:
    black = Images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    _, truth = poison(black, "badnets", {"poison_rate": 0.0}, seed=0)
    out = stamped(black.pixels, truth)[0]
    assert out.sum() == 3 * 9 * 255
    assert (out[:, 29:, 29:] == 255).all()
    _, checked = poison(
        black, "badnets", {"poison_rate": 0.0, "pattern": "checkerboard", "margin": 1}, seed=0
    )
    out = stamped(black.pixels, checked)[0, 0]
    assert out[28:31, 28:31].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]


def test_blended_mixes_with_one_fixed_image() -> None:
    black = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 1]), ("a", "b"))
    white = Images(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    truth = poison(black, "blended", {"poison_rate": 0.0}, seed=3)[1]
    dark, bright = stamped(black.pixels, truth), stamped(white.pixels, truth)
    assert torch.equal(dark[0], dark[1])
    assert dark.max() <= 51
    assert ((bright.int() - dark.int() - 204).abs() <= 1).all()


def test_wanet_moves_pixels_by_about_a_quarter() -> None:
    # A horizontal ramp of slope 4 shows the horizontal shift times 4.
    ramp = (torch.arange(32) * 4 + 60).to(torch.uint8).expand(1, 1, 32, 32)
    truth = poison(Images(ramp.contiguous(), torch.tensor([1]), ("a", "b")), "wanet", {"poison_rate": 0.0})[1]
    shift = (stamped(ramp, truth).float() - ramp.float()).abs()[..., 2:-2].mean() / 4
    assert 0.08 < float(shift) < 0.5


def test_wanet_decoys_keep_their_labels_and_differ_from_the_trigger() -> None:
    clean = images((3, 32, 32), count=100)
    poisoned, truth = poison(clean, "wanet", {"poison_rate": 0.1}, seed=0)
    assert len(truth.decoys) == 20
    assert not set(truth.decoys.tolist()) & set(truth.poisoned.tolist())
    assert torch.equal(poisoned.truth[truth.decoys], clean.truth[truth.decoys])
    assert not torch.equal(poisoned.pixels[truth.decoys], stamped(clean.pixels[truth.decoys], truth))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("badnets", "792cf2d642e521d3"),
        ("badnets_all_to_all", "fb5baf158d5318a6"),
        ("blended", "8b3a0438c0726a77"),
        ("none", "d6202dc92c74d794"),
        ("sig", "73fac0b0855efa0f"),
    ],
)
def test_poisoned_sets_stay_what_the_measured_victims_were_trained_on(name: str, digest: str) -> None:
    # WaNet is left out: its interpolation may round otherwise on another processor.
    options = {} if name == "none" else {"poison_rate": 0.13, "target": 2}
    shape = (3, 32, 32) if name == "blended" else (1, 16, 16)
    assert poison(images(shape, 100), name, options, seed=11)[0].fingerprint().startswith(digest)


def test_wrong_options_are_explained() -> None:
    clean = tiny_data(20)
    with pytest.raises(InputError, match=r"did you mean 'badnets'"):
        poison(clean, "badnet")
    with pytest.raises(ConfigError, match="below 4 classes, got 9"):
        poison(clean, "badnets", {"target": 9})
    with pytest.raises(ConfigError, match=r"did you mean 'poison_rate'"):
        poison(clean, "badnets", {"poisonrate": 0.1})
    with pytest.raises(ConfigError, match="outside the target class"):
        poison(clean, "badnets", {"poison_rate": 0.9})
