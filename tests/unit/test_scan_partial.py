"""A scan that is cut short, or cannot decide, tells what it has: checks, classes, and the correction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny import tiny_classifier, tiny_data
from unbackdoor import confinement
from unbackdoor.audit.checks import default_checks
from unbackdoor.audit.json_records import audit_json, verification_json
from unbackdoor.audit.scanning import Audit, scan
from unbackdoor.audit.verification import verify
from unbackdoor.engine.trusted_caller import Surroundings
from unbackdoor.errors import MethodFailed, UnbackdoorError
from unbackdoor.registry import SCANNERS, Config, scanner
from unbackdoor.report.audit import Subject, audit_page
from unbackdoor.report.sarif import sarif
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict

MODEL, IMAGES = tiny_classifier("conv-bn"), tiny_data(60, seed=3)
DATA = CleanData.split(IMAGES)
NAMES = ("cat", "dog", "2", "x" * 100)
CALLS: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def _only_ours() -> Iterator[None]:
    """Empty the table of scanners for a test, and the list of those that were called."""
    list(SCANNERS)
    before = dict(SCANNERS._parts)
    SCANNERS._parts.clear()
    CALLS.clear()
    yield
    SCANNERS._parts.clear()
    SCANNERS._parts.update(before)


def named(model: Classifier) -> Classifier:
    model.class_names = NAMES
    return model


def says(name: str, p_value: float | None, *classes: int, **more: Any) -> str:
    """Register a scanner that says the same of every model, and return its name."""

    @scanner(name, config=Config, question=f"What does {name} say?", cost=len(SCANNERS._parts))
    def look(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        CALLS.append((name, model.sha256()))
        for step in run.progress(range(3), "looking"):
            if step == 1 and "raises" in more:
                raise more["raises"]
        value = more.get("p_of", {}).get(model.sha256(), p_value)
        verdict: Verdict = "undecided" if value is None else "no evidence found"
        return ScanReport(verdict, (Finding("size", 1.0, "small", 0.5, "made up", value, classes),))

    return name


def look(*, thorough: bool = True, **more: Any) -> Audit:
    return scan(named(MODEL.copy()), DATA, thorough=thorough, **more)


# ---------------------------------------------------------------------------------------------------
# Interrupted


def test_what_had_ended_before_an_interrupt_is_the_answer() -> None:
    says("first", 0.001, 1)
    says("second", 0.5, 2, raises=KeyboardInterrupt())
    says("third", 0.5, 3)
    surroundings = Surroundings.take()
    audit = look()
    assert surroundings.changed() == []
    assert audit.interrupted and audit.partial
    assert [c.status for c in audit.checks] == ["ran", "interrupted", "interrupted"]
    assert [c.reason for c in audit.checks[1:]] == [
        "it was interrupted",
        "the scan was interrupted before it began",
    ]
    assert (audit.verdict, audit.classes) == ("backdoor found", (1,))
    assert [name for name, _ in CALLS] == ["first", "second"]
    record = audit_json(audit, NAMES)
    json.dumps(record, allow_nan=False)
    assert record["interrupted"] and record["partial"]
    (run,) = sarif(audit, Path("m.pth"), NAMES, file_sha256="0" * 64)["runs"]
    assert [r["ruleId"] for r in run["results"]] == ["first"]
    assert not run["invocations"][0]["executionSuccessful"] and run["properties"]["interrupted"]
    assert len(run["invocations"][0]["toolExecutionNotifications"]) == 2
    assert "it was interrupted" in audit_page(Subject("m", NAMES), audit=audit)


def test_an_interrupted_scan_without_evidence_decides_nothing() -> None:
    says("first", 0.9, 1)
    says("second", 0.5, 2, raises=KeyboardInterrupt())
    audit = look()
    assert audit.verdict == "undecided"
    assert "second (it was interrupted)" in audit.reasons[0]


def test_an_interrupt_of_the_first_check_is_no_result_and_says_so() -> None:
    says("first", 0.9, 1, raises=KeyboardInterrupt())
    audit = look()
    assert (audit.verdict, audit.interrupted, audit.unsupported) == ("undecided", True, False)
    assert audit.reasons[0] == "No check came to a calibrated result."
    assert "first (it was interrupted)" in audit.reasons[1]


def test_a_whole_scan_is_not_called_interrupted() -> None:
    says("first", 0.9, 1)
    audit = look()
    assert not audit.interrupted and not audit.partial and not audit_json(audit, NAMES)["interrupted"]


@pytest.mark.parametrize(
    ("which", "before", "after"),
    [(0, ["interrupted", "interrupted"], ["interrupted", "interrupted"]),
     (1, ["ran", "ran"], ["interrupted", "interrupted"])],
)  # fmt: skip
def test_an_interrupted_comparison_tells_what_had_ended(
    which: int, before: list[str], after: list[str]
) -> None:
    models = MODEL.copy(), tiny_classifier("conv")

    @scanner("first", config=Config, question="First?", cost=1)
    def first(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        if model.sha256() == models[which].sha256():
            raise KeyboardInterrupt
        return ScanReport("no evidence found", (Finding("size", 1.0, "small", 0.5, "made up", 0.9, (1,)),))

    says("second", 0.9, 1)
    done = verify(*models, IMAGES)
    assert done.interrupted and done.accuracy is not None
    assert [c.status for c in done.before.checks] == before
    assert [c.status for c in done.after.checks] == after
    json.dumps(verification_json(done, NAMES), allow_nan=False)
    audit_page(Subject("pair", NAMES), verification=done)


# ---------------------------------------------------------------------------------------------------
# Out of time


@pytest.mark.parametrize("swallowed", [True, False])
def test_the_end_of_the_budget_is_told_whatever_a_scanner_makes_of_it(
    swallowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(confinement, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    says("first", 0.001, 1)

    @scanner("second", config=Config, question="Second?", cost=2)
    def second(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        try:
            for _ in run.progress(iter(int, 1), "for ever"):
                clock[0] += 1
        except UnbackdoorError as error:
            if not swallowed:
                raise MethodFailed("it did not work") from error
        return ScanReport("no evidence found", (Finding("size", 1.0, "small", 0.5, "made up", 1e-9, (2,)),))

    says("third", 0.5, 3)
    audit = scan(MODEL, DATA, budget=10, thorough=True)
    assert [c.status for c in audit.checks] == ["ran", "out of budget", "out of budget"]
    assert (audit.verdict, audit.classes, audit.interrupted) == ("backdoor found", (1,), False)


# ---------------------------------------------------------------------------------------------------
# Undecided


def test_undecided_names_every_check_behind_it_and_its_classes() -> None:
    for name, p_value, classes in (
        ("one", 0.025, (0,)),
        ("two", 0.025, (2, 1)),
        ("none", 0.04, ()),
        ("far", 0.9, (1,)),
    ):
        says(name, p_value, *classes)
    audit = look()
    assert audit.verdict == "undecided"
    assert audit.reasons[0] == (
        "What was noticed is no evidence yet: one, towards cat (class 0): adjusted p = 0.1; two, towards "
        "class 2 and dog (class 1): adjusted p = 0.1; none, towards no single class: adjusted p = 0.1."
    )
    noticed = audit_json(audit, NAMES)["noticed"]
    assert [n["checks"] for n in noticed] == [["one"], ["two"], ["none"]]
    assert noticed[1]["classes"] == [{"index": 2, "name": "2"}, {"index": 1, "name": "dog"}]
    assert all(n["adjusted_p_value"] == pytest.approx(0.1) for n in noticed)


def test_an_agreement_names_its_checks_and_its_class() -> None:
    says("one", 0.06, 1)
    says("two", 0.06, 1)
    audit = look()
    assert audit.verdict == "undecided"
    assert "one and two together, towards dog (class 1): adjusted p = 0.078" in audit.reasons[0]
    assert audit_json(audit, NAMES)["noticed"][0]["checks"] == ["one", "two"]


def test_evidence_and_silence_name_their_checks_and_classes_too() -> None:
    says("one", 0.001, 3)
    reason = look().reasons[0]
    assert reason == f"Evidence of a backdoor in one, towards {'x' * 60} (class 3): adjusted p = 0.001."
    SCANNERS._parts.clear()
    says("one", 0.4, 1)
    assert "the smallest p-value: one, towards dog (class 1): adjusted p = 0.4" in look().reasons[0]


# ---------------------------------------------------------------------------------------------------
# How many checks the p-values are corrected for


def test_fewer_checks_are_corrected_for_less_and_it_is_said() -> None:
    says("one", 0.03, 1)
    says("two", 0.9, 2)
    says("unsure", None, 2)
    whole = look()
    assert (whole.verdict, whole.corrected_for, whole.left_out) == ("undecided", 2, ())
    assert whole.reasons[-1] == "The p-values are corrected for the 2 checks that gave a p-value."
    picked = scan(MODEL, DATA, checks=["one"])
    assert (picked.verdict, picked.corrected_for) == ("backdoor found", 1)
    assert picked.reasons[1:] == (
        "The p-values are corrected for the 1 check that gave a p-value.",
        "Not asked for: two, unsure. A scan of all usual checks corrects for more of them.",
        "Corrected for those as well, the smallest p-value is 0.09, which is no evidence: "
        "who tries one check after the other is bound to find something.",
    )
    record = audit_json(picked, NAMES)
    assert (record["corrected_for"], record["left_out"]) == (1, ["two", "unsure"])


# ---------------------------------------------------------------------------------------------------
# Verify repeats what accused


def test_verify_repeats_every_check_that_accused_first() -> None:
    bad, good = MODEL.copy(), tiny_classifier("conv")
    says("cheap", 0.9, 1)
    says("accuser", 0.9, 2, p_of={bad.sha256(): 1e-4})
    says("dear", 0.9, 3)
    done = verify(bad, good, IMAGES)
    assert done.before.classes == (2,) and done.after.verdict == "no evidence found"
    assert [name for name, model in CALLS if model == bad.sha256()] == ["cheap", "accuser", "dear"]
    assert [name for name, model in CALLS if model == good.sha256()] == ["accuser", "cheap", "dear"]
    # They are shown side by side, in the order of a scan.
    for audit in (done.before, done.after):
        assert [c.check.name for c in audit.checks] == [c.name for c in default_checks()]


def test_verify_repeats_checks_that_accuse_together_before_its_time_is_over() -> None:
    bad, good = MODEL.copy(), tiny_classifier("conv")
    says("quiet", 0.9, 3)
    says("one", 0.9, 1, p_of={bad.sha256(): 0.02})
    says("two", 0.9, 1, p_of={bad.sha256(): 0.02})
    done = verify(bad, good, IMAGES)
    assert done.before.joint and not done.before.guilty
    assert [name for name, model in CALLS if model == good.sha256()] == ["one", "two", "quiet"]


def test_what_still_accuses_the_repair_is_found_by_the_check_that_accused() -> None:
    bad = MODEL.copy()
    says("accuser", 1e-4, 2)
    assert verify(bad, tiny_classifier("conv"), IMAGES).after.verdict == "backdoor found"


# ---------------------------------------------------------------------------------------------------
# Answered before the end


def test_a_check_that_answers_the_question_ends_the_scan_and_is_corrected_for_all() -> None:
    says("first", 0.9, 2)
    says("second", 0.02, 1)
    says("third", 0.001, 3)
    says("fourth", 0.5, 0)
    audit = look(thorough=False)
    # The second would be evidence among two, and is none among the four that were planned.
    assert [name for name, _ in CALLS] == ["first", "second", "third"]
    assert [c.status for c in audit.checks] == ["ran", "ran", "ran", "not needed"]
    assert audit.checks[3].reason == "third had answered the question"
    assert (audit.verdict, audit.classes) == ("backdoor found", (3,))
    assert audit.checks[2].adjusted == pytest.approx(0.004) and audit.corrected_for == 4
    assert not audit.partial and not audit.interrupted
    assert "fourth did not run" in " ".join(audit.reasons)
    whole = look()
    assert [c.adjusted for c in whole.checks[:3]] == [c.adjusted for c in audit.checks[:3]]
    record = audit_json(audit, NAMES)
    json.dumps(record, allow_nan=False)
    assert record["checks"][3]["status"] == "not needed"
    assert "not needed" in audit_page(Subject("m", NAMES), audit=audit)
    (run,) = sarif(audit, Path("m.pth"), NAMES, file_sha256="0" * 64)["runs"]
    notes = run["invocations"][0]["toolExecutionNotifications"]
    assert [note["level"] for note in notes] == ["note"]


def test_an_agreement_answers_the_question_as_well() -> None:
    for name in ("first", "second", "third", "fourth"):
        says(name, 0.018, 1)
    audit = look(thorough=False)
    assert [c.status for c in audit.checks] == ["ran", "ran", "not needed", "not needed"]
    assert audit.checks[2].reason == "first and second had answered the question"
    assert (audit.verdict, audit.classes) == ("backdoor found", (1,))


def test_what_is_left_to_run_never_takes_an_answer_back() -> None:
    says("first", 0.012, 1)
    for name in ("second", "third", "fourth"):
        says(name, 1.0, 0)
    assert look(thorough=False).verdict == look().verdict == "backdoor found"
    SCANNERS._parts.pop("first")
    says("first", 0.013, 1)
    assert look(thorough=False).verdict == look().verdict == "undecided"


def test_fewer_checks_do_not_loosen_the_correction_silently() -> None:
    says("first", 0.02, 1)
    for name in ("second", "third", "fourth"):
        says(name, 0.9, 0)
    assert look().verdict == "undecided"
    alone = look(checks=["first"])
    assert alone.verdict == "backdoor found" and alone.left_out == ("second", "third", "fourth")
    told = " ".join(alone.reasons)
    assert "corrected for the 1 check" in told and "Not asked for: second, third, fourth." in told
    assert "the smallest p-value is 0.08, which is no evidence" in told
    SCANNERS._parts.pop("first")
    says("first", 0.001, 1)
    assert "which is no evidence" not in " ".join(look(checks=["first"]).reasons)


# ---------------------------------------------------------------------------------------------------
# Opened wrongly


@pytest.mark.parametrize("p_value", [0.0001, 0.9])
def test_a_model_that_may_have_been_opened_wrongly_is_never_firmly_judged(p_value: float) -> None:
    says("first", p_value, 1)
    audit = look(doubts=["The labels do not fit."])
    assert (audit.verdict, audit.classes) == ("undecided", ())
    assert audit.reasons[0] == "The labels do not fit."
    assert audit_json(audit, NAMES)["doubts"] == ["The labels do not fit."]
    noticed = any("dog (class 1)" in reason for reason in audit.reasons)
    assert noticed == (p_value < 0.05)
