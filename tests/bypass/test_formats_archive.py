"""Archives that show two readers two files, or grow beyond measure: each is refused by a typed error."""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from hostile import Entry, Payload, archive
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.zip_archive import Archive
from unbackdoor.weights.read import read_contents, read_state

PICKLE = pickle.dumps({}, protocol=2)
GOOD = [Entry(b"m/data.pkl", PICKLE), Entry(b"m/version", b"3\n")]


def refused(content: bytes, words: str, kind: type[Exception] = UnsafeFile) -> None:
    with pytest.raises(kind, match=words):
        Archive(content, "a test")


def test_the_archive_of_these_tests_is_read() -> None:
    read = Archive(archive(GOOD), "a test")
    assert list(read.entries) == ["m/data.pkl", "m/version"]
    assert read.root == "m"
    assert read.content(read.entries["m/data.pkl"], 100) == PICKLE
    packed = Archive(archive([Entry(b"m/code/a.py", b"def f(): ...\n" * 20, method=8)]), "a test")
    assert packed.content(packed.entries["m/code/a.py"], 1000) == b"def f(): ...\n" * 20


@pytest.mark.parametrize(
    "name",
    [
        b"../data.pkl",
        b"m/../../x",
        b"/etc/passwd",
        b"m\\data.pkl",
        b"c:/x",
        b"m//x",
        b"m/./x",
        b"",
        b"m/a\0b",
    ],
)
def test_names_that_lead_out_of_a_folder(name: bytes) -> None:
    refused(archive([*GOOD, Entry(name, b"x")]), "leads out")


def test_names_of_absurd_length() -> None:
    refused(archive([Entry(b"m/" + b"x" * 2000)]), "too long")


@pytest.mark.parametrize("second", [b"m/data.pkl", b"M/DATA.PKL"])
def test_two_entries_of_one_name(second: bytes) -> None:
    refused(archive([*GOOD, Entry(second, PICKLE)]), "one name")


def test_links_and_devices() -> None:
    refused(archive([*GOOD, Entry(b"m/data/0", b"/etc/passwd", attributes=0o120777 << 16)]), "link")
    refused(archive([*GOOD, Entry(b"m/data/0", attributes=0o060600 << 16)]), "link or a device")


def test_encrypted_entries() -> None:
    refused(archive([*GOOD, Entry(b"m/data/0", b"x", flags=0x801)]), "encrypted")


def test_unknown_ways_of_packing() -> None:
    refused(archive([*GOOD, Entry(b"m/data/0", b"x", method=14)]), "unknown way")


def test_an_entry_that_the_two_headers_name_differently() -> None:
    refused(archive([Entry(b"m/readme.txt", PICKLE, local_name=b"m/data.pkl")]), "two ways")


def test_bombs() -> None:
    refused(archive([*GOOD, Entry(b"m/x", bytes(10_000_000), method=8)]), "more than it holds")
    # Less in each, more in all: 2,000 entries of 40 KB out of 600 bytes.
    some = [Entry(b"m/%d" % i, (b"ab" * 90 + bytes([i % 251])) * 220, method=8) for i in range(2000)]
    refused(archive(some), "more than it holds")


def test_entries_that_share_their_bytes() -> None:
    # All of them unpack the same content: the bomb that needs no ratio.
    shared = [Entry(b"m/data/%d" % i, b"x" * 1000, local_name=b"m/data/0") for i in range(3)]
    content = archive([shared[0], *(Entry(b"m/data/0", b"x" * 1000, header_at=0) for _ in range(1))])
    refused(content, "one name|overlap")
    inner = archive([Entry(b"m/b", b"y" * 10)])
    outer = archive([Entry(b"m/a", inner), Entry(b"m/b", b"y" * 10, header_at=33)])
    refused(outer, "overlap")


@pytest.mark.parametrize(("size", "packed"), [(5, 6), (1 << 31, 6), (0, 6)])
def test_stored_entries_of_two_sizes(size: int, packed: int) -> None:
    refused(archive([Entry(b"m/a", b"abcdef", size=size, packed=packed)]), "two sizes")


@pytest.mark.parametrize("size", [10, 1000])
def test_packed_entries_that_unpack_to_another_size(size: int) -> None:
    read = Archive(archive([Entry(b"m/a", b"abc" * 100, method=8, size=size)]), "a test")
    with pytest.raises(UnsafeFile, match="another size"):
        read.content(read.entries["m/a"], 10_000)


def test_two_directories() -> None:
    # The comment of the first archive is a second one, which readers that look from the end would take.
    hidden = archive([Entry(b"m/data.pkl", PICKLE)])
    refused(archive(GOOD, comment=hidden), "two directories|not where")


def test_an_archive_behind_something_else() -> None:
    refused(archive(GOOD, before=b"PK\x03\x04 a program that unpacks itself"), "not where")


@pytest.mark.parametrize("count", [1, 3])
def test_a_directory_that_miscounts(count: int) -> None:
    refused(archive(GOOD, count=count), "more entries|damaged", (UnsafeFile, InputError))  # type: ignore[arg-type]


def test_a_directory_of_a_million_costs_nothing() -> None:
    refused(archive(GOOD, count=60_000), "too many entries")


def test_the_two_directories_of_a_large_archive_must_agree() -> None:
    small = archive(GOOD)
    end = small.rindex(b"PK\x05\x06")
    count, size, offset = struct.unpack("<H2L", small[end + 10 : end + 20])
    for claim in (count, count - 1):
        large = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, claim, claim, size, offset)
        content = small[:end] + large + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + small[end:]
        if claim == count:
            assert len(Archive(content, "a test").entries) == 2
        else:
            refused(content, "differ")


def test_a_size_that_is_stated_twice() -> None:
    content = bytearray(archive([Entry(b"m/a", b"abc")]))
    # Two zip64 fields in the directory.
    at = content.index(b"PK\x01\x02")
    field = struct.pack("<2H2Q", 1, 16, 3, 3)
    struct.pack_into("<H", content, at + 30, 2 * len(field))
    struct.pack_into("<2L", content, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    content[at + 46 + 3 : at + 46 + 3] = field * 2
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<L", content, end + 12, 46 + 3 + 2 * len(field))
    refused(bytes(content), "twice")


@pytest.mark.parametrize("keep", [0, 4, 30, 60, -1, -10, -23])
def test_archives_that_are_cut_short(keep: int) -> None:
    refused(archive(GOOD)[:keep], "damaged|not where", (InputError, UnsafeFile))  # type: ignore[arg-type]


def test_archives_within_archives(tmp_path: Path) -> None:
    content = archive(GOOD)
    for _ in range(4):
        content = archive([Entry(b"m/data.pkl", PICKLE), Entry(b"m/inner.zip", content)])
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(UnsafeFile, match="within archives"):
        read_state(tmp_path / "m.pt")


def test_packed_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "n.pt", "w") as out:
        for name in source.namelist():
            out.writestr(name, source.read(name), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFile, match="packed"):
        read_state(tmp_path / "n.pt")


@pytest.mark.parametrize("place", ["data.pkl", "extra.pkl", "data/9", "notes.txt", "inner.pt"])
@pytest.mark.parametrize("method", [0, 8])
def test_a_payload_anywhere_in_an_archive_is_told(tmp_path: Path, place: str, method: int) -> None:
    payload = pickle.dumps(Payload(tmp_path / "executed"), protocol=2)
    if place == "inner.pt":
        held = io.BytesIO()
        torch.save(Payload(tmp_path / "executed"), held)
        payload = held.getvalue()
    entries = [Entry(b"m/" + place.encode(), payload, method=method)]
    if place != "data.pkl":
        entries.insert(0, Entry(b"m/data.pkl", PICKLE))
    (tmp_path / "m.pt").write_bytes(archive(entries))
    assert any("system" in name for name in read_contents(tmp_path / "m.pt").dangerous)
    assert inspect(tmp_path / "m.pt").executes
    assert not (tmp_path / "executed").exists()


def test_absurd_claims_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    claims = [
        archive([Entry(b"m/data.pkl", PICKLE, method=8, size=1 << 31)]),
        archive(GOOD, count=65_535),
        # A text of an exabyte, a tuple of numbers of a gigabyte.
        archive([Entry(b"m/data.pkl", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.")]),
        archive([Entry(b"m/data.pkl", b"\x80\x02\x8b" + struct.pack("<l", 1 << 30) + b"abc.")]),
    ]
    for number, content in enumerate(claims):
        (tmp_path / "m.pt").write_bytes(content)
        tracemalloc.start()
        begun = time.process_time()
        with pytest.raises((InputError, UnsafeFile)):
            read_state(tmp_path / "m.pt")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000, number
        assert time.process_time() - begun < 2
