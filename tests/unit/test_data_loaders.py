"""Loaders: what is read, and what each bad input is called."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unbackdoor.data import loaders
from unbackdoor.data.loaders import load_images
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.types import Images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)  # (N, H, W, C)
LABELS = [0, 1, 0, 1, 0, 1]
NAMES = ["cat", "dog"]
SCHEMA_NAMES: Any = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Images]:
    def load(path: Path, **options: Any) -> Images:
        return load_images(path, cache=tmp_path / "cache", **options)

    return load


@pytest.fixture(autouse=True)
def nothing_half_written(tmp_path: Path) -> Any:
    yield
    for left in (tmp_path / "cache").glob("*"):
        assert left.suffix == ".safetensors" and ".tmp-" not in left.name


def parquet(
    path: Path,
    *,
    images: list[bytes | None] | None = None,
    labels: Any = LABELS,
    metadata: Any = SCHEMA_NAMES,
    label_type: Any = None,
    columns: dict[str, Any] | None = None,
) -> Path:
    data = [png(p) for p in PIXELS] if images is None else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = pa.array([{"bytes": d, "path": None} for d in data], kind)
    table = pa.table(columns or {"image": structs, "label": pa.array(labels, label_type or pa.int64())})
    if metadata is not None:
        text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, row_group_size=2)
    return path


def folder(path: Path, classes: dict[str, int]) -> Path:
    rows = iter(range(100))
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for k in range(count):
            (path / name / f"{k}.png").write_bytes(png(PIXELS[next(rows) % len(PIXELS)]))
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def channels_first() -> torch.Tensor:
    return torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


# Parquet -------------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path, load: Any) -> None:
    images = load(parquet(tmp_path / "pets.parquet"))
    assert torch.equal(images.pixels, channels_first())
    assert images.truth.tolist() == LABELS
    assert images.class_names == ("cat", "dog") and images.name == "pets"


def test_parquet_without_names_is_numbered_or_named_by_the_caller(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", metadata=None)
    assert load(path).class_names == ("0", "1")
    assert load(path, class_names=["x", "y"]).class_names == ("x", "y")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_parquet(tmp_path: Path, load: Any, keep: int) -> None:
    path = parquet(tmp_path / "pets.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"damaged or cut short \(.*pets\.parquet.*Fetch or write the file"):
        load(path)


def test_a_parquet_damaged_in_the_middle_tells_where(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "pets.parquet"
    data = bytearray(parquet(path).read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 12] = b"\xff" * 12
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"damaged or cut short \(.*pets\.parquet, near row \d"):
        load(path)


@pytest.mark.parametrize("value", [None, b""])
def test_a_row_without_an_image(tmp_path: Path, load: Any, value: bytes | None) -> None:
    data: list[bytes | None] = [png(p) for p in PIXELS]
    data[4] = value
    path = parquet(tmp_path / "pets.parquet", images=data)
    with pytest.raises(InputError, match=r"a row has no image \(.*pets\.parquet, row 4\).*Remove the row"):
        load(path)


def test_a_corrupt_image_in_a_parquet(tmp_path: Path, load: Any) -> None:
    data: list[bytes | None] = [png(p) for p in PIXELS]
    data[3] = data[3][:30] if data[3] else None
    path = parquet(tmp_path / "pets.parquet", images=data)
    with pytest.raises(InputError, match=r"pets\.parquet, row 3\).*Replace the image or remove it"):
        load(path)


def test_mixed_sizes_in_a_parquet(tmp_path: Path, load: Any) -> None:
    data: list[bytes | None] = [png(p) for p in PIXELS]
    data[2] = png(PIXELS[0][:3])
    path = parquet(tmp_path / "pets.parquet", images=data)
    with pytest.raises(InputError, match=r"row 2\): expected 4x5 .*, got 3x5\. Give a size"):
        load(path)
    assert load(path, size=(2, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_a_label_out_of_range(tmp_path: Path, load: Any, label: int) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0, 1, 0, label, 0, 1])
    with pytest.raises(InputError, match=rf"row 3\): expected 0\.\.1, got {label}\. Correct the label"):
        load(path)


@pytest.mark.parametrize("label", [-1, 2**40])
def test_a_label_out_of_range_without_names(tmp_path: Path, load: Any, label: int) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0, 1, 0, label, 0, 1], metadata=None)
    with pytest.raises(InputError, match=rf"row 3\): expected 0\.\.65535, got {label}\."):
        load(path)


def test_an_unsigned_label_cannot_wrap_around(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0, 1, 0, 2**64 - 1, 0, 1], label_type=pa.uint64())
    with pytest.raises(InputError, match=r"row 3\): expected 0\.\.1"):
        load(path)


def test_a_null_label(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0, 1, None, 1, 0, 1])
    with pytest.raises(InputError, match=r"a label is missing \(.*row 2\).*Label the image"):
        load(path)


def test_labels_that_are_neither_integers_nor_texts(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0.5] * 6, label_type=pa.float64())
    with pytest.raises(
        InputError, match=r"'label' has the wrong type .*expected integers or texts, got double"
    ):
        load(path)
    path = parquet(tmp_path / "others.parquet", labels=["a"] * 6, label_type=pa.string())
    with pytest.raises(InputError, match=r"none of the classes .*row 0.*cat, dog, got a"):
        load(path)


def test_a_missing_class_in_a_parquet(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", labels=[0] * 6)
    with pytest.raises(InputError, match=r"class 'dog' \(label 1\) has no images .*Add images of the class"):
        load(path)


def test_missing_and_wrong_columns(tmp_path: Path, load: Any) -> None:
    labels = pa.array(LABELS, pa.int64())
    path = parquet(tmp_path / "a.parquet", columns={"img": labels, "label": labels})
    with pytest.raises(InputError, match=r"'image' is missing .*got img, label\. Use the Hugging Face"):
        load(path)
    path = parquet(tmp_path / "b.parquet", columns={"image": labels, "label": labels})
    with pytest.raises(InputError, match=r"'image' has the wrong type .*binary field 'bytes'"):
        load(path)
    path = parquet(tmp_path / "c.parquet", columns={"image": labels})
    with pytest.raises(InputError, match=r"'label' is missing"):
        load(path)


def test_a_parquet_without_rows(tmp_path: Path, load: Any) -> None:
    with pytest.raises(InputError, match=r"has no rows .*pets\.parquet"):
        load(parquet(tmp_path / "pets.parquet", images=[], labels=[]))


@pytest.mark.parametrize(
    "metadata", [b"{", b"[]", b'{"info": 3}', {"info": {"features": {"label": {"names": [1, 2]}}}}]
)
def test_unreadable_metadata(tmp_path: Path, load: Any, metadata: Any) -> None:
    with pytest.raises(InputError, match=r"metadata .*pets\.parquet.*give the class names"):
        load(parquet(tmp_path / "pets.parquet", metadata=metadata))


def test_class_names_that_disagree(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet")
    with pytest.raises(InputError, match=r"do not agree .*expected 'dog' for label 0, got 'cat'"):
        load(path, class_names=["dog", "cat"])
    with pytest.raises(InputError, match=r"expected 3 classes, got 2"):
        load(path, class_names=["cat", "dog", "cow"])


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "pets.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pyarrow.*pip install \"unbackdoor\[parquet\]\""):
        load(path)


@pytest.mark.parametrize(("names", "got"), [([], "none"), (["cat", "cat"], "'cat' twice")])
def test_class_names_that_cannot_be_told_apart(tmp_path: Path, load: Any, names: Any, got: str) -> None:
    metadata = {"info": {"features": {"label": {"names": names}}}}
    with pytest.raises(InputError, match=rf"class names do not fit \(.*pets\.parquet.*got {got}"):
        load(parquet(tmp_path / "pets.parquet", metadata=metadata))


# Folder --------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"dog": 2, "cat": 3})
    (path / "dog" / "notes.txt").write_text("not an image")
    (path / "dog" / ".hidden.png").write_bytes(b"not read")
    (path / ".git").mkdir()
    (path / "readme.md").write_text("not a class")
    images = load(path)
    assert images.class_names == ("cat", "dog") and images.truth.tolist() == [0, 0, 0, 1, 1]
    # "dog" was written first and has the first two pictures.
    assert torch.equal(images.pixels[3:], channels_first()[:2])


def test_folder_in_the_order_of_given_names(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"dog": 2, "cat": 1})
    assert load(path, class_names=["dog", "cat"]).truth.tolist() == [0, 0, 1]


def test_a_folder_below_a_class_belongs_to_it(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 1, "dog/images": 2})
    assert load(path).truth.tolist() == [0, 1, 1]


def test_an_empty_folder(tmp_path: Path, load: Any) -> None:
    (tmp_path / "pets").mkdir()
    with pytest.raises(InputError, match=r"no class folders \(.*pets\).*Put the images of each class"):
        load(tmp_path / "pets")


def test_an_empty_class_folder(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 1, "dog": 0})
    with pytest.raises(InputError, match=r"'dog' has no images \(.*dog\).*got an empty folder\. Add images"):
        load(path)


def test_a_missing_class_folder(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 1})
    with pytest.raises(InputError, match=r"'dog' has no images \(.*dog\).*got no such folder"):
        load(path, class_names=NAMES)


def test_a_folder_that_is_none_of_the_classes(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 1, "cow": 1, "dog": 1})
    with pytest.raises(InputError, match=r"'cow' is none of the classes"):
        load(path, class_names=NAMES)


def test_a_corrupt_image_in_a_folder(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    (path / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(InputError, match=r"\(.*dog.1\.png\).*Replace the image"):
        load(path)
    assert not (tmp_path / "cache").exists()


def test_a_changed_folder_is_read_again(tmp_path: Path, load: Any) -> None:
    path = folder(tmp_path / "pets", {"cat": 1, "dog": 1})
    before = load(path)
    target = path / "cat" / "0.png"
    target.write_bytes(png(PIXELS[5]))
    os.utime(target, ns=(1, 1))
    assert not torch.equal(load(path).pixels, before.pixels)


# npz -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "labels")])
@pytest.mark.parametrize("form", ["NHWC", "NCHW", "float"])
def test_npz(tmp_path: Path, load: Any, keys: tuple[str, str], form: str) -> None:
    values: Any = {"NHWC": PIXELS, "NCHW": PIXELS.transpose(0, 3, 1, 2), "float": PIXELS / 255.0}[form]
    path = npz(tmp_path / "pets.npz", **{keys[0]: values, keys[1]: np.array(LABELS, np.int32)})
    images = load(path)
    assert torch.equal(images.pixels, channels_first())
    assert images.truth.tolist() == LABELS and images.class_names == ("0", "1")


def test_npz_grey_names_and_size(tmp_path: Path, load: Any) -> None:
    grey = PIXELS[..., 0]
    path = npz(tmp_path / "pets.npz", images=grey, labels=LABELS, class_names=NAMES)
    images = load(path, size=(2, 3))
    assert images.shape == (1, 2, 3) and images.class_names == ("cat", "dog")
    expected = Image.fromarray(grey[1]).resize((3, 2), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images.pixels[1, 0].numpy(), np.asarray(expected))


def test_npz_without_labels(tmp_path: Path, load: Any) -> None:
    assert load(npz(tmp_path / "pets.npz", images=PIXELS)).labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS}, r"no array of images .*numpy\.savez"),
        ({"images": PIXELS.astype(np.int64)}, r"array images.*expected uint8 or float, got int64"),
        (
            {"images": np.zeros((6, 4, 5, 4), np.uint8)},
            r"wrong shape .*got \(6, 4, 5, 4\)\. Save",
        ),
        ({"images": np.zeros((6, 3, 5, 3), np.uint8)}, r"place of the channels is ambiguous"),
        ({"images": np.zeros((6, 0, 5, 3), np.uint8)}, r"no pixels"),
        ({"images": np.zeros((0, 4, 5, 3), np.uint8)}, r"no images .*array images"),
        ({"images": np.zeros(5, np.uint8)}, r"wrong shape"),
        ({"images": PIXELS, "labels": [0, 1]}, r"array labels.*expected integers of shape \(6,\)"),
        ({"images": PIXELS, "labels": [0.5] * 6}, r"array labels.*expected integers"),
        ({"images": PIXELS, "labels": [0, 1, -1, 1, 0, 1]}, r"array labels, row 2\): expected 0\.\.65535"),
        ({"images": PIXELS, "labels": [0, 2] * 3, "class_names": ["a", "b", "c"]}, r"'b' \(label 1\) has no"),
        ({"images": PIXELS, "labels": LABELS, "class_names": [1, 2]}, r"class names have the wrong form"),
    ],
)
def test_bad_npz(tmp_path: Path, load: Any, arrays: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(npz(tmp_path / "pets.npz", **arrays))


def test_a_few_images_of_many_classes_need_no_names(tmp_path: Path, load: Any) -> None:
    """An owner of a model with a thousand classes may have an image of every fifth."""
    images = load(npz(tmp_path / "few.npz", images=PIXELS, labels=[0, 2, 9, 2, 0, 9]))
    assert images.classes == 10 and images.truth.tolist() == [0, 2, 9, 2, 0, 9]


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.5, 255.0, np.inf])
def test_npz_floats_out_of_range(tmp_path: Path, load: Any, value: float) -> None:
    values = PIXELS / 255.0
    values[4, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"row 4\): expected float in \[0, 1\], got .*\. Save uint8"):
        load(npz(tmp_path / "pets.npz", images=values))


@pytest.mark.parametrize("damage", ["cut", "text", "flip", "npy"])
def test_a_damaged_npz(tmp_path: Path, load: Any, damage: str) -> None:
    path = npz(tmp_path / "pets.npz", images=PIXELS, labels=LABELS)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[300] ^= 0xFF
    if damage == "npy":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", b"not an array")
    else:
        path.write_bytes({"cut": bytes(data[:200]), "text": b"hello", "flip": bytes(data)}[damage])
    with pytest.raises(InputError, match=r"npz file is damaged \(.*pets\.npz\).*numpy\.savez"):
        load(path)


# All -----------------------------------------------------------------------------------------------


def test_unknown_forms(tmp_path: Path, load: Any) -> None:
    with pytest.raises(InputError, match=r"no such file or folder .*Give a \.parquet file"):
        load(tmp_path / "absent.parquet")
    (tmp_path / "pets.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"form of the image set is not known: got pets\.zip"):
        load(tmp_path / "pets.zip")


@pytest.mark.parametrize("options", [{"class_names": []}, {"class_names": ["a", "a"]}, {"size": (0, 3)}])
def test_bad_arguments(tmp_path: Path, load: Any, options: Any) -> None:
    with pytest.raises(InputError, match=r"do(es)? not fit"):
        load(folder(tmp_path / "pets", {"a": 1}), **options)


def test_the_second_load_does_not_decode(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        parquet(tmp_path / "a.parquet"),
        folder(tmp_path / "b", {"cat": 2, "dog": 1}),
        npz(tmp_path / "c.npz", images=PIXELS, labels=LABELS),
    ]
    first = [load(path) for path in paths]
    for reader in ("read_parquet", "read_folder", "read_npz"):
        monkeypatch.setattr(loaders, reader, lambda *a, **k: pytest.fail("decoded again"))
    assert [load(path).fingerprint() for path in paths] == [images.fingerprint() for images in first]


def test_options_are_part_of_the_cache_key(tmp_path: Path, load: Any) -> None:
    path = parquet(tmp_path / "pets.parquet", metadata=None)
    assert load(path).shape == (3, 4, 5)
    assert load(path, size=(2, 2)).shape == (3, 2, 2)
    assert load(path, class_names=NAMES).class_names == ("cat", "dog")


def test_an_interrupt_while_decoding_leaves_nothing(tmp_path: Path, load: Any) -> None:
    def interrupted(items: Any, label: str, total: int | None = None) -> Any:
        for item in items:
            yield item
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(parquet(tmp_path / "pets.parquet"), progress=interrupted)
    assert not (tmp_path / "cache").exists()
