"""ONNX files: their weights as a state dict. Needs the extra ``onnx``; ``onnx_graph`` makes a network.

An ONNX file holds no code. What it can do is to be large, to claim to be, and to name other files: data
outside the folder of the model is never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbackdoor.errors import InputError, MissingExtra, UnsafeFile
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import MAX_AXES, MAX_TIED, natural
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.stored_file import StoredFile

MAX_BYTES = (1 << 31) - 1  # what a protocol buffer can have
# Messages and fields in the graph. A message of two bytes becomes an object of a hundred.
MAX_FIELDS = 500_000
_DEPTH = 20  # messages within each other, such as graphs in attributes of nodes

# Numbers of the tags by which the first three bytes of a model are recognised: the version, then a text or a
# graph.
_VERSION_TAG = 0x08
_NEXT_TAGS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
# Messages that contain messages: field number to kind. All other fields are counted and skipped.
_NESTED: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "value": {},
}
# Fields of numbers that may be packed into one: each of their bytes may become a number of eight.
_PACKED: Mapping[str, frozenset[int]] = {
    "attribute": frozenset({7, 8}),  # floats, ints
    "sparse": frozenset({3}),  # dims
    "tensor": frozenset({1}),  # dims
}
_VARINT, _WIDE, _LENGTH, _NARROW = 0, 1, 2, 5
# Data type to its name in torch, how numpy carries it, and the field that may hold it where there are no raw
# bytes.
TYPES = {
    1: (torch.float32, "<f4", "float_data"),
    2: (torch.uint8, "u1", "int32_data"),
    3: (torch.int8, "i1", "int32_data"),
    4: (torch.uint16, "<i2", "int32_data"),
    5: (torch.int16, "<i2", "int32_data"),
    6: (torch.int32, "<i4", "int32_data"),
    7: (torch.int64, "<i8", "int64_data"),
    9: (torch.bool, "u1", "int32_data"),
    10: (torch.float16, "<i2", "int32_data"),
    11: (torch.float64, "<f8", "double_data"),
    16: (torch.bfloat16, "<i2", "int32_data"),
}
EXTERNAL = 1


def is_onnx(head: bytes) -> bool:
    """Tell whether a file begins as an ONNX model does; the format has no magic number."""
    return len(head) > 2 and head[0] == _VERSION_TAG and 0 < head[1] < 0x40 and head[2] in _NEXT_TAGS


def read(file: StoredFile, trail: Trail) -> dict[str, Tensor]:
    """Return the initializers of a model by name.

    Raises:
        MissingExtra: If the package onnx is not installed.
        InputError: If the file is damaged or holds no weights.
        UnsafeFile: If it names data outside its folder, or is built to exhaust the memory.
    """
    model = parse(file)
    tensors, path = Tensors(file), file.path
    if not all(isinstance(tensor.name, str) for tensor in model.graph.initializer):
        raise InputError("the name of a weight is no text", where=path)  # protobuf leaves bad ones as bytes
    spend("tensors", len(model.graph.initializer))
    state = {tensor.name: tensors.read(tensor) for tensor in model.graph.initializer}
    if len(state) != len(model.graph.initializer):
        raise UnsafeFile("two weights of the model have one name", where=path)
    if not state:
        raise InputError("the model holds no weights", expected="initializers", where=path)
    if tensors.outside:
        trail.note(f"weights lie in other files of its folder: {listed(list(tensors.outside))}")
    return state


def parse(file: StoredFile) -> Any:
    """Return the model message of a file, after counting what it would become.

    Raises:
        MissingExtra: If the package onnx is not installed.
        InputError: If the file is damaged.
        UnsafeFile: If it would take far more memory than it has bytes.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", "reading ONNX files") from error
    path = file.path
    if file.size > MAX_BYTES:
        raise UnsafeFile(
            "the model file is too large",
            expected=f"at most {MAX_BYTES} bytes",
            got=file.size,
            where=path,
        )
    content = bytes(file.content)
    if len(list(_graphs(content))) > 1:
        raise UnsafeFile("the model has several graphs, of which readers choose differently", where=path)
    try:
        _count(content)
        return onnx.ModelProto.FromString(content)
    except (DecodeError, IndexError, ValueError) as error:
        raise InputError(
            "the model file is damaged or cut short",
            got=short(str(error) or type(error).__name__),
            where=path,
            remedy="Copy or download it again",
        ) from error


class Tensors:
    """Reads tensor messages, and what lies in other files, within bounds.

    Args:
        file: The model; other files must lie in its folder.
    """

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._path = file.path
        self._folder = file.path.parent.resolve()
        self._described = 0
        self.numbers = 0
        self.outside: dict[str, int] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of the model and of the other files that were read so far."""
        return self._file.size + sum(self.outside.values())

    def read(self, message: Any) -> Tensor:
        """Return the tensor of a message.

        Raises:
            InputError: If bytes are missing, or it is of an unknown type.
            UnsafeFile: If it lies outside the folder.
        """
        shape = tuple(int(size) for size in message.dims)
        where = f"{self._path}, tensor {short(message.name)}"
        count = 1
        for size in shape:
            count *= size
        if len(shape) > MAX_AXES or not all(natural(size) for size in shape) or not natural(count):
            raise UnsafeFile("a tensor has an absurd shape", got=short(list(shape[:8])), where=where)
        if message.data_type not in TYPES:
            raise InputError("a tensor is of an unknown type", got=message.data_type, where=where)
        dtype, carrier, field = TYPES[message.data_type]
        numbers = self._numbers(message, np.dtype(carrier), field, count, where)
        self._described += numbers.nbytes
        self.numbers += count
        if self._described > MAX_TIED * self.bytes_read:
            raise UnsafeFile("the model describes more than it holds", got=self._described, where=where)
        tensor = torch.from_numpy(numbers.reshape(shape))
        return tensor != 0 if dtype == torch.bool else tensor.view(dtype)

    def _numbers(self, message: Any, carrier: np.dtype[Any], field: str, count: int, where: str) -> Any:
        if message.data_location == EXTERNAL:
            raw = self._external(message, count * carrier.itemsize, where)
        elif message.HasField("raw_data"):
            raw = message.raw_data
        else:
            values = getattr(message, field)
            if len(values) != count:
                raise _missing(count, len(values), where)
            # One number after the other, because a list of them has eight times their size.
            wide = np.fromiter(values, np.int64 if carrier.kind in "iu" else np.float64, count)
            return np.ascontiguousarray(wide.astype(carrier))
        if len(raw) != count * carrier.itemsize:
            raise _missing(count * carrier.itemsize, len(raw), where)
        return np.frombuffer(raw, carrier).copy()

    def _external(self, message: Any, expected: int, where: str) -> bytes:
        facts = {entry.key: entry.value for entry in message.external_data}
        location = facts.get("location", "")
        file = self._inside(location, where)
        try:
            offset, length = int(facts.get("offset") or 0), int(facts.get("length") or expected)
        except ValueError as error:
            raise InputError("the place of a tensor is no number", where=where) from error
        if not natural(offset) or length != expected:
            raise _missing(expected, length, where)
        stored = self._file.other(location, file)
        self.outside[location] = stored.size
        if offset + length > stored.size:
            raise _missing(offset + length, stored.size, where)
        return bytes(stored.content[offset : offset + length])

    def _inside(self, location: str, where: str) -> Path:
        parts = PurePosixPath(location).parts
        plain = bool(parts) and not any(part in ("..", "/") or "\\" in part or ":" in part for part in parts)
        file = (self._folder / location).resolve() if plain and "\0" not in location else self._folder
        # Resolved, because a link in the folder may lead out of it.
        if not file.is_relative_to(self._folder) or not plain:
            raise UnsafeFile("the model names data outside its folder", got=short(location), where=where)
        if not file.is_file():
            raise InputError("a file of weights is missing", expected=file.name, where=where)
        return file


def _missing(expected: int, got: int, where: str) -> InputError:
    return InputError("the bytes of a tensor are missing", expected=expected, got=got, where=where)


def _fields(content: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    # Number, wire type and, for those with a length, content of each field of a message.
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field without a number")
        if wire == _LENGTH:
            length, at = _varint(content, at)
            if at + length > len(content):
                raise ValueError("a field reaches beyond the file")
            yield number, wire, content[at : at + length]
            at += length
        elif wire == _VARINT:
            _, at = _varint(content, at)
            yield number, wire, content[:0]
        elif wire in (_WIDE, _NARROW):
            at += 8 if wire == _WIDE else 4
            yield number, wire, content[:0]
        else:
            raise ValueError("an unknown kind of field")


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _graphs(content: bytes) -> Iterator[int]:
    try:
        for number, _, _ in islice(_fields(memoryview(content)), MAX_FIELDS):  # the count refuses more
            if number == 7:
                yield number
    except (IndexError, ValueError):
        return  # the count says what is wrong


def _count(content: bytes) -> None:
    # Depth first, so that the count itself takes no memory.
    above: list[tuple[str, Iterator[tuple[int, int, memoryview]]]] = [("model", _fields(memoryview(content)))]
    seen = 0
    while above:
        kind, fields = above[-1]
        number, wire, inner = next(fields, (0, _VARINT, memoryview(b"")))
        if not number:
            above.pop()
            spend("visits")
            continue
        packed = wire == _LENGTH and number in _PACKED.get(kind, ())
        seen += max(len(inner), 1) if packed else 1
        if seen > MAX_FIELDS:
            raise UnsafeFile("the model has too many parts", expected=f"at most {MAX_FIELDS} fields")
        nested = _NESTED[kind].get(number) if wire == _LENGTH else None
        if nested is not None:
            if len(above) > _DEPTH:
                raise UnsafeFile("graphs of the model lie within each other", got=f"more than {_DEPTH} deep")
            above.append((nested, _fields(inner)))
