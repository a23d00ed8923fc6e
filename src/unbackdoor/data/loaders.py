"""Image sets from a Parquet file, a folder, a table of labels, an ``.npz`` file or a single image."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbackdoor import confinement
from unbackdoor.data import apart
from unbackdoor.data.cache import DecodedImages, cache_key, cache_path, cached, load, store
from unbackdoor.data.sources.checks import REMEDY_FORMS, require_arguments
from unbackdoor.data.sources.class_folders import by_class, class_folders, folder_state, read_folder
from unbackdoor.data.sources.image_files import (
    IMAGE_SUFFIXES,
    flat_state,
    image_files,
    read_flat,
    unread_notes,
)
from unbackdoor.data.sources.label_table import NAME as LABELS
from unbackdoor.data.sources.label_table import read_labelled, read_table
from unbackdoor.data.sources.npz import read_npz
from unbackdoor.data.sources.parquet import read_parquet
from unbackdoor.errors import InputError
from unbackdoor.files import is_there, opened, sha256_file
from unbackdoor.types import Images, Progress, silent

_DECODE = "unbackdoor.data.loaders:decode_apart"


def load_images(
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    partial: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> Images:
    """Load an image set, decoding it at the first call and reading the cache afterwards.

    - Parquet: the Hugging Face image schema, columns ``image`` (struct with ``bytes``, or bytes) and
      ``label`` (integers, or texts), class names in the schema metadata under ``huggingface``. Other usual
      names, such as ``img`` and ``fine_label``, are known too.
    - Folder: one folder per class, in sorted order (folders called by whole numbers: in the order of the
      numbers) or in the order of ``class_names``, whose folders may also be called by their index; files
      without an image suffix and hidden files are passed over. With a ``labels.csv`` in it, or where such a
      table is given itself: one row an image, ``file,label``. With images only: a set without labels.
    - Image: a set of one, without a label.
    - npz: ``images`` (or ``x``, ``data``) of shape (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float
      in [0, 1]; ``labels`` (or ``y``); ``class_names``. Without labels the set has none.

    An image is turned upright by its EXIF tag, loses its alpha channel, and is reduced to 8 bits. The set is
    greyscale (C = 1) where every image is, else RGB. Files of kinds that are not read, such as HEIC, are
    counted in ``notes``.

    Args:
        path: The file or folder.
        class_names: Names in label order; they must agree with those in the file.
        size: (H, W) to resize to, bilinear; None demands that all images have one size.
        partial: Whether some of the ``class_names`` may have no images.
        cache: Cache folder; None is :func:`unbackdoor.data.cache.default_cache`.
        progress: Shows how far decoding has come.
        image_column: Column of the images in a Parquet file; None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out and counted in ``notes``.

    Raises:
        InputError: If the set cannot be used; it names the file or row, and what to do.
        UnsafeFile: If a file holds pickled objects or declares absurd sizes.
        MissingExtra: If a Parquet file is given and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.savez(folder / "pets.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=[0, 1, 0, 1])
        >>> pets = load_images(folder / "pets.npz", class_names=["cat", "dog"], cache=folder)
        >>> pets.shape, pets.class_names
        ((3, 8, 8), ('cat', 'dog'))
    """
    path = Path(path)
    names = None if class_names is None else tuple(class_names)
    require_arguments(names, size)
    read, source = _reader(path)
    facts = {"source": source, "class_names": names, "size": size} | ({"partial": True} if partial else {})
    special: dict[str, Any] = {"skip_damaged": True} if skip_damaged and read is not read_npz else {}
    columns = {"image_column": image_column, "label_column": label_column}
    if read is not read_parquet:
        _reject_columns(path, image_column, label_column)
    special |= {name: column for name, column in columns.items() if column is not None}
    options = {"class_names": names, "size": size, "partial": partial, **special}
    facts |= special
    if not confinement.enabled():
        here = {**options, "progress": progress}
        return _noted(cached(path.stem, cache_key(facts), lambda: read(path, **here), cache=cache), path)
    stored = cache_path(path.stem, cache_key(facts), cache=cache)
    images: Images | None = load(stored)
    if images is None:
        task = {"path": str(path.absolute()), "options": options}
        images = apart.decoded(_DECODE, task, stored, _bytes(source), progress)
    return _noted(images, path)


def _reject_columns(path: Path, image_column: str | None, label_column: str | None) -> None:
    columns = {"image_column": image_column, "label_column": label_column}
    if given := [name for name, column in columns.items() if column is not None]:
        raise InputError("only a Parquet file has columns to be named", got=", ".join(given), where=path)


def _noted(images: Images, path: Path) -> Images:
    # Not in the cache, because what is not read plays no part in its key.
    return replace(images, notes=(*images.notes, *unread_notes(path))) if path.is_dir() else images


@dataclass(frozen=True)
class ImageFiles:
    """Images that lie in files, and how they are read; see :func:`load_images`.

    Attributes:
        path: The file or folder.
        image_column: Column of the images in a Parquet file; None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out.
    """

    path: Path
    image_column: str | None = None
    label_column: str | None = None
    skip_damaged: bool = False

    def load(self, *, size: tuple[int, int] | None = None, progress: Progress = silent) -> Images:
        """Return the images; ``size`` (H, W) is what they are resized to."""
        return load_images(
            self.path,
            size=size,
            progress=progress,
            image_column=self.image_column,
            label_column=self.label_column,
            skip_damaged=self.skip_damaged,
        )


def _bytes(source: Any) -> int:
    """Return the bytes of what identifies a source: a list of files with their sizes, or of one of them."""
    if isinstance(source, list):
        return sum(_bytes(part) for part in source)
    return source if isinstance(source, int) and source < 1 << 40 else 0


def decode_apart(task: Mapping[str, Any]) -> None:
    """Decode a set in a process of its own; see :mod:`unbackdoor.data.apart`."""
    path = Path(task["path"])
    read: Callable[..., Images] = read_flat if task.get("flat") else _reader(path)[0]
    # JSON has no tuples.
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in task["options"].items()
    }
    store(read(path, **options, progress=apart.reporting(task)), Path(task["stored"]))


def _reader(path: Path) -> tuple[Callable[..., Images], Any]:
    """Return the function for this form of set, and what identifies the source's content."""
    if not is_there(path):
        raise InputError("there is no such file or folder", where=path, remedy=REMEDY_FORMS)
    if path.is_dir() and is_there(path / LABELS):
        return read_labelled, ["table", sha256_file(path / LABELS), flat_state(path)]
    if path.is_dir():
        if not class_folders(path) and (flat := flat_state(path)):
            return read_flat, ["images", flat]
        return read_folder, ["class folders", folder_state(path)]
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_labelled, ["table", sha256_file(path), flat_state(path.parent)]
    with opened(path, "the image set"):
        pass  # its type and its size are looked at before it is hashed
    if suffix in IMAGE_SUFFIXES:
        return read_flat, ["image", sha256_file(path)]
    if suffix not in (".parquet", ".npz"):
        raise InputError("the form of the image set is not known", got=path.name, remedy=REMEDY_FORMS)
    content = [suffix, path.stat().st_size, sha256_file(path)]
    return (read_parquet if suffix == ".parquet" else read_npz), content


def load_unlabelled(
    path: Path,
    *,
    class_names: Sequence[str],
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> tuple[Images, tuple[str, ...]]:
    """Load images of unknown origin, and what each of them is called.

    Args:
        path: A folder with images at any depth, in the order of their paths; or a .parquet or .npz file,
            whose labels are not kept.
        class_names: Classes of the model that is to look at them.
        size: See :func:`load_images`.
        progress: Shows how far decoding has come.
        image_column: See :func:`load_images`, as for the two that follow.
        label_column: Column of the labels.
        skip_damaged: Whether damaged images are left out; those that are left keep what they are called.

    Returns:
        The images without labels, and their paths inside the folder, or their rows.

    Raises:
        InputError: If there is no image, or one cannot be read.
        UnsafeFile: See :func:`load_images`.
    """
    path = Path(path)
    reading = {"image_column": image_column, "label_column": label_column, "skip_damaged": skip_damaged}
    if not path.is_dir():
        images = load_images(path, size=size, progress=progress, **reading)  # type: ignore[arg-type]
        named = _left(images, lambda count: [f"row {row}" for row in range(count)])
        return replace(images, labels=None, class_names=tuple(class_names), name=path.stem), named
    _reject_columns(path, image_column, label_column)
    require_arguments(None, size)
    files = image_files(path)
    if not files:
        raise InputError("the folder holds no image", where=path, remedy=REMEDY_FORMS)
    options = {"size": size, "skip_damaged": skip_damaged}
    if confinement.enabled():
        with tempfile.TemporaryDirectory(prefix="unbackdoor-") as folder:
            task = {"path": str(path.absolute()), "options": options, "flat": True}
            total = sum(file.stat().st_size for file in files)
            images = apart.decoded(_DECODE, task, Path(folder) / "pixels", total, progress)
    else:
        images = read_flat(path, size=size, skip_damaged=skip_damaged, progress=progress)
    names = _left(images, lambda _: [file.relative_to(path).as_posix() for file in files])
    images = replace(images, class_names=tuple(class_names), name=path.name or "images")
    return _noted(images, path), names


def _left(images: Images, names: Callable[[int], list[str]]) -> tuple[str, ...]:
    """Return what the images are called that were not left out; ``names`` gets the count before that."""
    left_out = set(images.left_out) if isinstance(images, DecodedImages) else set()
    return tuple(name for i, name in enumerate(names(len(images) + len(left_out))) if i not in left_out)


def load_labelled(
    path: Path,
    *,
    class_names: Sequence[str],
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> tuple[Images, tuple[str, ...]]:
    """Load a labelled set of unknown origin, such as a training set, and what each image is called.

    Args:
        path: See :func:`load_images`.
        class_names: Classes of the model that is to look at them, in label order.
        size: See :func:`load_images`.
        progress: Shows how far decoding has come.
        image_column: See :func:`load_images`, as for the two that follow.
        label_column: Column of the labels.
        skip_damaged: Whether damaged images are left out; those that are left keep what they are called.

    Returns:
        The images with labels, and their paths inside the folder, or their rows.

    Raises:
        InputError: If the set cannot be used, or carries no labels.
        UnsafeFile: See :func:`load_images`.
    """
    path = Path(path)
    # A training set may be brought in parts, such as the suspected class alone.
    images = load_images(
        path,
        class_names=tuple(class_names),
        size=size,
        partial=True,
        progress=progress,
        image_column=image_column,
        label_column=label_column,
        skip_damaged=skip_damaged,
    )
    if images.labels is None:
        raise InputError(
            "the images carry no labels, and this screening looks at a training set",
            where=path,
            remedy="Add the labels, or choose a method for single inputs",
        )
    table = path / LABELS if path.is_dir() else path
    if table.suffix.lower() == ".csv" and table.is_file():
        entries = read_table(table)
        return images, _left(
            images, lambda _: [entry.file.relative_to(table.parent).as_posix() for entry in entries]
        )
    if not path.is_dir():
        return images, _left(images, lambda count: [f"row {row}" for row in range(count)])
    folders = by_class(class_folders(path), images.class_names)
    files = (file for name in images.class_names for file in folders.get(name, ()))
    return images, _left(images, lambda _: [file.relative_to(path).as_posix() for file in files])
