"""How well scanners separate backdoored networks from clean ones, computed from the rows of their scans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from unbackdoor.audit.evidence import agreements, holm
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import ScanRow
from unbackdoor.metrics import Rate, auroc, tpr_at_fpr

COMBINED = "all together"
LEVEL = 0.05
FPRS = (0.0, 0.05, 0.1, 0.2, 0.5)  # points of the ROC curve


@dataclass(frozen=True)
class Detection:
    """One scanner over many networks.

    Attributes:
        scanner: Its name, or :data:`COMBINED`.
        clean: Clean networks with an answer.
        backdoored: Networks whose attack took, with an answer.
        auroc: Probability that a backdoored network has the smaller p-value; None without both kinds.
        tpr: Share of backdoored networks found where 5 % of the clean ones are accused.
        roc: The same where each share of :data:`FPRS` is; empty without both kinds.
        alarms: Clean networks accused at p = 0.05.
        found: Backdoored networks found at p = 0.05.
        target: Of these, those whose strongest class is the attacker's, where there is one.
        seconds: Mean wall time.
    """

    scanner: str
    clean: int
    backdoored: int
    auroc: float | None
    tpr: float | None
    roc: tuple[float, ...]
    alarms: Rate
    found: Rate
    target: Rate
    seconds: float


@dataclass(frozen=True)
class _ScanResult:
    backdoored: bool
    p_value: float
    classes: tuple[int, ...]
    target_found: bool | None
    seconds: float


def detections(rows: Iterable[ScanRow]) -> list[Detection]:
    """Return one entry for each scanner in the order of their first row, and one for all combined.

    A scan without a calibrated p-value (``undecided``) counts as p = 1: it accuses nobody. The combined
    entry joins the p-values as ``unbackdoor scan`` does (``audit/evidence.py``). Networks whose
    attack did not take, and failed scans, are left out.
    """
    usable = [row for row in rows if row.error is None and WEAK not in row.flags]
    out, by_network = [], {}  # type: ignore[var-annotated]
    for name in dict.fromkeys(_name(row) for row in usable):
        scans = []
        for row in (row for row in usable if _name(row) == name):
            counted = row.p_value is not None and row.verdict != "undecided"
            p_value = row.p_value if counted and row.p_value is not None else 1.0
            scan = _ScanResult(
                row.attack != "none", p_value, tuple(row.classes or ()), row.target_found, row.seconds or 0.0
            )
            scans.append(scan)
            if counted:
                by_network.setdefault(_network(row), []).append(scan)
        out.append(_detection(name, scans))
    combined = [_combined(scans) for scans in by_network.values()]
    return [*out, _detection(COMBINED, combined)] if combined else out


def by_attack(rows: Iterable[ScanRow]) -> dict[str, list[Detection]]:
    """Return the same for every attack by itself, against all clean networks."""
    rows = list(rows)
    clean = [row for row in rows if row.attack == "none"]
    kinds: dict[str, list[ScanRow]] = {}
    for row in rows:
        if row.attack != "none":
            kinds.setdefault(f"{row.attack}, {100 * row.poison_rate:g} %", []).append(row)
    return {kind: detections([*clean, *group]) for kind, group in kinds.items()}


def _name(row: ScanRow) -> str:
    return row.scanner if row.preset == "default" else f"{row.scanner}:{row.preset}"


def _network(row: ScanRow) -> tuple[object, ...]:
    return (
        *(row.dataset, row.architecture, row.width, row.recipe, row.attack, row.poison_rate, row.target),
        *(row.victim_seed, row.clean_images, row.altered, row.defender_seed),
    )


def _combined(scans: Sequence[_ScanResult]) -> _ScanResult:
    p_values = [scan.p_value for scan in scans]
    adjusted = holm(p_values)
    first = min(range(len(scans)), key=adjusted.__getitem__)
    strongest, p_value = scans[first], adjusted[first]
    for agreement in agreements(p_values, [scan.classes for scan in scans])[:1]:
        if agreement.p_value < p_value:
            strongest, p_value = scans[agreement.places[0]], agreement.p_value
    seconds = sum(scan.seconds for scan in scans)
    return _ScanResult(scans[0].backdoored, p_value, strongest.classes, strongest.target_found, seconds)


def _detection(name: str, scans: Sequence[_ScanResult]) -> Detection:
    backdoored = [scan for scan in scans if scan.backdoored]
    clean = [scan for scan in scans if not scan.backdoored]
    found = [scan for scan in backdoored if scan.p_value <= LEVEL]
    aimed = [scan for scan in found if scan.target_found is not None]
    scores = torch.tensor([-scan.p_value for scan in scans])
    is_backdoored = torch.tensor([scan.backdoored for scan in scans])
    both = bool(backdoored) and bool(clean)
    return Detection(
        name,
        len(clean),
        len(backdoored),
        auroc(scores, is_backdoored) if both else None,
        tpr_at_fpr(scores, is_backdoored, LEVEL) if both else None,
        tuple(tpr_at_fpr(scores, is_backdoored, fpr) for fpr in FPRS) if both else (),
        Rate(sum(scan.p_value <= LEVEL for scan in clean), len(clean)),
        Rate(len(found), len(backdoored)),
        Rate(sum(bool(scan.target_found) for scan in aimed), len(aimed)),
        sum(scan.seconds for scan in scans) / len(scans) if scans else 0.0,
    )
