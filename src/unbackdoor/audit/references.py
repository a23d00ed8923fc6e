"""Scans of clean models, which calibrate a scanner that has no null distribution of its own.

Such a scanner declares (``registry.References``) which of its numbers must be known of clean models. The
numbers are comparable only where architecture, classes, clean images and options agree; others are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.audit.checks import Check
from unbackdoor.errors import InputError
from unbackdoor.files import parse_json, read_text
from unbackdoor.registry import SCANNERS, References

_LARGEST = 64 << 20  # bytes of a record; that of a scan of a thousand classes has less than one
_REMEDY = "Give the result.json, or what --json printed, of a scan of a clean model with the same options"


@dataclass(frozen=True)
class Reference:
    """The record of a scan of a clean model.

    Attributes:
        path: Where it lies.
        model_sha256: Weights of the model.
        setting: What the model and its clean images were, as in ``Audit.facts``.
        checks: The records of the checks by name.
    """

    path: Path
    model_sha256: str
    setting: Mapping[str, Any]
    checks: Mapping[str, Mapping[str, Any]]


def read_references(paths: Sequence[Path]) -> tuple[Reference, ...]:
    """Read records of scans.

    Raises:
        InputError: If one cannot be read, or two are of the same model.
    """
    out: dict[str, Reference] = {}
    for path in paths:
        reference = _read(Path(path))
        other = out.get(reference.model_sha256)
        if other is not None:
            # One clean model counted twice would make the p-value smaller than it is.
            raise InputError(
                "two references are of the same model",
                where=f"{other.path} and {path}",
                remedy="Give one of each",
            )
        out[reference.model_sha256] = reference
    return tuple(out.values())


def _read(path: Path) -> Reference:
    try:
        path.stat()
        record = parse_json(read_text(path, "the reference", limit=_LARGEST), "the reference", path)
        checks = {str(check["check"]): dict(check) for check in record["checks"]}
        return Reference(path, str(record["model_sha256"]), dict(record["setting"]), checks)
    except FileNotFoundError:
        raise InputError("there is no such reference", where=path, remedy=_REMEDY) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the reference cannot be read", where=path, got=repr(error)[:200], remedy=_REMEDY
        ) from error


def calibrated(
    checks: Sequence[Check], references: Sequence[Reference], setting: Mapping[str, Any], model_sha256: str
) -> tuple[Check, ...]:
    """Return the checks, those that clean models calibrate with the numbers of the references.

    Args:
        checks: The checks of a scan.
        references: Records of scans of clean models.
        setting: What the suspicious model and its clean images are.
        model_sha256: Weights of the suspicious model.

    Raises:
        InputError: If no check asks for references, or one of them is of another kind, is of the suspicious
            model itself, or has no such number.
    """
    if not references:
        return tuple(checks)
    for reference in references:
        if reference.model_sha256 == model_sha256:
            raise InputError(
                "the reference is the suspicious model itself", where=reference.path, remedy=_REMEDY
            )
        _require_alike(reference.path, dict(setting), dict(reference.setting))
    out, any_calibrated = [], False
    for check in checks:
        declared = SCANNERS[check.scanner].scanning.references
        if declared is not None:
            any_calibrated = True
            values = tuple(_value(reference, check, declared) for reference in references)
            own = tuple(check.options.get(declared.option, ()))
            check = Check(
                check.name, check.scanner, check.question, {**check.options, declared.option: (*own, *values)}
            )
        out.append(check)
    if not any_calibrated:
        named = ", ".join(n for n in SCANNERS if SCANNERS[n].scanning.references is not None)
        raise InputError(
            "no check of this scan is calibrated by clean models", expected=f"one of {named or 'none'}"
        )
    return tuple(out)


def _value(reference: Reference, check: Check, declared: References) -> float:
    record = reference.checks.get(check.name)
    ours = SCANNERS[check.scanner].configure(check.options).model_dump()
    ignored = {declared.option, *declared.unrelated}
    try:
        report = (record or {})["report"]
        options = {name: value for name, value in dict(report["options"]).items() if name not in ignored}
        values = [f["value"] for f in report["findings"] if f["statistic"] == declared.statistic]
        value = float(values[0])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"the reference has no {declared.statistic} of the check {check.name!r}",
            where=reference.path,
            remedy=_REMEDY,
        ) from None
    if not math.isfinite(value):
        raise InputError("the reference is not finite", where=reference.path, got=value, remedy=_REMEDY)
    ours = {name: value for name, value in ours.items() if name not in ignored}
    _require_alike(reference.path, {"options": _plain(ours)}, {"options": options})
    return value


def _require_alike(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    differing = [key for key, value in ours.items() if theirs.get(key) != _plain(value)]
    if differing:
        raise InputError(
            "the reference is of another kind",
            where=path,
            got=f"different {', '.join(differing).replace('_', ' ')}",
            remedy=_REMEDY,
        )


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON: lists for tuples."""
    return json.loads(json.dumps(value))
