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
class _Measured:
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
    current = _measured_by_method(repairs.current, published.current, methods)
    older = _measured_by_method(repairs.older, published.older, methods)
    made = []
    for line in lines(current, older):
        if line.group is None:
            key = None if line.key is None else (line.key, cells.HONEST, 0)
            made.append((missing(key), *cells.absent(len(_COLUMNS) - 1)))
        elif line.key is not None:
            name = cells.method(line.key, older=line.older, means=True)
            made.append((name, *_cells(line.group)))
    return cells.table(identifier, "", caption, _COLUMNS, made)


def _measured_by_method(
    repairs: Iterable[Row], published: Iterable[Mapping[str, Any]], methods: Sequence[str]
) -> dict[str, _Measured]:
    by_method: dict[str, _Measured] = {}
    for row in {row.key()[2:]: row for row in repairs}.values():
        if defense_of(row) not in methods or WEAK in row.flags:
            continue
        measured, lost = by_method.setdefault(defense_of(row), _Measured()), acc_lost(row)
        measured.failed += row.error is not None
        if lost is None:
            continue
        if row.asr is not None:
            measured.asr.append(row.asr)
        (measured.clean if row.attack == "none" else measured.lost).append(lost)
        measured.seconds += [] if row.seconds is None else [row.seconds]
    for record in published:
        if record["method"] not in methods:
            continue
        measured = by_method.setdefault(record["method"], _Measured())
        measured.failed += "error" in record
        if "error" not in record:
            measured.published_asr.append(record["asr"])
            measured.published_lost.append(record["acc_before"] - record["acc"])
            measured.seconds.append(record["seconds"])
    return {name: by_method[name] for name in methods if name in by_method}


def _cells(measured: _Measured) -> tuple[Cell, ...]:
    return (
        cells.number(len(measured.asr)),
        *map(_range, (measured.asr, measured.lost, measured.clean)),
        cells.number(len(measured.published_asr)),
        *map(_range, (measured.published_asr, measured.published_lost)),
        cells.number(measured.failed, tone="bad"),
        _times(measured.seconds),
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
