"""Image files without labels: one image, or a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import decode
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.types import Images, Progress, silent

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff"}
)
_MAX_FILE_BYTES = 1 << 28


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
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def flat_state(path: Path) -> list[list[Any]]:
    try:
        stats = [(file, file.stat()) for file in image_files(path)]
    except OSError as error:
        raise InputError(
            "the folder cannot be read", where=error.filename or path, got=error.strerror
        ) from error
    return [[file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns] for file, s in stats]


def read_bounded(file: Path) -> bytes:
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
