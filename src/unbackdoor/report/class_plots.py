"""Dot plots of a statistic over the classes: sorted by suspicion, with the limit and the suspicious side."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from unbackdoor.audit.scanning import Checked
from unbackdoor.types import Finding

UNFOLDED_CLASSES = 12  # rows that are seen at once; the others are folded
MAX_CLASSES = 200  # rows in all; more would only make the page heavy
_DEVIATIONS = 3.0  # robust standard deviations of the usual range
_MAD = 1.4826  # median absolute deviation to standard deviation, of normal numbers
_LOGARITHMIC = 20.0  # largest over smallest value from which the axis is logarithmic
_PADDING = 0.04  # of the axis, so that no dot lies on its end
_SMALL = re.compile(r"\b(small|smaller|smallest|short|shorter|shortest|less|little|low|lower|near|nearest)\b")
Side = Literal["small", "large", ""]


@dataclass(frozen=True)
class Dot:
    """A class: its value as a text, and its place on the axis in percent; None where it has no value."""

    name: str
    value: str
    place: float | None
    suspect: bool


@dataclass(frozen=True)
class Arrow:
    """One source class of a mapping and its target, as places of the two ends of a line."""

    source: str
    target: str
    start: float
    end: float


@dataclass(frozen=True)
class DotPlot:
    """The values of all classes under one check.

    Attributes:
        check: Its name.
        question: What it asks, in plain words.
        statistic: What the values are.
        decision: What the check compared with what, as a sentence.
        side: Which values are suspicious.
        rows: Most suspicious first.
        folded: The rows that are not seen at once.
        left_out: Classes beyond both.
        ends: The ends of the axis as texts.
        logarithmic: Whether the axis is.
        limit: Place of the limit in percent; None where there is none to draw.
        limit_words: What the limit is.
        zero: Place of zero, where it lies on the axis.
        mapping: Which class a trigger turns into which, where the check is evidence of that.
    """

    check: str
    question: str
    statistic: str
    decision: str
    side: Side
    rows: Sequence[Dot]
    folded: Sequence[Dot]
    left_out: int
    ends: tuple[str, str]
    logarithmic: bool
    limit: float | None
    limit_words: str
    zero: float | None
    mapping: Sequence[Arrow] = ()

    @property
    def caption(self) -> str:
        """Which side is suspicious, as a sentence."""
        sides = {"small": "Small values, on the left,", "large": "Large values, on the right,"}
        return f"{sides.get(self.side, 'Values apart from the others')} are suspicious."


def dot_plot(
    checked: Checked,
    finding: Finding,
    suspects: Sequence[int],
    name: Callable[[int], str],
    *,
    accused: bool = False,
) -> DotPlot:
    """Return the plot of a finding.

    The statistic of a check is often another number than the values of the classes, such as how far the
    smallest of them lies from the others. Its limit is drawn where it is in the unit of the values; elsewhere
    the edge of the usual range is: three robust deviations from the median of the classes.

    Args:
        checked: The check.
        finding: Of it; has a value for each class.
        suspects: Classes that it is evidence against.
        name: Of a class.
        accused: Whether the check is evidence, so that its mapping is drawn.
    """
    values = [float(value) for value in finding.per_class]
    finite = [value for value in values if math.isfinite(value)]
    side = suspicious_side(finding)
    logarithmic = bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= _LOGARITHMIC

    def scaled(value: float) -> float:
        return math.log(value) if logarithmic else value

    limit, words = _limit(finding, finite, side, logarithmic)
    on_axis = [*finite, *([limit] if limit is not None else [])] or [0.0]
    low, high = scaled(min(on_axis)), scaled(max(on_axis))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (_PADDING + (1 - 2 * _PADDING) * (scaled(value) - low) / span)

    middle = median(finite) if finite else 0.0

    def rank(k: int) -> tuple[bool, float]:
        value = values[k]
        if not math.isfinite(value):
            return k not in suspects, math.inf
        return k not in suspects, {"small": value, "large": -value}.get(side, -abs(value - middle))

    order = sorted(range(len(values)), key=rank)
    rows = [
        Dot(
            name(k),
            short_number(values[k]) or "none",
            place(values[k]) if math.isfinite(values[k]) else None,
            k in suspects,
        )
        for k in order[:MAX_CLASSES]
    ]
    seen = UNFOLDED_CLASSES if len(values) > UNFOLDED_CLASSES else len(values)
    crosses_zero = not logarithmic and min(on_axis) < 0 < max(on_axis)
    return DotPlot(
        checked.check.name,
        checked.check.question,
        finding.statistic,
        _decision(finding),
        side,
        rows[:seen],
        rows[seen:],
        max(0, len(values) - MAX_CLASSES),
        (short_number(min(on_axis)), short_number(max(on_axis))),
        logarithmic,
        None if limit is None else place(limit),
        words,
        place(0.0) if crosses_zero else None,
        _arrows(finding, name) if accused else (),
    )


def _arrows(finding: Finding, name: Callable[[int], str]) -> list[Arrow]:
    pairs = sorted(finding.mapping)[:MAX_CLASSES]
    places = {k: place for place, k in enumerate(sorted({k for pair in pairs for k in pair}))}
    return [
        Arrow(name(source), name(target), places[source] + 0.5, places[target] + 0.5)
        for source, target in pairs
    ]


def suspicious_side(finding: Finding) -> Side:
    """Return which values of the classes are suspicious.

    What a check says of its direction is about its statistic, which is often large where the value of a class
    is small. So the classes that it points to tell the side; where it points to none, its words do.
    """
    finite = [value for value in finding.per_class if math.isfinite(value)]
    pointed = [finding.per_class[k] for k in finding.classes if k < len(finding.per_class)]
    pointed = [value for value in pointed if math.isfinite(value)]
    if finite and pointed:
        distance = sum(pointed) / len(pointed) - median(finite)
        if distance:
            return "small" if distance < 0 else "large"
    what = f"{finding.statistic} {finding.direction.partition(':')[2]}".lower()
    if _SMALL.search(what):
        return "small"
    return "large" if finding.direction.lower().startswith("large") else ""


def _limit(
    finding: Finding, finite: Sequence[float], side: Side, logarithmic: bool
) -> tuple[float | None, str]:
    """Return where the limit lies among the values of the classes, and what it is."""
    ends = [value for value in finite if math.isclose(value, finding.value, rel_tol=1e-6)]
    same_unit = bool(ends) and math.isfinite(finding.threshold) and "p-value" not in finding.threshold_source
    if same_unit and not (logarithmic and finding.threshold <= 0):
        return finding.threshold, f"limit of the check, {short_number(finding.threshold)}"
    if len(finite) < 3 or not side:
        return None, ""
    scaled = [math.log(value) if logarithmic else value for value in finite]
    middle = median(scaled)
    spread = _MAD * median(abs(value - middle) for value in scaled)
    if not spread:
        return None, ""
    edge = middle + (_DEVIATIONS if side == "large" else -_DEVIATIONS) * spread
    edge = math.exp(edge) if logarithmic else edge
    return edge, f"edge of the usual range of these classes, {short_number(edge)}"


def _decision(finding: Finding) -> str:
    p = "" if finding.p_value is None else f"p = {short_number(finding.p_value)}"
    if "p-value" in finding.threshold_source:
        return f"The check decides by a p-value: {p or 'none'}, limit {short_number(finding.threshold)}."
    if not math.isfinite(finding.threshold):
        return f"The check says {p}." if p else "It is shown, and not judged."
    text = f"The check compares: {short_number(finding.value)}, limit {short_number(finding.threshold)}"
    return f"{text}; {p}." if p else f"{text}."


def short_number(value: float | None) -> str:
    """Return a number with three digits; nothing of what is none."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.3g}"
