"""How results are looked at in a session or a notebook: a line, a table, a data frame, a chart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unbackdoor.errors import MissingExtra
from unbackdoor.text import printable

_MAX_ROWS = 20  # of the table in a notebook; a data frame has all


@dataclass(frozen=True)
class Bars:
    """What a chart of a result shows.

    Attributes:
        title: Over the chart.
        names: Below the bars.
        values: Their heights.
        axis: What the heights are.
        threshold: Where a line is drawn, if anywhere.
        marked: Positions of bars that stand out.
    """

    title: str
    names: Sequence[str]
    values: Sequence[float]
    axis: str
    threshold: float | None = None
    marked: Sequence[int] = ()


class Viewed:
    """A result that can be looked at. Its class says what there is to see."""

    def headline(self) -> str:
        """Return the result in one line."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """Return its table, every row with the same columns and plain values."""
        raise NotImplementedError

    def bars(self) -> Bars | None:
        """Return what its chart shows; None where there is nothing to draw."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self.headline())}>"

    def _repr_html_(self) -> str:
        """Return the result as a notebook shows it; names of strangers are text in it."""
        rows = self.rows()
        text = f"<p><b>{_html(self.headline())}</b></p>"
        if not rows:
            return text
        head = "".join(f"<th>{_html(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{_html(_short(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows[:_MAX_ROWS]
        )
        more = f"<p>and {len(rows) - _MAX_ROWS} more</p>" if len(rows) > _MAX_ROWS else ""
        return f"{text}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def to_frame(self) -> Any:
        """Return its table as a ``pandas.DataFrame``.

        Raises:
            MissingExtra: Without pandas.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtra("pandas", "frame", "a data frame") from None
        return pd.DataFrame(self.rows())

    def plot(self) -> Any:
        """Return a chart as a ``matplotlib.figure.Figure``, which a notebook shows.

        Raises:
            MissingExtra: Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtra("matplotlib", "report", "a chart") from None
        if "ipykernel" in sys.modules:
            # In a notebook, this import and nothing else makes that figures are shown.
            import matplotlib.pyplot  # noqa: F401
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        bars = self.bars()
        if bars is None:
            axes.set_axis_off()
            axes.text(0.5, 0.5, printable(self.headline()), ha="center", va="center", wrap=True)
            return figure
        colours = ["#b3261e" if i in set(bars.marked) else "#5b7fa6" for i in range(len(bars.values))]
        axes.bar(range(len(bars.values)), bars.values, color=colours)
        if bars.threshold is not None:
            axes.axhline(bars.threshold, color="black", linewidth=1, linestyle="--")
        if len(bars.names) <= _MAX_ROWS:
            # A dollar sign would begin a formula.
            names = [printable(name)[:20].replace("$", r"\$") for name in bars.names]
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_ylabel(bars.axis)
        axes.set_title(printable(bars.title).replace("$", r"\$"), fontsize=10)
        return figure


def _html(value: object) -> str:
    return escape(printable(value))


def _short(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
