"""The report of a suite: means beside worst cases, failures included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from unbackdoor.bench.reference import PublishedTable
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import ProbeRow, Row, ScanRow
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.errors import InputError
from unbackdoor.report.benchmark.cells import ORACLE, counted, name
from unbackdoor.report.benchmark.charts import chart_section
from unbackdoor.report.benchmark.groups import IsCurrent, Rows, Setting, defense_of
from unbackdoor.report.benchmark.probes import probe_section
from unbackdoor.report.benchmark.published import published_section
from unbackdoor.report.benchmark.repairs import (
    attack_section,
    failed_section,
    left_out_section,
    rows_section,
    summary_section,
)
from unbackdoor.report.benchmark.scans import scan_section
from unbackdoor.report.tables import ABSENT, OLDER, Document, Section

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
        "\u00b1",
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
    (
        f"{OLDER} older code",
        "measured by code that has changed since in what the method runs; a mean is over rows of the current "
        f"code or of older code, never of both, and {ABSENT} stands where the current code has no row",
    ),
)


def bench_report(
    rows: Sequence[Row],
    *,
    scans: Sequence[ScanRow] = (),
    probes: Sequence[ProbeRow] = (),
    published: PublishedTable | None = None,
    colophon: str = "",
    is_current: IsCurrent | None = None,
    all_rows: bool = False,
) -> Document:
    """Say in tables and charts what rows say.

    Args:
        rows: Of one suite or several; means are taken within a data set, an architecture, a width and a
            training recipe only, and over rows of the current code or of older code, never of both.
        scans: What scanners said of the same victims.
        probes: What probes found in the repaired networks.
        published: Numbers of others, shown beside ours where the setting matches.
        colophon: Last line.
        is_current: Whether a row (as a mapping) was measured by the current code; the benchmark's own
            judgement if None.
        all_rows: Whether Markdown shows every single row too, as HTML always does.

    Raises:
        InputError: If there is no row.
        MissingExtra: If matplotlib is not installed.
    """
    if not rows:
        raise InputError(
            "there are no rows to report", remedy="Run the suite first: unbackdoor bench run SUITE"
        )
    repairs, scan_rows = Rows.of(rows, is_current), Rows.of(scans, is_current)
    probe_rows = Rows.of(probes, is_current)
    settings = repairs.by(Setting.of)
    sections = [
        summary_section(settings),
        chart_section(settings),
        attack_section(settings),
        scan_section(scan_rows),
        probe_section(probe_rows),
        *([published_section(settings, published)] if published else []),
        left_out_section(repairs),
        failed_section(repairs),
        rows_section(repairs, only_html=not all_rows),
        Section("conclude", "What a reader may conclude", words=_conclusions(rows)),
        Section("words", "What the words mean", terms=MEANINGS),
        Section("how", "What was measured", terms=_facts(rows)),
    ]
    return Document(
        title="Benchmark " + name(", ".join(sorted({f"{row.suite}-v{row.version}" for row in rows}))),
        lead=_lead(repairs, settings, age_of(repairs, scan_rows, probe_rows)),
        sections=tuple(s for s in sections if s.tables or s.charts or s.terms or s.identifier == "conclude"),
        colophon=colophon,
    )


def _lead(repairs: Rows[Row], settings: Mapping[Setting, Rows[Row]], age: Sequence[str]) -> tuple[str, ...]:
    rows = repairs.all
    attacks = {row.attack for row in rows} - {"none"}
    budgets = sorted({row.clean_images for row in rows})
    control = " and clean models as a control" if any(row.attack == "none" for row in rows) else ""
    failed = sum(row.error is not None for row in rows)
    weak = sum(WEAK in row.flags for row in rows)
    oracle = sum(row.selection == ORACLE for row in rows)
    first = (
        f"{counted(len(rows), 'row')}: {counted(len({defense_of(row) for row in rows}), 'defense')} after "
        f"{counted(len(attacks), 'attack')}{control}, in {counted(len(settings), 'setting')}, with "
        f"{', '.join(f'{budget:,}' for budget in budgets)} clean images."
    )
    second = (
        f"{counted(failed, 'row')} failed; {weak:,} left out of every mean because the attack did not take; "
        f"{oracle:,} chosen with the truth and ranked apart."
    )
    return (first, second, *age)


def _conclusions(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say what these rows can tell, by how many networks and samples they are of."""
    # Altered images are another setting and not another network.
    settings = [Setting.of(row)._replace(altered="") for row in rows]
    victims = {
        (setting, row.attack, row.poison_rate, row.target, row.victim_seed)
        for setting, row in zip(settings, rows, strict=True)
    }
    samples = {row.defender_seed for row in rows}
    return (
        f"The rows are of {counted(len(victims), 'network')} and {counted(len(samples), 'sample')} of clean "
        "images. A mean says how a defense did on these; a difference between two defenses within their "
        "intervals is none, and a mean of one or two rows has no interval. On another architecture, data "
        "set, attack or training a method may do worse than its worst row here.",
    )


def age_of(*kinds: Rows[Row] | Rows[ScanRow] | Rows[ProbeRow]) -> list[str]:
    """Say how many rows are of older code; nothing if there are none."""
    older, every = sum(len(rows.older) for rows in kinds), sum(len(rows.pairs) for rows in kinds)
    if not older:
        return []
    return [
        f"{older:,} of {every:,} rows were measured by older code: they are marked {OLDER}, have means of "
        "their own, and are in no mean of the current code."
    ]


def _facts(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    def distinct(value: Callable[[Row], object]) -> str:
        values = sorted({name(value(row)) for row in rows} - {""})
        return ", ".join(values[:8]) + (f" and {len(values) - 8} more" if len(values) > 8 else "")

    facts = (
        ("Suites", distinct(lambda row: f"{row.suite}-v{row.version}")),
        ("Settings", distinct(Setting.of)),
        ("Attacks", distinct(lambda row: row.attack)),
        ("Seeds of victims", distinct(lambda row: row.victim_seed)),
        ("Seeds of defenders", distinct(lambda row: row.defender_seed)),
        ("Measured on", distinct(lambda row: row.device)),
        ("Commits", distinct(lambda row: row.commit)),
    )
    return tuple((term, text) for term, text in facts if text)
