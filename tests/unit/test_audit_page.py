"""The page of an audit: the right side is suspicious, the limit and the frame are where they belong."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unbackdoor.audit.checks import Check
from unbackdoor.audit.scanning import Audit, Checked
from unbackdoor.metrics import Rate
from unbackdoor.report import audit as audit_pages
from unbackdoor.report.audit import Subject, audit_page
from unbackdoor.report.class_plots import MAX_CLASSES, UNFOLDED_CLASSES, dot_plot, suspicious_side
from unbackdoor.report.decision import decide
from unbackdoor.report.trigger_strips import Example, spot, trigger_view
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Finding, ScanReport

NAMES = ("a", "b", "c", "d", "e", "f")
SMALL = (5.0, 1.0, 5.2, 4.9, 5.1, 4.8)  # class 1 stands apart


def finding(per_class: tuple[float, ...] = SMALL, classes: tuple[int, ...] = (1,), **more: Any) -> Finding:
    facts: dict[str, Any] = {
        "statistic": "Grubbs G of the smallest latent shift",
        "value": 2.3,
        "direction": "large: one class is reached by a much shorter shift of the features than the others",
        "threshold": 1.9,
        "threshold_source": "Grubbs",
        "p_value": 0.001,
    }
    return Finding(**{**facts, "classes": classes, "per_class": per_class, **more})


def checked(one: Finding | None = None, **more: Any) -> Checked:
    report = None if one is None else ScanReport("backdoor found", (one,), coverage=("all",))
    facts: dict[str, Any] = {"p_value": 0.001, "adjusted": 0.001, "report": report, "seconds": 1.0}
    return Checked(Check("tac", "tac", "Is one class near?"), **{"status": "ran", **facts, **more})


def audit(*checks: Checked, **more: Any) -> Audit:
    facts = {"images": 40, "labelled": True}
    return Audit("backdoor found", (1,), checks, ("Evidence.",), facts=facts, **more)


def name(k: int) -> str:
    return NAMES[k] if k < len(NAMES) else f"class {k}"


# ---------------------------------------------------------------------------------------------------
# Dots


@pytest.mark.parametrize(
    ("one", "side"),
    [
        (finding(), "small"),  # the caption said "Large", as the statistic is
        (finding(classes=()), "small"),
        (finding(tuple(-v for v in SMALL)), "large"),
        (finding((1.0, 9.0, 1.1), statistic="attraction", direction="large: more images"), "large"),
        (finding((1.0, 1.0), (), statistic="attraction", direction="large: more images"), "large"),
        (finding((1.0, 1.0), (), statistic="norm", direction="apart from the others"), ""),
        (finding((math.inf, math.inf), statistic="size", direction="large: need far less"), "small"),
        (finding((-3.0, -9.0, -2.9), statistic="cosine", direction="large: too low"), "small"),
    ],
)
def test_the_suspicious_side_is_that_of_the_classes(one: Finding, side: str) -> None:
    assert suspicious_side(one) == side


def test_rows_are_sorted_by_suspicion_and_dots_in_place() -> None:
    plot = dot_plot(checked(), finding(), (1,), name)
    assert [row.name for row in plot.rows] == ["b", "f", "d", "a", "e", "c"]
    assert plot.rows[0].suspect and plot.caption.startswith("Small values, on the left,")
    places = [row.place for row in plot.rows]
    assert places == sorted(places) and all(0 < place < 100 for place in places if place is not None)  # type: ignore[type-var]
    assert "2.3, limit 1.9; p = 0.001" in plot.decision
    assert plot.limit is not None and places[0] < plot.limit < places[1]  # type: ignore[operator]
    assert "edge of the usual range" in plot.limit_words


def test_negative_values_are_no_zeros() -> None:
    plot = dot_plot(checked(), finding((-5.0, 2.0, -1.0, 0.5), classes=()), (), name)
    by_name = {row.name: row.place for row in plot.rows}
    assert by_name["a"] < by_name["c"] < plot.zero < by_name["d"] < by_name["b"]  # type: ignore[operator]


def test_a_limit_in_the_unit_of_the_classes_is_drawn_where_it_is() -> None:
    shares = (0.1, 0.62, 0.1, 0.09, 0.05, 0.04)
    own = finding(shares, value=0.62, threshold=0.4, statistic="attraction", direction="large: more images")
    plot = dot_plot(checked(), own, (1,), name)
    assert plot.limit_words == "limit of the check, 0.4"
    span = (plot.rows[0].place - plot.rows[-1].place) / (0.62 - 0.04)  # type: ignore[operator]
    assert plot.limit == pytest.approx(plot.rows[-1].place + span * (0.4 - 0.04))  # type: ignore[operator]


def test_a_limit_of_a_p_value_is_no_limit_of_a_margin() -> None:
    margin = finding(
        (3.0, 9.0, 3.1, 2.9, 3.2, 3.05), value=9.0, threshold=0.05, direction="large: farther",
        statistic="margin", threshold_source="p-value of the largest", p_value=0.002,
    )  # fmt: skip
    plot = dot_plot(checked(), margin, (1,), name)
    assert "limit of the check" not in plot.limit_words
    assert plot.decision == "The check decides by a p-value: p = 0.002, limit 0.05."


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1e300, 1e300])
def test_odd_values_are_drawn_or_said_to_be_none(value: float) -> None:
    plot = dot_plot(checked(), finding((1.0, value, 2.0, 3.0), classes=(1,)), (1,), name)
    (row,) = [row for row in plot.rows if row.name == "b"]
    assert (row.place is None) == (not math.isfinite(value))
    assert all(0 <= row.place <= 100 for row in plot.rows if row.place is not None)
    assert all(0 <= place <= 100 for place in (plot.limit, plot.zero) if place is not None)
    same = dot_plot(checked(), finding((value, value), classes=()), (), name)
    assert len(same.rows) == 2


def test_many_classes_are_folded_and_wide_ranges_logarithmic() -> None:
    plot = dot_plot(checked(), finding(tuple(float(k + 1) for k in range(1000))), (), str)
    assert len(plot.rows) == UNFOLDED_CLASSES and len(plot.rows) + len(plot.folded) == MAX_CLASSES
    assert plot.left_out == 1000 - MAX_CLASSES and plot.logarithmic and plot.zero is None


# ---------------------------------------------------------------------------------------------------
# Strips


def corner(value: float = 1.0, size: int = 2) -> RecoveredTrigger:
    mask = torch.zeros(8, 8)
    mask[-size:, -size:] = 1
    return RecoveredTrigger(1, torch.full((3, 8, 8), value), mask, "tac")


def test_the_frame_lies_on_the_trigger_and_not_around_the_image() -> None:
    box = spot(corner())
    assert box is not None and (box.left, box.top, box.width, box.height) == (75, 75, 25, 25)
    assert spot(replace(corner(), mask=torch.ones(8, 8))) is None
    assert spot(replace(corner(), mask=torch.zeros(8, 8))) is None
    assert spot(RecoveredTrigger(1, torch.full((3, 8, 8), 0.02), None)) is None
    dot = torch.zeros(3, 8, 8)
    dot[:, 0, 4] = -0.5
    seen = spot(RecoveredTrigger(1, dot, None))
    assert seen is not None and (seen.left, seen.top) == (50, 0)


def test_white_on_white_is_amplified_and_framed() -> None:
    white = torch.full((3, 8, 8), 250, dtype=torch.uint8)
    stamped = corner().apply_bytes(white[None])[0]
    view = trigger_view(corner(), [Example(white, stamped, 0, (0, 1), 0)], name, Rate(9, 10))
    assert view.amplified == "51" and view.box is not None
    (strip,) = view.strips
    assert strip.works and strip.repaired_right and strip.repaired == "a"
    assert "9 of 10 images" in view.about
    none = trigger_view(corner(), [Example(white, white, 1, (1, 1))], name)
    assert none.amplified == "1" and not none.strips[0].works and none.strips[0].repaired is None


# ---------------------------------------------------------------------------------------------------
# Words


def test_a_check_that_the_budget_ended_has_one_name() -> None:
    page = audit_page(Subject("m", NAMES), audit=audit(checked(status="out of budget", reason="later")))
    assert "out of budget" in page and "out of time" not in page


def test_plain_words_stand_before_the_name_of_a_check() -> None:
    page = audit_page(Subject("m", NAMES, date="2026-11-28 01:00 UTC"), audit=audit(checked(finding())))
    assert page.index("Is one class near?") < page.index("<code>tac</code>")
    for words in ("2026-11-28", "Do not deploy this model.", "1 of 1 checks done", "AML.T0018"):
        assert words in page


@pytest.mark.parametrize(
    ("made", "tone", "advice"),
    [
        (audit(checked(finding())), "bad", "Do not deploy this model."),
        (
            replace(audit(checked(finding(), adjusted=0.6)), verdict="no evidence found", classes=()),
            "good",
            "Nothing here speaks against the model.",
        ),
        (
            replace(audit(checked(status="out of budget")), verdict="undecided", classes=()),
            "fair",
            "Do not decide on this yet.",
        ),
    ],
)
def test_what_to_do_follows_the_verdict(made: Audit, tone: str, advice: str) -> None:
    decision = decide(name, audit=made)
    assert decision.tone == tone and decision.facts[0].text == advice


@pytest.mark.parametrize(
    ("facts", "status", "reservations", "wanted"),
    [
        ({"images": 0}, "skipped", (), "clean images"),
        ({"images": 9, "labelled": False}, "skipped", (), "labelled images"),
        ({"images": 9, "labelled": True}, "out of budget", (), "larger budget"),
        ({"images": 9, "labelled": True}, "failed", (), "checks that failed"),
        ({"images": 9, "labelled": True}, "ran", ("There is a program.",), "weights alone"),
        ({"images": 9, "labelled": True}, "ran", (), "more clean images"),
    ],
)
def test_an_undecided_scan_says_what_would_decide_it(
    facts: dict[str, Any], status: Any, reservations: tuple[str, ...], wanted: str
) -> None:
    made = replace(
        audit(checked(status=status)), verdict="undecided", classes=(), facts=facts, reservations=reservations
    )
    assert wanted in decide(name, audit=made).facts[0].small


@pytest.mark.parametrize("convicted", [[{"class": 2, "gap": 0.85}], [], [{"class": -1, "gap": 0.5}]])
def test_large_gaps_between_a_model_and_its_twin_are_the_suspicious_ones(
    convicted: list[dict[str, Any]],
) -> None:
    gaps = [0.17, 0.0, 0.85, 0.0, 0.12, 0.09]
    evidence = {"gaps": gaps, "convicted": convicted}
    done = SimpleNamespace(
        model=SimpleNamespace(classes=len(gaps)), purified=SimpleNamespace(evidence=evidence)
    )
    (plot,) = audit_pages._gaps(done, SimpleNamespace(name=str))  # type: ignore[arg-type]
    assert plot.side == "large" and plot.rows[0].name == "2" and plot.limit_words.startswith("limit")
    assert plot.rows[0].suspect == (convicted == [{"class": 2, "gap": 0.85}])
