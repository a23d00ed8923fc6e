"""The recovered trigger: stamped by its formula, written and read whole, refused where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.comparison import trigger_success
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.registry import Config, Part
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport
from unbackdoor.weights.triggers import TENSORS, read_trigger, write_trigger, write_triggers

MODEL = tiny_classifier("conv-bn")
CORNER = torch.zeros(8, 8)
CORNER[0, 0] = 1.0


def test_a_patch_and_a_blend_by_hand() -> None:
    pixels = torch.tensor([[[[0, 100]]]], dtype=torch.uint8)
    patch = RecoveredTrigger(0, torch.ones(1, 1, 2), torch.tensor([[0.5, 0.0]]))
    assert patch.apply_bytes(pixels).tolist() == [[[[128, 100]]]]
    assert patch.norms() == {"mask_l1": 0.5, "mask_share": 0.25, "mask_max": 0.5}
    blend = RecoveredTrigger(0, torch.tensor([[[-0.5, 0.8]]]), None)
    assert blend.apply_bytes(pixels).tolist() == [[[[0, 255]]]]
    assert blend.norms()["pattern_mean"] == pytest.approx(0.65)
    mixed = patch.apply(pixels.float() / 255)
    assert mixed.tolist() == [[[[0.5, pytest.approx(100 / 255)]]]]


def test_a_stamped_set_is_the_same_set_with_the_trigger() -> None:
    images = tiny_data(6)
    out = RecoveredTrigger(1, torch.full((1, 8, 8), 0.2), CORNER).stamp(images)
    assert bool((out.pixels[:, 0, 0, 0] == 51).all()) and out.pixels.dtype == torch.uint8
    assert torch.equal(out.pixels[..., 1:], images.pixels[..., 1:])
    assert out.labels is images.labels and (out.class_names, out.name) == (images.class_names, images.name)


def test_success_is_counted_on_images_of_other_classes() -> None:
    images = tiny_data(8)
    rate = trigger_success(MODEL, images, RecoveredTrigger(1, torch.zeros(1, 8, 8), None), Run.create())
    assert rate.total == int((images.truth != 1).sum())


# ---------------------------------------------------------------------------------------------------
# A scanner's trigger is checked like everything else that it returns


@pytest.mark.parametrize(
    ("trigger", "word"),
    [
        (RecoveredTrigger(4, torch.zeros(1, 8, 8), CORNER), "class 4"),
        (RecoveredTrigger(-1, torch.zeros(1, 8, 8), None), "class -1"),
        (RecoveredTrigger(1, torch.zeros(3, 8, 8), CORNER), "a pattern of shape"),
        (RecoveredTrigger(1, torch.zeros(1, 8, 8), CORNER[None]), "a mask of shape"),
        (RecoveredTrigger(1, torch.full((1, 8, 8), float("nan")), CORNER), "finite"),
        (RecoveredTrigger(1, torch.zeros(1, 8, 8, dtype=torch.uint8), None), "finite"),
        (RecoveredTrigger(1, torch.zeros(1, 8, 8), 2 * CORNER), "outside of 0..1"),
    ],
)
def test_a_scanner_with_an_unusable_trigger_is_refused(trigger: RecoveredTrigger, word: str) -> None:
    def look(model: Classifier, data: CleanData, cfg: Config, *, run: Any) -> ScanReport:
        finding = Finding("size", 1.0, "small", 0.5, "made up", classes=(1,), trigger=trigger)
        return ScanReport("undecided", (finding,))

    part: Part[Any] = Part("rogue", "scanner", look, Config, "", frozenset())
    with pytest.raises(MethodFailed, match=f"scanner 'rogue' gave a trigger that cannot be used.*{word}"):
        scan(part, MODEL, CleanData.split(tiny_data(8)))


# ---------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_a_trigger_is_written_whole_and_read_as_it_was(channels: int, masked: bool, tmp_path: Path) -> None:
    pattern = torch.rand(channels, 8, 8, generator=torch.Generator().manual_seed(0))
    trigger = RecoveredTrigger(3, pattern, CORNER if masked else None, "a check")
    for _ in range(2):  # replacing works as well
        files = write_trigger(tmp_path / "new", trigger, {"model_sha256": "0"})
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["trigger.png", "trigger.safetensors"]
    picture = np.array(Image.open(files["picture"]))
    width = 24 if masked else 8
    assert picture.shape == ((8, width, 3) if channels == 3 else (8, width))
    if masked:
        assert picture[0, 8].max() == 255 and not picture[1:, 16:].any()
    with safe_open(files["tensors"], framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts == {"class": 3, "check": "a check", "model_sha256": "0"}
    model = replace_shape(channels)
    for path in (tmp_path / "new", files["tensors"]):
        again = read_trigger(path, model)
        assert (again.label, again.check) == (3, TENSORS) and torch.equal(again.pattern, pattern)
        assert (again.mask is None) != masked and (again.mask is None or torch.equal(again.mask, CORNER))


def replace_shape(channels: int) -> Classifier:
    twin = MODEL.copy()
    twin.input_shape = (channels, 8, 8)
    return twin


def test_a_report_holds_the_triggers_of_its_own_scan_only(tmp_path: Path) -> None:
    one = RecoveredTrigger(1, torch.full((1, 8, 8), 0.5), CORNER)
    write_triggers(tmp_path, [one, replace(one, label=2), replace(one, label=3)], {}, most=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trigger-0", "trigger-1"]
    write_triggers(tmp_path, [one], {}, most=2, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["trigger-0"]


GOOD = {"pattern": torch.zeros(1, 8, 8), "mask": torch.zeros(8, 8)}


@pytest.mark.parametrize(
    ("tensors", "facts", "problem"),
    [
        (GOOD, '{"class": 4}', "does not fit the model"),
        (GOOD, '{"class": -1}', "does not fit the model"),
        (GOOD, '{"class": 1e999}', "cannot be read"),
        (GOOD, '{"class": "x"}', "cannot be read"),
        (GOOD, "[1]", "cannot be read"),
        (GOOD, "{", "cannot be read"),
        (GOOD, "[" * 100_000, "cannot be read"),
        (GOOD, None, "cannot be read"),
        ({"mask": CORNER}, '{"class": 1}', "cannot be read"),
        ({**GOOD, "pattern": torch.zeros(2, 8, 8)}, '{"class": 1}', "does not fit the model"),
        ({**GOOD, "mask": torch.zeros(1, 8, 8)}, '{"class": 1}', "does not fit the model"),
        ({**GOOD, "mask": torch.full((8, 8), 7.0)}, '{"class": 1}', "does not fit the model"),
        ({**GOOD, "mask": torch.full((8, 8), float("inf"))}, '{"class": 1}', "does not fit the model"),
        ({"pattern": torch.full((1, 8, 8), float("nan"))}, '{"class": 1}', "does not fit the model"),
    ],
)
def test_a_file_that_is_no_trigger_of_this_model_is_refused(
    tensors: dict[str, torch.Tensor], facts: str | None, problem: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "t.safetensors", metadata=None if facts is None else {"facts": facts})
    with pytest.raises(InputError, match=problem):
        read_trigger(tmp_path / "t.safetensors", MODEL)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    for path in (tmp_path / "t.safetensors", tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_trigger(path, MODEL)
