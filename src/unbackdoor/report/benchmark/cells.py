"""Cells of numbers and names, the same in every table of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from unbackdoor.bench.results import Mean
from unbackdoor.bench.rows import ProbeRow, Row, ScanRow
from unbackdoor.metrics import Rate
from unbackdoor.report.tables import ABSENT, MOST_ROWS, Cell, Column, Table
from unbackdoor.report.words import NOTHING, duration

ORACLE = "oracle"
HONEST = "held-out clean"
OLDER_CODE = "older code"
NOT_RUN = "no row of the current code"
LONGEST_ERROR = 300
_LONGEST = 60  # characters of a name


def table(
    identifier: str,
    heading: str,
    caption: str,
    columns: tuple[Column, ...],
    rows: Iterable[tuple[Cell, ...]],
    *,
    filtered: bool = False,
    facets: tuple[int, ...] = (),
) -> Table:
    """Return a table of at most ``MOST_ROWS`` rows, which knows how many there were."""
    made = list(rows)
    return Table(identifier, heading, caption, columns, made[:MOST_ROWS], len(made), filtered, facets)


def name(text: object, longest: int = _LONGEST) -> str:
    """Return a stranger's text without control characters, and not too long."""
    plain = "".join(c if c.isprintable() else " " for c in str(text)[: longest + 1])
    return plain if len(plain) <= longest else plain[: longest - 1] + "\u2026"


def percent(value: float) -> str:
    """Return a share of 0..1 in percent."""
    # Adding zero makes a zero of a negative zero.
    return f"{round(100 * value, 1) + 0.0:.1f} %"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def absent(cells: int) -> tuple[Cell, ...]:
    """Return the cells of means over no row of the current code."""
    return tuple(Cell(ABSENT, key=math.nan) for _ in range(cells))


def method(defense: str, selection: str = HONEST, *, older: bool = False, means: bool = False) -> Cell:
    """Return the name of a method, how it chose, and whether its row is of older code.

    Args:
        defense: Name with its preset.
        selection: How its strength was chosen.
        older: Measured by older code.
        means: The row is of means, and the table also has one of the current code.
    """
    small = [OLDER_CODE] if older and means else []
    small += [how] if (how := chosen(selection)) else []
    tone = "fair" if selection == ORACLE else ""
    return Cell(name(defense), "; ".join(small), tone=tone, older=older)


def chosen(selection: str) -> str:
    """Say how a strength was chosen; nothing where it was with held-out clean images."""
    if selection == HONEST:
        return ""
    return "oracle: chosen with the truth" if selection == ORACLE else f"chosen by {name(selection)}"


def attack(row: Row | ScanRow | ProbeRow, *, older: bool = False, means: bool = False) -> Cell:
    """Return the attack of a row with its poison rate and target."""
    small = [OLDER_CODE] if older and means else []
    if row.attack == "none":
        return Cell("none", "; ".join([*small, "clean model"]), older=older)
    target = "" if row.target is None else f" to class {row.target}"
    return Cell(name(row.attack), "; ".join([*small, f"{100 * row.poison_rate:g} %{target}"]), older=older)


def rate(mean: Mean, *, worst: bool = False) -> Cell:
    """Return a mean of shares with its interval, and the worst row where that is asked for."""
    return _mean(mean, percent, lambda half: f"{100 * half:.1f}", worst)


def der(mean: Mean, *, worst: bool = True) -> Cell:
    """Return a mean of defense effectiveness, as :func:`rate` does."""
    return _mean(mean, "{:.3f}".format, "{:.3f}".format, worst)


def _mean(mean: Mean, words: Callable[[float], str], width: Callable[[float], str], worst: bool) -> Cell:
    if not mean.n:
        return Cell(NOTHING, key=math.nan)
    small = [] if math.isnan(mean.half) else [f"\u00b1 {width(mean.half)}"]
    if worst and mean.n > 1:
        small.append(f"worst {words(mean.worst)}")
    return Cell(words(mean.value), "; ".join(small), mean.value)


def worst(mean: Mean) -> Cell:
    """Return the worst single share behind a mean."""
    return Cell(percent(mean.worst) if mean.n else NOTHING, key=mean.worst)


def cost(seconds: Mean, rows: Iterable[Row | ScanRow] = ()) -> Cell:
    """Return the mean time, and the largest memory of some rows."""
    peak = max((row.peak_mb for row in rows if row.peak_mb is not None), default=None)
    memory = "" if peak is None else f"up to {peak:,.0f} MB"
    return Cell(duration(seconds.value) if seconds.n else NOTHING, memory, seconds.value)


def time(seconds: float | None) -> Cell:
    """Return one time."""
    return Cell(NOTHING if seconds is None else duration(seconds), key=seconds)


def share(part: int, total: int) -> Cell:
    """Return how many of how many."""
    return Cell(f"{part:,} of {total:,}", key=part / total) if total else Cell(NOTHING)


def measured(hits: Rate) -> Cell:
    """Return a measured share in percent."""
    return Cell(percent(hits.value), key=hits.value) if hits.total else Cell(NOTHING)


def one(value: float | None) -> Cell:
    """Return one share in percent."""
    return Cell(NOTHING if value is None else percent(value), key=value)


def decimal(value: float | None, form: str = ".3f") -> Cell:
    """Return one number."""
    return Cell(NOTHING if value is None else format(value, form), key=value)


def number(value: int, *, tone: str = "") -> Cell:
    """Return a count; its tone is for counts over zero."""
    return Cell(f"{value:,}", key=value, tone=tone if value else "")
