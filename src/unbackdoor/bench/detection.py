"""How well scanners tell backdoored networks from clean ones, from the rows of their scans."""

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
class _Look:
    backdoored: bool
    p_value: float
    classes: tuple[int, ...]
    target_found: bool | None
    seconds: float


def detections(rows: Iterable[ScanRow]) -> list[Detection]:
    """Return one entry for each scanner in the order of their first row, and one for all together.

    A scan without a calibrated p-value (``undecided``) counts as p = 1: it accuses nobody. All together is
    what ``unbackdoor scan`` makes of the scanners that gave one (``audit/evidence.py``). Networks whose
    attack did not take, and failed scans, are left out.
    """
    good = [row for row in rows if row.error is None and WEAK not in row.flags]
    out, by_network = [], {}  # type: ignore[var-annotated]
    for name in dict.fromkeys(_name(row) for row in good):
        looks = []
        for row in (row for row in good if _name(row) == name):
            counted = row.p_value is not None and row.verdict != "undecided"
            p_value = row.p_value if counted and row.p_value is not None else 1.0
            look = _Look(
                row.attack != "none", p_value, tuple(row.classes or ()), row.target_found, row.seconds or 0.0
            )
            looks.append(look)
            if counted:
                by_network.setdefault(_network(row), []).append(look)
        out.append(_detection(name, looks))
    together = [_together(looks) for looks in by_network.values()]
    return [*out, _detection(COMBINED, together)] if together else out


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
        *(row.victim_seed, row.clean_images, row.defender_seed),
    )


def _together(looks: Sequence[_Look]) -> _Look:
    p_values = [look.p_value for look in looks]
    adjusted = holm(p_values)
    first = min(range(len(looks)), key=adjusted.__getitem__)
    strongest, p_value = looks[first], adjusted[first]
    for one in agreements(p_values, [look.classes for look in looks])[:1]:
        if one.p_value < p_value:
            strongest, p_value = looks[one.places[0]], one.p_value
    seconds = sum(look.seconds for look in looks)
    return _Look(looks[0].backdoored, p_value, strongest.classes, strongest.target_found, seconds)


def _detection(name: str, looks: Sequence[_Look]) -> Detection:
    bad = [look for look in looks if look.backdoored]
    clean = [look for look in looks if not look.backdoored]
    found = [look for look in bad if look.p_value <= LEVEL]
    aimed = [look for look in found if look.target_found is not None]
    scores = torch.tensor([-look.p_value for look in looks])
    marks = torch.tensor([look.backdoored for look in looks])
    both = bool(bad) and bool(clean)
    return Detection(
        name,
        len(clean),
        len(bad),
        auroc(scores, marks) if both else None,
        tpr_at_fpr(scores, marks, LEVEL) if both else None,
        tuple(tpr_at_fpr(scores, marks, fpr) for fpr in FPRS) if both else (),
        Rate(sum(look.p_value <= LEVEL for look in clean), len(clean)),
        Rate(len(found), len(bad)),
        Rate(sum(bool(look.target_found) for look in aimed), len(aimed)),
        sum(look.seconds for look in looks) / len(looks) if looks else 0.0,
    )
