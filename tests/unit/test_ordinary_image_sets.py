"""Image sets as people really have them: other columns, paths of other systems, damage, foreign formats."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli.app import app
from unbackdoor.data.loaders import load_images
from unbackdoor.errors import ConfigError, InputError, UnbackdoorError, UnsafeFile
from unbackdoor.types import Images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)  # (N, H, W, C)
LABELS = [0, 1, 0, 1, 0, 1]
NAMES = ["cat", "dog"]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


ENCODED: list[bytes | None] = [png(p) for p in PIXELS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBACKDOOR_CACHE", str(tmp_path / "cache"))


def structs(encoded: list[bytes | None] = ENCODED) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": None} for data in encoded], kind)


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    table = pa.table(columns)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return path


def require_pets(images: Images, labels: list[int] = LABELS, names: list[str] = NAMES) -> None:
    assert torch.equal(images.pixels.permute(0, 2, 3, 1), torch.from_numpy(PIXELS[: len(images)]))
    assert images.truth.tolist() == labels and list(images.class_names) == names


def folder(path: Path, classes: dict[str, int]) -> Path:
    """Write as many images into each class folder, those of PIXELS in their order."""
    rows = iter(range(100))
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for k in range(count):
            (path / name / f"{k}.png").write_bytes(png(PIXELS[next(rows) % len(PIXELS)]))
    return path


# ---------------------------------------------------------------------------------------------------
# Parquet


@pytest.mark.parametrize("image", ["image", "img", "images", "picture"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "target"])
@pytest.mark.parametrize("nested", [True, False])
def test_usual_columns_are_known(tmp_path: Path, image: str, label: str, nested: bool) -> None:
    pixels = structs() if nested else pa.array(ENCODED, pa.binary())
    path = write(tmp_path / "a.parquet", {image: pixels, label: LABELS}, {label: {"names": NAMES}})
    require_pets(load_images(path))


def test_the_finer_labels_are_taken_and_the_others_are_named(tmp_path: Path) -> None:
    columns = {"img": structs(), "coarse_label": [0] * 6, "fine_label": LABELS}
    features = {"fine_label": {"names": NAMES}, "coarse_label": {"names": ["pet"]}}
    path = write(tmp_path / "a.parquet", columns, features)
    images = load_images(path)
    require_pets(images)
    assert any("fine_label" in note and "coarse_label" in note for note in images.notes)
    require_pets(load_images(path, label_column="coarse_label"), [0] * 6, ["pet"])
    assert not load_images(path, label_column="fine_label").notes


@pytest.mark.parametrize(
    ("texts", "labels", "names"),
    [
        (["cat", "dog"] * 3, LABELS, NAMES),
        (["0", "1"] * 3, LABELS, ["0", "1"]),
        (["10", "2"] * 3, [10, 2] * 3, [str(k) for k in range(11)]),
        (["0.0", "10.0"] * 3, [0, 10] * 3, [str(k) for k in range(11)]),
        (["b", "B", "a", "b", "B", "a"], [2, 0, 1] * 2, ["B", "a", "b"]),
    ],
)
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_labels_may_be_texts(
    tmp_path: Path, texts: list[str], labels: list[int], names: list[str], kind: str
) -> None:
    column = pa.array(texts, pa.large_string() if kind == "large_string" else pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    path = write(tmp_path / "a.parquet", {"image": structs(), "label": column})
    require_pets(load_images(path), labels, names)


def test_texts_follow_the_given_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(), "label": ["cat", "dog"] * 3})
    require_pets(load_images(path, class_names=["dog", "cat"]), [1, 0] * 3, ["dog", "cat"])
    with pytest.raises(InputError, match="none of the classes"):
        load_images(path, class_names=["dog", "cow"])


def test_columns_may_be_named(tmp_path: Path) -> None:
    columns = {"scan": structs(), "image": structs(ENCODED[::-1]), "label": [0] * 6, "finding": LABELS}
    path = write(tmp_path / "a.parquet", columns)
    require_pets(load_images(path, image_column="scan", label_column="finding"), names=["0", "1"])
    with pytest.raises(InputError, match=r"'photo' is missing .*--image-column"):
        load_images(path, image_column="photo")
    with pytest.raises(InputError, match=r"'scan' has the wrong type .*--label-column"):
        load_images(path, label_column="scan")
    with pytest.raises(InputError, match="only a Parquet file"):
        load_images(folder(tmp_path / "f", {"cat": 1}), label_column="finding")


# ---------------------------------------------------------------------------------------------------
# Tables and folders


@pytest.mark.parametrize("header", ["file,label\n", ""])
def test_paths_that_were_written_on_windows(tmp_path: Path, header: str) -> None:
    folder(tmp_path / "pets" / "train", {"cat": 3, "dog": 3})
    names = [f"train\\{kind}\\{k}.png" for kind in NAMES for k in range(3)]
    rows = [f"{name},{name.split(chr(92))[1]}" for name in names]
    (tmp_path / "pets" / "labels.csv").write_text(header + "\n".join(rows))
    require_pets(load_images(tmp_path / "pets"), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("name", ["..\\secret.png", "a\\..\\..\\secret.png", "\\\\server\\share\\secret.png"])
def test_no_path_of_windows_leads_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "pets").mkdir()
    (tmp_path / "secret.png").write_bytes(png(PIXELS[0]))
    (tmp_path / "pets" / "labels.csv").write_text(f"file,label\n{name},cat\n")
    with pytest.raises(UnsafeFile, match="outside its folder"):
        load_images(tmp_path / "pets")


def test_a_name_that_no_file_can_have_is_a_typed_error(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".png", "x\\" * 3000 + "a.png"):
        (tmp_path / "labels.csv").write_text(f"file,label\n{name},cat\n")
        with pytest.raises(UnbackdoorError):
            load_images(tmp_path / "labels.csv")


def test_numbers_of_a_spreadsheet_do_not_sort_as_texts(tmp_path: Path) -> None:
    rows = []
    for k in range(11):
        (tmp_path / f"{k}.png").write_bytes(png(PIXELS[k % 6]))
        rows.append(f"{k}.png,{float(k)}")
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(rows))
    images = load_images(tmp_path)
    assert images.truth.tolist() == list(range(11)) and images.class_names[10] == "10"


@pytest.mark.parametrize("left", ["__MACOSX", "@eaDir", ".thumbnails"])
def test_what_other_programs_left_behind_is_passed_over(tmp_path: Path, left: str) -> None:
    pets = folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    folder(pets / left, {"cat": 3})
    folder(pets / "cat" / left, {"more": 1})
    (pets / "cat" / "._0.png").write_bytes(b"a resource fork")
    require_pets(load_images(pets), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("kind", ["HEIC", "AVIF", "JXL"])
def test_images_of_kinds_that_are_not_read_are_counted(tmp_path: Path, kind: str) -> None:
    pets = folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    (pets / "dog" / f"a.{kind.lower()}").write_bytes(b"x")
    (pets / "dog" / f"b.{kind}").write_bytes(b"x")
    images = load_images(pets)
    require_pets(images, [0, 0, 0, 1, 1, 1])
    assert images.notes == (
        f"2 {kind} images were passed over, because they cannot be read here; convert them to PNG",
    )
    (pets / "cow").mkdir()
    (pets / "cow" / f"a.{kind}").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"'cow' has no images .*1 {kind} images were passed over"):
        load_images(pets)


# ---------------------------------------------------------------------------------------------------
# Damaged images


def with_damage(form: str, path: Path) -> Path:
    """Write the set of pets with its third and its last image damaged."""
    encoded = [png(p) for p in PIXELS]
    damaged = [*encoded[:2], encoded[2][:40], *encoded[3:5], b"no image"]
    if form == "parquet":
        return write(path.with_suffix(".parquet"), {"image": structs([*damaged[:5], None]), "label": LABELS})
    path.mkdir()
    for k, data in enumerate(damaged):
        place = path / ("" if form == "table" else NAMES[LABELS[k]])
        place.mkdir(exist_ok=True)
        (place / f"{k}.png").write_bytes(data)
    if form == "table":
        rows = [f"{k}.png,{NAMES[label]}" for k, label in enumerate(LABELS)]
        (path / "labels.csv").write_text("file,label\n" + "\n".join(rows))
    return path


@pytest.mark.parametrize("form", ["folders", "table", "parquet"])
def test_damaged_images_are_left_out_and_counted(tmp_path: Path, form: str) -> None:
    path = with_damage(form, tmp_path / "pets")
    with pytest.raises(InputError):
        load_images(path)
    for images in (load_images(path, skip_damaged=True), load_images(path, skip_damaged=True)):
        assert len(images) == 4 and sorted(images.truth.tolist()) == [0, 0, 1, 1]
        assert len(images.notes) == 1 and images.notes[0].startswith("2 of 6 images are damaged")
        for k, pixels in enumerate(images.pixels.permute(0, 2, 3, 1)):
            own = int((torch.from_numpy(PIXELS) == pixels).flatten(1).all(1).nonzero()[0])
            assert LABELS[own] == int(images.truth[k])
    with pytest.raises(InputError):  # what is left out plays a part in the key of the cache
        load_images(path)


def test_a_class_of_damaged_images_only_is_an_error(tmp_path: Path) -> None:
    pets = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    for file in (pets / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="all images of the class 'dog' are damaged"):
        load_images(pets, skip_damaged=True)
    for file in (pets / "cat").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be decoded"):
        load_images(pets, skip_damaged=True)


# ---------------------------------------------------------------------------------------------------
# Through the verbs


def test_the_verbs_take_the_options_and_say_what_was_left_out(tmp_path: Path) -> None:
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "model.pth")
    images = tiny_data(60, seed=11)
    encoded: list[bytes | None] = [png(p) for p in images.pixels.numpy()[:, 0]]
    encoded[7] = b"no image"
    labels = [images.class_names[k] for k in images.truth.tolist()]
    data = write(tmp_path / "a.parquet", {"scan": structs(encoded), "finding": labels, "label": [0] * 60})
    reading = {"image_column": "scan", "label_column": "finding", "skip_damaged": True}
    opening: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
    audit = unbackdoor.scan(tmp_path / "model.pth", data, checks="tac", **opening, **reading)
    assert audit.facts["images"] == 59 and audit.facts["labelled"]
    assert audit.to_dict()["image_notes"][0].startswith("1 of 60 images are damaged")
    typed = ["--image-column", "scan", "--label-column", "finding", "--skip-damaged", "--checks", "tac"]
    network = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25"]
    command = ["scan", str(tmp_path / "model.pth"), "--data", str(data), *typed, *network]
    outcome = CliRunner().invoke(app, [*command, "--report", str(tmp_path / "report")])
    assert "1 of 60 images are damaged" in outcome.stderr, outcome.stderr
    assert "1 of 60 images are damaged" in (tmp_path / "report" / "report.html").read_text()
    done = unbackdoor.purify(tmp_path / "model.pth", data, "none", **opening, **reading)
    assert done.case is not None and done.case.notes
    with pytest.raises(ConfigError, match="columns"):
        unbackdoor.scan(tiny_classifier("conv-bn"), images, checks="tac", image_column="scan")
    with pytest.raises(ConfigError, match="columns"):
        unbackdoor.scan(tiny_classifier("conv-bn"), "digits", checks="tac", label_column="finding")


@pytest.mark.parametrize("method", ["strip", "spectral_signatures"])
@pytest.mark.parametrize("form", ["folders", "table", "parquet", "flat"])
def test_screening_takes_the_options_and_keeps_what_images_are_called(
    tmp_path: Path, form: str, method: str
) -> None:
    """What was left out must not shift the names of what was not: somebody will remove the images named."""
    if (form, method) == ("flat", "spectral_signatures"):
        pytest.skip("it needs labels")
    model, images = tiny_classifier("conv-bn"), tiny_data(60, seed=11)
    encoded: list[bytes | None] = [png(p) for p in images.pixels.numpy()[:, 0]]
    encoded[7] = b"no image"
    labels = [images.class_names[k] for k in images.truth.tolist()]
    path, reading = tmp_path / "suspects", {"skip_damaged": True}
    path.mkdir()
    if form == "parquet":
        path = write(path / "a.parquet", {"scan": structs(encoded), "finding": labels})
        reading |= {"image_column": "scan", "label_column": "finding"}
        called = [f"row {i}" for i in range(60)]
    else:
        called = [f"{labels[i]}/{i:02}.png" if form == "folders" else f"{i:02}.png" for i in range(60)]
        for name, data in zip(called, encoded, strict=True):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data or b"")
        (path / "phone.heic").write_bytes(b"no matter")
    if form == "table":
        rows = [f"{name},{label}" for name, label in zip(called, labels, strict=True)]
        (path / "labels.csv").write_text("file,label\n" + "\n".join(rows))
    with pytest.raises(InputError, match="skip-damaged"):
        unbackdoor.screen(model, path, method, images, **{**reading, "skip_damaged": False})
    done = unbackdoor.screen(model, path, method, images, **reading)
    assert sorted(done.names) == sorted(called[:7] + called[8:]) and done.scores.shape == (59,)
    assert any("1 of 60 images are damaged" in note for note in done.notes)
    assert form == "parquet" or any("1 HEIC images" in note for note in done.notes)
    if done.labels is not None:
        whose = dict(zip(called, labels, strict=True))
        assert [whose[name] for name in done.names] == [images.class_names[k] for k in done.labels]


def test_columns_are_of_whichever_set_is_a_parquet_file(tmp_path: Path) -> None:
    images = tiny_data(60, seed=11)
    encoded: list[bytes | None] = [png(p) for p in images.pixels.numpy()[:, 0]]
    labels = [images.class_names[k] for k in images.truth.tolist()]
    data = write(tmp_path / "a.parquet", {"scan": structs(encoded), "finding": labels})
    suspects = tmp_path / "suspects"
    suspects.mkdir()
    (suspects / "one.png").write_bytes(encoded[0] or b"")
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "model.pth")
    reading = ["--image-column", "scan", "--label-column", "finding"]
    network = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25"]
    command = ["screen", str(tmp_path / "model.pth"), "--method", "strip", *reading, *network, "--json"]
    outcome = CliRunner().invoke(app, [*command, "--images", str(suspects), "--data", str(data)])
    assert outcome.exit_code == 0, outcome.stderr
    outcome = CliRunner().invoke(app, [*command, "--images", str(data), "--data", str(suspects)])
    assert "column" not in outcome.stderr  # that the clean images carry no labels is another matter
    outcome = CliRunner().invoke(app, [*command, "--images", str(suspects), "--data", str(suspects)])
    assert outcome.exit_code == 2 and "only a Parquet file has columns" in outcome.stderr
    with pytest.raises(ConfigError, match="columns"):
        unbackdoor.screen(tiny_classifier("conv-bn"), images, "strip", images, image_column="scan")
