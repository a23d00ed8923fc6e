"""The charts of a benchmark: what a defense leaves of the attack, what it costs, and what more images buy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unbackdoor.report.charts import INK, SERIES, svg_chart

MOST = 24  # defenses in one chart; more cannot be distinguished
# Seven shapes and six colours: 42 pairs before one comes again.
_SHAPES = "osD^vPX"


@dataclass(frozen=True)
class Mark:
    """The marker of a defense, the same in every chart of a page.

    Attributes:
        name: In the legend.
        place: Decides shape and colour.
        oracle: Chosen with the truth: the mark is half-filled.
        older: Measured by older code: the mark is hollow.
    """

    name: str
    place: int
    oracle: bool
    older: bool


def scatter(points: Mapping[Mark, tuple[float, float]], *, title: str, key: str) -> Markup:
    """Return an ``<svg>`` of ACC against ASR, one mark for each defense, with the front that none beats.

    Args:
        points: For each defense its ASR and ACC in 0..1.
        title: What the chart shows, for those who cannot see it.
        key: Makes the identifiers inside the picture unique in the page.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """

    def draw(axes: Any) -> None:
        front = pareto(points.values())
        # Steps: between two of its points the front has the accuracy of the one with the lower ASR.
        axes.step(
            [100 * asr for asr, _ in front],
            [100 * acc for _, acc in front],
            where="post",
            color=INK,
            linewidth=0.8,
            linestyle=":",
            zorder=2,
        )
        axes.annotate(
            "better \u2196", (0, 1), (4, -4), xycoords="axes fraction", textcoords="offset points", va="top",
            fontsize=9,
        )  # fmt: skip
        for mark, (asr, acc) in points.items():
            axes.plot([100 * asr], [100 * acc], linestyle="none", clip_on=False, zorder=3, **style(mark))
        heights = [100 * acc for _, acc in points.values()]
        low, high = min(heights), max(heights)
        margin = max(1.0, 0.1 * (high - low))
        axes.set_ylim(low - margin, high + margin)
        _percent_axis(axes.xaxis)
        axes.set_xlabel("ASR after the repair: lower is better")
        axes.set_ylabel("ACC: higher is better")

    return _percent_chart(draw, list(points), title, key)


def losses(points: Mapping[Mark, tuple[float, float]], *, title: str, key: str) -> Markup:
    """Return an ``<svg>`` of ASR against the ACC that was lost, with the front that no defense beats.

    Args:
        points: For each defense its ASR in 0..1 and the ACC lost in -1..1.
        title: What the chart shows, for those who cannot see it.
        key: Makes the identifiers inside the picture unique in the page.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """

    def draw(axes: Any) -> None:
        front = pareto((asr, -lost) for asr, lost in points.values())
        # Steps: between two of its points the front has the loss of the one with the lower ASR.
        axes.step(
            [-100 * kept for _, kept in front], [100 * asr for asr, _ in front], where="pre", color=INK,
            linewidth=0.8, linestyle=":", zorder=2,
        )  # fmt: skip
        axes.annotate(
            "better \u2199", (0, 0), (4, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9
        )
        for mark, (asr, lost) in points.items():
            axes.plot([100 * lost], [100 * asr], linestyle="none", clip_on=False, zorder=3, **style(mark))
        widths = [100 * lost for _, lost in points.values()]
        margin = max(1.0, 0.1 * (max(widths) - min(widths)))
        axes.set_xlim(min(widths) - margin, max(widths) + margin)
        _percent_axis(axes.yaxis)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set_xlabel("ACC lost, in points: lower is better")
        axes.set_ylabel("ASR after the repair")

    return _percent_chart(draw, list(points), title, key)


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (ASR, ACC) that no other one beats in both, lowest ASR first.

    Example:
        >>> pareto([(0.5, 0.9), (0.1, 0.8), (0.3, 0.7), (0.1, 0.6)])
        [(0.1, 0.8), (0.5, 0.9)]
    """
    front: list[tuple[float, float]] = []
    for asr, acc in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or acc > front[-1][1]:
            front.append((asr, acc))
    return front


def over_budgets(lines: Mapping[Mark, Sequence[tuple[int, float]]], *, title: str, key: str) -> Markup:
    """Return an ``<svg>`` of ASR against the number of clean images, one line for each defense.

    Args:
        lines: For each defense the number of clean images, at least 1, and the ASR in 0..1.
        title: What the chart shows, for those who cannot see it.
        key: Makes the identifiers inside the picture unique in the page.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """

    def draw(axes: Any) -> None:
        for mark, line in lines.items():
            axes.plot(
                [x for x, _ in line], [100 * y for _, y in line], linewidth=1.4, clip_on=False, **style(mark)
            )
        budgets = sorted({x for line in lines.values() for x, _ in line})
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{x:,}" for x in budgets])
        axes.set_xticks([], minor=True)
        _percent_axis(axes.yaxis)
        axes.set_xlabel("clean images of the defender, logarithmic")
        axes.set_ylabel("ASR after the repair")

    return _percent_chart(draw, list(lines), title, key)


def style(mark: Mark) -> dict[str, Any]:
    """Return how matplotlib draws a mark."""
    colour = SERIES[mark.place % len(SERIES)]
    return {
        "color": colour,
        "marker": _SHAPES[mark.place % len(_SHAPES)],
        "markersize": 7,
        "fillstyle": "none" if mark.older else "left" if mark.oracle else "full",
        "markerfacecolor": "none" if mark.older else colour,
        "markeredgecolor": colour,
        # A label that begins with an underscore would be left out of the legend.
        "label": " " + mark.name,
    }


def _percent_axis(axis: Any) -> None:
    axis.axes.set(**{f"{axis.axis_name}lim": (-2, 102)})
    axis.set_ticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])


def _percent_chart(draw: Any, marks: Sequence[Mark], title: str, key: str) -> Markup:
    def with_percent(axes: Any) -> None:
        draw(axes)
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g} %")

    legend = {"loc": "outside lower left", "fontsize": 9, "handlelength": 1.4}
    size = (4.6, 3.2 + 0.2 * -(-len(marks) // 2))  # two names a row of the legend
    with warnings.catch_warnings():
        # The texts stay texts: a letter that the measuring font lacks is the reader's font's to draw.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        chart = svg_chart(with_percent, size=size, title=title, grid="both", legend=legend)
    svg = str(chart)  # a str, because Markup escapes what is put into it
    return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg))
