"""Charts of repairs: what is left of the attack against what it cost, and what more images buy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from markupsafe import Markup

from unbackdoor.bench.results import summarise
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark.cells import ORACLE, name
from unbackdoor.report.benchmark.groups import (
    Group,
    Rows,
    Setting,
    acc_lost_attacked,
    attacked_acc,
    defense_of,
)
from unbackdoor.report.benchmark.plots import MOST, Mark, losses, over_budgets, scatter
from unbackdoor.report.tables import OLDER, Section

MOST_CHARTS = 12  # of each kind
Who = tuple[str, bool, bool]  # defense, chosen with the truth, older code
Pair = tuple[float, float]  # ASR, ACC


def chart_section(settings: Mapping[Setting, Rows[Row]]) -> Section:
    """Return the charts of all settings; none where no attack took."""
    scatters: list[tuple[str, Markup]] = []
    curves: list[tuple[str, Markup]] = []
    places = _places(settings.values())
    for setting, rows in settings.items():
        marks, means = _marks(rows, places), _means(rows)
        budgets = sorted({budget for _, budget in means})
        for budget in budgets:
            points = {m: means[who, budget] for who, m in marks.items() if (who, budget) in means}
            if points and len(scatters) < MOST_CHARTS:
                title = f"{setting}: {budget:,} clean images"
                words = f"Accuracy against attack success after each defense, {title}; the numbers are above"
                scatters.append((title, scatter(points, title=words, key=f"scatter{len(scatters)}")))
        curve_points = {
            m: [(b, means[who, b][0]) for b in budgets if (who, b) in means] for who, m in marks.items()
        }
        curve_points = {m: line for m, line in curve_points.items() if line}
        if curve_points and len(budgets) > 1 and len(curves) < MOST_CHARTS:
            words = f"Attack success against the number of clean images, {setting}; the numbers are above"
            curves.append(
                (str(setting), over_budgets(curve_points, title=words, key=f"budgets{len(curves)}"))
            )
    caption = (
        "Means over all attacks that took; a defense has the same mark in every chart. On the dotted line "
        f"lie those that none beats in both. Hollow marks {OLDER} were measured by older code; half-filled "
        "ones were chosen with the truth (oracle)."
    )
    if any(len(set(map(_who, rows.all))) > MOST for rows in settings.values()):
        caption += f" The {MOST} defenses with the best DER."
    if max(len(scatters), len(curves)) == MOST_CHARTS:
        caption += f" At most {MOST_CHARTS} charts of a kind are drawn."
    title = "What is left of the attack, and what it cost"
    return Section("charts", title, (caption,), charts=(*scatters, *curves), only_html=True)


def pareto_charts(settings: Mapping[Setting, Rows[Row]]) -> tuple[tuple[str, Markup], ...]:
    """Return charts of ASR against the ACC that was lost, one for each setting and budget; at most twelve."""
    made: list[tuple[str, Markup]] = []
    places = _places(settings.values())
    for setting, rows in settings.items():
        marks, means = _marks(rows, places), _means(rows, acc_lost_attacked)
        for budget in sorted({budget for _, budget in means}):
            points = {m: means[who, budget] for who, m in marks.items() if (who, budget) in means}
            if points and len(made) < MOST_CHARTS:
                title = f"{setting}: {budget:,} clean images"
                words = f"Attack success against accuracy lost, {title}; the numbers are in the table"
                made.append((title, losses(points, title=words, key=f"losses{len(made)}")))
    return tuple(made)


def _means(
    rows: Rows[Row], cost: Callable[[Row], float | None] = attacked_acc
) -> dict[tuple[Who, int], Pair]:
    out = {}
    for older, own in ((False, rows.current), (True, rows.older)):
        groups: dict[tuple[Who, int], list[Row]] = {}
        for row in own:
            groups.setdefault(((*_who(row), older), row.clean_images), []).append(row)
        for key, members in groups.items():
            group = Group(members[0], members)
            pair = group.mean(lambda row: row.asr).value, group.mean(cost).value
            if not any(map(math.isnan, pair)):
                out[key] = pair
    return out


def _who(row: Row) -> tuple[str, bool]:
    return defense_of(row), row.selection == ORACLE


def _places(every: Iterable[Rows[Row]]) -> dict[tuple[str, bool], int]:
    """Return the place of every defense among all of the page, which its shape and colour follow from."""
    return {who: place for place, who in enumerate(sorted({_who(row) for rows in every for row in rows.all}))}


def _marks(rows: Rows[Row], places: Mapping[tuple[str, bool], int]) -> dict[Who, Mark]:
    """Return a mark for every defense: that of the same one in all charts, older code included."""
    best: dict[tuple[str, bool], float] = {}
    for own in (rows.current, rows.older):
        for s in summarise(own):
            who = (s.defense, s.selection == ORACLE)
            best[who] = max(best.get(who, -1.0), -1.0 if math.isnan(s.der.value) else s.der.value)
    chosen = sorted(sorted(best, key=lambda who: -best[who])[:MOST])
    return {
        (defense, oracle, older): Mark(
            name(defense, 28) + (" (oracle)" if oracle else "") + (f" {OLDER}" if older else ""),
            places[defense, oracle],
            oracle=oracle,
            older=older,
        )
        for defense, oracle in chosen
        for older in (False, True)
    }
