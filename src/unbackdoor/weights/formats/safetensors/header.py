"""Safetensors from bytes in memory, as strictly as its own library reads files.

The library opens a path by itself, so that what it reads could be another file than the one that was hashed.
The rules here are its rules: the tensors follow each other without a gap from the end of the header to the
end of the file, and each has as many bytes as its shape and type say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import (
    DTYPES,
    StorageRef,
    Store,
    TensorRef,
    Window,
    contiguous,
    natural,
    sizes,
)

MAX_HEADER = 16 << 20  # bytes
_METADATA = "__metadata__"
_TYPES: Mapping[str, torch.dtype] = {
    short_name: DTYPES[name]
    for short_name, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
        "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32",
        "U64": "uint64", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }.items()
    if name in DTYPES
}  # fmt: skip


def read(data: Buffer, where: object) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Return the tensors that a file describes, and the texts of its header.

    Args:
        data: The whole file.
        where: What to call it in messages.

    Raises:
        InputError: If it is cut short or damaged, or a tensor is of an unknown type.
        UnsafeFile: If its header is too large, or names a tensor twice.
    """
    length = int.from_bytes(bytes(data[:8]), "little")
    if length > len(data) - 8:
        raise InputError(
            "the model file is cut short",
            expected=f"a header of {length} bytes",
            got=f"{len(data) - 8} bytes in all",
            where=where,
            remedy="Copy or download it again",
        )
    if length > MAX_HEADER:
        raise UnsafeFile(
            "the header of the model file is too large",
            expected=f"at most {MAX_HEADER} bytes",
            got=length,
            where=where,
        )
    header = bytes(data[8 : 8 + length])
    spend("visits", header.count(b",") + header.count(b"[") + header.count(b"{"))  # each is an object to come
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
        metadata = entries.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("the metadata are no texts")
        "".join([*entries, *metadata, *metadata.values()]).encode("utf-8")  # no half of a character
        return _tensors(data, 8 + length, entries), metadata
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            "the model file is damaged or cut short",
            got=short(str(error).split("\n")[0] or type(error).__name__),
            where=where,
            remedy="Copy or download it again",
        ) from error


def _tensors(data: Buffer, start: int, entries: Mapping[str, Any]) -> dict[str, TensorRef]:
    spans: list[tuple[int, int]] = []
    out = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        if not (natural(first) and natural(last)):
            raise ValueError(f"the place of tensor {short(name)} is no number")
        dtype = _TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise InputError("a tensor is of an unknown type", got=short(entry["dtype"]))
        shape = sizes(entry["shape"])
        storage = StorageRef(Store(), name, dtype, (last - first) // dtype.itemsize)
        reference = TensorRef(storage, dtype, 0, shape, contiguous(shape))
        if last - first != reference.count * dtype.itemsize:
            raise ValueError(f"tensor {short(name)} has {last - first} bytes, its shape says otherwise")
        reference.storage.store.windows[name] = Window(data, start + first, last - first)
        spans.append((first, last))
        out[name] = reference
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError("the tensors overlap, or leave a gap")
        end = last
    if start + end != len(data):
        raise ValueError("the file is longer or shorter than its tensors")
    return out


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise UnsafeFile("a name stands twice in the header, and readers choose differently")
    return mapping


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")
