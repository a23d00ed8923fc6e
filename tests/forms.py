"""Outputs against their schema, where the validator is installed (extra: dev)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import unbackdoor


def require_form(told: dict[str, Any], command: str) -> None:
    """Fail unless an output has the form of its command."""
    assert told["schema"] == command
    if find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator(unbackdoor.json_schema()).validate(told)
