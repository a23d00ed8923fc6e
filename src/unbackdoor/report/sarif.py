"""A scan as SARIF 2.1.0, the log format that code-scanning services read.

Source:  OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unbackdoor import __version__
from unbackdoor.audit.scanning import Agreed, Audit, Checked

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(audit: Audit, model: Path, class_names: Sequence[str], *, file_sha256: str) -> dict[str, Any]:
    """Return a scan as a SARIF log with one run.

    A check with evidence is a result of level ``error``, and so is a class that several checks noticed; an
    undecided scan is one ``warning``; a scan without evidence has no result. Checks that did not come to
    their end are notifications, and the invocation is then marked as unsuccessful.

    Args:
        audit: The scan.
        model: The file that was scanned; named by its last part only.
        class_names: In label order.
        file_sha256: Of the file.
    """
    place = {
        "physicalLocation": {"artifactLocation": {"uri": quote(model.name), "index": 0}},
    }
    results = [_result(c, place, class_names) for c in audit.guilty]
    results += [_agreement(a, place, class_names) for a in audit.joint]
    if audit.verdict == "undecided":
        results.append(
            {
                "ruleId": "undecided",
                "level": "warning",
                "message": {
                    "text": "Whether there is a backdoor could not be decided. " + " ".join(audit.reasons)
                },
                "locations": [place],
            }
        )
    rules = [
        {
            "id": _rule(c),
            "shortDescription": {"text": c.check.question},
            "defaultConfiguration": {"level": "error"},
        }
        for c in audit.checks
    ]
    rules.append(
        {
            "id": "agreement",
            "shortDescription": {"text": "Do several checks notice the same class?"},
            "defaultConfiguration": {"level": "error"},
        }
    )
    rules.append({"id": "undecided", "shortDescription": {"text": "The scan could not decide."}})
    notes = [
        {
            "level": {"failed": "error", "not needed": "note"}.get(c.status, "warning"),
            "message": {"text": f"{c.check.name}: {c.reason}"},
        }
        for c in audit.checks
        if c.status != "ran"
    ]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "unbackdoor", "version": __version__, "rules": rules}},
                "invocations": [
                    {"executionSuccessful": not audit.partial, "toolExecutionNotifications": notes}
                ],
                "artifacts": [{"location": {"uri": quote(model.name)}, "hashes": {"sha-256": file_sha256}}],
                "results": results,
                "properties": {
                    "verdict": audit.verdict,
                    "level": audit.level,
                    "partial": audit.partial,
                    "interrupted": audit.interrupted,
                },
            }
        ],
    }


def _result(checked: Checked, place: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    named = ", ".join(f"{class_names[k]!r} (class {k})" for k in checked.classes) or "no single class"
    return {
        "ruleId": _rule(checked),
        "level": "error",
        "message": {
            "text": f"Evidence of a backdoor towards {named}: {checked.check.question} Yes "
            f"(p = {checked.p_value:.2g}, {checked.adjusted:.2g} after correction for all checks)."
        },
        "locations": [place],
        "properties": {
            "p_value": checked.p_value,
            "adjusted_p_value": checked.adjusted,
            "classes": list(checked.classes),
        },
    }


def _agreement(agreed: Agreed, place: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "ruleId": "agreement",
        "level": "error",
        "message": {
            "text": f"Evidence of a backdoor towards {class_names[agreed.label]!r} (class {agreed.label}): "
            f"{' and '.join(agreed.checks)} notice the same class "
            f"(p = {agreed.adjusted:.2g} after correction for all checks)."
        },
        "locations": [place],
        "properties": {
            "adjusted_p_value": agreed.adjusted,
            "checks": list(agreed.checks),
            "classes": [agreed.label],
        },
    }


def _rule(checked: Checked) -> str:
    return checked.check.name.replace(":", "-").replace("_", "-")
