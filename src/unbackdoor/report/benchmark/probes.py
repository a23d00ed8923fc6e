"""Tables of probes: what is left in a repaired network, beside its victim and a clean network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median_low

from unbackdoor.bench.results import WEAK, Mean
from unbackdoor.bench.rows import ProbeRow
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Line, Rows, Setting, attack_key, defense_of, lines
from unbackdoor.report.benchmark.repairs import absent_attack
from unbackdoor.report.tables import Cell, Section, Table, columns
from unbackdoor.report.words import NOTHING

STEPS = 10  # of re-learning that the table shows; the rows have the whole course
_PROBES = columns(
    "attack", "defense", "clean images", "ASR", f"ASR after {STEPS} steps", "steps to 50 %",
    "alternative trigger", "triggered images right", "in one other class", "rows", "failed", "left out",
    text=2,
)  # fmt: skip
_BESIDE = (("clean network", "_control"), ("victim", "_before"))
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
        identifier = f"probes-{len(tables)}"
        tables.append(
            cells.table(identifier, str(setting), caption, _PROBES, map(_cells, made), filtered=True)
        )
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
        *(_beside(rows, _mean(name)) for name in ("alternative", "pacc", "moved")),
        cells.number(len(rows)),
        cells.number(sum(row.error is not None for row in line.group), tone="bad"),
        cells.number(sum(WEAK in row.flags and row.error is None for row in line.group), tone="fair"),
    )


Column = Callable[[Sequence[ProbeRow], str], tuple[str, float]]


def _beside(rows: Sequence[ProbeRow], column: Column) -> Cell:
    """Return what a column says of the repaired networks, and in small print of those beside them."""
    text, key = column(rows, "")
    small = [f"{name} {words}" for name, end in _BESIDE if (words := column(rows, end)[0]) != NOTHING]
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
