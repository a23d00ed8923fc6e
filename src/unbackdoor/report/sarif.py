"""A scan as SARIF 2.1.0, the log format that code-scanning services read.

Source:  OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0", 2020.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unbackdoor import __version__
from unbackdoor.audit.scanning import Agreed, Audit, Checked
from unbackdoor.registry import SCANNERS

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class Scanned:
    """A file of a model and what a scan of it said.

    Attributes:
        audit: The scan; None where there is none.
        path: The file.
        class_names: In label order.
        file_sha256: Of the file; empty where it could not be read.
        failure: Why there is no scan.
    """

    audit: Audit | None
    path: Path
    class_names: Sequence[str] = ()
    file_sha256: str = ""
    failure: str = ""


def sarif(audit: Audit, model: Path, class_names: Sequence[str], *, file_sha256: str) -> dict[str, Any]:
    """Return a scan as a SARIF log with one run; see :func:`sarif_log`.

    Args:
        audit: The scan.
        model: The file that was scanned.
        class_names: In label order.
        file_sha256: Of the file.
    """
    log = sarif_log([Scanned(audit, model, class_names, file_sha256)])
    log["runs"][0]["properties"] = _verdict(audit)
    return log


def sarif_log(scans: Sequence[Scanned]) -> dict[str, Any]:
    """Return scans as a SARIF log with one run.

    A check with evidence is a result of level ``error``, and so is a class that several checks noticed; an
    undecided scan is one ``warning``; a scan without evidence has no result. Checks that did not come to
    their end, and models that could not be scanned, are notifications, and the invocation is then marked as
    unsuccessful.

    A file is named by its path from the root of the repository that it lies in, else from the working
    folder, else by its last part alone. A result has the same fingerprint whenever the same file is
    scanned, whatever the p-values are, so that an alert that was dismissed stays dismissed until the file
    is another.
    """
    results: list[dict[str, Any]] = []
    rules: dict[str, dict[str, Any]] = {}
    notes: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    for index, scan in enumerate(scans):
        uri, based = _uri(scan.path)
        location = {"uri": uri, **({"uriBaseId": "%SRCROOT%"} if based else {})}
        artifact: dict[str, Any] = {"location": location}
        if scan.file_sha256:
            artifact["hashes"] = {"sha-256": scan.file_sha256}
        artifacts.append(artifact)
        place = {
            # A file of weights has no lines; code scanning shows no alert without one.
            "physicalLocation": {
                "artifactLocation": {**location, "index": index},
                "region": {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1},
            },
        }
        if scan.audit is None:
            notes.append(_notification("error", f"{scan.path.name}: {scan.failure}", place))
            continue
        audit = scan.audit
        artifact["properties"] = _verdict(audit)
        found = [_result(c, scan.class_names) for c in audit.guilty]
        found += [_agreement(a, scan.class_names) for a in audit.joint]
        if audit.verdict == "undecided":
            text = "Whether there is a backdoor could not be decided. " + " ".join(audit.reasons)
            found.append({"ruleId": "undecided", "level": "warning", "message": {"text": text}})
        for result in found:
            classes = result.get("properties", {}).get("classes", [])
            parts = [result["ruleId"], uri, scan.file_sha256, *map(str, classes)]
            digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
            results.append(
                {
                    **result,
                    "locations": [place],
                    "partialFingerprints": {"primaryLocationLineHash": f"{digest}:1"},
                }
            )
        for checked in audit.checks:
            rules.setdefault(_rule(checked), _check_rule(checked))
            if checked.status != "ran":
                level = {"failed": "error", "not needed": "note"}.get(checked.status, "warning")
                notes.append(_notification(level, f"{checked.check.name}: {checked.reason}", place))
    rules |= {rule["id"]: rule for rule in _OTHER_RULES}
    order = list(rules)
    for result in results:
        result["ruleIndex"] = order.index(result["ruleId"])
    driver = {
        "name": "unbackdoor",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": list(rules.values()),
    }
    successful = all(scan.audit is not None and not scan.audit.partial for scan in scans)
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "automationDetails": {"id": "unbackdoor/scan/"},
                "invocations": [
                    {"executionSuccessful": successful, "toolExecutionNotifications": notes},
                ],
                "artifacts": artifacts,
                "results": results,
            }
        ],
    }


def _verdict(audit: Audit) -> dict[str, Any]:
    return {
        "verdict": audit.verdict,
        "level": audit.level,
        "partial": audit.partial,
        "interrupted": audit.interrupted,
    }


def _uri(path: Path) -> tuple[str, bool]:
    """Return how a log names a file, and whether that is from the root of a repository or working folder."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100  a link is named as it lies in the repository
    here = Path.cwd()
    roots = [folder for folder in whole.parents if os.path.lexists(folder / ".git")][:1]
    for root in (*roots, here):
        if whole.is_relative_to(root):
            return quote(whole.relative_to(root).as_posix()), True
    return quote(path.name), False


def _notification(level: str, text: str, place: dict[str, Any]) -> dict[str, Any]:
    return {"level": level, "message": {"text": text}, "locations": [place]}


def _rule_facts(
    name: str, short: str, full: str, *, level: str, severity: str, precision: str
) -> dict[str, Any]:
    return {
        "id": name,
        "name": "".join(part.capitalize() for part in name.split("-")),
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": f"{full}\n\n{_HELP}", "markdown": f"{full}\n\n{_HELP}"},
        "defaultConfiguration": {"level": level},
        "properties": {
            "tags": ["security", "machine-learning", "backdoor", *_ATLAS],
            "precision": precision,
            "problem.severity": level,
            "security-severity": severity,
        },
    }


def _check_rule(checked: Checked) -> dict[str, Any]:
    check = checked.check
    full = f"The check {check.name} asks: {check.question}"
    if check.scanner in SCANNERS:
        part = SCANNERS[check.scanner]
        full += f" {part.summary[:1].upper()}{part.summary[1:]}".replace("``", "").rstrip(".") + "."
        full += f" Published as {part.paper}." if part.paper else ""
    return _rule_facts(
        _rule(checked), check.question, full, level="error", severity="9.0", precision="medium"
    )


_HELP = (
    "Do not deploy this model as it is. The report of the scan (unbackdoor scan MODEL --data IMAGES "
    "--report DIR) shows the suspected class and the recovered trigger. Ask for the model from its source "
    "again, or repair it (unbackdoor purify) and compare (unbackdoor verify). A small share of clean models "
    "is accused wrongly: the level of the scan."
)
_ATLAS = ("external/mitre-atlas/AML.T0018", "external/mitre-atlas/AML.T0020")
_OTHER_RULES = (
    _rule_facts(
        "agreement",
        "Do several checks notice the same class?",
        "Several checks, none of which is evidence alone, point to the same class more strongly than chance "
        "allows after correction for all checks.",
        level="error",
        severity="9.0",
        precision="medium",
    ),
    _rule_facts(
        "undecided",
        "The scan could not decide.",
        "Whether there is a backdoor could not be decided: too few images or classes, too little time, or "
        "checks that did not come to their end.",
        level="warning",
        severity="4.0",
        precision="low",
    ),
)


def _result(checked: Checked, class_names: Sequence[str]) -> dict[str, Any]:
    named = ", ".join(f"{class_names[k]!r} (class {k})" for k in checked.classes) or "no single class"
    return {
        "ruleId": _rule(checked),
        "level": "error",
        "message": {
            "text": f"Evidence of a backdoor towards {named}: {checked.check.question} Yes "
            f"(p = {checked.p_value:.2g}, {checked.adjusted:.2g} after correction for all checks)."
        },
        "properties": {
            "p_value": checked.p_value,
            "adjusted_p_value": checked.adjusted,
            "classes": list(checked.classes),
        },
    }


def _agreement(agreed: Agreed, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "ruleId": "agreement",
        "level": "error",
        "message": {
            "text": f"Evidence of a backdoor towards {class_names[agreed.label]!r} (class {agreed.label}): "
            f"{' and '.join(agreed.checks)} notice the same class "
            f"(p = {agreed.adjusted:.2g} after correction for all checks)."
        },
        "properties": {
            "adjusted_p_value": agreed.adjusted,
            "checks": list(agreed.checks),
            "classes": [agreed.label],
        },
    }


def _rule(checked: Checked) -> str:
    return checked.check.name.replace(":", "-").replace("_", "-")
