"""Writers of files that no honest program writes, and a payload that tells whether it was executed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Payload:
    """Leaves a marker where it is executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


@dataclass
class Entry:
    """One entry of an archive, with every lie that its two headers can tell."""

    name: bytes
    data: bytes = b""
    local_name: bytes | None = None
    method: int = 0
    flags: int = 0x800
    attributes: int = 0
    made_by: int = 3 << 8
    size: int | None = None
    packed: int | None = None
    header_at: int | None = None


def archive(
    entries: list[Entry], *, comment: bytes = b"", count: int | None = None, before: bytes = b""
) -> bytes:
    """Return a zip file of the entries, as they are told."""
    out, directory = bytearray(before), bytearray()
    for entry in entries:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = packer.compress(entry.data) + packer.flush() if entry.method == 8 else entry.data
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(body) if entry.packed is None else entry.packed
        crc = zlib.crc32(entry.data)
        at = len(out) if entry.header_at is None else entry.header_at
        local = entry.name if entry.local_name is None else entry.local_name
        numbers = (20, entry.flags, entry.method, 0, 0, crc, packed, size)
        if entry.header_at is None:
            out += struct.pack("<4s5H3L2H", b"PK\x03\x04", *numbers, len(local), 0) + local + body
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            entry.made_by | 20,
            *numbers,
            len(entry.name),
            0,
            0,
            0,
            0,
            entry.attributes,
            at,
        )
        directory += entry.name
    number = len(entries) if count is None else count
    # What stands before the archive is not counted, as with a program that unpacks itself.
    end = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, number, number, len(directory), len(out) - len(before), len(comment)
    )
    return bytes(out + directory + end + comment)


def exported(weights: dict[str, list[float]], *extra: Entry, **changes: Any) -> bytes:
    """Return a program of torch.export with float32 weights; each description gets the changes."""
    entries, config = [], {}
    for number, (name, values) in enumerate(weights.items()):
        path = f"weight_{number}"
        meta = {
            "dtype": 7, "sizes": [{"as_int": len(values)}], "strides": [{"as_int": 1}], "requires_grad": True,
            "device": {"type": "cpu", "index": None}, "storage_offset": {"as_int": 0}, "layout": 7,
        }  # fmt: skip
        told = {"path_name": path, "is_param": True, "use_pickle": False, "tensor_meta": meta}
        meta.update({key: value for key, value in changes.items() if key in meta})
        told.update({key: value for key, value in changes.items() if key not in meta})
        config[name] = told
        entries.append(Entry(f"m/data/weights/{path}".encode(), struct.pack(f"<{len(values)}f", *values)))
    listing = json.dumps({"config": config}).encode()
    return archive(
        [
            *entries,
            Entry(b"m/data/weights/model_weights_config.json", listing),
            Entry(b"m/archive_format", b"pt2"),
            *extra,
        ]
    )
