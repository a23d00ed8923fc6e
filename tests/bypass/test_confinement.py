"""What no limit of a reader foresees ends as a typed error, because files are read in a bounded process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from tiny import tiny_classifier
from unbackdoor import confinement, isolate
from unbackdoor.audit.trigger_files import read_triggers
from unbackdoor.cli.app import app
from unbackdoor.confinement import Bounds, rehearsed
from unbackdoor.data.loaders import load_images, load_unlabelled
from unbackdoor.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    UnbackdoorError,
    UnsafeFile,
    UnsupportedModel,
)
from unbackdoor.files import sha256_file
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import open_model
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.weights.patch import make_patch, read_patch, write_patch
from unbackdoor.weights.source import open_source
from unbackdoor.weights.stored_file import read_file
from unbackdoor.weights.triggers import read_trigger, write_trigger

pytestmark = pytest.mark.confined

# A busy machine may take minutes to start the server of processes.
AMPLE = Bounds(seconds=600)


# What a reader of a hostile file may do; these run in the child.


def hangs(path: Path, options: Mapping[str, Any]) -> None:
    while True:
        signal.pause()


def fills_the_memory(path: Path, options: Mapping[str, Any]) -> None:
    held = []
    while True:
        held.append(bytearray(1 << 24))


def takes_it_for_damage(path: Path, options: Mapping[str, Any]) -> UnbackdoorError:
    try:
        bytearray(1 << 42)
    except MemoryError as error:
        damaged = InputError("the file is damaged")
        damaged.__cause__ = error
        return damaged
    raise AssertionError


def dies(path: Path, options: Mapping[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def stumbles(path: Path, options: Mapping[str, Any]) -> None:
    {}["no such key"]


def ends_well(path: Path, options: Mapping[str, Any]) -> None:
    read_file(path)


def ends_typed(path: Path, options: Mapping[str, Any]) -> None:
    raise UnsupportedModel("the network is odd")


def first(name: str, path: Path, bounds: Bounds = AMPLE) -> list[str]:
    done = []
    with rehearsed(f"test_confinement:{name}", path, bounds=bounds):
        done.append("the parent went on")
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("name", "bounds", "kind", "words"),
    [
        ("hangs", Bounds(seconds=1), UnsafeFile, "more time than"),
        ("fills_the_memory", Bounds(seconds=600, memory_mb=256), UnsafeFile, "more memory than"),
        ("takes_it_for_damage", AMPLE, UnsafeFile, "more memory than"),
        ("dies", AMPLE, UnsafeFile, "died.*SIGSEGV"),
        ("stumbles", AMPLE, InputError, "a defect of unbackdoor.*KeyError"),
    ],
)
def test_every_end_of_a_reader_is_a_typed_error(
    name: str, bounds: Bounds, kind: type[UnbackdoorError], words: str, model: Path
) -> None:
    with pytest.raises(kind, match=words):
        first(name, model, bounds)


@pytest.mark.parametrize("name", ["ends_well", "ends_typed"])
def test_the_parent_comes_to_the_same_end_by_itself(name: str, model: Path) -> None:
    assert first(name, model) == ["the parent went on"]


def test_bytes_that_were_not_rehearsed_are_refused(model: Path) -> None:
    with (
        pytest.raises(IntegrityError, match="changed while it was read"),
        rehearsed("test_confinement:ends_well", model, bounds=AMPLE),
    ):
        save_file({"fc.weight": torch.ones(3, 4)}, model)
        read_file(model)


def test_a_pipe_that_becomes_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    with (
        pytest.raises(IntegrityError, match="changed while it was read"),
        rehearsed("test_confinement:ends_well", path, bounds=AMPLE),
    ):
        path.unlink()
        save_file({"fc.weight": torch.ones(3, 4)}, path)
        read_file(path)


def test_inspection_opening_and_reading_run_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def call(function: str, task: Mapping[str, Any], *rest: Any, **more: Any) -> dict[str, Any]:
        begun.append(task["function"])
        return usual(function, task, *rest, **more)

    usual = isolate.call
    monkeypatch.setattr(isolate, "call", call)
    inspect(model)
    source = open_source(model)
    assert source.contents.tensors.keys() == {"fc.weight", "fc.bias"}
    with pytest.raises(UnsupportedModel):
        open_model(model)
    rooms = [name.rpartition(":")[0].removeprefix("unbackdoor.") for name in begun]
    assert rooms == ["opening.inspection", "weights.source", "opening.open_model"]


def test_a_set_of_images_is_decoded_apart(tmp_path: Path) -> None:
    pixels = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=pixels, labels=[0, 1, 0, 1])
    apart = load_images(tmp_path / "a.npz", class_names=["cat", "dog"], cache=tmp_path / "cache")
    assert torch.equal(apart.pixels, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    assert apart.class_names == ("cat", "dog") and apart.labels is not None
    with pytest.raises(InputError, match="a label is out of range") as caught:
        load_images(tmp_path / "a.npz", class_names=["cat"], cache=tmp_path / "cache")
    assert caught.value.remedy


def test_images_without_labels_are_decoded_apart(tmp_path: Path) -> None:
    from PIL import Image

    shown = []

    def progress(items: Any, label: str, total: int | None = None) -> Any:
        for item in items:
            shown.append(label)
            yield item

    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "in" / "a.png")
    images, names = load_unlabelled(tmp_path / "in", class_names=["x"], progress=progress)
    assert names == ("a.png",) and images.pixels[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_program_without_a_guard_is_not_run_again(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "audit.py"
    script.write_text(
        f"import unbackdoor\nprint('begun')\nunbackdoor.inspect({str(model)!r})\nprint('done')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["begun", "done"]


def test_options_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    save_model(model, tmp_path / "m.safetensors")
    channels = model.input_shape[0]
    mean, std = list(np.full(channels, 0.5, np.float32)), list(np.full(channels, 0.25))
    opened = open_model(tmp_path / "m.safetensors", mean=mean, std=std)
    assert opened.model.mean.flatten().tolist() == [0.5] * channels
    with pytest.raises(ConfigError, match="finite"):
        open_model(tmp_path / "m.safetensors", mean=[float("nan")], std=[1.0])


@pytest.mark.parametrize("fault", [OSError(11, "Resource temporarily unavailable"), EOFError()])
def test_where_no_process_can_be_started_the_remedy_is_said(
    fault: BaseException, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(isolate, "call", call)
    with pytest.raises(InputError, match="UNBACKDOOR_CONFINE=0"):
        inspect(model)


def test_without_a_folder_for_temporary_files_the_remedy_is_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(**_: Any) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(confinement.tempfile, "TemporaryDirectory", none)
    with pytest.raises(InputError, match="TMPDIR"):
        inspect(model)


def test_confinement_is_the_default_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confinement.enabled()
    monkeypatch.setenv(confinement.VARIABLE, "0")
    assert not confinement.enabled()


@pytest.mark.parametrize("command", ["inspect", "scan", "purify", "verify"])
@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_the_commands_end_with_an_error_of_ours(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pth" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    more = {"purify": ["--method", "ft"], "verify": [str(path)]}.get(command, [])
    data = [] if command == "inspect" else ["--data", str(tmp_path / "none.npz")]
    out = ["--out", str(tmp_path / "out.pth")] if command == "purify" else []
    result = CliRunner().invoke(app, [command, str(path), *more, *data, *out, "--quiet"])
    assert result.exit_code == 2 and "error:" in result.stderr and "defect" not in result.stderr


@pytest.mark.parametrize("form", [[], ["--tensors"], ["--json"]])
def test_names_are_shown_by_their_codes(form: list[str], tmp_path: Path) -> None:
    name = "fc\x1b[2J\u202e\x9b31m.weight"
    torch.save({name: torch.zeros(2, 3), "epoch\x07": 1}, tmp_path / "m.pth")
    torch.save({"state_dict": {name: torch.zeros(2, 3)}, "e\x07\u202e": "\x1b[1m"}, tmp_path / "n.pth")
    for file in ("m.pth", "n.pth"):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / file), *form])
        assert result.exit_code in (0, 2)
        assert not {c for c in result.output if not c.isprintable()} - {"\n"}


def test_triggers_and_patches_are_read_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refused(function: str, task: Mapping[str, Any], *rest: Any) -> dict[str, Any]:
        asked.append(task["function"])
        return {"read": []}  # so that nothing may be parsed here

    monkeypatch.setattr(confinement, "_answer", refused)
    model = tiny_classifier("conv-bn")
    before = {"a": torch.zeros(3)}
    write_patch(tmp_path / "p", make_patch(before, {"a": torch.ones(3)}))
    write_trigger(tmp_path / "t", RecoveredTrigger(0, torch.zeros(model.input_shape), None, "a test"), {})
    with pytest.raises(IntegrityError):
        read_patch(tmp_path / "p")
    with pytest.raises(IntegrityError):
        read_trigger(tmp_path / "t", model)
    with pytest.raises(IntegrityError):
        read_triggers([f"{tmp_path / 't' / 'trigger.png'},class=0"], model)
    assert [name.rpartition(":")[0].rpartition(".")[2] for name in asked] == [
        "patch", "triggers", "trigger_picture"
    ]  # fmt: skip


@pytest.mark.parametrize("swapped", ["patch.png", "mask.png"])
def test_a_picture_that_is_swapped_after_its_rehearsal_is_refused(
    swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("patch.png", "mask.png", "another.png")):
        Image.new("RGB", (2, 2), (40 * number + 40,) * 3).save(tmp_path / name)
    text = f"{tmp_path / 'patch.png'},class=0,mask=mask.png"
    model = tiny_classifier("conv-bn")
    rehearsals: list[frozenset[str]] = []

    def answered(*_: Any) -> dict[str, Any]:
        # As the child reads them; it then lies in wait until the parent does.
        digests = [sha256_file(tmp_path / name) for name in ("patch.png", "mask.png")]
        rehearsals.append(frozenset(digests))
        if len(rehearsals) > 1:
            (tmp_path / "another.png").replace(tmp_path / swapped)
        return {"read": digests}

    monkeypatch.setattr(confinement, "_answer", answered)
    read_triggers([text], model)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        read_triggers([text], model)
    assert len(set(rehearsals)) == 1
