"""TOML from files that somebody else may have written."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from unbackdoor.files import MAX_DEPTH, depth

MAX_PARTS = 64  # of a dotted key
_NO_KEY = re.compile(r"[,=\[\]{}#\n]")  # no key goes over one of these


def parse_toml(text: str) -> dict[str, Any]:
    """Return the values of a text of a bounded length.

    The library takes time and depth without bound for a key of many parts, and passes on what Python says of
    absurdly long numbers.

    Raises:
        ValueError: With a short reason, if it is no TOML, or lies deeper than any file of ours.
    """
    if any(piece.count(".") > MAX_PARTS for piece in _NO_KEY.split(text)):
        raise ValueError(f"a key has more than {MAX_PARTS} parts")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not TOML: {str(error)[:200]}") from None
    if depth(values) > MAX_DEPTH:
        raise ValueError(f"its tables lie more than {MAX_DEPTH} deep")
    return values
