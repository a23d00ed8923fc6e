"""Attack results of BackdoorBench become a model and a judged test set, and nothing in them runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unbackdoor
from unbackdoor.cli.app import app
from unbackdoor.networks import build
from unbackdoor.weights import attack_result
from unbackdoor.weights.source import open_source

jsonschema = pytest.importorskip("jsonschema", reason="outputs are held against their schema (extra: dev)")
CLASSES = tuple(map(str, range(10)))
SPEC = "small_cnn[width=8]"
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
LABELS = list(range(1, 10))  # none of the attacker's class, as BackdoorBench leaves them out
NAMES = {"model", "card", "triggered", "record"}


def network() -> dict[str, torch.Tensor]:
    model = build(SPEC, input_shape=(3, 8, 8), class_names=CLASSES, seed=1)
    return dict(model.network.state_dict())


def state(entries: dict[Any, Any], folder: str | None) -> dict[str, Any]:
    """Return what prepro_cls_DatasetBD_v2.retrieve_state returns."""
    container = {"save_folder_path": folder, "data_dict": entries, "save_file_format": ".png"}
    return {
        "bd_data_container": container,
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(len(entries)),
        "poison_indicator": np.ones(len(entries)),
        "save_folder_path": folder,
    }


def in_files(folder: Path) -> dict[str, Any]:
    place, entries = "./record/badnet_0_1/bd_test_dataset", {}
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        file = folder / "bd_test_dataset" / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        # The indices come out of numpy, and so do some labels.
        wanted = np.int64(0) if index % 2 else 0
        entries[np.int64(index)] = {"path": f"{place}/{label}/{index}.png", "other_info": [wanted, label]}
    return state(entries, place)


def in_memory(_: Path) -> dict[str, Any]:
    rows = enumerate(zip(PIXELS, LABELS, strict=True))
    return state({np.int64(i): (Image.fromarray(p), 0, np.int32(y)) for i, (p, y) in rows}, None)


def in_tensors(_: Path) -> dict[str, Any]:
    return {"x": torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float(), "y": torch.zeros(9).long()}


def result(folder: Path, form: Callable[[Path], dict[str, Any]] = in_memory, **changed: Any) -> Path:
    content = {
        "model_name": "smallcnn",
        "num_classes": 10,
        "model": network(),
        "data_path": "./data",
        "img_size": [8, 8, 3],
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": form(folder),
    }
    torch.save({**content, **changed}, folder / "attack_result.pt")
    return folder / "attack_result.pt"


@pytest.mark.parametrize("form", [in_files, in_memory, in_tensors])
def test_each_form_becomes_the_same_model_and_images(
    tmp_path: Path, form: Callable[[Path], dict[str, Any]]
) -> None:
    done = unbackdoor.import_backdoorbench(result(tmp_path, form), arch=SPEC)
    assert done.target == 0 and done.triggered.shape == (3, 8, 8) and done.network == "smallcnn"
    assert torch.equal(done.triggered.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    held = done.opened.model.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in network().items())
    # What BackdoorBench subtracts for CIFAR-10, whose classes are ours.
    assert done.opened.model.class_names[0] == "airplane"
    done.save(tmp_path / "out")
    again = unbackdoor.open_model(tmp_path / "out" / "model.safetensors").model
    assert again.sha256() == done.opened.model.sha256()
    assert torch.allclose(again.mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]))
    kept = unbackdoor.load_images(
        tmp_path / "out" / "triggered.npz", class_names=again.class_names, partial=True
    )
    assert torch.equal(kept.pixels, done.triggered.pixels)
    labelled = form is not in_tensors
    assert (kept.labels is not None) == labelled and (not labelled or kept.truth.tolist() == LABELS)
    assert json.loads((tmp_path / "out" / "attack.json").read_text()) == done.to_dict()
    assert set(done.written) == NAMES


def test_what_is_written_is_judged(tmp_path: Path) -> None:
    done = unbackdoor.import_backdoorbench(result(tmp_path), arch=SPEC)
    done.save(tmp_path / "out")
    model, images = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "triggered.npz"
    network = unbackdoor.open_model(model).model
    with torch.no_grad():
        predicted = network(done.triggered.pixels.float() / 255).argmax(1)
    np.savez(
        tmp_path / "clean.npz",
        images=np.repeat(PIXELS[:1], 10, 0),
        labels=np.arange(10),
        class_names=network.class_names,
    )
    scores = unbackdoor.evaluate(
        model, tmp_path / "clean.npz", triggered=images, target=done.target, precision="fp32"
    ).scores
    assert (scores.asr.hits, scores.asr.total) == (int((predicted == 0).sum()), 9)
    assert scores.ra.hits == int((predicted == torch.tensor(LABELS)).sum()) and scores.acc.hits == 1


def test_command_and_function_agree(tmp_path: Path) -> None:
    file = result(tmp_path)
    words = ["import-backdoorbench", str(file), "--out", str(tmp_path / "out"), "--arch", SPEC, "--quiet"]
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    jsonschema.validate(told, unbackdoor.json_schema())
    done = unbackdoor.import_backdoorbench(file, arch=SPEC)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(unbackdoor.InputError, match="the file exists"):
        done.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == written and len(written) == 4
    done.save(tmp_path / "out", force=True)
    assert {name: told[name] for name in done.to_dict()} == done.to_dict()
    assert "--target 0" in done.command() and "--dataset cifar10" in done.command()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "the file exists" in again.stderr


class Runs:
    """Writes a file when its pickle is executed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("place", ["bd_test", "bd_train", "model_name", "beside", "entry"])
def test_nothing_is_executed(tmp_path: Path, place: str) -> None:
    trap = tmp_path / "ran"
    changed: dict[str, Any] = {place: Runs(trap)}
    if place == "entry":
        changed = {"bd_test": state({0: (Runs(trap), 0, 1)}, None)}
    with pytest.raises(unbackdoor.UnsafeFile, match="would run code"):
        unbackdoor.import_backdoorbench(result(tmp_path, **changed), arch=SPEC)
    assert not trap.exists()


def entry(*values: Any) -> dict[str, Any]:
    return {"bd_test": state({0: values}, None)}


def at(path: Any, *labels: Any) -> dict[str, Any]:
    return {"bd_test": state({0: {"path": path, "other_info": list(labels or (0, 1))}}, "x")}


PICTURE = Image.fromarray(PIXELS[0])
LOST = "triggered test images are missing"
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"bd_test": None}, "bd_test"),
    ({"bd_test": []}, "bd_test"),
    ({"bd_test": {}}, "bd_data_container"),
    ({"bd_test": {"bd_data_container": {}}}, "data_dict"),
    ({"bd_test": state({}, None)}, "got none"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8, 8)}}, "x alone"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2).long()}}, "shape"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8, 8), "y": torch.zeros(3).long()}}, "shape"),
    ({"bd_test": {"x": torch.zeros(0, 3, 8, 8), "y": torch.zeros(0).long()}}, "shape"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8, 8), "y": torch.zeros(2)}}, "whole numbers"),
    ({"bd_test": {"x": torch.full((2, 3, 8, 8), torch.nan), "y": torch.zeros(2).long()}}, "pixels"),
    ({"bd_test": {"x": torch.full((2, 3, 8, 8), 256.0), "y": torch.zeros(2).long()}}, "pixels"),
    ({"bd_test": {"x": torch.full((2, 3, 8, 8), -1), "y": torch.zeros(2).long()}}, "pixels"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8, 8), "y": torch.tensor([0, 1])}}, "several classes"),
    ({"bd_test": {"x": torch.zeros(2, 3, 8, 8), "y": torch.tensor([10, 10])}}, "a label"),
    ({"num_classes": 9}, "a label"),
    ({"num_classes": 1}, "num_classes"),
    ({"num_classes": 10**30}, "num_classes"),
    ({"num_classes": "10"}, "num_classes"),
    ({"num_classes": None}, "num_classes"),
    ({"model_name": 3}, "model_name"),
    ({"clean_data": "x" * 5000}, "clean_data"),
    ({"img_size": 32}, "img_size"),
    ({"img_size": [0, 8, 3]}, "img_size"),
    ({"img_size": [10**9, 10**9, 3]}, "img_size"),
    (entry(PICTURE, 0), "two labels"),
    (entry(PICTURE, 0, -1), "a label"),
    (entry(PICTURE, True, 1), "a label"),
    (entry(PICTURE, np.float64(0), 1), "a label"),
    (entry(PICTURE, np.array([0]), 1), "a label"),
    (entry(PICTURE.convert("RGBA"), 0, 1), "modes"),
    (entry("picture", 0, 1), "pictures"),
    (entry(PIXELS[0], 0, 1), "pictures"),
    ({"bd_test": state({0: 7}, None)}, "two labels"),
    ({"bd_test": state({0: (PICTURE, 0, 1), 1: (PICTURE, 1, 2)}, None)}, "several classes"),
    ({"bd_test": state({0: (PICTURE, 0, 1), 1: (PICTURE.resize((4, 4)), 0, 2)}, None)}, "one size"),
    (at("/etc/passwd"), "CLASS/INDEX"),
    (at("../../secret.png"), "CLASS/INDEX"),
    (at("1/../2.png"), "CLASS/INDEX"),
    (at("1/0.png\n"), "CLASS/INDEX"),
    (at("1/0.png\0"), "CLASS/INDEX"),
    (at(7), "CLASS/INDEX"),
    (at(None), "CLASS/INDEX"),
    (at("/root/.ssh/1/999.png"), LOST),  # no path of the file is followed
    (at("1/0.png", 0), "two labels"),
    ({"bd_test": state({i: {"path": "1/0.png", "other_info": [0, 1]} for i in range(2)}, "x")}, "twice"),
    ({"model": {}}, ""),
    ({"model": {"conv.weight": torch.zeros(2, 3, 3, 3)}}, ""),
]


@pytest.fixture
def unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process: the process of its own has tests of its own, and takes its time."""
    monkeypatch.setenv("UNBACKDOOR_CONFINE", "0")


@pytest.mark.usefixtures("unconfined")
def test_every_other_form_is_a_typed_error_and_nothing_is_written(tmp_path: Path) -> None:
    in_files(tmp_path)  # the folder is there
    for number, (changed, words) in enumerate(HOSTILE):
        file = result(tmp_path, **changed)
        with pytest.raises(unbackdoor.UnbackdoorError) as caught:
            unbackdoor.import_backdoorbench(file, arch=SPEC).save(tmp_path / "out")
        assert words in str(caught.value), (number, changed.keys(), str(caught.value))
        assert not (tmp_path / "out").exists()


def lying(state: tuple[Any, ...]) -> Image.Image:
    """Return a picture that says whatever it likes when it is pickled."""
    picture = PICTURE.copy()
    picture.__getstate__ = lambda: list(state)  # type: ignore[method-assign, assignment]
    return picture


@pytest.mark.usefixtures("unconfined")
@pytest.mark.parametrize(
    "state",
    [
        ({}, "RGB", (4096, 4096), None, b"few"),
        ({}, "RGB", (-8, -8), None, bytes(192)),
        ({}, "RGB", (8,), None, bytes(192)),
        ({}, ["RGB"], (8, 8), None, bytes(192)),
        ({}, "RGB", (8, 8), None, "text"),
        ({}, "RGB", (8, 8)),
    ],
)
def test_a_picture_that_lies_is_refused(tmp_path: Path, state: tuple[Any, ...]) -> None:
    with pytest.raises(unbackdoor.InputError, match="no attack result"):
        unbackdoor.import_backdoorbench(result(tmp_path, **entry(lying(state), 0, 1)), arch=SPEC)


@pytest.mark.usefixtures("unconfined")
def test_a_changed_byte_is_a_typed_error_or_nothing(tmp_path: Path) -> None:
    file = result(tmp_path)
    content = file.read_bytes()
    draw = random.Random(0)
    middle = content.find(b"bd_test")
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            place = draw.choice((draw.randrange(len(content)), middle + draw.randrange(4000)))
            changed[place % len(content)] = draw.randrange(256)
        if draw.random() < 0.1:
            del changed[draw.randrange(len(changed)) :]
        file.write_bytes(changed)
        try:
            attack_result.read_attack_result(open_source(file))
        except unbackdoor.UnbackdoorError:
            continue


@pytest.mark.usefixtures("unconfined")
def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file = result(tmp_path)
    with pytest.raises(unbackdoor.InputError, match="itself holds its images"):
        unbackdoor.import_backdoorbench(file, images=tmp_path, arch=SPEC)
    with pytest.raises(unbackdoor.InputError, match="as many names"):
        unbackdoor.import_backdoorbench(file, class_names=("a", "b"), arch=SPEC)
    source = open_source(file)
    result(tmp_path, model_name="another")
    with pytest.raises(unbackdoor.IntegrityError, match="changed"):
        unbackdoor.import_backdoorbench(source, arch=SPEC)
    done = unbackdoor.import_backdoorbench(file, arch=SPEC)
    result(tmp_path, model_name="a third")
    with pytest.raises(unbackdoor.IntegrityError, match="changed"):
        done.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "f").mkdir()
    file = result(tmp_path / "f", in_files)
    (tmp_path / "f" / "bd_test_dataset").rename(tmp_path / "moved")
    with pytest.raises(unbackdoor.InputError, match="are not there"):
        unbackdoor.import_backdoorbench(file, arch=SPEC)
    moved = unbackdoor.import_backdoorbench(file, images=tmp_path / "moved", arch=SPEC)
    assert torch.equal(moved.triggered.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert moved.triggered.truth.tolist() == LABELS
