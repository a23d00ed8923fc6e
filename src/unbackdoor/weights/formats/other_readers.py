"""What else a file could be taken for: the rules by which other readers find the start and end of theirs.

A format is judged here by the first bytes, but a zip file is found from its end, a tar file by a sum over its
first block, an HDF5 file behind any block of a doubled size, and a protocol buffer by being read to the end.
So one file can be two, and a loader of the second kind reads, or runs, what was never looked at.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from unbackdoor.weights.formats.buffers import Buffer

TAR_BLOCK = 512
# How files begin that are of no supported format, what they are, and what to do with them.
NAMED = (
    (b"\x1f\x8b", "a gzip file", "Unpack it first"),
    (b"BZh", "a bzip2 file", "Unpack it first"),
    (b"\xfd7zXZ", "an xz file", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "Unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it first"),
    (b"Rar!", "a rar archive", "Unpack it first"),
    (b"\x89HDF", "an HDF5 file", "Keras models are not read; export it to ONNX or safetensors"),
    (b"\x93NUMPY", "a NumPy array", "Save all weights by name, at best as safetensors"),
    (b"GGUF", "a GGUF file", "Save the original weights as safetensors"),
    (b"\x89PNG", "an image", "Images are given with --data"),
    (b"\xff\xd8\xff", "an image", "Images are given with --data"),
    (b"%PDF", "a PDF document", "Give the file of weights itself"),
)
_POINTER = "Run git lfs pull in its repository, or download the file itself"
_PAGE = "Most often the page of a login or an error: download the file itself, logged in where it is asked"
# The same for texts, which are held against the beginning without blanks and in small letters.
_TEXTS = (
    (b"version https://git-lfs.github.com", "a pointer of git-lfs that stands in the file's place", _POINTER),
    (b"version https://hawser.github.com", "a pointer of git-lfs that stands in the file's place", _POINTER),
    (b"version http://git-media.io", "a pointer of git-lfs that stands in the file's place", _POINTER),
    (b"/annex/objects/", "a pointer of git-annex that stands in the file's place", "Run git annex get"),
    (b"<!doctype html", "a web page", _PAGE),
    (b"<html", "a web page", _PAGE),
    (b"<head", "a web page", _PAGE),
    (b"<?xml", "an XML document, such as a server's refusal", _PAGE),
    (b"<error", "an XML document, such as a server's refusal", _PAGE),
)
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP_END, _ZIP_END_SIZE, _ZIP_COMMENT = b"PK\x05\x06", 22, 0xFFFF
_ZIP_LOCATOR, _ZIP_LOCATOR_SIZE = b"PK\x06\x07", 20
_ZIP_STARTS = (b"PK\x01\x02", b"PK\x06\x06")
_FIELDS = 500_000  # of a protocol buffer; one that has more is refused in any case
_GRAPH = 7  # the field of a model that holds its graph


def taken_for(data: Buffer, kind: str) -> list[str]:
    """Return what other readers would take a file for, in words.

    Pickles are not among them; whether a file is one shows only when it is read as one.

    Args:
        data: The whole file.
        kind: What it is taken for here: safetensors, zip, pickle, tar or onnx.
    """
    head = bytes(data[:TAR_BLOCK])
    rules: dict[str, Callable[[], bool]] = {
        "zip": lambda: _ends_as_zip(data),
        "tar": lambda: is_tar_header(head),
        "onnx": lambda: _is_protocol_buffer(data),
        "an HDF5 file": lambda: _holds_hdf5(data),
        "a zlib stream": lambda: _is_zlib(data),
    }
    found = [words for words, holds in rules.items() if words != kind and holds()]
    return found + [words for magic, words, _ in NAMED if head.startswith(magic)]


def kind_of_text(head: bytes, name: str = "") -> tuple[str, str] | None:
    """Return what a text is that was taken for a file of weights, and what to do, both in words, or None.

    Args:
        head: The first bytes of the file.
        name: Its name, by which texts of JSON differ.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, words, remedy in _TEXTS:
        if text.startswith(magic):
            return words, remedy
    # In braces: the header of safetensors begins with its length.
    if text[:1] != b"{" or text[1:].lstrip()[:1] not in (b'"', b"}"):
        return None
    if name == "adapter_config.json":
        return "the configuration of an adapter", "Merge the adapter into its base, and give the merged model"
    if name == "config.json" or b'"architectures"' in text or b'"architecture"' in text:
        return "a configuration", "Give the folder that holds it and the weights"
    return "a text of JSON", "If it is a server's answer, download the file itself"


def is_index(head: bytes) -> bool:
    """Tell whether a file begins as the index of shards does that transformers writes."""
    return head.lstrip()[:1] == b"{" and b'"weight_map"' in head


def is_tar_header(block: bytes) -> bool:
    """Tell whether a reader of tar files would take these bytes for a member's header, by their sum."""
    if len(block) < TAR_BLOCK:
        return False
    field = block[148:156]  # counted as blanks
    try:
        if field[0] in (0x80, 0xFF):
            stated = int.from_bytes(field[1:], "big")
        else:
            stated = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    others = block[:148] + block[156:TAR_BLOCK]
    unsigned = 8 * ord(" ") + sum(others)
    return stated in (unsigned, unsigned - 256 * sum(byte > 0x7F for byte in others))


def _ends_as_zip(data: Buffer) -> bool:
    # Whatever stands before the archive: a reader that starts at the end finds the directory either where it
    # is said to be, or directly before the record of its end.
    start = max(0, len(data) - _ZIP_END_SIZE - _ZIP_COMMENT)
    tail = bytes(data[start:])
    at = tail.find(_ZIP_END)
    while 0 <= at <= len(tail) - _ZIP_END_SIZE:
        end = start + at
        size, offset = struct.unpack_from("<2L", tail, at + 12)
        before = bytes(data[max(0, end - _ZIP_LOCATOR_SIZE) : end])
        places = [offset, end - size]
        if before.startswith(_ZIP_LOCATOR):
            places.append(struct.unpack_from("<Q", before, 8)[0])
            places.append(end - _ZIP_LOCATOR_SIZE - 56)
        if any(bytes(data[place : place + 4]) in _ZIP_STARTS for place in places if 0 <= place < end):
            return True
        at = tail.find(_ZIP_END, at + 1)
    return False


def _holds_hdf5(data: Buffer) -> bool:
    at = 0
    while at < len(data):
        if bytes(data[at : at + 8]) == _HDF5:
            return True
        at = 2 * at or 512
    return False


def _is_zlib(data: Buffer) -> bool:
    if bytes(data[:1]) != b"x":
        return False
    try:
        return bool(zlib.decompressobj().decompress(bytes(data[: 1 << 16]), 1 << 16))
    except zlib.error:
        return False


def _is_protocol_buffer(data: Buffer) -> bool:
    # Whether the whole file is a message with a graph: fields of other numbers and kinds are kept unread.
    at, end, groups, graph = 0, len(data), 0, False
    for _ in range(_FIELDS):
        if at == end:
            return graph and not groups
        tag, at = _varint(data, at, end)
        field, wire = tag >> 3, tag & 7
        if not 0 < field < 1 << 29:
            return False
        length = 0
        if wire in (0, 2):
            value, at = _varint(data, at, end)
            length = value if wire == 2 else 0
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        elif wire in (3, 4):
            groups += 1 if wire == 3 else -1
        else:
            return False
        graph |= field == _GRAPH and wire == 2 and groups == 0
        at += length
        if at > end or groups < 0:
            return False
    return graph


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    # Beyond the end where it does not stop in time.
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, end + 1
