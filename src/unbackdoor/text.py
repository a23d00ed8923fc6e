"""Texts of strangers: names of tensors, classes and files may hold anything, and are shown as what they are.

A control character moves the cursor or rings the bell of a terminal, an escape sequence repaints it, and the
marks of bidirectional writing turn what stands beside them. A reader is shown their codes instead.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Nearly everything is ASCII, which needs no look at each character.
_PLAIN = re.compile(r"[ -~]*")


def printable(text: object, *, keep: str = "") -> str:
    r"""Return a text with every character escaped that is not to be seen, such as ``\x1b`` and ``\u202e``.

    Args:
        text: From a file, or with parts of one.
        keep: Characters that stay as they are, such as a line feed in a page.

    Example:
        >>> printable("cat\x1b[2J")
        'cat\\x1b[2J'
    """
    words = str(text)
    if _PLAIN.fullmatch(words):
        return words
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in words
    )


def json_text(value: Any) -> str:
    """Return indented JSON in which every character can be seen; a reader of it gets the same value.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON has not.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if text.isascii() and "\x7f" not in text:
        return text
    # Outside of texts JSON is ASCII, so that these stand in texts alone.
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def is_text(value: str) -> bool:
    """Tell whether a text can be written: half of a character (a lone surrogate) cannot."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
