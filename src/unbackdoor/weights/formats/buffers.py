"""Bytes of a file, and short safe forms of its untrusted names for messages."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

Buffer = bytes | mmap.mmap | memoryview
LONGEST = 120  # characters of a name from a file in a message


def short(value: object) -> str:
    """Return a quoted, bounded form of something from a file; no control character reaches a terminal."""
    # The text of a list within lists may be without end, and that of a long integer is refused by Python.
    if isinstance(value, list | tuple):
        return _bounded(
            "[" + ", ".join(_short(one) for one in value[:8]) + (", ...]" if len(value) > 8 else "]")
        )
    return _bounded(_short(value))


def _short(value: object) -> str:
    if isinstance(value, str | bytes):
        return repr(value[: 2 * LONGEST])
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names of a list as :func:`short` does, without quotes, and how many more there are."""
    text = ", ".join(_bounded(repr(name[: 2 * LONGEST])[1:-1]) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def _bounded(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
