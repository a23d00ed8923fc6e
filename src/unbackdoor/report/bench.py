"""The page of a benchmark, and the same tables as Markdown: means beside worst cases, failures included."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import NamedTuple, TypeVar

from markupsafe import Markup

from unbackdoor.bench.reference import Published, PublishedTable
from unbackdoor.bench.results import WEAK, Mean, Summary, summarise, summarise_scans
from unbackdoor.bench.rows import Row, ScanRow
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.errors import InputError
from unbackdoor.report.bench_charts import MOST, Mark, over_budgets, scatter
from unbackdoor.report.page import render
from unbackdoor.report.words import NOTHING, duration

MOST_ROWS = 2000  # of one table; a browser sorts them at once
MOST_FAILURES = 200
MOST_CHARTS = 12  # of each kind
ORACLE = "oracle"
HONEST = "held-out clean"
_LONGEST = 60  # characters of a name
_LONGEST_ERROR = 300
K = TypeVar("K")
R = TypeVar("R", Row, ScanRow)

MEANINGS = (
    ("ACC", "accuracy: test images classified rightly; higher is better"),
    ("ACC lost", "accuracy of the victim less that of the repaired network; lower is better"),
    ("ACC lost on clean models", "the same on networks without a backdoor: what a needless repair costs"),
    (
        "ASR",
        "attack success rate: triggered images classified as the attacker wants, of those that are not of "
        "that class; lower is better",
    ),
    ("RA", "robust accuracy: the same images classified as what they show; higher is better"),
    (
        "DER",
        "defense effectiveness: (max(0, fall of ASR) - max(0, fall of ACC) + 1) / 2; 0.5 is what doing "
        "nothing gets, 1 is best",
    ),
    ("worst", "the worst single row behind a mean"),
    (
        "±",
        "half the width of the 95 % interval of a mean by Student's t; none for fewer than three rows",
    ),
    (
        "left out",
        f"rows whose victim has an ASR below {100 * ATTACK_TOOK:g} % before any repair: the attack did not "
        "take, there was nothing to remove, and no mean counts them",
    ),
    (
        "oracle",
        "the method, or its stopping point, was chosen with the truth, which no defender has; ranked apart",
    ),
)


@dataclass(frozen=True)
class Column:
    """A column: its name, whether it holds numbers, and how the table is ordered by it."""

    name: str
    number: bool = True
    order: str = ""  # ascending or descending


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a remark in small print, the number to sort by, and the tone of its colour."""

    text: str
    small: str = ""
    key: float | None = None
    tone: str = ""

    @property
    def sort_key(self) -> str:
        """What the table is sorted by; empty for no number, which comes last."""
        return "" if self.key is None or math.isnan(self.key) else f"{self.key:.9g}"


@dataclass(frozen=True)
class Table:
    """A table for the page and for Markdown alike; ``total`` is its length before it was cut."""

    identifier: str
    heading: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]]
    total: int
    filtered: bool = False

    @property
    def cut(self) -> str:
        """Say what is missing, or nothing."""
        if len(self.rows) == self.total:
            return ""
        return (
            f"These are the first {len(self.rows):,} of {self.total:,} rows; all of them are in the export "
            "(unbackdoor bench export)."
        )


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    identifier: str
    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[tuple[str, Markup], ...] = ()
    terms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """All that is said of some rows."""

    title: str
    lead: tuple[str, ...]
    parts: tuple[Part, ...]
    colophon: str

    def html(self) -> str:
        """Return one page that loads nothing; its tables can be sorted and filtered."""
        script = files("unbackdoor.report").joinpath("templates/table.js").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        return render("bench.html", report=self, script=Markup(script), script_hash=digest)

    def markdown(self) -> str:
        """Return the summary, the attacks, the published numbers and the failures as Markdown."""
        lines = [f"# {_md(self.title)}", "", *(text for said in self.lead for text in (_md(said), ""))]
        for part in self.parts:
            if part.identifier in ("charts", "rows"):
                continue
            lines += [f"## {_md(part.title)}", ""]
            for said in part.words:
                lines += [_md(said), ""]
            for table in part.tables:
                lines += _md_table(table)
            if part.terms:
                lines += [*(f"- **{_md(term)}**: {_md(text)}" for term, text in part.terms), ""]
        return "\n".join([*lines, _md(self.colophon), ""])


class _Setting(NamedTuple):
    """What rows must share before a mean over them says anything."""

    dataset: str
    architecture: str
    width: float
    recipe: str

    @classmethod
    def of(cls, row: Row | ScanRow) -> _Setting:
        return cls(row.dataset, row.architecture, row.width, row.recipe)

    def __str__(self) -> str:
        words = f"{_name(self.dataset)}, {_name(self.architecture)} of width {self.width:g}"
        return words if self.recipe == "plain" else f"{words}, recipe {_name(self.recipe)}"


@dataclass(frozen=True)
class _Group:
    """One defense against one attack: rows that differ in their seeds only."""

    row: Row
    rows: list[Row] = field(default_factory=list)

    def fine(self) -> list[Row]:
        return [row for row in self.rows if row.error is None and WEAK not in row.flags]

    def mean(self, value: Callable[[Row], float | None], *, worst: str = "max") -> Mean:
        found = (value(row) for row in self.fine())
        return Mean.of([number for number in found if number is not None], worst=worst)


def bench_report(
    rows: Sequence[Row],
    *,
    scans: Sequence[ScanRow] = (),
    published: PublishedTable | None = None,
    colophon: str = "",
) -> Report:
    """Say in tables and charts what rows say.

    Args:
        rows: Of one suite or several; means are taken within a data set, an architecture, a width and a
            training recipe only.
        scans: What scanners said of the same victims.
        published: Numbers of others, shown beside ours where the setting matches.
        colophon: Last line.

    Raises:
        InputError: If there is no row.
        MissingExtra: If matplotlib is not installed.
    """
    if not rows:
        raise InputError(
            "there are no rows to report", remedy="Run the suite first: unbackdoor bench run SUITE"
        )
    settings = _grouped(rows, _Setting.of)
    suites = sorted({f"{row.suite}-v{row.version}" for row in rows})
    parts = [
        _summary_part(settings),
        _chart_part(settings),
        _attack_part(settings),
        _scan_part(scans),
        _published_part(settings, published),
        _left_out_part(rows),
        _failed_part(rows),
        _rows_part(rows),
        Part("words", "What the words mean", terms=MEANINGS),
        Part("how", "What was measured", terms=_facts(rows)),
    ]
    return Report(
        title="Benchmark " + _name(", ".join(suites)),
        lead=_lead(rows, settings),
        parts=tuple(part for part in parts if part.tables or part.charts or part.terms),
        colophon=colophon,
    )


# ---------------------------------------------------------------------------------------------------
# Sections


def _lead(rows: Sequence[Row], settings: dict[_Setting, list[Row]]) -> tuple[str, ...]:
    attacks = {row.attack for row in rows} - {"none"}
    defenses = {_defense(row) for row in rows}
    budgets = sorted({row.clean_images for row in rows})
    control = " and clean models as a control" if any(row.attack == "none" for row in rows) else ""
    failed = sum(row.error is not None for row in rows)
    weak = sum(WEAK in row.flags for row in rows)
    oracle = sum(row.selection == ORACLE for row in rows)
    count = _count(len(settings), "setting")
    first = (
        f"{_count(len(rows), 'row')}: {_count(len(defenses), 'defense')} after "
        f"{_count(len(attacks), 'attack')}{control}, in {count}, with "
        f"{', '.join(f'{budget:,}' for budget in budgets)} clean images."
    )
    second = (
        f"{_count(failed, 'row')} failed; {weak:,} left out of every mean because the attack did not take; "
        f"{oracle:,} chosen with the truth and ranked apart."
    )
    return first, second


def _summary_part(settings: dict[_Setting, list[Row]]) -> Part:
    tables: list[Table] = []
    for setting, rows in settings.items():
        summaries = summarise(rows)
        memory = _grouped(rows, lambda row: (_defense(row), row.selection, row.clean_images))
        for budget in sorted({s.clean_images for s in summaries}):
            for oracle in (False, True):
                chosen = [
                    s for s in summaries if s.clean_images == budget and (s.selection == ORACLE) is oracle
                ]
                if chosen:
                    most = max(s.asr.n for s in chosen)
                    cells = (_summary_cells(s, memory[s.defense, s.selection, budget], most) for s in chosen)
                    tables.append(_summary_table(f"summary-{len(tables)}", setting, budget, oracle, cells))
    return Part(
        "summary",
        "All attacks together",
        ("Means over attacks, poison rates and seeds, in the order of mean DER. In small print the 95 % "
         "interval and the worst single row. Where a defense has fewer rows than the others, its mean "
         "is over less, and its place says less.",),
        tuple(tables),
    )  # fmt: skip


def _summary_table(
    identifier: str, setting: _Setting, budget: int, oracle: bool, cells: Iterable[tuple[Cell, ...]]
) -> Table:
    columns = (
        Column("defense", number=False),
        Column("ASR"),
        Column("worst ASR"),
        Column("ACC lost"),
        Column("ACC lost on clean models"),
        Column("RA"),
        Column("DER", order="descending"),
        Column("cost"),
        Column("rows"),
        Column("failed"),
        Column("left out"),
    )
    heading = f"{setting}: {budget:,} clean images"
    caption = "Only rows chosen with held-out clean images, as a defender can."
    if oracle:
        heading += ", chosen with the truth (oracle)"
        caption = "Chosen with the truth, which no defender has: not to be ranked with the others."
    return _table(identifier, heading, caption, columns, cells)


def _summary_cells(s: Summary, rows: list[Row], most: int) -> tuple[Cell, ...]:
    peak = max((row.peak_mb for row in rows if row.peak_mb is not None), default=None)
    return (
        _who(s.defense, s.selection),
        _rate(s.asr),
        _worst(s.asr),
        _rate(s.acc_lost, worst=True),
        _rate(s.acc_lost_clean, worst=True),
        _rate(s.ra, worst=True),
        _der(s.der),
        _cost(s.seconds, peak),
        Cell(
            f"{s.asr.n:,}",
            f"of {most:,}" if s.asr.n < most else "",
            s.asr.n,
            "fair" if s.asr.n < most else "",
        ),
        _number(s.failed, tone="bad"),
        _number(s.weak, tone="fair"),
    )


def _scan_part(scans: Sequence[ScanRow]) -> Part:
    columns = (
        Column("scanner", number=False),
        Column("clean images"),
        Column("found"),
        Column("missed"),
        Column("undecided"),
        Column("target named"),
        Column("false alarms"),
        Column("undecided on clean models"),
        Column("cost"),
        Column("failed"),
    )
    tables: list[Table] = []
    for setting, rows in _grouped(scans, _Setting.of).items():
        cells = []
        for s in summarise_scans(rows):
            cells.append(
                (
                    _who(s.scanner, HONEST),
                    _number(s.clean_images),
                    _share(s.found, s.backdoored),
                    _share(s.missed, s.backdoored),
                    _share(s.undecided, s.backdoored),
                    _share(*s.target),
                    _share(s.alarms, s.clean),
                    _share(s.undecided_clean, s.clean),
                    _cost(s.seconds, None),
                    _number(s.failed, tone="bad"),
                )
            )
        caption = (
            "Counts over attacks, poison rates and seeds; victims whose attack did not take are left out."
        )
        tables.append(_table(f"scans-{len(tables)}", str(setting), caption, columns, cells))
    return Part("scans", "Scanners", tables=tuple(tables))


def _share(part: int, whole: int) -> Cell:
    return Cell(f"{part:,} of {whole:,}", key=part / whole) if whole else Cell(NOTHING)


def _attack_part(settings: dict[_Setting, list[Row]]) -> Part:
    tables: list[Table] = []
    for setting, rows in settings.items():
        groups = list(_attack_groups(rows))
        for oracle in (False, True):
            chosen = [group for group in groups if (group.row.selection == ORACLE) is oracle]
            if not chosen:
                continue
            place = {name: at for at, name in enumerate(dict.fromkeys(g.row.attack for g in chosen))}
            chosen.sort(key=lambda g: (place[g.row.attack], *_attack_order(g)))
            heading = f"{setting}, chosen with the truth (oracle)" if oracle else str(setting)
            tables.append(
                _table(
                    f"attack-{len(tables)}",
                    heading,
                    "Means over the seeds of victims and defenders; within an attack, in the order of mean "
                    "DER.",
                    (
                        Column("attack", number=False),
                        Column("defense", number=False),
                        Column("clean images"),
                        Column("ASR"),
                        Column("worst ASR"),
                        Column("ACC"),
                        Column("ACC lost"),
                        Column("RA"),
                        Column("DER"),
                        Column("cost"),
                        Column("rows"),
                        Column("failed"),
                        Column("left out"),
                    ),
                    map(_attack_cells, chosen[:MOST_ROWS]),
                    total=len(chosen),
                    filtered=True,
                )
            )
    return Part("attacks", "Attack by attack", (), tuple(tables))


def _attack_groups(rows: Iterable[Row]) -> Iterable[_Group]:
    groups: dict[tuple[object, ...], _Group] = {}
    for row in rows:
        key = (row.attack, row.poison_rate, row.target, _defense(row), row.selection, row.clean_images)
        groups.setdefault(key, _Group(row)).rows.append(row)
    return groups.values()


def _attack_order(group: _Group) -> tuple[float, float, float, float, str]:
    value = group.mean(lambda row: row.der).value
    target = -1 if group.row.target is None else group.row.target
    return (
        group.row.poison_rate,
        target,
        group.row.clean_images,
        math.inf if math.isnan(value) else -value,
        _defense(group.row),
    )


def _attack_cells(group: _Group) -> tuple[Cell, ...]:
    row = group.row
    peak = max((r.peak_mb for r in group.rows if r.peak_mb is not None), default=None)
    asr = group.mean(lambda r: r.asr)
    return (
        _attack(row),
        _who(_defense(row), row.selection),
        _number(row.clean_images),
        _rate(asr),
        _worst(asr),
        _rate(group.mean(lambda r: r.acc, worst="min")),
        _rate(group.mean(_lost), worst=True),
        _rate(group.mean(lambda r: r.ra, worst="min"), worst=True),
        _der(group.mean(lambda r: r.der, worst="min")),
        _cost(group.mean(lambda r: r.seconds), peak),
        _number(len(group.fine())),
        _number(sum(r.error is not None for r in group.rows), tone="bad"),
        _number(sum(WEAK in r.flags and r.error is None for r in group.rows), tone="fair"),
    )


def _chart_part(settings: dict[_Setting, list[Row]]) -> Part:
    scatters: list[tuple[str, Markup]] = []
    lines: list[tuple[str, Markup]] = []
    for setting, rows in settings.items():
        found = {
            key: _Group(group[0], group)
            for key, group in _grouped(
                rows, lambda row: (_defense(row), row.selection == ORACLE, row.clean_images)
            ).items()
        }
        marks = _marks(rows)
        budgets = sorted({budget for _, _, budget in found})
        rates = {
            key: (group.mean(lambda row: row.asr).value, group.mean(_attacked_acc).value)
            for key, group in found.items()
        }
        rates = {key: pair for key, pair in rates.items() if not any(map(math.isnan, pair))}
        for budget in budgets:
            points = {m: rates[*who, budget] for who, m in marks.items() if (*who, budget) in rates}
            if points and len(scatters) < MOST_CHARTS:
                name = f"{setting}: {budget:,} clean images"
                title = f"Accuracy against attack success after each defense, {name}; the numbers are above"
                scatters.append((name, scatter(points, title=title, key=f"scatter{len(scatters)}")))
        curves = {
            m: [(b, rates[*who, b][0]) for b in budgets if (*who, b) in rates] for who, m in marks.items()
        }
        curves = {m: line for m, line in curves.items() if line}
        if curves and len(budgets) > 1 and len(lines) < MOST_CHARTS:
            title = f"Attack success against the number of clean images, {setting}; the numbers are above"
            lines.append((str(setting), over_budgets(curves, title=title, key=f"budgets{len(lines)}")))
    words = "Means over all attacks that took. Hollow marks were chosen with the truth (oracle)."
    if any(len(_defenses_of(rows)) > MOST for rows in settings.values()):
        words += f" The {MOST} defenses with the best DER."
    if max(len(scatters), len(lines)) == MOST_CHARTS:
        words += f" At most {MOST_CHARTS} charts of a kind are drawn."
    return Part(
        "charts", "What is left of the attack, and what it cost", (words,), charts=(*scatters, *lines)
    )


def _defenses_of(rows: Iterable[Row]) -> list[tuple[str, bool]]:
    return list(dict.fromkeys((_defense(row), row.selection == ORACLE) for row in rows))


def _marks(rows: Sequence[Row]) -> dict[tuple[str, bool], Mark]:
    best: dict[tuple[str, bool], float] = {}
    for s in summarise(rows):
        who = (s.defense, s.selection == ORACLE)
        best[who] = max(best.get(who, -1.0), -1.0 if math.isnan(s.der.value) else s.der.value)
    chosen = sorted(sorted(best, key=lambda who: -best[who])[:MOST])
    return {
        who: Mark(_name(who[0], 28) + (" (oracle)" if who[1] else ""), place, who[1])
        for place, who in enumerate(chosen)
    }


def _published_part(settings: dict[_Setting, list[Row]], published: PublishedTable | None) -> Part:
    tables: list[Table] = []
    for setting, rows in settings.items() if published else ():
        assert published is not None
        pairs = [(theirs, group) for group in _attack_groups(rows) if (theirs := published.match(group.row))]
        if pairs:
            tables.append(
                _table(
                    f"published-{len(tables)}",
                    str(setting),
                    "Published by BackdoorBench, theirs: 2,500 clean images, width 64, their "
                    "training. Ours: means over seeds, with our width and our number of clean images.",
                    (
                        Column("attack", number=False),
                        Column("defense", number=False),
                        Column("theirs: ACC"),
                        Column("theirs: ASR"),
                        Column("theirs: RA"),
                        Column("theirs: DER"),
                        Column("ours: ACC"),
                        Column("ours: ASR"),
                        Column("ours: RA"),
                        Column("ours: DER"),
                        Column("ours: width"),
                        Column("ours: clean images"),
                        Column("ours: rows"),
                    ),
                    (_published_cells(theirs, group) for theirs, group in pairs[:MOST_ROWS]),
                    total=len(pairs),
                )
            )
    return Part(
        "published",
        "Beside the published numbers",
        ("Theirs and ours are different experiments with the same attack, poison rate, architecture and data "
         "set. They stand side by side so that a gross disagreement is seen, and no mean holds both. DER is "
         "computed from their published rates.",),
        tuple(tables),
    )  # fmt: skip


def _published_cells(theirs: Published, group: _Group) -> tuple[Cell, ...]:
    row = group.row
    return (
        replace(_attack(row), small=f"{_attack(row).small}; theirs: {_name(theirs.attack)}"),
        replace(
            _who(_defense(row), row.selection),
            small="; ".join(filter(None, (_selection(row.selection), f"theirs: {_name(theirs.defense)}"))),
        ),
        *(Cell(_percent(value), key=value) for value in (theirs.acc, theirs.asr, theirs.ra)),
        Cell(NOTHING if theirs.der is None else f"{theirs.der:.3f}", key=_key(theirs.der)),
        _rate(group.mean(lambda r: r.acc, worst="min")),
        _rate(group.mean(lambda r: r.asr)),
        _rate(group.mean(lambda r: r.ra, worst="min")),
        _der(group.mean(lambda r: r.der, worst="min"), worst=False),
        Cell(f"{row.width:g}", key=row.width),
        _number(row.clean_images),
        _number(len(group.fine())),
    )


def _left_out_part(rows: Sequence[Row]) -> Part:
    weak = [row for row in rows if WEAK in row.flags]
    victims = {
        (_Setting.of(row), row.attack, row.poison_rate, row.target, row.victim_seed): row for row in weak
    }
    table = _table(
        "left-out-0",
        "Victims",
        f"The attack did not take: before any repair its ASR is below {100 * ATTACK_TOOK:g} %.",
        (
            Column("attack", number=False),
            Column("setting", number=False),
            Column("victim seed"),
            Column("ACC before"),
            Column("ASR before"),
        ),
        (
            (
                _attack(row),
                Cell(str(_Setting.of(row))),
                _number(row.victim_seed),
                _one(row.acc_before),
                _one(row.asr_before),
            )
            for row in list(victims.values())[:MOST_ROWS]
        ),
        total=len(victims),
    )
    words = f"Rows of these victims are in the table of all rows, and in no mean. There are {len(weak):,}."
    return Part("left-out", "Left out of the means", (words,), (table,) if weak else ())


def _failed_part(rows: Sequence[Row]) -> Part:
    failed = [row for row in rows if row.error is not None]
    table = _table(
        "failed-0",
        "Failures",
        "Rows that ended with an error.",
        (
            Column("defense", number=False),
            Column("attack", number=False),
            Column("setting", number=False),
            Column("clean images"),
            Column("victim seed"),
            Column("defender seed"),
            Column("error", number=False),
        ),
        (
            (
                _who(_defense(row), row.selection),
                _attack(row),
                Cell(str(_Setting.of(row))),
                _number(row.clean_images),
                _number(row.victim_seed),
                _number(row.defender_seed),
                Cell(_name(row.error or "", _LONGEST_ERROR), tone="bad"),
            )
            for row in failed[:MOST_FAILURES]
        ),
        total=len(failed),
    )
    return Part("failed", "Failed", (), (table,) if failed else ())


def _rows_part(rows: Sequence[Row]) -> Part:
    several = len({_Setting.of(row) for row in rows}) > 1
    names = ("seeds", "clean images", "ACC before", "ASR before", "ACC", "ASR", "RA", "DER", "seconds", "MB")
    columns = (
        Column("defense", number=False),
        Column("attack", number=False),
        *((Column("setting", number=False),) if several else ()),
        *(Column(name) for name in names),
        Column("remarks", number=False),
    )
    table = _table(
        "rows-0",
        "Rows",
        "One line for each repair; the seeds are the victim's and the defender's.",
        columns,
        (_row_cells(row, several) for row in rows[:MOST_ROWS]),
        total=len(rows),
        filtered=True,
    )
    return Part("rows", "All rows", (), (table,))


def _row_cells(row: Row, several: bool) -> tuple[Cell, ...]:
    remarks = [_name(flag) for flag in row.flags]
    if row.error is not None:
        remarks.insert(0, "failed: " + _name(row.error, _LONGEST_ERROR))
    tone = "bad" if row.error is not None else "fair" if WEAK in row.flags else ""
    return (
        _who(_defense(row), row.selection),
        _attack(row),
        *((Cell(str(_Setting.of(row))),) if several else ()),
        Cell(f"{row.victim_seed} / {row.defender_seed}", key=row.victim_seed + row.defender_seed / 1e6),
        _number(row.clean_images),
        *(_one(value) for value in (row.acc_before, row.asr_before, row.acc, row.asr, row.ra)),
        Cell(NOTHING if row.der is None else f"{row.der:.3f}", key=_key(row.der)),
        Cell(NOTHING if row.seconds is None else f"{row.seconds:.2f}", key=_key(row.seconds)),
        Cell(NOTHING if row.peak_mb is None else f"{row.peak_mb:,.0f}", key=_key(row.peak_mb)),
        Cell("; ".join(remarks), tone=tone),
    )


def _facts(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    def distinct(value: Callable[[Row], object]) -> str:
        found = sorted({_name(value(row)) for row in rows} - {""})
        return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")

    facts = (
        ("Suites", distinct(lambda row: f"{row.suite}-v{row.version}")),
        ("Settings", distinct(_Setting.of)),
        ("Attacks", distinct(lambda row: row.attack)),
        ("Seeds of victims", distinct(lambda row: row.victim_seed)),
        ("Seeds of defenders", distinct(lambda row: row.defender_seed)),
        ("Measured on", distinct(lambda row: row.device)),
        ("Commits", distinct(lambda row: row.commit)),
    )
    return tuple((term, text) for term, text in facts if text)


# ---------------------------------------------------------------------------------------------------
# Cells and words


def _table(
    identifier: str,
    heading: str,
    caption: str,
    columns: tuple[Column, ...],
    cells: Iterable[tuple[Cell, ...]],
    *,
    total: int | None = None,
    filtered: bool = False,
) -> Table:
    rows = list(cells)
    count = len(rows) if total is None else total
    return Table(identifier, heading, caption, columns, rows[:MOST_ROWS], count, filtered)


def _grouped(rows: Iterable[R], key: Callable[[R], K]) -> dict[K, list[R]]:
    groups: dict[K, list[R]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _defense(row: Row) -> str:
    return row.defense if row.preset == "default" else f"{row.defense}:{row.preset}"


def _lost(row: Row) -> float | None:
    return None if row.acc is None or row.acc_before is None else row.acc_before - row.acc


def _attacked_acc(row: Row) -> float | None:
    return row.acc if row.asr is not None else None


def _who(defense: str, selection: str) -> Cell:
    return Cell(_name(defense), _selection(selection), tone="fair" if selection == ORACLE else "")


def _selection(selection: str) -> str:
    if selection == HONEST:
        return ""
    return "oracle: chosen with the truth" if selection == ORACLE else f"chosen by {_name(selection)}"


def _attack(row: Row) -> Cell:
    if row.attack == "none":
        return Cell("none", "clean model")
    target = "" if row.target is None else f" to class {row.target}"
    return Cell(_name(row.attack), f"{100 * row.poison_rate:g} %{target}")


def _rate(mean: Mean, *, worst: bool = False) -> Cell:
    return _mean(mean, _percent, lambda half: f"{100 * half:.1f}", worst)


def _der(mean: Mean, *, worst: bool = True) -> Cell:
    return _mean(mean, lambda value: f"{value:.3f}", lambda half: f"{half:.3f}", worst)


def _mean(mean: Mean, words: Callable[[float], str], width: Callable[[float], str], worst: bool) -> Cell:
    if not mean.n:
        return Cell(NOTHING, key=math.nan)
    small = [] if math.isnan(mean.half) else [f"± {width(mean.half)}"]
    if worst and mean.n > 1:
        small.append(f"worst {words(mean.worst)}")
    return Cell(words(mean.value), "; ".join(small), mean.value)


def _worst(mean: Mean) -> Cell:
    return Cell(_percent(mean.worst) if mean.n else NOTHING, key=mean.worst)


def _cost(seconds: Mean, peak: float | None) -> Cell:
    memory = "" if peak is None else f"up to {peak:,.0f} MB"
    return Cell(duration(seconds.value) if seconds.n else NOTHING, memory, seconds.value)


def _one(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else _percent(value), key=_key(value))


def _number(value: int, *, tone: str = "") -> Cell:
    return Cell(f"{value:,}", key=value, tone=tone if value else "")


def _key(value: float | None) -> float:
    return math.nan if value is None else value


def _percent(value: float) -> str:
    # Adding zero makes a zero of a negative zero.
    return f"{round(100 * value, 1) + 0.0:.1f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _name(text: object, longest: int = _LONGEST) -> str:
    """Return a stranger's text without control characters, and not too long."""
    plain = "".join(c if c.isprintable() else " " for c in str(text)[: longest + 1])
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text)


def _md_table(table: Table) -> list[str]:
    def cell(one: Cell) -> str:
        return _md(f"{one.text} ({one.small})" if one.small else one.text)

    lines = [f"### {_md(table.heading)}", "", _md(table.caption), ""]
    lines.append("| " + " | ".join(_md(column.name) for column in table.columns) + " |")
    lines.append("|" + "|".join(" ---: " if column.number else " --- " for column in table.columns) + "|")
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
    return [*lines, "", *([_md(table.cut), ""] if table.cut else [])]
