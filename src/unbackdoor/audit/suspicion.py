"""The suspicion that a repair begins with: the result of a scan, and triggers that were brought along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from unbackdoor.audit.scanning import Audit
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.files import is_there, parse_json, read_text
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Classifier, Verdict
from unbackdoor.weights.triggers import FOLDER, MAX_KEPT, read_trigger

RECORD = "result.json"
_LARGEST = 64 << 20  # bytes of a record; that of a scan of a thousand classes has less than one
_REMEDY = "Give the folder that unbackdoor scan --report wrote"

Scan = Audit | Path | str


def read_suspicion(scan: Scan | None, model: Classifier) -> Suspicion | None:
    """Return what a scan suspects: the classes of its finding, and the triggers it recovered towards them.

    A scan without a finding suspects nothing: what it only noticed must not lead a repair.

    Args:
        scan: Its result, the folder of its report, or the record in that folder; of a record alone, triggers
            are not read. None for no scan.
        model: The classifier that is to be repaired.

    Returns:
        The suspicion, empty where the scan came to no finding; None without a scan.

    Raises:
        InputError: If it is no record of a scan, or a trigger cannot be read or does not fit the model.
        IntegrityError: If the scan, or a trigger, is of another model.
        UnsafeFile: If a file is absurdly large.
    """
    if scan is None:
        return None
    if isinstance(scan, Audit):
        _require_same(scan.facts.get("model_sha256"), model, "a scan in memory")
        p_values = {k: n.adjusted for n in reversed(scan.noticed) for k in n.classes}
        return _suspicion(scan.classes, p_values, scan.triggers)
    if not isinstance(scan, str | Path):
        raise InputError(
            "the scan is of another type",
            expected="what unbackdoor.scan returned, or the folder of its report",
            got=type(scan).__name__,
        )
    path = Path(scan)
    folder = path if is_there(path) and path.is_dir() else None
    file = path if folder is None else path / RECORD
    record = parse_json(
        read_text(file, "the record of the scan", limit=_LARGEST), "the record of the scan", file
    )
    try:
        digest, classes, p_values, recorded = _read(record, model.classes)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            "the file is no record of a scan", where=file, got=repr(error)[:200], remedy=_REMEDY
        ) from error
    _require_same(digest, model, file)
    triggers = []
    for i, (label, success) in enumerate(recorded[:MAX_KEPT] if folder is not None else ()):
        assert folder is not None
        trigger = read_trigger(folder / FOLDER.format(i), model, of=digest)
        if trigger.label != label:
            raise IntegrityError(
                "the trigger is not the one that the record of the scan speaks of",
                expected=f"class {label}",
                got=f"class {trigger.label}",
                where=folder / FOLDER.format(i),
                remedy="Scan again",
            )
        triggers.append(replace(trigger, success=success))
    return _suspicion(classes, p_values, triggers)


def _suspicion(
    classes: Sequence[int], p_values: Mapping[int, float], triggers: Sequence[RecoveredTrigger]
) -> Suspicion:
    towards = tuple(trigger for trigger in triggers if trigger.label in classes)
    return Suspicion(tuple(classes), tuple(p_values.get(k) for k in classes), towards)


def _read(
    record: Any, classes: int
) -> tuple[str, tuple[int, ...], dict[int, float], list[tuple[int, float | None]]]:
    """Return hash, suspected classes, their p-values, and class and success of the triggers of a record."""

    def share(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"{value!r}, which is no number in 0..1")
        return float(value)

    def label(entry: Any) -> int:
        index = entry["index"]
        if type(index) is not int or not 0 <= index < classes:
            raise ValueError(f"class {index!r}, of {classes} classes")
        return index

    def labels(entries: Any) -> tuple[int, ...]:
        if not isinstance(entries, list):
            raise TypeError("the classes are no list")
        return tuple(dict.fromkeys(label(entry) for entry in entries))

    if not isinstance(record, dict) or record["verdict"] not in get_args(Verdict):
        raise ValueError("no verdict of a scan")
    digest, suspected = record["model_sha256"], labels(record["classes"])
    if not isinstance(digest, str):
        raise TypeError("the hash of the model is no text")
    if suspected and record["verdict"] != "backdoor found":
        raise ValueError("a suspected class without a finding")
    p_values: dict[int, float] = {}
    for entry in record["noticed"]:  # smallest p-value first
        for k in labels(entry["classes"]):
            p_values.setdefault(k, share(entry["adjusted_p_value"]))
    if not isinstance(record["triggers"], list):
        raise TypeError("the triggers are no list")
    recorded = [
        (label(entry["class"]), None if entry["success"] is None else share(entry["success"]))
        for entry in record["triggers"]
    ]
    return digest, suspected, p_values, recorded


def _require_same(digest: object, model: Classifier, where: object) -> None:
    own = model.sha256()
    if digest != own:
        raise IntegrityError(
            "the scan is of another model",
            expected=f"SHA-256 of the weights {own}",
            got=digest,
            where=where,
            remedy="Scan this model, or repair the one that was scanned",
        )
