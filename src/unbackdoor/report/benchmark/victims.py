"""What the victims of a benchmark know and what they cost, before anybody repairs or scans them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unbackdoor.bench.results import WEAK, Mean
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Rows, Setting
from unbackdoor.report.benchmark.plots import Mark, style
from unbackdoor.report.charts import svg_chart
from unbackdoor.report.tables import Cell, Table, columns
from unbackdoor.report.words import NOTHING

IN_PART = 0.4  # a trigger that two images of five follow is a backdoor, though no repair is measured by it
_COLUMNS = columns("attack", "victims", "ACC", "ASR", "took", "in part", "not", "processor minutes")


def victims_of(rows: Rows[Row]) -> Rows[Row]:
    """Return one row for each victim: which sample a defender drew does not change what it was before."""

    def victim(row: Row) -> tuple[object, ...]:
        return (Setting.of(row), row.attack, row.poison_rate, row.target, row.victim_seed)

    firsts = {victim(row): (row, older) for row, older in reversed(rows.pairs) if row.acc_before is not None}
    return Rows(tuple(reversed(firsts.values())))


def victim_tables(rows: Rows[Row]) -> tuple[Table, ...]:
    """Return a table for each kind of network: ACC and ASR of its victims by attack, and what each cost.

    Args:
        rows: Of repairs; each victim counts once.
    """
    settings = victims_of(rows).by(Setting.of)
    return tuple(
        cells.table(f"victims-{place}", str(setting), "", _COLUMNS, _lines(own))
        for place, (setting, own) in enumerate(settings.items())
    )


def _lines(victims: Rows[Row]) -> list[tuple[Cell, ...]]:
    made = []
    for older, rows in ((False, victims.current), (True, victims.older)):
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.attack, row.poison_rate), []).append(row)
        made += [_line(group, older=older) for group in groups.values()]
    return made


def _line(rows: Sequence[Row], *, older: bool) -> tuple[Cell, ...]:
    one = rows[0].model_copy(update={"target": None})
    took = [WEAK not in row.flags for row in rows if row.asr_before is not None]
    part = sum(WEAK in row.flags and row.asr_before is not None and row.asr_before >= IN_PART for row in rows)
    return (
        cells.attack(one, older=older),
        cells.number(len(rows)),
        cells.rate(_mean(rows, lambda row: row.acc_before, "min"), worst=True),
        cells.rate(_mean(rows, lambda row: row.asr_before, "min"), worst=True),
        *(
            (cells.number(sum(took)), cells.number(part), cells.number(len(took) - sum(took) - part))
            if took
            else 3 * (Cell(NOTHING),)
        ),
        _minutes(_mean(rows, lambda row: row.victim_processor_seconds, "max")),
    )


def _mean(rows: Sequence[Row], value: Callable[[Row], float | None], worst: str) -> Mean:
    return Mean.of([number for row in rows if (number := value(row)) is not None], worst=worst)


def _minutes(seconds: Mean) -> Cell:
    if not seconds.n:
        return Cell(NOTHING)
    return Cell(f"{seconds.value / 60:.1f}", f"most {seconds.worst / 60:.1f}", seconds.value)


def cost_chart(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> Markup:
    """Return an ``<svg>`` of the accuracy of clean victims against the processor time of their training.

    Args:
        lines: For each kind of network and recipe, in the order of the legend, its points: processor minutes
            and ACC in 0..1, from the shortest training to the longest.
        title: What the chart shows, for those who cannot see it.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """

    def draw(axes: Any) -> None:
        for place, (name, points) in enumerate(lines.items()):
            look = style(Mark(name, place, oracle=False, older=False))
            axes.plot([x for x, _ in points], [100 * y for _, y in points], linewidth=1.4, **look)
        axes.set_xlabel("processor minutes of one victim")
        axes.set_ylabel("ACC of clean victims")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g} %")

    legend = {"loc": "outside lower left", "fontsize": 9, "handlelength": 1.4}
    size = (6.4, 3.6 + 0.2 * -(-len(lines) // 2))
    return svg_chart(draw, size=size, title=title, grid="both", legend=legend)
