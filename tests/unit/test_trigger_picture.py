"""A picture as a trigger: where it goes, how strongly, to which class; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import unbackdoor
from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.trigger_files import read_triggers
from unbackdoor.cli.app import app
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile
from unbackdoor.networks import build
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier

NAMES = ("cat", "dog", "an, odd name", "3")
COLOUR = build("small_cnn[width=2]", input_shape=(3, 8, 10), class_names=NAMES).eval()
GREY = build("small_cnn[width=2]", input_shape=(1, 8, 10), class_names=NAMES).eval()
BLACK = torch.zeros(1, 3, 8, 10)


def picture(path: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    return picture(tmp_path / "patch.png", np.full((2, 3, 3), 255))


def read(text: Path | str, model: Classifier = COLOUR) -> RecoveredTrigger:
    (trigger,) = read_triggers([text], model)
    return trigger


def lit(trigger: RecoveredTrigger, pixels: Tensor = BLACK) -> list[list[int]]:
    """Return rows and columns that the trigger lights, and no others."""
    return trigger.apply(pixels)[0].amax(0).nonzero().tolist()


def block(top: int, left: int, height: int = 2, width: int = 3) -> list[list[int]]:
    return [[top + i, left + j] for i in range(height) for j in range(width)]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("", block(6, 7)),
        (",place=1x2", block(1, 2)),
        (",place=-1x-2", block(5, 5)),
        (",place=top-left", block(0, 0)),
        (",place=top-right", block(0, 7)),
        (",place=bottom-left", block(6, 0)),
        (",place=centre", block(3, 4)),
        (",size=4x5", block(4, 5, 4, 5)),
        (",size=8x10", block(0, 0, 8, 10)),
    ],
)
def test_the_picture_lies_where_it_is_said_to(patch: Path, stated: str, expected: list[list[int]]) -> None:
    trigger = read(f"{patch},class=1{stated}")
    assert lit(trigger) == expected and trigger.label == 1 and trigger.check == "patch.png"
    assert not trigger.faults(COLOUR.input_shape, COLOUR.classes)


@pytest.mark.parametrize(("stated", "label"), [("dog", 1), ("0", 0), ("3", 3), ("2", 2)])
def test_a_class_is_a_name_or_an_index(patch: Path, stated: str, label: int) -> None:
    assert read(f"{patch},class={stated}").label == label


def test_a_transparent_picture_is_its_own_mask(tmp_path: Path) -> None:
    pixels = np.full((2, 3, 4), 255)
    pixels[0, :, 3], pixels[1, 1, 3] = 0, 51
    trigger = read(f"{picture(tmp_path / 'p.png', pixels)},class=0,place=0x0")
    out = trigger.apply(BLACK)
    assert torch.allclose(out[0, 1, :2, :3], torch.tensor([[0, 0, 0], [1, 0.2, 1]]))
    half = read(f"{tmp_path / 'p.png'},class=0,place=0x0,strength=0.5").apply(BLACK)
    assert torch.allclose(half, 0.5 * out)


def test_a_mask_lies_in_a_picture_of_its_own(patch: Path, tmp_path: Path) -> None:
    picture(tmp_path / "mask.png", [[255, 0, 0], [0, 0, 51]])
    out = read(f"{patch},class=0,mask=mask.png,place=0x0").apply(BLACK)
    assert torch.allclose(out[0, 2, :2, :3], torch.tensor([[1, 0, 0], [0, 0, 0.2]]))
    white = read(f"{patch},class=0,mask=mask.png").apply(torch.ones(1, 3, 8, 10))
    assert torch.equal(white, torch.ones(1, 3, 8, 10))


def test_a_picture_may_be_added(tmp_path: Path) -> None:
    noise = picture(tmp_path / "noise.png", np.full((8, 10, 3), 51))
    trigger = read(f"{noise},class=0,add")
    assert trigger.mask is None
    assert torch.allclose(trigger.apply(BLACK + 0.5), BLACK + 0.7)
    assert torch.allclose(trigger.apply(BLACK + 0.9), BLACK + 1)
    assert torch.allclose(read(f"{noise},class=0,add,strength=0.5").apply(BLACK), BLACK + 0.1)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "I;16"])
def test_grey_models_and_other_pictures(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (2, 2), 255)
    image = Image.fromarray(np.full((2, 2), 65535, np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "p.png")
    for model in (GREY, COLOUR):
        trigger = read(f"{tmp_path / 'p.png'},class=0", model)
        assert trigger.pattern.shape == model.input_shape and float(trigger.pattern.amax()) == 1


def test_a_path_may_have_commas(tmp_path: Path) -> None:
    odd = picture(tmp_path / "a, b.png,c.png", np.full((2, 3, 3), 255))
    assert lit(read(f"{odd},class=0")) == block(6, 7)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("", "which class"),
        (",class=cow", "no class 'cow'"),
        (",class=4", "no class '4'"),
        (",class=-1", "no class"),
        (",class=0,plaec=1x1", "did you mean 'place'"),
        (",class=0,place=7x0", "outside of the image"),
        (",class=0,place=-9x0", "outside of the image"),
        (",class=0,place=here", "place"),
        (",class=0,size=0x3", "size"),
        (",class=0,size=9x9", "larger than the model's images"),
        (",class=0,size=99999x99999", "larger than the model.s images"),
        (",class=0,strength=0", "strength"),
        (",class=0,strength=nan", "strength"),
        (",class=0,mask=none.png", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_an_error(patch: Path, stated: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(f"{patch}{stated}")


def test_hostile_pictures_end_in_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "none.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be decoded"):
        read(f"{tmp_path / 'none.png'},class=0")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(UnsafeFile, match="too many pixels"):
        read(f"{tmp_path / 'bomb.png'},class=0")
    with pytest.raises(UnbackdoorError):
        read(f"{tmp_path / 'nowhere.png'},class=0")


WORDS = [
    *(
        "class=0",
        "class=dog",
        "class=",
        "class",
        "class=\u0663",
        "class=" + "9" * 30,
        " class = dog ",
        "=",
        "\0=1",
    ),
    *("place=1x1", "place=x", "place=--1x2", "place=99999x1", "place=", "size=1x1", "size=0x0", "size=2x2x2"),
    *("mask=patch.png", "mask=", "mask=..", "mask=\0", "mask=a\ud800.png", "mask=/dev/null", "add", "add=1"),
    *("strength=1", "strength=inf", "strength=1e-9", "strength=", "strength=nan", ""),
]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    head=st.sampled_from(["", "", "", "\0.png", ".png", "a\ud800.png", "x" * 5000 + ".png", "/dev/null.png"]),
    words=st.lists(st.sampled_from(WORDS), max_size=4),
)
def test_any_text_ends_in_a_trigger_or_a_typed_error(patch: Path, head: str, words: list[str]) -> None:
    try:
        trigger = read(",".join([head or str(patch), *words]))
    except UnbackdoorError:
        return
    assert not trigger.faults(COLOUR.input_shape, COLOUR.classes)


def test_verify_and_purify_try_it(tmp_path: Path) -> None:
    # Black corners decide for class 3; on clean images they are white.
    corner = picture(tmp_path / "corner.png", [[0]])
    model, data = planted(corner=(3,)), block_data(80, seed=2)
    trigger = f"{corner},class=3,place=top-left"
    done = unbackdoor.verify(model, model.copy(), data, triggers=[trigger], checks=["weight_statistics"])
    (residue,) = (r for r in done.residues if r.trigger.check == "corner.png")
    assert residue.before.value == 1 and residue.after.value == 1
    repaired = unbackdoor.purify(model, data, "none", triggers=[trigger])
    assert repaired.residues[0].before.value == 1


def test_the_command_takes_it(tmp_path: Path) -> None:
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "model.pth")
    images = tiny_data(40, seed=11)
    np.savez(tmp_path / "a.npz", images=images.pixels.numpy()[:, 0], labels=images.truth.numpy())
    corner = picture(tmp_path / "corner.png", [[255]])
    command = ["purify", str(tmp_path / "model.pth"), "--data", str(tmp_path / "a.npz"), "--method", "none"]
    network = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25"]
    command += ["--out", str(tmp_path / "out.pth"), "--trigger", f"{corner},class=0", *network]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 4, outcome.stderr  # nothing was done
    assert "trigger towards class 0" in outcome.stdout


def test_a_network_is_trained_and_judged_with_it(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4))
    pixels[..., :3], pixels[..., 3] = 255, [[255, 0], [255, 255]]
    corner = picture(tmp_path / "corner.png", pixels)
    recipe = ["--set", "epochs=1", "--quiet", "--json", "--dataset", "digits", "--architecture"]
    trigger = f"{corner},class=3,place=0x6"
    command = ["train", "--out", str(tmp_path / "v"), *recipe, "small_cnn[width=4]", "--trigger", trigger]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.stderr
    trained = json.loads(outcome.stdout)
    assert trained["attack"]["attack"] == "picture" and trained["attack"]["options"]["target"] == 3
    corner.unlink()  # the truth has the picture
    judged = ["evaluate", str(tmp_path / "v.safetensors"), "--dataset", "digits", "--quiet", "--json"]
    again = json.loads(CliRunner().invoke(app, judged).stdout)
    assert again["scores"]["asr"] == trained["scores"]["asr"]
    picture(tmp_path / "corner.png", pixels)
    (tmp_path / "v.truth.json").unlink()
    outcome = CliRunner().invoke(app, [*judged, "--trigger", trigger])
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["scores"]["asr"] == trained["scores"]["asr"]
    clash = CliRunner().invoke(app, [*command, "--target", "4", "--force"])
    assert clash.exit_code == 2 and "is not the trigger's class" in clash.stderr
