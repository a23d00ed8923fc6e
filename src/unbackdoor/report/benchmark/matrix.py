"""Defenses against attacks in one table, and defenses beside a baseline on the same cells."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from unbackdoor.bench.results import WEAK, Mean, Summary
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Rows, defense_of, lines
from unbackdoor.report.benchmark.repairs import Key, missing, summaries
from unbackdoor.report.tables import Cell, Table, columns
from unbackdoor.report.words import NOTHING

_MEANS = ("mean ASR", "ACC lost", "RA", "DER", "time", "ACC lost on clean models", "failed")
_PAIRED = ("clean images", "rows", "ASR", "ACC lost", "DER", "rows of both", "DER there", "DER of {} there",
           "ACC lost on clean models")  # fmt: skip


def asr_matrix(identifier: str, heading: str, caption: str, rows: Rows[Row]) -> Table:
    """Return a row a defense and a column an attack, with its ASR for each sample, and the means."""
    attacks = list(dict.fromkeys(_victim(row) for row in rows.all if row.attack != "none"))
    made = []
    for line in lines(summaries(rows.current), summaries(rows.older)):
        if line.group is None:
            made.append((missing(line.key), *cells.absent(len(attacks) + len(_MEANS))))
            continue
        s, own = line.group, rows.older if line.older else rows.current
        own_rows = [row for row in own if _key(row) == (s.defense, s.selection, s.clean_images)]
        first = cells.method(s.defense, s.selection, older=line.older, means=True)
        made.append((first, *(_asr(own_rows, attack) for attack in attacks), *_means(s)))
    return cells.table(identifier, heading, caption, columns("defense", *attacks, *_MEANS), made)


def paired_table(
    identifier: str, heading: str, caption: str, rows: Rows[Row], *, defenses: Collection[str], baseline: str
) -> Table:
    """Return means of defenses, and of a baseline over the cells that both have.

    A cell is a victim, a budget and a sample. Means of both are over rows of the same age.

    Args:
        identifier: Of the table.
        heading: Above it.
        caption: Above it.
        rows: With those of the baseline.
        defenses: Names, without presets.
        baseline: Name of the defense to lay beside them.
    """
    chosen = rows.where(lambda row: row.defense in defenses)
    names = [name.format(baseline) for name in _PAIRED]
    made = []
    for line in lines(summaries(chosen.current), summaries(chosen.older)):
        if line.group is None:
            made.append((missing(line.key), *cells.absent(len(names))))
            continue
        own = rows.older if line.older else rows.current
        made.append(_paired_cells(line.group, own, baseline, line.older))
    return cells.table(identifier, heading, caption, columns("defense", *names), made)


def _paired_cells(s: Summary, rows: Sequence[Row], baseline: str, older: bool) -> tuple[Cell, ...]:
    other = {_cell(row): row.der for row in _took(rows) if defense_of(row) == baseline}
    own_rows = [row for row in _took(rows) if _key(row) == (s.defense, s.selection, s.clean_images)]
    pairs = [(row.der, other[_cell(row)]) for row in own_rows if other.get(_cell(row)) is not None]
    first, second = ([pair[at] for pair in pairs if pair[at] is not None] for at in (0, 1))
    return (
        cells.method(s.defense, s.selection, older=older, means=True),
        cells.number(s.clean_images),
        cells.number(s.asr.n),
        _plain(s.asr),
        _plain(s.acc_lost),
        _plain_der(s.der),
        cells.number(len(pairs)),
        _plain_der(Mean.of([der for der in first if der is not None])),
        _plain_der(Mean.of([der for der in second if der is not None])),
        _plain(s.acc_lost_clean),
    )


def _took(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.error is None and row.asr is not None and WEAK not in row.flags]


def _cell(row: Row) -> tuple[Any, ...]:
    victim = (row.dataset, row.architecture, row.width, row.recipe, row.attack, row.poison_rate, row.target)
    return (*victim, row.victim_seed, row.clean_images, row.altered, row.defender_seed)


def _key(row: Row) -> Key:
    return defense_of(row), row.selection, row.clean_images


def _victim(row: Row) -> str:
    return f"{cells.name(row.attack)} {100 * row.poison_rate:g} %"


def _asr(rows: Sequence[Row], attack: str) -> Cell:
    attack_rows = [row for row in rows if _victim(row) == attack]
    if not attack_rows:
        return Cell(NOTHING)
    text = ", ".join("failed" if row.asr is None else cells.percent(row.asr) for row in attack_rows)
    weak = any(WEAK in row.flags for row in attack_rows)
    return Cell(f"({text})" if weak else text, key=attack_rows[0].asr, tone="fair" if weak else "")


def _means(s: Summary) -> tuple[Cell, ...]:
    return (
        *map(_plain, (s.asr, s.acc_lost, s.ra)),
        _plain_der(s.der),
        cells.cost(s.seconds),
        _plain(s.acc_lost_clean),
        cells.number(s.failed, tone="bad"),
    )


def _plain(mean: Mean) -> Cell:
    return cells.one(mean.value if mean.n else None)


def _plain_der(mean: Mean) -> Cell:
    return cells.decimal(mean.value if mean.n else None)
