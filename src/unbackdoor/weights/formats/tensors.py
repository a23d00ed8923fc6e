"""Tensors that a file describes, checked before any memory is allocated for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unbackdoor.errors import InputError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend

MAX_AXES = 16
MAX_TIED = 4  # times the bytes of the file that its tensors may have in all; tied weights are copied
_LARGEST = 1 << 40  # elements; a bound so that sums stay small, beyond every file that is read

# By the name that torch gives the type, and by that of its storage class.
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16",
        "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    )
    if hasattr(torch, name)
}  # fmt: skip
STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage":
    torch.bool, "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
# Of quantised tensors, by the type of their levels.
QUANTISED_STORAGES: Mapping[str, torch.dtype] = {
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
}  # fmt: skip
_CARRIERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}


@dataclass(frozen=True)
class Window:
    """Bytes of a buffer that one storage occupies."""

    data: Buffer = field(repr=False)
    start: int
    size: int


@dataclass(eq=False)
class Store:
    """The storages of one file by key; some containers fill it only after the pickle has been read."""

    windows: dict[str, Window] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A storage that a pickle refers to.

    Attributes:
        store: Where its bytes will be.
        key: Its name there.
        dtype: Type of its elements.
        count: Number of elements it is said to have.
        first: Element of the stored one that a view begins at.
    """

    store: Store
    key: str
    dtype: torch.dtype
    count: int
    first: int = 0


@dataclass(frozen=True, eq=False)
class QuantisedStorageRef(StorageRef):
    """A storage of levels, whose scale stands elsewhere: no plain tensor is made of it."""


@dataclass(frozen=True, eq=False)
class Affine:
    """How the levels of a quantised tensor become numbers: (level - zero point) * scale.

    Attributes:
        scale: One number, or one for each index along an axis.
        zero_point: Likewise.
        axis: That axis; None for one scale of the whole tensor.
    """

    scale: float | tuple[float, ...] | TensorRef
    zero_point: int | tuple[int, ...] | TensorRef
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor that a file describes; nothing has been read of it.

    Attributes:
        storage: Where its elements lie.
        dtype: Their type there; of a quantised tensor, that of its levels.
        offset: Element of the storage that it begins at.
        shape: Its sizes.
        stride: Elements from one to the next along each axis.
        affine: Of a quantised tensor, which is read as float32; else None.
    """

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    affine: Affine | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def bytes(self) -> int:
        """Bytes that it takes once it is read."""
        return self.count * (self.dtype if self.affine is None else torch.float32).itemsize

    @property
    def type_in_file(self) -> str:
        """Its type in the file, as torch names it: ``float32``, ``qint8``."""
        name = str(self.dtype).removeprefix("torch.")
        return name if self.affine is None else f"q{name}"


def natural(value: object) -> bool:
    """Tell whether a value from a file is a size: an integer from 0 to beyond every file."""
    return type(value) is int and 0 <= value <= _LARGEST


def sizes(values: object) -> tuple[int, ...]:
    """Return a shape or strides from a file.

    Raises:
        InputError: If it is no short list of natural numbers.
    """
    if not isinstance(values, list | tuple) or len(values) > MAX_AXES or not all(natural(v) for v in values):
        raise InputError(
            "a tensor has an absurd shape", expected=f"at most {MAX_AXES} sizes", got=_short_sizes(values)
        )
    return tuple(values)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps."""
    out = [1]
    for size in reversed(shape[1:]):
        out.append(out[-1] * max(size, 1))
    return tuple(reversed(out)) if shape else ()


def check(name: str, ref: TensorRef) -> None:
    """Raise unless a tensor lies within its storage, and the storage within its file.

    Raises:
        InputError: If bytes are missing.
        UnsafeFile: If the sizes claim what no file holds.
    """
    count = 1
    for size in ref.shape:
        count *= max(size, 1)
        if count > _LARGEST:
            raise _absurd(name, ref)
    if len(ref.shape) != len(ref.stride):
        raise _absurd(name, ref)
    if not ref.count:
        return
    storage = ref.storage
    window = storage.store.windows.get(storage.key)
    if window is None:
        raise InputError("the bytes of a tensor are missing", got=f"tensor {short(name)}")
    # A view is a part of the stored bytes, and the type of a tensor may be another than its storage's.
    size = min(storage.count * storage.dtype.itemsize, window.size - storage.first * storage.dtype.itemsize)
    available = size // ref.dtype.itemsize
    last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
    if last >= available:
        raise InputError(
            "a tensor reaches beyond its bytes",
            expected=f"at least {last + 1} elements",
            got=f"{available}, tensor {short(name)}",
        )


def materialise(refs: Mapping[str, TensorRef], file_size: int) -> dict[str, Tensor]:
    """Return tensors in memory of their own, after all of them have been checked.

    Args:
        refs: Tensors by name.
        file_size: Bytes of the file they come from.

    Raises:
        InputError: If bytes are missing.
        UnsafeFile: If they describe far more than the file holds.
        UnsupportedModel: If the scale or the zero point of a quantised tensor is none.
    """
    described = 0
    spend("tensors", len(refs))
    for name, ref in refs.items():
        check(name, ref)
        described += ref.bytes
    # With a stride of zero one stored number fills a tensor of any size: counted before copying.
    if described > MAX_TIED * file_size:
        raise UnsafeFile(
            "the file describes more than it holds",
            expected=f"tensors of at most {MAX_TIED * file_size} bytes in a file of {file_size} bytes",
            got=f"{described} bytes",
        )
    return {
        name: _copied(ref) if ref.affine is None else _dequantised(name, ref, ref.affine)
        for name, ref in refs.items()
    }


def quantised(got: str = "whole numbers, whose scale stands elsewhere") -> UnsupportedModel:
    """Return the error that says that quantised weights are not read, and what to do.

    Args:
        got: Why not, in words.
    """
    return UnsupportedModel(
        "the weights are quantised in a way that is not read",
        expected="whole numbers beside their scale, one for each tensor or for each of its outputs",
        got=got,
        remedy="Use the network that it was made from, before quantisation",
    )


def dequantise(name: str, levels: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return (levels - zero point) * scale as float32, exactly as torch computes it.

    Args:
        name: Name of the tensor, for messages.
        levels: Whole numbers.
        scale: One number, or what can be laid over the levels; of 64 bits it is multiplied in 64 bits.
        zero_point: Whole numbers, likewise.

    Raises:
        UnsupportedModel: If a scale is not a positive number, or a zero point is no level.
    """
    usable = torch.isfinite(scale.float()) & (scale.float() > 0)  # as float32, which may make 0 of it
    if not scale.is_floating_point() or not bool(usable.all()):
        raise quantised(f"a scale that is zero, negative or not finite, tensor {short(name)}")
    span = torch.iinfo(levels.dtype)
    levels_only = (span.min <= zero_point) & (zero_point <= span.max) & (zero_point == zero_point.long())
    if not bool(levels_only.all()):
        raise quantised(f"a zero point that is no level, tensor {short(name)}")
    wide = torch.int64 if levels.dtype == torch.int32 else torch.int32
    distance = levels.to(wide) - zero_point.to(wide)
    if wide == torch.int64 and distance.numel() and int(distance.abs().max()) >= 1 << 31:
        raise quantised(f"levels whose distance from the zero point overflows, tensor {short(name)}")
    if scale.dtype == torch.float64:
        # Torch takes the difference of two numbers in float32 here, and multiplies in float64.
        return ((levels.float() - zero_point.float()).double() * scale).float()
    return distance.float() * scale.float()


def _dequantised(name: str, ref: TensorRef, affine: Affine) -> Tensor:
    levels = _copied(ref)
    if affine.axis is None:
        scale = torch.tensor(affine.scale, dtype=torch.float64).float()
        return dequantise(name, levels, scale, torch.tensor(affine.zero_point))
    count = ref.shape[affine.axis]
    along = [count if axis == affine.axis else 1 for axis in range(len(ref.shape))]
    scale = _along(name, affine.scale, count).double().reshape(along)
    return dequantise(name, levels, scale, _along(name, affine.zero_point, count).reshape(along))


def _along(name: str, values: object, count: int) -> Tensor:
    """Return as many numbers as a tensor has indices along an axis."""
    shape = values.shape if isinstance(values, TensorRef) else (len(values),)  # type: ignore[arg-type]
    if shape != (count,):
        raise quantised(f"scales or zero points {list(shape)[:4]} for {count} outputs, tensor {short(name)}")
    if not isinstance(values, TensorRef):
        return torch.tensor(values)
    spend("tensors")
    check(name, values)
    return _copied(values)


def _copied(ref: TensorRef) -> Tensor:
    if not ref.count:
        return torch.empty(ref.shape, dtype=ref.dtype)
    window = ref.storage.store.windows[ref.storage.key]
    item = ref.dtype.itemsize
    # Viewed by numpy as integers of the width, because it knows neither bfloat16 nor tensors in unaligned
    # bytes.
    begin = window.start + ref.storage.first * ref.storage.dtype.itemsize + ref.offset * item
    strides = [stride * item for stride in ref.stride]
    there = np.ndarray(ref.shape, _CARRIERS[item], window.data, begin, strides)
    raw = torch.from_numpy(np.array(there, order="C"))
    # Any other byte than 0 and 1 is undefined behaviour in a truth value.
    return raw != 0 if ref.dtype == torch.bool else raw.view(ref.dtype)


def _absurd(name: str, ref: TensorRef) -> UnsafeFile:
    return UnsafeFile("a tensor has an absurd shape", got=f"{_short_sizes(ref.shape)}, tensor {short(name)}")


def _short_sizes(values: object) -> str:
    return short(list(values[:8])) if isinstance(values, list | tuple) else type(values).__name__
