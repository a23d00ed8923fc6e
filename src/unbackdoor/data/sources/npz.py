"""An ``.npz`` file of numpy: arrays of pixels and labels, and no pickled object."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unbackdoor.data.cache import as_images
from unbackdoor.data.conform import resized
from unbackdoor.data.decode import require_memory
from unbackdoor.data.sources.checks import agreed_names, checked_labels
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.types import Images, Progress, silent

_PIXEL_KEYS = ("images", "x", "data")
_LABEL_KEYS = ("labels", "y")
_MAX_NPY_HEADER = 10_000


def read_npz(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
) -> Images:
    """Read an ``.npz`` file, past the cache; see :func:`load_images`."""
    title = name or path.stem
    arrays = _npz_arrays(path)
    pixel_key = next((key for key in _PIXEL_KEYS if key in arrays), None)
    if pixel_key is None:
        raise InputError(
            "there is no array of images",
            expected=f"one of the keys {', '.join(_PIXEL_KEYS)}",
            got=", ".join(sorted(arrays)) or "no arrays",
            where=path,
            remedy="Save the file with numpy.savez(path, images=..., labels=...)",
        )
    where = f"{path}, array {pixel_key}"
    pixels = _channels_first(_as_bytes(arrays[pixel_key], where), where)  # (N, C, H, W)
    if not len(pixels):
        raise InputError("the file has no images", expected="at least 1 image", got=0, where=where)
    if size is not None and pixels.shape[2:] != size:
        require_memory(len(pixels) * pixels.shape[1] * size[0] * size[1], title)
        pixels = resized(torch.from_numpy(pixels), size, title, progress).numpy()
    label_key = next((key for key in _LABEL_KEYS if key in arrays), None)
    names = agreed_names(class_names, _npz_names(arrays.get("class_names"), path), str(path))
    if label_key is None:
        return as_images(pixels, None, names or (), title)
    where = f"{path}, array {label_key}"
    raw = arrays[label_key]
    if raw.dtype.kind not in "iu" or raw.shape != (len(pixels),):
        raise InputError(
            "the labels have the wrong form",
            expected=f"integers of shape ({len(pixels)},)",
            got=f"{raw.dtype} of shape {raw.shape}",
            where=where,
            remedy="Save one integer per image",
        )
    labels = np.ascontiguousarray(raw, dtype=np.int64)
    # Without names nothing says which classes there are; the images may be few of a larger set.
    some = partial or names is None
    names, labels = checked_labels(labels, names, lambda i: f"{where}, row {i}", str(path), some)
    return as_images(pixels, labels, names, title)


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of known names, after checking their headers against the bytes that are there."""
    keys = {*_PIXEL_KEYS, *_LABEL_KEYS, "class_names"}
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if key in keys and member.filename.endswith(".npy"):
                    if key in arrays:
                        raise UnsafeFile("two arrays have one name", got=key, where=path)
                    arrays[key] = _npy(archive, member, f"{path}, array {key}")
    # zipfile, the decompressors and the parser of the headers, which is that of Python, report damage as any
    # of these; RuntimeError means encrypted, or a method of packing that is not known.
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError),
        *(OSError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError, SyntaxError),
    ) as error:
        raise InputError(
            "the .npz file is damaged",
            expected="a zip archive of .npy arrays",
            got=f"{type(error).__name__}: {error}",
            where=path,
            remedy="Write the file again with numpy.savez",
        ) from error
    return arrays


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    npy = np.lib.format
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(stream, max_header_size=_MAX_NPY_HEADER)
        offset = stream.tell()
    if dtype.hasobject:
        raise UnsafeFile(
            "the array holds pickled objects, which can run code",
            expected="numbers or texts",
            got=str(dtype),
            where=where,
            remedy="Save the array with a plain number type",
        )
    # Python integers: numpy's product would wrap around for a hostile shape.
    declared = dtype.itemsize
    for extent in shape:
        declared *= extent
    if declared != member.file_size - offset:
        raise UnsafeFile(
            "the array declares another size than the file holds",
            expected=f"{member.file_size - offset} bytes",
            got=f"shape {shape} of {dtype}, {declared} bytes",
            where=where,
            remedy="Write the file again with numpy.savez",
        )
    require_memory(declared, where)
    with archive.open(member) as stream:
        array: NDArray[Any] = npy.read_array(stream, allow_pickle=False, max_header_size=_MAX_NPY_HEADER)
    return array


def _as_bytes(values: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if values.dtype == np.uint8 or values.ndim not in (3, 4):
        return values  # the shape is refused by the next check
    remedy = "Save uint8 in 0..255, or float in [0, 1]"
    if values.dtype.kind != "f":
        raise InputError(
            "the pixels have the wrong type",
            expected="uint8 or float",
            got=values.dtype,
            where=where,
            remedy=remedy,
        )
    # The comparison is false for NaN as well.
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        row = int(wrong.reshape(len(values), -1).any(axis=1).argmax())
        raise InputError(
            "pixels are out of range",
            expected="float in [0, 1]",
            got=values[row][wrong[row]].flat[0],
            where=f"{where}, row {row}",
            remedy=remedy,
        )
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


def _channels_first(values: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    if values.ndim == 3:
        values = values[:, None]  # (N, 1, H, W)
    last = values.ndim == 4 and values.shape[-1] in (1, 3)
    first = values.ndim == 4 and values.shape[1] in (1, 3)
    if last == first:
        raise InputError(
            "the images have the wrong shape" if not last else "the place of the channels is ambiguous",
            expected="(N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3",
            got=values.shape,
            where=where,
            remedy="Save images of 1 or 3 channels",
        )
    if last:
        values = values.transpose(0, 3, 1, 2)  # (N, C, H, W)
    if 0 in values.shape[1:]:
        raise InputError("the images have no pixels", got=values.shape, where=where)
    return np.ascontiguousarray(values)


def _npz_names(array: NDArray[Any] | None, path: Path) -> tuple[str, ...] | None:
    if array is None:
        return None
    if array.dtype.kind != "U" or array.ndim != 1:
        raise InputError(
            "the class names have the wrong form",
            expected="a list of texts",
            got=f"{array.dtype} of shape {array.shape}",
            where=f"{path}, array class_names",
        )
    try:
        return tuple(str(name) for name in array)
    except (ValueError, SystemError) as error:  # a number that is no character
        raise InputError(
            "the class names have the wrong form", expected="a list of texts", got=str(error), where=path
        ) from error
