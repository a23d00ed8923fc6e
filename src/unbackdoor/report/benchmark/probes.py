"""Probes in tables: what is left in a repaired network, beside its victim and a clean network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median_low
from typing import TypeVar

from unbackdoor.bench.results import WEAK, Mean
from unbackdoor.bench.rows import ProbeRow, Row
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Line, Rows, Setting, attack_key, defense_of, lines
from unbackdoor.report.benchmark.repairs import absent_attack
from unbackdoor.report.tables import Cell, Section, Table, columns
from unbackdoor.report.words import NOTHING

STEPS = 10  # of re-learning that the table shows; the rows have the whole course
_PROBES = columns(
    "attack", "defense", "clean images", "ASR", f"ASR after {STEPS} steps", "steps to 50 %",
    "alternative trigger", "alternative patch", "triggered images right", "in one other class", "rows",
    "failed", "left out", text=2,
)  # fmt: skip
_PATCH = [column.name for column in _PROBES].index("alternative patch")
PROBED = columns(
    f"ASR after {STEPS} steps of re-learning", "alternative trigger", "alternative patch",
    "triggered images right", "probed",
    text=0, group="probes", hidden=True,
)  # fmt: skip
_SMALL = "in small print the same of a network that was trained clean, and of the victim"
PROBED_MEANINGS = (
    (
        PROBED[0].name,
        "ASR after fine-tuning on a handful of poisoned images: where it comes back much sooner than it "
        f"comes to a clean network, the repair hid the backdoor; {_SMALL}; lower is better",
    ),
    (
        PROBED[1].name,
        "success of one faint pattern for all images, searched from the attack's own trigger, which counts "
        f"where it does more to the victim than to the clean network; {_SMALL}; lower is better",
    ),
    (
        PROBED[2].name,
        "success of one small square for all images, searched in the place of the attack's trigger, which "
        f"counts where the pattern's does; {_SMALL}; lower is better; rows older than this probe have none",
    ),
    (
        PROBED[3].name,
        "triggered images of all classes, the attacker's too, that are classified as what they show, fewer "
        f"where the trigger now leads to another class; {_SMALL}; higher is better",
    ),
    (PROBED[4].name, "rows behind these means, and how many probes failed"),
)
_CLEAN = "clean network"
T = TypeVar("T")
ProbeLine = Line[tuple[object, ...], list[ProbeRow]]


def probe_section(probes: Rows[ProbeRow]) -> Section:
    """Return what the probes found, attack by attack, a table for each setting."""
    tables: list[Table] = []
    attacked = probes.where(lambda row: row.asr_before is not None)
    for setting, rows in attacked.by(Setting.of).items():
        made = lines(rows_by_attack(rows.current), rows_by_attack(rows.older))
        caption = (
            "Means over the seeds of victims and defenders, of steps the median; in small print the same "
            "of networks that were trained clean from the same first weights, and of the victims."
        )
        identifier, chosen, shown = f"probes-{len(tables)}", _PROBES, list(map(_cells, made))
        if all(row.patch is None for row in rows.all):  # they are older than that probe
            chosen, shown = _without_patch(chosen), list(map(_without_patch, shown))
        tables.append(cells.table(identifier, str(setting), caption, chosen, shown, filtered=True))
    words = (
        "A repair that removed the backdoor leaves a network that answers as the clean one does. ASR after "
        f"{STEPS} steps, and steps to 50 %: the network is fine-tuned on a handful of poisoned images; where "
        "ASR comes back much sooner than it comes to the clean network, the backdoor was hidden. Alternative "
        "trigger: success of one faint pattern for all images, searched from the attack's own; it tells "
        "something only where it does more to the victim than to the clean network. Triggered images right: "
        "those of all classes, by what they show. In one other class: the largest share of them in a single "
        "class that is neither that nor the attacker's; where it exceeds the clean network's, the trigger "
        "has moved.",
    )
    return Section("probes", "What probes find", words, tuple(tables))


def _without_patch(line: tuple[T, ...]) -> tuple[T, ...]:
    return line[:_PATCH] + line[_PATCH + 1 :]


def rows_by_attack(rows: Sequence[ProbeRow]) -> dict[tuple[object, ...], list[ProbeRow]]:
    """Return rows in groups that differ in their seeds only."""
    groups: dict[tuple[object, ...], list[ProbeRow]] = {}
    for row in rows:
        groups.setdefault(attack_key(row), []).append(row)
    return groups


def _cells(line: ProbeLine) -> tuple[Cell, ...]:
    if line.group is None:
        return (*absent_attack(Line(line.key, None, line.older)), *cells.absent(len(_PROBES) - 3))
    first = line.group[0]
    rows = [row for row in line.group if row.error is None and WEAK not in row.flags]
    return (
        cells.attack(first, older=line.older, means=True),
        cells.method(defense_of(first), first.selection),
        cells.number(first.clean_images),
        cells.rate(Mean.of([row.asr for row in rows if row.asr is not None])),
        _beside(rows, _after),
        _beside(rows, _steps),
        *(_beside(rows, _mean(name)) for name in ("alternative", "patch", "pacc", "moved")),
        cells.number(len(rows)),
        cells.number(sum(row.error is not None for row in line.group), tone="bad"),
        cells.number(sum(WEAK in row.flags and row.error is None for row in line.group), tone="fair"),
    )


class ProbesOf:
    """The probes of repairs, found by the repair that they were made of.

    Args:
        probes: Each belongs to the repair of its experiment that was measured by the code that it names.
    """

    def __init__(self, probes: Rows[ProbeRow]) -> None:
        self._of = {_repair(probe): (probe, older) for probe, older in probes.pairs}

    def of(self, repairs: Sequence[Row]) -> list[ProbeRow]:
        """Return the probes of some repairs."""
        return [self._of[key][0] for key in map(_repair, repairs) if key in self._of]

    def strangers(self, repairs: Sequence[Row]) -> int:
        """Return how many probes are of none of these repairs."""
        return len(self._of.keys() - set(map(_repair, repairs)))

    def cells(self, repairs: Sequence[Row], most: int, *, older: bool) -> tuple[Cell, ...]:
        """Return the cells of :data:`PROBED`, means over the probes of some repairs.

        Args:
            repairs: Of one line of a table.
            most: How many rows the other means of the line are over.
            older: The line is of older code. Elsewhere cells of older probes are marked one by one, and there
                are such only where no probe is of the current code.
        """
        found = [self._of[key] for key in map(_repair, repairs) if key in self._of]
        own = [probe for probe, old in found if not old] or [probe for probe, _ in found]
        rows = [row for row in own if row.pacc is not None and WEAK not in row.flags]
        mark = not older and bool(rows) and all(old for _, old in found)
        failed = sum(row.error is not None for row in own)
        small = [f"of {most:,}"] if rows and len(rows) < most else []
        small += [f"{failed:,} failed"] if failed else []
        number = Cell(f"{len(rows):,}", "; ".join(small), len(rows), "fair" if small else "")
        columns = (_after, _mean("alternative"), _mean("patch"), _mean("pacc"))
        values = (_beside(rows, column, "clean") for column in columns)
        return tuple(replace(cell, older=mark) for cell in (*values, number))


def _repair(row: Row | ProbeRow) -> tuple[object, ...]:
    """Return what a repair and its probes have in common, and no other repair has."""
    code = row.repair_code if isinstance(row, ProbeRow) else row.code
    return (*row.key(), code, row.victim_code)


Column = Callable[[Sequence[ProbeRow], str], tuple[str, float]]


def _beside(rows: Sequence[ProbeRow], column: Column, clean: str = _CLEAN) -> Cell:
    """Return what a column says of the repaired networks, and in small print of those beside them."""
    beside = ((clean, "_control"), ("victim", "_before"))
    text, key = column(rows, "")
    small = [f"{name} {words}" for name, end in beside if (words := column(rows, end)[0]) != NOTHING]
    return Cell(text, "; ".join(small), key)


def _mean(name: str) -> Column:
    def column(rows: Sequence[ProbeRow], end: str) -> tuple[str, float]:
        return _percent([getattr(row, name + end) for row in rows])

    return column


def _after(rows: Sequence[ProbeRow], end: str) -> tuple[str, float]:
    courses = [dict(zip(row.relearn_steps, getattr(row, f"relearned{end}"), strict=False)) for row in rows]
    return _percent([course.get(STEPS) for course in courses])


def _percent(values: Sequence[float | None]) -> tuple[str, float]:
    mean = Mean.of([value for value in values if value is not None])
    return (cells.percent(mean.value) if mean.n else NOTHING), mean.value


def _steps(rows: Sequence[ProbeRow], end: str) -> tuple[str, float]:
    measured = [row for row in rows if getattr(row, f"relearned{end}")]
    if not measured:
        return NOTHING, math.nan
    counts = [getattr(row, f"steps_to_half{end}") for row in measured]
    middle = median_low([math.inf if count is None else count for count in counts])
    longest = max(row.relearn_steps[-1] for row in measured)
    return (f"{middle:g}", middle) if math.isfinite(middle) else (f"over {longest}", longest + 1)
