"""What the commands print with ``--json``: a header before the result, and a JSON Schema of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from unbackdoor import __version__
from unbackdoor.errors import ConfigError, UnbackdoorError
from unbackdoor.text import printable

# MAJOR.MINOR: a minor version adds keys, which readers ignore; a major one removes or changes some.
SCHEMA_VERSION = "1.0"
_FILE = "output-v1.schema.json"
_FACTS = ("problem", "expected", "got", "where", "remedy")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of everything that the commands print with ``--json``.

    The ``schema`` of an output names the command, such as ``scan`` or ``patch apply``, and so its part of the
    schema; ``schema_version`` is MAJOR.MINOR, and a reader of one major version can read all of it. What
    :func:`unbackdoor.save_report` writes as ``result.json`` has the same form.

    Example:
        >>> json_schema()["properties"]["schema_version"]["pattern"]
        '^1\\\\.[0-9]+$'
    """
    content: dict[str, Any] = json.loads((files(__package__) / "schemas" / _FILE).read_text(encoding="utf-8"))
    return content


def with_header(command: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result behind the header that every output has.

    Args:
        command: Such as ``scan`` or ``patch apply``.
        result: As plain values.
    """
    header = {
        "schema": command,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return {**header, **result}


def error_facts(error: BaseException | str, *, exit_code: int) -> dict[str, Any]:
    """Return what a command prints where it failed, without the header.

    Args:
        error: The error, or its message where there is no exception to show.
        exit_code: What the command ends with.
    """
    facts: dict[str, Any] = {"type": "Error", "message": printable(error)}
    if isinstance(error, BaseException):
        facts["type"] = type(error).__name__
    if isinstance(error, UnbackdoorError):
        values = {name: getattr(error, name, None) for name in _FACTS}
        facts |= {name: printable(value) for name, value in values.items() if value is not None}
    if isinstance(error, ConfigError):
        facts["faults"] = [printable(fault) for fault in error.faults]
    return {"error": facts, "exit_code": exit_code}
