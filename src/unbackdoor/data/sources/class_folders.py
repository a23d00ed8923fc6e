"""A folder with one folder of images for each class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import Damaged, damage_notes, decode
from unbackdoor.data.sources.checks import intact_labels
from unbackdoor.data.sources.image_files import image_files, passed_over, read_bounded, unread_notes
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.types import Images, Progress, silent


def read_folder(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
    skip_damaged: bool = False,
) -> Images:
    """Decode a folder of class folders, past the cache; see :func:`load_images`."""
    folders = class_folders(path)
    if not folders:
        raise InputError(
            "the folder holds no class folders",
            expected="one folder per class",
            got="no folders",
            where=path,
            remedy="Put the images of each class into a folder named after it",
        )
    names = class_names or tuple(folders)
    folders = by_class(folders, names)
    if extra := [n for n in folders if n not in names]:
        raise InputError(
            f"the folder {extra[0]!r} is none of the classes",
            expected=", ".join(names[:20]),
            where=path / extra[0],
            remedy="Add it to the class names or move it away",
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(names):
        members = folders.get(class_name)
        if partial and members is None:
            continue
        if not members:
            raise InputError(
                f"the class {class_name!r} has no images",
                expected="a folder with at least 1 image",
                got="no such folder" if members is None else _empty(path / class_name),
                where=path / class_name,
                remedy="Add images of the class or leave it out of the class names and the folder",
            )
        files += members
        labels += [label] * len(members)
    title = name or path.name or "images"
    items = ((str(file), read_bounded(file)) for file in files)
    damaged: list[Damaged] | None = [] if skip_damaged else None
    pixels = decode(items, len(files), name=title, size=size, progress=progress, damaged=damaged)
    table = intact_labels(np.asarray(labels, dtype=np.int64), damaged, names, str(path), partial=partial)
    notes = damage_notes(damaged or (), len(files))
    return as_images(pixels, table, names, title, notes, (one.row for one in damaged or ()))


def _empty(folder: Path) -> str:
    unread = unread_notes(folder) if folder.is_dir() else ()
    return unread[0] if unread else "an empty folder"


def class_folders(path: Path) -> dict[str, list[Path]]:
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not passed_over(entry.name))
        if _are_indices([folder.name for folder in folders]):
            folders.sort(key=lambda folder: int(folder.name))  # 2 before 10
        here = path.resolve()
        for folder in folders:
            if folder.is_symlink() and here.is_relative_to(folder.resolve()):
                raise UnsafeFile(
                    "a class folder leads to a folder that it lies in",
                    expected="a folder of images",
                    got=f"a link to {folder.resolve()}",
                    where=folder,
                    remedy="Remove the link",
                )
        return {folder.name: image_files(folder) for folder in folders}
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or path, got=error.strerror
        ) from error


def by_class(folders: dict[str, list[Path]], names: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files by class, where the folders may be called by the index of their class."""
    if not _are_indices(folders) or any(folder in names for folder in folders):
        return folders
    return {names[int(k)] if int(k) < len(names) else k: files for k, files in folders.items()}


def _are_indices(names: Collection[str]) -> bool:
    """Tell whether all names are whole numbers, no two of one value."""
    digits = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)
    return digits and len({int(name) for name in names}) == len(names)


def folder_state(path: Path) -> list[list[Any]]:
    # Names, sizes and times in the place of the content: reading every file would cost as much as decoding.
    state: list[list[Any]] = []
    for class_name, files in class_folders(path).items():
        state.append([class_name])
        for file in files:
            stat = file.stat()
            state.append([file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns])
    return state
