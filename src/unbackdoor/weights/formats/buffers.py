"""Bytes of a file without reading it into memory, and words for what strangers put into it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unbackdoor.errors import InputError

Buffer = bytes | mmap.mmap | memoryview
LONGEST = 120  # characters of a name from a file in a message


@contextmanager
def mapped(path: Path) -> Iterator[Buffer]:
    """Yield the content of a file, mapped into memory and not read.

    Raises:
        InputError: If it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                yield b""
                return
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                yield data
            finally:
                # What an error that is on its way still looks at keeps the map alive until it is gone.
                with suppress(BufferError):
                    data.close()
    except OSError as error:
        raise InputError("the model file cannot be read", got=error.strerror, where=path) from error


def short(value: object) -> str:
    """Return a quoted, bounded form of something from a file; no control character reaches a terminal."""
    text = repr(value[: 2 * LONGEST] if isinstance(value, str | bytes) else value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def listed(names: list[str], limit: int = 5) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(short(name)[1:-1] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
