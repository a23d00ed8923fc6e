"""Numbers that others published, beside the rows of the same setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from unbackdoor.bench.reference import Published, PublishedTable
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Group, Rows, Setting, attack_groups, defense_of, lines
from unbackdoor.report.tables import Cell, Section, Table, columns

_COLUMNS = columns(
    "attack", "defense", "theirs: ACC", "theirs: ASR", "theirs: RA", "theirs: DER", "ours: ACC", "ours: ASR",
    "ours: RA", "ours: DER", "ours: width", "ours: clean images", "ours: rows", text=2,
)  # fmt: skip


def published_section(settings: Mapping[Setting, Rows[Row]], published: PublishedTable) -> Section:
    """Lay published numbers beside the rows whose setting matches; without a table if none does."""
    tables: list[Table] = []
    for setting, rows in settings.items():
        pairs = list(_pairs(rows, published))
        if pairs:
            caption = (
                "Published by BackdoorBench, theirs: 2,500 clean images, width 64, their training. Ours: "
                "means over seeds, with our width and our number of clean images."
            )
            tables.append(cells.table(f"published-{len(tables)}", str(setting), caption, _COLUMNS, pairs))
    words = (
        "Theirs and ours are different experiments with the same attack, poison rate, architecture and data "
        "set. They stand side by side so that a gross disagreement is seen, and no mean holds both. DER is "
        "computed from their published rates."
    )
    return Section("published", "Beside the published numbers", (words,), tuple(tables))


def _pairs(rows: Rows[Row], published: PublishedTable) -> Iterator[tuple[Cell, ...]]:
    older = attack_groups(rows.older)
    for line in lines(attack_groups(rows.current), older):
        group = line.group or (older[line.key] if line.key is not None else None)
        theirs = published.match(group.row) if group else None
        if group and theirs:
            yield _cells(theirs, group, line.older, line.group is not None)


def _cells(theirs: Published, group: Group, older: bool, ours: bool) -> tuple[Cell, ...]:
    row = group.row
    attack, who = cells.attack(row, older=older, means=True), cells.method(defense_of(row), row.selection)
    words = filter(None, (who.small, f"theirs: {cells.name(theirs.defense)}"))
    return (
        replace(attack, small=f"{attack.small}; theirs: {cells.name(theirs.attack)}"),
        replace(who, small="; ".join(words)),
        *map(cells.one, (theirs.acc, theirs.asr, theirs.ra)),
        cells.decimal(theirs.der),
        *(_means(group) if ours else cells.absent(4)),
        Cell(f"{row.width:g}", key=row.width),
        cells.number(row.clean_images),
        cells.number(len(group.fine()) if ours else 0),
    )


def _means(group: Group) -> tuple[Cell, ...]:
    return (
        cells.rate(group.mean(lambda row: row.acc, worst="min")),
        cells.rate(group.mean(lambda row: row.asr)),
        cells.rate(group.mean(lambda row: row.ra, worst="min")),
        cells.der(group.mean(lambda row: row.der, worst="min"), worst=False),
    )
