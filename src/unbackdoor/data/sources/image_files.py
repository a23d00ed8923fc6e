"""Image files without labels: one image, or a folder of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import decode
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.files import read_bytes
from unbackdoor.types import Images, Progress, silent

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff"}
)
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
) -> Images:
    """Decode one image, or a folder of images without class folders; see :func:`load_images`."""
    files = image_files(path) if path.is_dir() else [path]
    title = name or path.stem or "images"
    items = ((str(file), read_bounded(file)) for file in files)
    pixels = decode(items, len(files), name=title, size=size, progress=progress)
    return as_images(pixels, None, class_names or (), title)


def image_files(folder: Path) -> list[Path]:
    """Return the images at any depth of a folder, sorted; links to folders in it are not followed.

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
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(place / entry.name)
                    elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
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


def read_bounded(file: Path) -> bytes:
    return read_bytes(file, "the image", limit=MAX_IMAGE)
