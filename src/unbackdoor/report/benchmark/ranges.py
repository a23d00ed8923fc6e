"""What each method left, from the best case to the worst: no mean, no promise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Rows, acc_lost, defense_of, lines
from unbackdoor.report.benchmark.repairs import missing
from unbackdoor.report.tables import Cell, Table, columns
from unbackdoor.report.words import NOTHING, duration

_COLUMNS = columns(
    "method", "attacked networks", "ASR left", "ACC lost", "ACC lost on clean models", "published models",
    "ASR left there", "ACC lost there", "failed", "time",
)  # fmt: skip


@dataclass
class _Found:
    asr: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    published_asr: list[float] = field(default_factory=list)
    published_lost: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: list[float] = field(default_factory=list)


def range_table(
    identifier: str,
    caption: str,
    repairs: Rows[Row],
    published: Rows[Mapping[str, Any]],
    *,
    methods: Sequence[str],
) -> Table:
    """Return for each method the smallest and the largest ASR that it left, and of the accuracy it cost.

    Args:
        identifier: Of the table.
        caption: Above it.
        repairs: Rows of suites; where the attack did not take, they are left out. One experiment that
            stands in two suites counts once.
        published: Records of repairs of models that other people trained: ``method``, ``acc_before``,
            ``acc``, ``asr``, ``seconds``, or ``error``.
        methods: Names with their presets, in the order of the table.
    """
    current = _found(repairs.current, published.current, methods)
    older = _found(repairs.older, published.older, methods)
    made = []
    for line in lines(current, older):
        if line.group is None:
            key = None if line.key is None else (line.key, cells.HONEST, 0)
            made.append((missing(key), *cells.absent(len(_COLUMNS) - 1)))
        elif line.key is not None:
            name = cells.method(line.key, older=line.older, means=True)
            made.append((name, *_cells(line.group)))
    return cells.table(identifier, "", caption, _COLUMNS, made)


def _found(
    repairs: Iterable[Row], published: Iterable[Mapping[str, Any]], methods: Sequence[str]
) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for row in {row.key()[2:]: row for row in repairs}.values():
        if defense_of(row) not in methods or WEAK in row.flags:
            continue
        mine, lost = found.setdefault(defense_of(row), _Found()), acc_lost(row)
        mine.failed += row.error is not None
        if lost is None:
            continue
        if row.asr is not None:
            mine.asr.append(row.asr)
        (mine.clean if row.attack == "none" else mine.lost).append(lost)
        mine.seconds += [] if row.seconds is None else [row.seconds]
    for record in published:
        if record["method"] not in methods:
            continue
        mine = found.setdefault(record["method"], _Found())
        mine.failed += "error" in record
        if "error" not in record:
            mine.published_asr.append(record["asr"])
            mine.published_lost.append(record["acc_before"] - record["acc"])
            mine.seconds.append(record["seconds"])
    return {name: found[name] for name in methods if name in found}


def _cells(found: _Found) -> tuple[Cell, ...]:
    return (
        cells.number(len(found.asr)),
        *map(_range, (found.asr, found.lost, found.clean)),
        cells.number(len(found.published_asr)),
        *map(_range, (found.published_asr, found.published_lost)),
        cells.number(found.failed, tone="bad"),
        _times(found.seconds),
    )


def _range(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(NOTHING)
    low, high = cells.percent(min(values)), cells.percent(max(values))
    return Cell(low if low == high else f"{low.removesuffix(' %')} to {high}", key=max(values))


def _times(seconds: Sequence[float]) -> Cell:
    if not seconds:
        return Cell(NOTHING)
    low, high = duration(min(seconds)), duration(max(seconds))
    return Cell(low if low == high else f"{low} to {high}", key=max(seconds))
