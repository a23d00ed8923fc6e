"""Encoded images to one array: modes, sizes, order of errors, workers."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unbackdoor.data import decode, decode_worker
from unbackdoor.errors import InputError

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def rgb(height: int = 4, width: int = 6) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def one(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    return decode.decode([("image", data)], 1, name="test", size=size)[0]  # (C, H, W)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_lossless_forms_keep_every_pixel(form: str) -> None:
    pixels = rgb()
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(
        one(encoded(Image.fromarray(pixels), form, **options)), pixels.transpose(2, 0, 1)
    )


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], dtype=np.uint16)
    # v / 257 to the nearest: 65535 / 257 = 255.
    expected = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(one(encoded(Image.fromarray(values))), expected[None])


def test_exif_rotation_is_applied() -> None:
    pixels = rgb(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    upright = one(encoded(Image.fromarray(pixels), "PNG", exif=exif))
    np.testing.assert_array_equal(upright, np.rot90(pixels, k=-1).transpose(2, 0, 1))


def test_alpha_is_dropped_and_a_palette_resolved() -> None:
    pixels = rgb()
    alpha = np.full((*pixels.shape[:2], 1), 7, dtype=np.uint8)
    with_alpha = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    np.testing.assert_array_equal(one(encoded(with_alpha)), pixels.transpose(2, 0, 1))
    flat = Image.new("RGB", (3, 2), (10, 20, 30))
    palette = flat.quantize(2)
    np.testing.assert_array_equal(
        one(encoded(palette, transparency=b"\x00\x80")), np.asarray(flat).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_give_one_channel(mode: str) -> None:
    assert one(encoded(Image.new("L", (3, 2), 255).convert(mode))).tolist() == [[[255] * 3] * 2]


def test_one_colour_image_makes_the_set_rgb() -> None:
    grey = encoded(Image.new("L", (3, 2), 9))
    colour = encoded(Image.new("RGB", (3, 2), (1, 2, 3)))
    assert decode.decode([("a", grey), ("b", grey)], 2, name="test").shape == (2, 1, 2, 3)
    mixed = decode.decode([("a", grey), ("b", colour)], 2, name="test")
    assert mixed[0, :, 0, 0].tolist() == [9, 9, 9] and mixed[1, :, 0, 0].tolist() == [1, 2, 3]


def test_resizing_is_bilinear_and_height_comes_first() -> None:
    picture = Image.fromarray(rgb(8, 12))
    expected = np.asarray(picture.resize((5, 3), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(one(encoded(picture), size=(3, 5)), expected)


def test_mixed_sizes_name_the_first_that_differs_and_the_remedy() -> None:
    small, large = encoded(Image.new("RGB", (4, 4))), encoded(Image.new("RGB", (5, 4)))
    items = [("row 0", small), ("row 1", small), ("row 2", large), ("row 3", large)]
    with pytest.raises(InputError, match=r"differ in size \(row 2\): expected 4x4 .*, got 4x5\. Give a size"):
        decode.decode(items, 4, name="test")
    assert decode.decode(items, 4, name="test", size=(4, 4)).shape == (4, 1 + 2, 4, 4)


@pytest.mark.parametrize("data", [b"", b"no image at all", encoded(Image.fromarray(rgb(16, 16)))[:200]])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_image_is_named(data: bytes, place: int) -> None:
    good = encoded(Image.fromarray(rgb(16, 16)))
    items = [(f"row {k}", data if k == place else good) for k in range(2)]
    with pytest.raises(InputError, match=rf"\(row {place}\).*Replace the image or remove it"):
        decode.decode(items, 2, name="test")


@pytest.mark.parametrize("held", [1, 3])
def test_a_wrong_count_is_an_error(held: int) -> None:
    items = [("row", encoded(Image.new("L", (2, 2))))] * held
    with pytest.raises(InputError, match=r"number of images is wrong \(test\): expected 2"):
        decode.decode(items, 2, name="test")


def test_no_image_at_all() -> None:
    with pytest.raises(InputError, match="the set is empty"):
        decode.decode([], 2, name="test")


def test_too_large_a_set_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_MAX_BYTES", 100)
    items = [("row", encoded(Image.new("L", (8, 8))))] * 2
    with pytest.raises(InputError, match=r"too large to hold in memory.*Give a smaller size"):
        decode.decode(items, 2, name="test")


def some_items(count: int) -> list[tuple[str, bytes]]:
    distinct = [encoded(Image.fromarray(rgb(4, 4))) for _ in range(7)]
    return [(f"row {k}", distinct[k % 7]) for k in range(count)]


def test_workers_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 8)
    items = some_items(60)
    serial = decode.decode(items, 60, name="test", workers=0)
    np.testing.assert_array_equal(decode.decode(items, 60, name="test", workers=2), serial)
    np.testing.assert_array_equal(decode.decode(items, 60, name="test", size=(4, 4), workers=2), serial)


def test_workers_report_the_first_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 4)
    items = some_items(40)
    items[13] = ("row 13", b"bad")
    items[38] = ("row 38", b"bad")
    with pytest.raises(InputError, match=r"cannot be decoded \(row 13\)"):
        decode.decode(items, 40, name="test", workers=2)


def test_a_worker_that_dies_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.stdin.buffer.readline(); sys.exit(3)")
    monkeypatch.setattr(decode_worker, "__file__", str(script))
    monkeypatch.setattr(decode, "CHUNK", 4)
    with pytest.raises(InputError, match=r"decoder stopped \(row 0 to row 3\).*exit code 3"):
        decode.decode(some_items(16), 16, name="test", workers=2)


def test_an_interrupt_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 4)
    started: list[Any] = []
    start = decode._Worker

    def remembered() -> Any:
        started.append(start())
        return started[-1]

    monkeypatch.setattr(decode, "_Worker", remembered)

    def interrupted(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
        for _ in items:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        decode.decode(some_items(40), 40, name="test", workers=2, progress=lambda *a: iter(interrupted(*a)))
    assert len(started) == 2
    assert all(worker._process.returncode is not None for worker in started)


def test_progress_sees_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 4)
    seen: list[Any] = []

    def progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
        seen.append((label, total))
        for item in items:
            seen.append(item[0])
            yield item

    decode.decode(some_items(10), 10, name="test", progress=progress)
    assert seen == [("decoding test", 3), 4, 4, 2]
