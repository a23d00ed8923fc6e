"""The leaderboard: one line for each defense, and one for each of its cells, to be sorted and chosen from.

Means are over rows of the current code alone; rows of older code stand in lines of their own, marked, behind
the others. Every cell leads to what it was measured with and to the commands that measure it again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from unbackdoor.bench.driver import name_of
from unbackdoor.bench.reference import PublishedTable
from unbackdoor.bench.results import Summary
from unbackdoor.bench.rows import ProbeRow, Row
from unbackdoor.errors import InputError
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.cells import counted
from unbackdoor.report.benchmark.charts import pareto_charts
from unbackdoor.report.benchmark.groups import (
    Group,
    IsCurrent,
    Line,
    Rows,
    Setting,
    acc_lost,
    attack_groups,
    defense_of,
    lines,
)
from unbackdoor.report.benchmark.probes import PROBED, PROBED_MEANINGS, ProbesOf
from unbackdoor.report.benchmark.published import published_section
from unbackdoor.report.benchmark.repairs import Key, absent_attack, missing, summaries
from unbackdoor.report.benchmark.suite import MEANINGS, age_of
from unbackdoor.report.tables import MOST_ROWS, Cell, Column, Document, Entry, Section, Table, columns

_RATES, _COST = "ACC, RA and DER", "cost and rows"
_METHODS = (
    *columns("defense", "data set", "network", text=3),
    *columns("clean images", "ASR", "worst ASR", text=0),
    *columns("ACC lost", "ACC lost on clean models", "RA", text=0, group=_RATES),
    Column("DER", order="descending", group=_RATES),
    *columns("cost", "rows", "failed", text=0, group=_COST, hidden=True),
)
_CELLS = (
    *columns("defense", "attack", "data set", "network", text=4),
    *columns("clean images", "ASR", "worst ASR", text=0),
    *columns("ACC", "ACC lost", "RA", "DER", text=0, group=_RATES),
    *columns("cost", "rows", text=0, group=_COST, hidden=True),
)
_CONFIG = (
    "suite", "version", "dataset", "architecture", "width", "recipe", "attack", "poison_rate", "target",
    "defense", "preset", "selection", "clean_images", "altered",
)  # fmt: skip
MOST_COMMANDS = 8  # of one entry


def leaderboard(
    rows: Sequence[Row],
    *,
    probes: Sequence[ProbeRow] = (),
    published: PublishedTable | None = None,
    colophon: str = "",
    is_current: IsCurrent | None = None,
) -> Document:
    """Rank defenses by what rows say.

    Args:
        rows: Of one suite or several.
        probes: What probes found in the repaired networks; columns of their own.
        published: Numbers of others, shown beside ours where the setting matches.
        colophon: Last line.
        is_current: Whether a row (as a mapping) was measured by the current code; the benchmark's own
            judgement if None.

    Raises:
        InputError: If there is no row.
        MissingExtra: If matplotlib is not installed.
    """
    if not rows:
        raise InputError("there are no rows to rank", remedy="Run a suite first: unbackdoor bench run SUITE")
    repairs = Rows.of(rows, is_current)
    settings = repairs.by(Setting.of)
    probed = Rows.of(probes, is_current)
    probes_of = ProbesOf(probed) if probes else None
    entries: list[Entry] = []
    by_cell = _cell_table(settings, probes_of, entries)
    sections = (
        Section("methods", "All attacks together", (_MEANS,), (_method_table(settings, probes_of),)),
        Section(
            "plots", "What is left of the attack against what it cost", (_PLOTS,), (), pareto_charts(settings)
        ),
        Section("cells", "Attack by attack", (_LINKS,), (by_cell,)),
        Section(
            "again",
            "How a cell was measured",
            ("Choose a defense in the table above.",),
            entries=tuple(entries),
        ),
        *([published_section(settings, published)] if published else []),
        Section("words", "What the words mean", terms=MEANINGS + (PROBED_MEANINGS if probes_of else ())),
    )
    attacks = {row.attack for row in rows} - {"none"}
    lead = (
        f"{counted(len(set(map(defense_of, rows))), 'defense')} after {counted(len(attacks), 'attack')}, "
        f"in {counted(len(settings), 'setting')}, {counted(len(rows), 'row')}.",
        *_of_probes(probes_of, rows),
        *age_of(repairs, probed),
    )
    return Document(
        title="Leaderboard of repairs",
        lead=lead,
        sections=tuple(s for s in sections if s.tables or s.charts or s.terms or s.entries),
        colophon=colophon,
        command="unbackdoor bench leaderboard",
    )


_MEANS = (
    "Means over attacks, poison rates and seeds, with the 95 % interval and the worst single row in small "
    "print. A difference within the intervals is none, and a line of another data set, network or budget is "
    "another experiment: choose one before you compare. Oracles, which were chosen with the truth, say so."
)
_PLOTS = (
    "Means over all attacks that took. On the dotted line lie those that none beats in both. Hollow marks "
    "were measured by older code; half-filled ones were chosen with the truth (oracle)."
)
_LINKS = "Every defense leads to what its cell was measured with and to the commands that measure it again."


def _of_probes(probes: ProbesOf | None, rows: Sequence[Row]) -> tuple[str, ...]:
    if probes is None:
        return ()
    words = (
        f"{counted(len(probes.of(rows)), 'repair')} of these were probed for what a low ASR can hide: choose "
        "the columns of the probes above a table."
    )
    strangers = probes.strangers(rows)
    return (
        words + (f" {counted(strangers, 'probe')} more are of repairs that are not here." * bool(strangers)),
    )


def _network(setting: Setting) -> Cell:
    recipe = "" if setting.recipe == "plain" else f", recipe {setting.recipe}"
    return Cell(cells.name(f"{setting.architecture} of width {setting.width:g}{recipe}"))


def _budget(setting: Setting, images: int) -> Cell:
    return replace(cells.number(images), small=cells.name(setting.altered))


def _method_table(settings: Mapping[Setting, Rows[Row]], probes: ProbesOf | None) -> Table:
    made = []
    for setting, rows in settings.items():
        for _, own in sorted(rows.by(lambda row: row.clean_images).items()):
            made += [
                _method_cells(line, setting, own, probes)
                for line in lines(summaries(own.current), summaries(own.older))
                if line.key is not None
            ]
    # The current code first; then honest ones before oracles; then by mean DER.
    made.sort(key=_rank)
    return cells.table(
        "methods-0", "", "One line for each defense, setting and budget.",
        _METHODS + (PROBED if probes else ()), made, filtered=True, facets=(1, 2, 3),
    )  # fmt: skip


def _rank(row: tuple[Cell, ...]) -> tuple[object, ...]:
    der = row[[column.name for column in _METHODS].index("DER")]
    return row[0].older, row[0].tone == "fair", not der.sort_key, -float(der.sort_key or 0), row[0].text


def _method_cells(
    line: Line[Key, Summary], setting: Setting, rows: Rows[Row], probes: ProbesOf | None
) -> tuple[Cell, ...]:
    assert line.key is not None
    defense, selection, images = line.key
    where = (Cell(cells.name(setting.dataset)), _network(setting), _budget(setting, images))
    if line.group is None:
        return (missing(line.key), *where, *cells.absent(len(_METHODS) - 4 + len(PROBED) * bool(probes)))
    summary = summaries(rows.older if line.older else rows.current)[line.key]
    own = [row for row in (rows.older if line.older else rows.current)
           if (defense_of(row), row.selection) == (defense, selection)]  # fmt: skip
    return (
        cells.method(defense, selection, older=line.older, means=True),
        *where,
        cells.rate(summary.asr),
        cells.worst(summary.asr),
        cells.rate(summary.acc_lost, worst=True),
        cells.rate(summary.acc_lost_clean, worst=True),
        cells.rate(summary.ra, worst=True),
        cells.der(summary.der),
        cells.cost(summary.seconds, own),
        cells.number(summary.asr.n),
        cells.number(summary.failed, tone="bad"),
        *(probes.cells(own, summary.asr.n, older=line.older) if probes else ()),
    )


def _cell_table(
    settings: Mapping[Setting, Rows[Row]], probes: ProbesOf | None, entries: list[Entry]
) -> Table:
    made = []
    for setting, rows in settings.items():
        for line in lines(attack_groups(rows.current), attack_groups(rows.older)):
            if line.key is None:
                continue
            attack, defense, _ = absent_attack(line)
            images = _budget(setting, int(str(line.key[-1])))
            where = (Cell(cells.name(setting.dataset)), _network(setting), images)
            if line.group is None:
                more = cells.absent(len(_CELLS) - 5 + len(PROBED) * bool(probes))
                made.append((defense, attack, *where, *more))
                continue
            link = f"cell-{len(made)}" if len(made) < MOST_ROWS else ""
            if link:
                entries.append(_entry(link, line.group, probes, older=line.older))
            row = line.group.row
            who = cells.method(defense_of(row), row.selection, older=line.older, means=True)
            numbers = (*_numbers(line.group), *_probed(line, probes))
            made.append((replace(who, link=link), cells.attack(row), *where, *numbers))
    return cells.table(
        "cells-0", "", "Means over the seeds of victims and defenders.",
        _CELLS + (PROBED if probes else ()), made, filtered=True, facets=(1, 2, 3, 4),
    )  # fmt: skip


def _probed(line: Line[tuple[object, ...], Group], probes: ProbesOf | None) -> tuple[Cell, ...]:
    if probes is None or line.group is None:
        return ()
    attacked = [row for row in line.group.fine() if row.asr is not None]
    return probes.cells(line.group.rows, len(attacked), older=line.older)


def _numbers(group: Group) -> Iterator[Cell]:
    asr = group.mean(lambda row: row.asr)
    yield cells.rate(asr)
    yield cells.worst(asr)
    yield cells.rate(group.mean(lambda row: row.acc, worst="min"))
    yield cells.rate(group.mean(acc_lost), worst=True)
    yield cells.rate(group.mean(lambda row: row.ra, worst="min"), worst=True)
    yield cells.der(group.mean(lambda row: row.der, worst="min"))
    yield cells.cost(group.mean(lambda row: row.seconds), group.rows)
    yield cells.number(len(group.fine()))


def _entry(identifier: str, group: Group, probes: ProbesOf | None, *, older: bool) -> Entry:
    """Say how a cell was measured, and how it is measured again."""
    row = group.row
    config = {name: getattr(row, name) for name in _CONFIG}
    config |= {
        "victim_seeds": sorted({one.victim_seed for one in group.rows}),
        "defender_seeds": sorted({one.defender_seed for one in group.rows}),
        "code": sorted({one.code for one in group.rows} - {""}),
        "victim_code": sorted({one.victim_code for one in group.rows} - {""}),
        "commits": sorted({one.commit for one in group.rows} - {""}),
        "devices": sorted({one.device for one in group.rows} - {""}),
    }
    probed = probes.of(group.rows) if probes else []
    if probed:
        config["probes"] = {
            name: sorted({getattr(one, name) for one in probed} - {""})
            for name in ("code", "control_code", "commit", "device")
        }
    age = ", older code" if older else ""
    images = f"{row.clean_images:,} clean images" + (f", altered: {row.altered}" if row.altered else "")
    title = f"{defense_of(row)} after {row.attack} on {row.dataset}, {images}{age}"
    lines = (*commands(group.rows), *commands(probed))
    return Entry(identifier, cells.name(title, 200), json.dumps(config, indent=2), lines)


def commands(rows: Sequence[Row | ProbeRow]) -> tuple[str, ...]:
    """Return the command lines that measure rows again, those of older code with the code of today."""
    words = dict.fromkeys(
        ("unbackdoor", "bench", "probe" if isinstance(row, ProbeRow) else "run",
         f"{row.suite}-v{row.version}", "--part", "all", "--only", name_of(row.model_dump()))
        for row in rows
    )  # fmt: skip
    made = [shlex.join(line) for line in words]
    more = [f"# and {len(made) - MOST_COMMANDS} more, of other seeds"] if len(made) > MOST_COMMANDS else []
    return (*made[:MOST_COMMANDS], *more)
