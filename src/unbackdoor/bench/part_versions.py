"""Versions of code that only some rows need; they stand beside the version of the cell.

They are kept apart from :mod:`unbackdoor.bench.code_version`, so that a change here leaves all other rows as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from unbackdoor.bench import code_version
from unbackdoor.bench.code_version import ENDS, OWN, Sources

ALTERED = f"{OWN}.bench.altered_samples"
PATCH = f"{OWN}.bench.patch_probe"
_ENDS = ENDS | {f"{OWN}.data.own_set"}  # the step checks foreign images against the hash of the specification


@cache
def alteration_version() -> str:
    """Return the version of the code that draws and alters a defender's images."""
    return Sources().version((ALTERED,), ends=_ENDS)


@cache
def patch_version() -> str:
    """Return the version of the code of the patch probe, beside that of the attack and the network."""
    return Sources().version((PATCH,), ends=_ENDS)


def is_current(row: Any) -> bool:
    """Return whether a row was measured by the code that is installed, these parts included.

    A row of probes without the patch is one of a time before it, and says nothing that has changed since.

    Args:
        row: See :func:`unbackdoor.bench.code_version.is_current`.
    """
    get = row.get if isinstance(row, Mapping) else lambda name, default=None: getattr(row, name, default)
    if get("altered", "") and get("altered_code", "") != alteration_version():
        return False
    if get("patch_code", "") and get("patch_code", "") != patch_version():
        return False
    return code_version.is_current(row)
