"""Files built to run code or to exhaust the machine: each is refused before it costs anything."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unbackdoor.data import cache, decode_worker
from unbackdoor.data.decode import decode
from unbackdoor.data.loaders import load_images
from unbackdoor.errors import InputError, UnsafeFile


class Bomb:
    """Reports if it is ever unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was executed",))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + idat + chunk(b"IEND", b"")


def npz_of(path: Path, *, header: bytes, body: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)
    return path


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_declares_too_many_pixels(side: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    try:
        with pytest.raises((UnsafeFile, InputError), match=r"\(row 0\).*"):
            decode([("row 0", png_claiming(side, side))], 1, name="bomb")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("side", [9_000, 60_000])
@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_a_pixel_bomb_is_called_one(side: int, filters: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(UnsafeFile, match=r"too many pixels .*Remove the image or make it smaller"):
            decode([("row 0", png_claiming(side, side))], 1, name="bomb")


def test_a_format_that_starts_other_programs_is_not_opened() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(InputError, match="cannot be decoded"):
        decode([("row 0", postscript)], 1, name="eps")


def test_damaged_images_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "WEBP", "PPM", "BMP", "GIF"):
        stream = io.BytesIO()
        picture.save(stream, form)
        for _ in range(60):
            data = bytearray(stream.getvalue())
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                pixels, _ = decode_worker.decode_image(bytes(data[: rng.integers(1, len(data) + 1)]), None)
            except decode_worker.Undecodable:
                continue
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, images=np.array([Bomb()], dtype=object))
    with pytest.raises(UnsafeFile, match=r"pickled objects, which can run code \(.*array images\)"):
        load_images(path, cache=tmp_path / "cache")
    np.savez(path, images=np.zeros((1, 2, 2), np.uint8), class_names=np.array([Bomb()], dtype=object))
    with pytest.raises(UnsafeFile, match=r"array class_names"):
        load_images(path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "shape", ["(1000000, 1000, 1000, 3)", "(9223372036854775807, 9223372036854775807, 3)", "(2, 2, 2)"]
)
def test_an_array_that_declares_more_than_it_holds(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = npz_of(tmp_path / "evil.npz", header=header, body=b"\0" * 10)
    with pytest.raises(UnsafeFile, match=r"declares another size than the file holds .*expected 10 bytes"):
        load_images(path, cache=tmp_path / "cache")


def test_a_header_that_would_stall_the_parser(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "evil.npz", header=b"(" * 60_000)
    with pytest.raises(InputError, match="npz file is damaged"):
        load_images(path, cache=tmp_path / "cache")


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbackdoor.data.decode._MAX_BYTES", 1 << 16)
    path = tmp_path / "evil.npz"
    np.savez_compressed(path, images=np.zeros((1000, 32, 32), np.uint8))
    assert path.stat().st_size < 1 << 13
    with pytest.raises(InputError, match=r"too large to hold in memory \(.*array images\)"):
        load_images(path, cache=tmp_path / "cache")


def test_a_parquet_that_repeats_one_image_beyond_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbackdoor.data.decode._MAX_BYTES", 1 << 20)
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    kind = pa.struct([("bytes", pa.binary())])
    table = pa.table(
        {"image": pa.array([{"bytes": stream.getvalue()}] * 2000, kind), "label": pa.array([0] * 2000)}
    )
    pq.write_table(table, tmp_path / "evil.parquet")
    with pytest.raises(InputError, match="too large to hold in memory"):
        load_images(tmp_path / "evil.parquet", cache=tmp_path / "cache")


def test_metadata_nested_beyond_the_stack(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary())])
    table = pa.table({"image": pa.array([{"bytes": b"x"}], kind), "label": pa.array([0])})
    table = table.replace_schema_metadata({"huggingface": b"[" * 200_000})
    pq.write_table(table, tmp_path / "evil.parquet")
    with pytest.raises(InputError, match="metadata under 'huggingface' cannot be read"):
        load_images(tmp_path / "evil.parquet", cache=tmp_path / "cache")


def test_a_cache_file_is_data_and_never_code(tmp_path: Path) -> None:
    path = cache.cache_path("x", "0" * 64, cache=tmp_path)
    head = json.dumps({"pixels": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    assert cache.load(path) is None
