"""Image sets from a Parquet file, a folder, a table of labels, an ``.npz`` file or a single image."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unbackdoor.data.cache import as_images, cache_key, cached
from unbackdoor.data.decode import CHUNK, Item, decode, require_memory
from unbackdoor.data.label_table import NAME as LABELS
from unbackdoor.data.label_table import numbered, read_table
from unbackdoor.errors import InputError, MissingExtra, UnsafeFile
from unbackdoor.files import sha256_file
from unbackdoor.types import Images, Progress, silent

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff"}
)
_PIXEL_KEYS = ("images", "x", "data")
_LABEL_KEYS = ("labels", "y")
_MAX_CLASSES = 1 << 16
_MAX_FILE_BYTES = 1 << 28
_MAX_NPY_HEADER = 10_000
_REMEDY_FORMS = (
    "Give a .parquet file, a folder with one folder per class or with a labels.csv, an .npz file, or an image"
)


def load_images(
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    partial: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Images:
    """Load an image set, decoding it at the first call and reading the cache afterwards.

    - Parquet: the Hugging Face image schema, columns ``image`` (struct with ``bytes``) and ``label``
      (integer), class names in the schema metadata under ``huggingface``.
    - Folder: one folder per class, in sorted order (folders called by whole numbers: in the order of the
      numbers) or in the order of ``class_names``, whose folders may also be called by their index; files
      without an image suffix and hidden files are passed over. With a ``labels.csv`` in it, or where such a
      table is given itself: one row an image, ``file,label``. With images only: a set without labels.
    - Image: a set of one, without a label.
    - npz: ``images`` (or ``x``, ``data``) of shape (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float
      in [0, 1]; ``labels`` (or ``y``); ``class_names``. Without labels the set has none.

    An image is turned upright by its EXIF tag, loses its alpha channel, and is reduced to 8 bits. The set is
    greyscale (C = 1) where every image is, else RGB.

    Args:
        path: The file or folder.
        class_names: Names in label order; they must agree with those in the file.
        size: (H, W) to resize to, bilinear; None demands that all images have one size.
        partial: Whether some of the ``class_names`` may have no images.
        cache: Cache folder; None is :func:`unbackdoor.data.cache.default_cache`.
        progress: Shows how far decoding has come.

    Raises:
        InputError: If the set cannot be used; it names the file or row, and what to do.
        UnsafeFile: If a file holds pickled objects or declares absurd sizes.
        MissingExtra: If a Parquet file is given and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.savez(folder / "pets.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=[0, 1, 0, 1])
        >>> pets = load_images(folder / "pets.npz", class_names=["cat", "dog"], cache=folder)
        >>> pets.shape, pets.class_names
        ((3, 8, 8), ('cat', 'dog'))
    """
    path = Path(path)
    names = None if class_names is None else tuple(class_names)
    _require_arguments(names, size)
    read, source = _reader(path)
    facts = {"source": source, "class_names": names, "size": size} | ({"partial": True} if partial else {})
    options = {"class_names": names, "size": size, "progress": progress, "partial": partial}
    return cached(path.stem, cache_key(facts), lambda: read(path, **options), cache=cache)


def _reader(path: Path) -> tuple[Callable[..., Images], Any]:
    """Return the function for this form of set, and what identifies the source's content."""
    if path.is_dir() and (path / LABELS).is_file():
        return read_labelled, ["table", sha256_file(path / LABELS), _flat_state(path)]
    if path.is_dir():
        if not _class_folders(path) and (flat := _flat_state(path)):
            return read_flat, ["images", flat]
        return read_folder, ["class folders", _folder_state(path)]
    if not path.exists():
        raise InputError("there is no such file or folder", where=path, remedy=_REMEDY_FORMS)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_labelled, ["table", sha256_file(path), _flat_state(path.parent)]
    if suffix in IMAGE_SUFFIXES:
        return read_flat, ["image", sha256_file(path)]
    if suffix not in (".parquet", ".npz"):
        raise InputError("the form of the image set is not known", got=path.name, remedy=_REMEDY_FORMS)
    content = [suffix, path.stat().st_size, sha256_file(path)]
    return (read_parquet if suffix == ".parquet" else read_npz), content


# ---------------------------------------------------------------------------------------------------
# Parquet


def read_parquet(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
) -> Images:
    """Decode a Parquet file, past the cache; see :func:`load_images`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "reading Parquet files") from error

    row = 0

    def items() -> Iterator[Item]:
        nonlocal row
        for batch in file.iter_batches(batch_size=CHUNK, columns=["image.bytes"]):
            # Flattened, because a null image counts as null bytes.
            for data in batch.column(0).flatten()[0].to_pylist():
                if not data:
                    raise InputError(
                        "a row has no image",
                        expected="encoded bytes in image.bytes",
                        got="null" if data is None else "0 bytes",
                        where=f"{path}, row {row}",
                        remedy="Remove the row or write the image's bytes into it",
                    )
                yield f"{path}, row {row}", data
                row += 1

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            _require_columns(schema, pa, path)
            count = file.metadata.num_rows
            if count < 1:
                raise InputError("the file has no rows", expected="at least 1 image", got=0, where=path)
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            require_memory(max(groups), f"{path}, row group {int(np.argmax(groups))}")
            require_memory(8 * count, f"{path}, column label")
            labels = _labels_of(file.read(columns=["label"]).column(0), path)
            names = _agreed(class_names, _names_in(schema.metadata, path), str(path))
            names, labels = _checked_labels(labels, names, lambda i: f"{path}, row {i}", str(path), partial)
            pixels = decode(items(), count, name=name or path.stem, size=size, progress=progress)
    except (pa.ArrowException, OSError) as error:
        # Arrow raises plain OSError for damage; a real I/O error has a number.
        if isinstance(error, OSError) and error.errno:
            raise InputError("the file cannot be read", where=path, got=error.strerror) from error
        raise InputError(
            "the Parquet file is damaged or cut short",
            expected="a complete Parquet file",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            where=f"{path}, near row {row}",
            remedy="Fetch or write the file again",
        ) from error
    return as_images(pixels, labels, names, name or path.stem)


def _require_columns(schema: Any, pa: Any, path: Path) -> None:
    remedy = "Use the Hugging Face image schema: image {bytes, path}, label"
    for column in ("image", "label"):
        if column not in schema.names:
            raise InputError(
                f"the column {column!r} is missing",
                expected="columns image and label",
                got=", ".join(schema.names) or "no columns",
                where=path,
                remedy=remedy,
            )
    kind = schema.field("image").type
    inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    data = inner.get("bytes")
    if data is None or not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
        raise InputError(
            "the column 'image' has the wrong type",
            expected="a struct with a binary field 'bytes'",
            got=kind,
            where=path,
            remedy=remedy,
        )
    if not pa.types.is_integer(schema.field("label").type):
        raise InputError(
            "the column 'label' has the wrong type",
            expected="integers",
            got=schema.field("label").type,
            where=path,
            remedy=remedy,
        )


def _labels_of(column: Any, path: Path) -> NDArray[np.int64]:
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise InputError(
            "a label is missing",
            expected="an integer",
            got="null",
            where=f"{path}, row {row}",
            remedy="Label the image or remove the row",
        )
    values = column.to_numpy()
    # Values of uint64 beyond int64 would turn negative, and then be reported as such.
    return np.ascontiguousarray(values, dtype=np.int64).copy()


def _names_in(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature = json.loads(text)["info"]["features"]["label"]
        names = feature.get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            "the metadata under 'huggingface' cannot be read",
            expected="JSON with info.features.label.names",
            got=f"{type(error).__name__}: {error}",
            where=path,
            remedy="Write the metadata again, or remove it and give the class names",
        ) from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            "the class names in the metadata are not a list of texts",
            got=str(names)[:80],
            where=path,
            remedy="Write the metadata again, or remove it and give the class names",
        )
    return tuple(names)


# ---------------------------------------------------------------------------------------------------
# Folder


def read_folder(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
) -> Images:
    """Decode a folder of class folders, past the cache; see :func:`load_images`."""
    found = _class_folders(path)
    if not found:
        raise InputError(
            "the folder holds no class folders",
            expected="one folder per class",
            got="no folders",
            where=path,
            remedy="Put the images of each class into a folder named after it",
        )
    names = class_names or tuple(found)
    found = _by_class(found, names)
    if extra := [n for n in found if n not in names]:
        raise InputError(
            f"the folder {extra[0]!r} is none of the classes",
            expected=", ".join(names[:20]),
            where=path / extra[0],
            remedy="Add it to the class names or move it away",
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(names):
        members = found.get(class_name)
        if partial and members is None:
            continue
        if not members:
            raise InputError(
                f"the class {class_name!r} has no images",
                expected="a folder with at least 1 image",
                got="an empty folder" if members == [] else "no such folder",
                where=path / class_name,
                remedy="Add images of the class or leave it out of the class names and the folder",
            )
        files += members
        labels += [label] * len(members)
    title = name or path.name or "images"
    items = ((str(file), _read_bounded(file)) for file in files)
    pixels = decode(items, len(files), name=title, size=size, progress=progress)
    return as_images(pixels, np.asarray(labels, dtype=np.int64), names, title)


def read_labelled(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
) -> Images:
    """Decode the images of a table of files and labels, past the cache; see :func:`load_images`."""
    table = path / LABELS if path.is_dir() else path
    entries = read_table(table)
    numbers, texts = numbered(entries, class_names, table)
    labels = np.asarray(numbers, dtype=np.int64)
    # Without given names, whole numbers need not all occur: the table may be a part of a larger one.
    names, labels = _checked_labels(
        labels,
        tuple(texts),
        lambda i: f"{table}, line {entries[i].line}",
        str(table),
        partial or class_names is None,
    )
    title = name or table.parent.name or "images"
    items = ((str(entry.file), _read_bounded(entry.file)) for entry in entries)
    pixels = decode(items, len(entries), name=title, size=size, progress=progress)
    return as_images(pixels, labels, names, title)


def read_flat(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
) -> Images:
    """Decode one image, or a folder of images without class folders; see :func:`load_images`."""
    files = _image_files(path) if path.is_dir() else [path]
    title = name or path.stem or "images"
    items = ((str(file), _read_bounded(file)) for file in files)
    pixels = decode(items, len(files), name=title, size=size, progress=progress)
    return as_images(pixels, None, class_names or (), title)


def load_unlabelled(
    path: Path,
    *,
    class_names: Sequence[str],
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> tuple[Images, tuple[str, ...]]:
    """Load images of unknown origin, and what each of them is called.

    Args:
        path: A folder with images at any depth, in the order of their paths; or a .parquet or .npz file,
            whose labels are not kept.
        class_names: Classes of the model that is to look at them.
        size: See :func:`load_images`.
        progress: Shows how far decoding has come.

    Returns:
        The images without labels, and their paths inside the folder, or their rows.

    Raises:
        InputError: If there is no image, or one cannot be read.
        UnsafeFile: See :func:`load_images`.
    """
    path = Path(path)
    if not path.is_dir():
        found = load_images(path, size=size, progress=progress)
        rows = tuple(f"row {row}" for row in range(len(found)))
        return Images(found.pixels, None, tuple(class_names), path.stem), rows
    _require_arguments(None, size)
    files = _image_files(path)
    if not files:
        raise InputError("the folder holds no image", where=path, remedy=_REMEDY_FORMS)
    items = ((str(file), _read_bounded(file)) for file in files)
    pixels = decode(items, len(files), name=path.name or "images", size=size, progress=progress)
    names = tuple(file.relative_to(path).as_posix() for file in files)
    return as_images(pixels, None, tuple(class_names), path.name or "images"), names


def load_labelled(
    path: Path,
    *,
    class_names: Sequence[str],
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> tuple[Images, tuple[str, ...]]:
    """Load a labelled set of unknown origin, such as a training set, and what each image is called.

    Args:
        path: See :func:`load_images`.
        class_names: Classes of the model that is to look at them, in label order.
        size: See :func:`load_images`.
        progress: Shows how far decoding has come.

    Returns:
        The images with labels, and their paths inside the folder, or their rows.

    Raises:
        InputError: If the set cannot be used, or carries no labels.
        UnsafeFile: See :func:`load_images`.
    """
    path = Path(path)
    # A training set may be brought in parts, such as the suspected class alone.
    found = load_images(path, class_names=tuple(class_names), size=size, partial=True, progress=progress)
    if found.labels is None:
        raise InputError(
            "the images carry no labels, and this screening looks at a training set",
            where=path,
            remedy="Add the labels, or choose a method for single inputs",
        )
    table = path / LABELS if path.is_dir() else path
    if table.suffix.lower() == ".csv" and table.is_file():
        return found, tuple(entry.file.relative_to(table.parent).as_posix() for entry in read_table(table))
    if not path.is_dir():
        return found, tuple(f"row {row}" for row in range(len(found)))
    folders = _by_class(_class_folders(path), found.class_names)
    files = (file for name in found.class_names for file in folders.get(name, ()))
    return found, tuple(file.relative_to(path).as_posix() for file in files)


def _class_folders(path: Path) -> dict[str, list[Path]]:
    try:
        folders = sorted(
            entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        if _are_indices([folder.name for folder in folders]):
            folders.sort(key=lambda folder: int(folder.name))  # 2 before 10
        return {folder.name: _image_files(folder) for folder in folders}
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or path, got=error.strerror
        ) from error


def _by_class(folders: dict[str, list[Path]], names: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files by class, where the folders may be called by the index of their class."""
    if not _are_indices(folders) or any(folder in names for folder in folders):
        return folders
    return {names[int(k)] if int(k) < len(names) else k: files for k, files in folders.items()}


def _are_indices(names: Collection[str]) -> bool:
    """Tell whether all names are whole numbers, no two of one value."""
    digits = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)
    return digits and len({int(name) for name in names}) == len(names)


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def _folder_state(path: Path) -> list[list[Any]]:
    # Names, sizes and times in the place of the content: reading every file would cost as much as decoding.
    state: list[list[Any]] = []
    for class_name, files in _class_folders(path).items():
        state.append([class_name])
        for file in files:
            stat = file.stat()
            state.append([file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns])
    return state


def _flat_state(path: Path) -> list[list[Any]]:
    try:
        stats = [(file, file.stat()) for file in _image_files(path)]
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or path, got=error.strerror
        ) from error
    return [[file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns] for file, s in stats]


def _read_bounded(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError("the image cannot be read", where=file, got=error.strerror) from error
    if len(data) > _MAX_FILE_BYTES:
        raise UnsafeFile(
            "the image file is too large",
            expected=f"at most {_MAX_FILE_BYTES} bytes",
            got=file.stat().st_size,
            where=file,
            remedy="Remove the image or make it smaller",
        )
    return data


# ---------------------------------------------------------------------------------------------------
# npz


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
        pixels = _resized(pixels, size, title, progress)
    label_key = next((key for key in _LABEL_KEYS if key in arrays), None)
    names = _agreed(class_names, _npz_names(arrays.get("class_names"), path), str(path))
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
    names, labels = _checked_labels(labels, names, lambda i: f"{where}, row {i}", str(path), partial)
    return as_images(pixels, labels, names, title)


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays we know, after their headers have been checked against the bytes that are there."""
    wanted = {*_PIXEL_KEYS, *_LABEL_KEYS, "class_names"}
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if key in wanted and member.filename.endswith(".npy"):
                    arrays[key] = _npy(archive, member, f"{path}, array {key}")
    # zipfile and the decompressors report damage as any of these; RuntimeError means encrypted.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
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
    if values.dtype == np.uint8:
        return values
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


def _resized(
    pixels: NDArray[np.uint8], size: tuple[int, int], name: str, progress: Progress
) -> NDArray[np.uint8]:
    count, channels = pixels.shape[:2]
    require_memory(count * channels * size[0] * size[1], name)
    result = np.empty((count, channels, *size), dtype=np.uint8)
    for row in progress(range(count), f"resizing {name}"):
        for channel in range(channels):
            plane = Image.fromarray(pixels[row, channel])
            result[row, channel] = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return result


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
    return tuple(str(name) for name in array)


# ---------------------------------------------------------------------------------------------------
# Shared checks


def _require_arguments(names: tuple[str, ...] | None, size: tuple[int, int] | None) -> None:
    if names is not None:
        _require_names(names, "class_names")
    if size is not None and (len(size) != 2 or min(size) < 1 or max(size) > 1 << 14):
        raise InputError("the size does not fit", expected="(height, width), each in 1..16384", got=size)


def _require_names(names: tuple[str, ...], where: str) -> None:
    if not names or len(set(names)) != len(names):
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        raise InputError(
            "the class names do not fit",
            expected="at least one, no two alike",
            got="none" if twice is None else f"{twice!r} twice",
            where=where,
        )


def _agreed(
    given: tuple[str, ...] | None, written: tuple[str, ...] | None, where: str
) -> tuple[str, ...] | None:
    if written is not None:
        _require_names(written, where)
    if given is None or written is None or given == written:
        return given or written
    place = next((k for k, (a, b) in enumerate(zip(given, written, strict=False)) if a != b), None)
    if place is None:
        expected, got = f"{len(given)} classes", f"{len(written)}"
    else:
        expected, got = f"{given[place]!r} for label {place}", repr(written[place])
    raise InputError(
        "the class names do not agree with those in the file",
        expected=expected,
        got=got,
        where=where,
        remedy="Leave the class names out, or renumber the labels of the file",
    )


def _checked_labels(
    labels: NDArray[np.int64],
    names: tuple[str, ...] | None,
    where: Callable[[int], str],
    file: str,
    partial: bool = False,
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return names and labels, all in range and, unless ``partial``, with an image of every class."""
    limit = len(names) if names is not None else _MAX_CLASSES
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            "a label is out of range",
            expected=f"0..{limit - 1}",
            got=int(labels[row]),
            where=where(row),
            remedy="Correct the label, or give the class names in full",
        )
    if names is None:
        names = tuple(str(k) for k in range(int(labels.max()) + 1))
    counts = np.bincount(labels, minlength=len(names))
    if not (partial or counts.all()):
        empty = int((counts == 0).argmax())
        raise InputError(
            f"the class {names[empty]!r} (label {empty}) has no images",
            expected="at least 1 image per class",
            got=0,
            where=file,
            remedy="Add images of the class, or renumber the labels without it",
        )
    return names, labels
