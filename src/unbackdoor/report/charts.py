"""Charts as SVG inside a page, drawn by matplotlib and coloured by the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from unbackdoor.errors import MissingExtra
from unbackdoor.metrics import Rate
from unbackdoor.text import printable

# Drawn in stand-in colours that are replaced by variables of the style sheet, so that the chart follows
# the reader's light or dark setting. No two of them are alike, and none is a colour anybody would choose.
INK, _GRID = "#010203", "#010204"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306")
_VARIABLES = {INK: "--ink", _GRID: "--line", **{c: f"--series-{i}" for i, c in enumerate(SERIES, 1)}}
_FONT = "DejaVu Sans"  # comes with matplotlib, which has to measure the texts


@dataclass(frozen=True)
class Series:
    """Bars of one colour.

    Attributes:
        name: In the legend.
        rates: One measured share for each group.
    """

    name: str
    rates: Sequence[Rate]


def require_charts() -> None:
    """Raise MissingExtra unless charts can be drawn; to be called before a long run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "the chart of a report") from error


def grouped_bars(groups: Sequence[str], series: Sequence[Series], *, title: str) -> Markup:
    """Return an ``<svg>`` of grouped bars in percent, each with its value and its 95 % interval.

    Args:
        groups: Names below the axis.
        series: At most six.
        title: What the chart shows, for those who cannot see it.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """

    def draw_bars(axes: Any) -> None:
        width = 0.84 / len(series)
        for place, (one, colour) in enumerate(zip(series, SERIES, strict=False)):
            centres = [g + (place - (len(series) - 1) / 2) * width for g in range(len(groups))]
            values = [100 * r.value if r.total else 0.0 for r in one.rates]
            bars = axes.bar(centres, values, width * 0.92, color=colour, label=one.name)
            for bar, value, measured in zip(bars, values, one.rates, strict=True):
                low, high = (100 * end for end in measured.interval)
                middle = bar.get_x() + bar.get_width() / 2
                if not measured.total:
                    continue
                axes.vlines(middle, low, high, color=INK, linewidth=1)
                axes.annotate(
                    f"{value:.0f}",
                    (middle, high),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 110)
        axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])

    legend = {"loc": "outside upper left", "handlelength": 1, "handleheight": 1}
    return svg_chart(draw_bars, size=(5.6, 3.3), title=title, grid="y", legend=legend)


def svg_chart(
    draw: Callable[[Any], None],
    *,
    size: tuple[float, float],
    title: str,
    grid: Literal["x", "y", "both"],
    legend: Mapping[str, Any],
) -> Markup:
    """Return an ``<svg>`` of one pair of axes in the style that all charts share.

    Args:
        draw: Puts the content onto the axes.
        size: Width and height in inches.
        title: What the chart shows, for those who cannot see it.
        grid: Which lines to show.
        legend: Place and form of the legend, as matplotlib's ``Figure.legend`` takes them.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """
    require_charts()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "font.family": _FONT,
        "font.size": 10,
        "text.parse_math": False,
        "svg.fonttype": "none",  # texts stay texts
        "svg.hashsalt": "unbackdoor",  # the same chart is the same file
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    # Without pyplot: no global figure, no backend of the user's choosing.
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_axisbelow(True)
        axes.grid(axis=grid, color=_GRID, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.legend(ncols=2, frameon=False, **legend)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(buffer.getvalue(), title)


def _inline(document: str, title: str) -> Markup:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A style sheet inside an inline picture would hold for the whole page.
    svg = re.sub(r"\s*<style\b.*?</style>", "", svg, flags=re.DOTALL)
    # HTML knows these namespaces by itself; without them no address stands in the page.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    # The page gives the width, the view box the proportions.
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace(f"'{_FONT}'", "system-ui, sans-serif")
    label = escape(title)
    svg = printable(svg, keep="\n\t")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
