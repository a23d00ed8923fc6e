"""Tables of repairs: means over attacks, attack by attack, and single rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unbackdoor.bench.results import WEAK, Summary, summarise
from unbackdoor.bench.rows import Row
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.cells import ORACLE
from unbackdoor.report.benchmark.groups import (
    Group,
    Line,
    Rows,
    Setting,
    acc_lost,
    attack_groups,
    defense_of,
    lines,
)
from unbackdoor.report.tables import MOST_ROWS, Cell, Column, Section, Table, columns

MOST_FAILURES = 200
_SUMMARY = (
    Column("defense", number=False),
    *columns("ASR", "worst ASR", "ACC lost", "ACC lost on clean models", "RA", text=0),
    Column("DER", order="descending"),
    *columns("cost", "rows", "failed", "left out", text=0),
)
_ATTACK = columns(
    "attack", "defense", "clean images", "ASR", "worst ASR", "ACC", "ACC lost", "RA", "DER", "cost", "rows",
    "failed", "left out", text=2,
)  # fmt: skip
Key = tuple[str, str, int]  # defense, selection, clean images
AttackLine = Line[tuple[object, ...], Group]


def summary_section(settings: Mapping[Setting, Rows[Row]]) -> Section:
    """Return the means over all attacks, a table for each setting, budget and way of choosing."""
    tables: list[Table] = []
    for setting, rows in settings.items():
        for budget, own in sorted(rows.by(lambda row: row.clean_images).items()):
            for oracle, group in sorted(own.by(lambda row: row.selection == ORACLE).items()):
                tables.append(_summary_table(f"summary-{len(tables)}", setting, budget, oracle, group))
    words = (
        "Means over attacks, poison rates and seeds, in the order of mean DER. In small print the 95 % "
        "interval and the worst single row. Where a defense has fewer rows than the others, its mean "
        "is over less, and its place says less."
    )
    return Section("summary", "All attacks together", (words,), tuple(tables))


def _summary_table(identifier: str, setting: Setting, budget: int, oracle: bool, rows: Rows[Row]) -> Table:
    heading = f"{setting}: {budget:,} clean images"
    caption = "Only rows chosen with held-out clean images, as a defender can."
    if oracle:
        heading += ", chosen with the truth (oracle)"
        caption = "Chosen with the truth, which no defender has: not to be ranked with the others."
    current, older = summaries(rows.current), summaries(rows.older)
    most = {at: max((s.asr.n for s in by_key.values()), default=0) for at, by_key in
            ((False, current), (True, older))}  # fmt: skip
    made = [
        _summary_cells(line, rows.older if line.older else rows.current, most[line.older])
        for line in lines(current, older)
    ]
    return cells.table(identifier, heading, caption, _SUMMARY, made)


def summaries(rows: Sequence[Row]) -> dict[Key, Summary]:
    """Return the summary of each defense at each budget, in the order of mean DER."""
    return {(s.defense, s.selection, s.clean_images): s for s in summarise(rows)}


def _summary_cells(line: Line[Key, Summary], rows: Sequence[Row], most: int) -> tuple[Cell, ...]:
    s = line.group
    if s is None:
        return (missing(line.key), *cells.absent(len(_SUMMARY) - 1))
    own_rows = [row for row in rows if (defense_of(row), row.selection) == (s.defense, s.selection)]
    fewer = s.asr.n < most
    return (
        cells.method(s.defense, s.selection, older=line.older, means=True),
        cells.rate(s.asr),
        cells.worst(s.asr),
        cells.rate(s.acc_lost, worst=True),
        cells.rate(s.acc_lost_clean, worst=True),
        cells.rate(s.ra, worst=True),
        cells.der(s.der),
        cells.cost(s.seconds, own_rows),
        Cell(f"{s.asr.n:,}", f"of {most:,}" if fewer else "", s.asr.n, "fair" if fewer else ""),
        cells.number(s.failed, tone="bad"),
        cells.number(s.weak, tone="fair"),
    )


def missing(key: Key | None) -> Cell:
    """Return the first cell of a line whose means are over no row."""
    if key is None:
        return Cell("current code", "no row")
    return Cell(cells.name(key[0]), "; ".join(filter(None, (cells.NOT_RUN, cells.chosen(key[1])))))


def attack_section(settings: Mapping[Setting, Rows[Row]]) -> Section:
    """Return the means over seeds, attack by attack."""
    tables: list[Table] = []
    for setting, rows in settings.items():
        for oracle, own in sorted(rows.by(lambda row: row.selection == ORACLE).items()):
            tables.append(
                cells.table(
                    f"attack-{len(tables)}",
                    f"{setting}, chosen with the truth (oracle)" if oracle else str(setting),
                    "Means over the seeds of victims and defenders; within an attack, in the order of mean "
                    "DER.",
                    _ATTACK,
                    map(_attack_cells, _in_order(own)),
                    filtered=True,
                )
            )
    return Section("attacks", "Attack by attack", tables=tuple(tables))


def _in_order(rows: Rows[Row]) -> list[AttackLine]:
    made = lines(attack_groups(rows.current), attack_groups(rows.older))
    place = {name: at for at, name in enumerate(dict.fromkeys(row.attack for row in rows.all))}

    def order(line: AttackLine) -> tuple[object, ...]:
        if line.key is None:
            return (-1,)
        attack, rate, target, defense, _, images = line.key
        value = line.group.mean(lambda row: row.der).value if line.group else math.nan
        best = math.inf if math.isnan(value) else -value
        return (place[str(attack)], rate, -1 if target is None else target, images, line.older, best, defense)

    return sorted(made, key=order)


def _attack_cells(line: AttackLine) -> tuple[Cell, ...]:
    group = line.group
    if group is None:
        return (*absent_attack(line), *cells.absent(len(_ATTACK) - 3))
    asr = group.mean(lambda row: row.asr)
    return (
        cells.attack(group.row, older=line.older, means=True),
        cells.method(defense_of(group.row), group.row.selection),
        cells.number(group.row.clean_images),
        cells.rate(asr),
        cells.worst(asr),
        cells.rate(group.mean(lambda row: row.acc, worst="min")),
        cells.rate(group.mean(acc_lost), worst=True),
        cells.rate(group.mean(lambda row: row.ra, worst="min"), worst=True),
        cells.der(group.mean(lambda row: row.der, worst="min")),
        cells.cost(group.mean(lambda row: row.seconds), group.rows),
        cells.number(len(group.fine())),
        cells.number(sum(row.error is not None for row in group.rows), tone="bad"),
        cells.number(sum(WEAK in row.flags and row.error is None for row in group.rows), tone="fair"),
    )


def absent_attack(line: AttackLine) -> tuple[Cell, ...]:
    """Return attack, defense and budget of a line whose means are over no row."""
    if line.key is None:
        return (missing(None), *cells.absent(2))
    attack, rate, target, defense, selection, images = line.key
    small = "clean model" if attack == "none" else f"{100 * float(str(rate)):g} %"
    small += "" if target is None else f" to class {target}"
    return (
        Cell(cells.name(attack), small),
        missing((str(defense), str(selection), int(str(images)))),
        cells.number(int(str(images))),
    )


def left_out_section(rows: Rows[Row]) -> Section:
    """Return the victims whose attack did not take; without a table if there are none."""
    weak = rows.where(lambda row: WEAK in row.flags)
    victims = weak.by(lambda row: (Setting.of(row), row.attack, row.poison_rate, row.target, row.victim_seed))
    made = cells.table(
        "left-out-0",
        "",
        f"The attack did not take: before any repair its ASR is below {100 * ATTACK_TOOK:g} %.",
        columns("attack", "setting", "victim seed", "ACC before", "ASR before", text=2),
        (
            (
                cells.attack(row, older=older),
                Cell(str(Setting.of(row))),
                cells.number(row.victim_seed),
                cells.one(row.acc_before),
                cells.one(row.asr_before),
            )
            for (row, older) in (group.pairs[0] for group in victims.values())
        ),
    )
    words = (
        f"Rows of these victims are in the table of all rows, and in no mean. There are {len(weak.pairs):,}."
    )
    return Section("left-out", "Left out of the means", (words,), (made,) if weak.pairs else ())


def failed_section(rows: Rows[Row]) -> Section:
    """Return the rows that ended with an error; without a table if there are none."""
    failed = rows.where(lambda row: row.error is not None).pairs
    made = Table(
        "failed-0",
        "",
        "Rows that ended with an error.",
        (
            *columns("defense", "attack", "setting", text=3),
            *columns("clean images", "victim seed", "defender seed", text=0),
            Column("error", number=False, long=True),
        ),
        [
            (
                cells.method(defense_of(row), row.selection, older=older),
                cells.attack(row),
                Cell(str(Setting.of(row))),
                cells.number(row.clean_images),
                cells.number(row.victim_seed),
                cells.number(row.defender_seed),
                Cell(cells.name(row.error or "", cells.LONGEST_ERROR), tone="bad"),
            )
            for row, older in failed[:MOST_FAILURES]
        ],
        len(failed),
    )
    return Section("failed", "Failed", tables=(made,) if failed else ())


def rows_section(rows: Rows[Row], *, only_html: bool = True) -> Section:
    """Return one line for each repair."""
    several = len({Setting.of(row) for row in rows.all}) > 1
    names = ("seeds", "clean images", "ACC before", "ASR before", "ACC", "ASR", "RA", "DER", "seconds", "MB")
    made = Table(
        "rows-0",
        "",
        "One line for each repair; the seeds are the victim's and the defender's.",
        (
            *columns("defense", "attack", *(("setting",) if several else ()), text=3),
            *columns(*names, text=0),
            Column("remarks", number=False, long=True),
        ),
        [_row_cells(row, older, several) for row, older in rows.pairs[:MOST_ROWS]],
        len(rows.pairs),
        filtered=True,
    )
    return Section("rows", "All rows", tables=(made,), only_html=only_html)


def _row_cells(row: Row, older: bool, several: bool) -> tuple[Cell, ...]:
    remarks = [cells.name(flag) for flag in row.flags]
    if row.error is not None:
        remarks.insert(0, "failed: " + cells.name(row.error, cells.LONGEST_ERROR))
    tone = "bad" if row.error is not None else "fair" if WEAK in row.flags else ""
    return (
        cells.method(defense_of(row), row.selection, older=older),
        cells.attack(row),
        *((Cell(str(Setting.of(row))),) if several else ()),
        Cell(f"{row.victim_seed} / {row.defender_seed}", key=row.victim_seed + row.defender_seed / 1e6),
        cells.number(row.clean_images),
        *(cells.one(value) for value in (row.acc_before, row.asr_before, row.acc, row.asr, row.ra)),
        cells.decimal(row.der),
        cells.decimal(row.seconds, ".2f"),
        cells.decimal(row.peak_mb, ",.0f"),
        Cell("; ".join(remarks), tone=tone),
    )
