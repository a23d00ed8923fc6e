"""Image files without labels: one image, or a folder of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import Damaged, damage_notes, decode
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.files import read_bytes
from unbackdoor.types import Images, Progress, silent

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff"}
)
# Images as well, of kinds that are not read: they are counted, because nobody should miss them silently.
_UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".psd", ".svg", ".exr", ".hdr"}
) | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dcm", ".dds", ".ico", ".xcf"}
# Folders that archives and cameras leave behind: a Mac's, a Synology's, a Windows trash.
_LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
MAX_IMAGE = 1 << 28  # bytes of an encoded image
MAX_ENTRIES = 1 << 21  # files and folders below a folder; ImageNet has 1.3 million


def read_flat(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
    skip_damaged: bool = False,
) -> Images:
    """Decode one image, or a folder of images without class folders; see :func:`load_images`."""
    files = image_files(path) if path.is_dir() else [path]
    title = name or path.stem or "images"
    items = ((str(file), read_bounded(file)) for file in files)
    damaged: list[Damaged] | None = [] if skip_damaged else None
    pixels = decode(items, len(files), name=title, size=size, progress=progress, damaged=damaged)
    notes = damage_notes(damaged or (), len(files))
    return as_images(pixels, None, class_names or (), title, notes, (one.row for one in damaged or ()))


def image_files(folder: Path) -> list[Path]:
    """Return the images at any depth of a folder, sorted."""
    return _files(folder, IMAGE_SUFFIXES)


def unread_notes(folder: Path) -> tuple[str, ...]:
    """Return in words how many images in a folder are of kinds that are not read; nothing where none are.

    Raises:
        InputError: If the folder cannot be read.
    """
    try:
        kinds = Counter(file.suffix[1:].upper() for file in _files(folder, _UNREAD_SUFFIXES))
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or folder, got=error.strerror
        ) from error
    if not kinds:
        return ()
    listed = " and ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (f"{listed} images were passed over, because they cannot be read here; convert them to PNG",)


def passed_over(name: str) -> bool:
    """Return whether a file or folder of that name is hidden, or was left behind by some other program."""
    return name.startswith(".") or name in _LEFT_BEHIND


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return files by their suffix at any depth of a folder, sorted; links to folders in it are not followed.

    Raises:
        UnsafeFile: If more lies there than any set of images has.
    """
    files, todo, seen = [], [folder], 0
    while todo:
        place = todo.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        raise UnsafeFile(
                            "the folder holds too many files",
                            expected=f"at most {MAX_ENTRIES}",
                            where=folder,
                            remedy="Give the folder of the images alone",
                        )
                    if passed_over(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(place / entry.name)
                    elif Path(entry.name).suffix.lower() in suffixes and entry.is_file():
                        files.append(place / entry.name)
        except PermissionError:
            if place == folder:
                raise
    return sorted(files)


def flat_state(path: Path) -> list[list[Any]]:
    try:
        stats = [(file, file.stat()) for file in image_files(path)]
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or path, got=error.strerror
        ) from error
    return [[file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns] for file, s in stats]


def is_file(path: Path) -> bool:
    """Return whether there is such a file; where the name is one that no file can have, there is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bounded(file: Path) -> bytes:
    return read_bytes(file, "the image", limit=MAX_IMAGE)
