"""What was found before leads a repair: scans and triggers are read safely, and methods say what they did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unbackdoor
from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.checks import Check
from unbackdoor.audit.scanning import Audit, Checked
from unbackdoor.audit.suspicion import read_suspicion
from unbackdoor.engine.run import Run
from unbackdoor.engine.trigger_search import search_triggers
from unbackdoor.engine.trusted_caller import run
from unbackdoor.errors import InputError, IntegrityError, UnbackdoorError
from unbackdoor.registry import DEFENSES, SUSPICION, Config, Part
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Classifier, CleanData, Finding, Purified, ScanReport
from unbackdoor.weights.triggers import write_triggers

MODEL = tiny_classifier("conv-bn")
DATA = CleanData.split(tiny_data(40))


def trigger(label: int, model: Classifier = MODEL, value: float = 0.5, **more: Any) -> RecoveredTrigger:
    mask = torch.zeros(model.input_shape[1:])
    mask[0, 0] = 1.0
    return RecoveredTrigger(label, torch.full(model.input_shape, value), mask, **more)


def audit(model: Classifier, *labels: int, verdict: str = "backdoor found", **facts: Any) -> Audit:
    """Return a scan that suspects classes, by a check that recovered a trigger to each and one to class 0."""
    report = ScanReport(
        verdict,  # type: ignore[arg-type]
        (
            Finding(
                "size",
                1.0,
                "small",
                0.5,
                "made up",
                0.01,
                labels,
                trigger=trigger(labels[0] if labels else 0),
            ),
        ),
    )
    checked = Checked(Check("size", "size", "?"), "ran", "", report, 0.01, 0.02)
    triggers = tuple(trigger(k, success=0.75) for k in (*labels, 0))
    facts = {"model_sha256": model.sha256(), **facts}
    return Audit(verdict, labels, (checked,), ("because",), triggers=triggers, facts=facts)  # type: ignore[arg-type]


def written(
    folder: Path, scanned: Audit, change: Callable[[dict[str, Any]], Any] = lambda record: None
) -> Path:
    """Write a scan as its report does, after a change of its record."""
    folder.mkdir(exist_ok=True)
    record = json.loads(json.dumps(scanned.to_dict()))
    change(record)
    (folder / "result.json").write_text(json.dumps(record))
    facts = {"model_sha256": scanned.facts["model_sha256"]}
    write_triggers(folder, scanned.triggers, facts, most=3, force=True)
    return folder


def seen_by(suspicion: Suspicion | None, *traits: str) -> Run:
    """Return the run that a method with these traits gets."""
    runs: list[Run] = []

    def purify(model: Classifier, data: CleanData, cfg: Config, *, run: Run) -> Purified:
        runs.append(run)
        for one in run.suspicion.triggers if run.suspicion is not None else ():
            one.pattern.fill_(0.123)  # a method may do as it likes with what it is lent
        return Purified(model)

    part = Part("probe", "defense", purify, Config, "", frozenset({"images"}), traits=frozenset(traits))
    run_defense = run(part, MODEL, DATA, suspicion=suspicion)
    assert run_defense.model.sha256() == MODEL.sha256()
    return runs[0]


def test_only_a_method_that_declares_it_is_led_and_it_gets_a_copy() -> None:
    given = Suspicion((2,), (0.01,), (trigger(2, check="secret-name.safetensors"),))
    assert seen_by(given).suspicion is None
    assert seen_by(None, SUSPICION).suspicion is None
    assert seen_by(Suspicion(), SUSPICION).suspicion is None  # a scan without a finding leads nothing
    lent = seen_by(given, SUSPICION).suspicion
    assert lent is not None and (lent.classes, lent.p_values) == ((2,), (0.01,))
    assert lent.triggers[0].check == ""
    assert float(given.triggers[0].pattern.mean()) == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        Suspicion((4,), (None,)),
        Suspicion((-1,), (None,)),
        Suspicion((1, 1), (None, None)),
        Suspicion((1,), ()),
        Suspicion((1,), (1.5,)),
        Suspicion((1,), (float("nan"),)),
        Suspicion((1,), (None,), (trigger(2),)),
        Suspicion.of_triggers([RecoveredTrigger(1, torch.zeros(1, 9, 9), None)]),
        Suspicion.of_triggers([RecoveredTrigger(1, torch.full((1, 8, 8), torch.nan), None)]),
        7,
    ],
)
def test_a_suspicion_that_does_not_fit_is_refused_before_the_method_runs(wrong: Any) -> None:
    with pytest.raises(InputError, match="the suspicion"):
        run("none", MODEL, DATA, suspicion=wrong)


def test_triggers_come_before_a_scan_and_keep_its_p_values() -> None:
    scanned = Suspicion((2, 1), (0.01, 0.03), (trigger(2),))
    both = Suspicion.of_triggers([trigger(1), trigger(3), trigger(1)]).joined(scanned)
    assert (both.classes, both.p_values) == ((1, 3, 2), (0.03, None, 0.01))
    assert [t.label for t in both.triggers] == [1, 3, 1, 2]
    assert both.trigger_to(2) is scanned.triggers[0] and both.trigger_to(0) is None


# ---------------------------------------------------------------------------------------------------
# Reading a scan


def test_a_scan_is_read_from_its_folder_its_record_or_memory(tmp_path: Path) -> None:
    scanned = audit(MODEL, 2)
    folder = written(tmp_path / "scan", scanned)
    for source in (folder, str(folder), scanned):
        suspicion = read_suspicion(source, MODEL)
        assert suspicion is not None
        assert (suspicion.classes, suspicion.p_values) == ((2,), (0.02,))
        # The trigger to class 0, which nothing accuses, leads nothing.
        assert [(t.label, t.success) for t in suspicion.triggers] == [(2, 0.75)]
    alone = read_suspicion(folder / "result.json", MODEL)
    assert alone is not None and alone.classes == (2,) and alone.triggers == ()
    assert read_suspicion(None, MODEL) is None


@pytest.mark.parametrize("verdict", ["no evidence found", "undecided"])
def test_a_scan_without_a_finding_suspects_nothing(tmp_path: Path, verdict: str) -> None:
    scanned = audit(MODEL, verdict=verdict)
    for source in (scanned, written(tmp_path / "scan", scanned)):
        suspicion = read_suspicion(source, MODEL)
        assert suspicion is not None and (suspicion.classes, suspicion.triggers) == ((), ())


def test_a_scan_of_another_model_is_refused(tmp_path: Path) -> None:
    other = tiny_classifier("conv")
    for source in (audit(other, 2), written(tmp_path / "scan", audit(other, 2))):
        with pytest.raises(IntegrityError, match="of another model"):
            read_suspicion(source, MODEL)
    # A record of this model beside triggers of another, and a record that speaks of other triggers.
    mixed = written(tmp_path / "mixed", audit(other, 2), lambda r: r.update(model_sha256=MODEL.sha256()))
    with pytest.raises(IntegrityError, match="recovered from another model"):
        read_suspicion(mixed, MODEL)
    swapped = written(tmp_path / "swapped", audit(MODEL, 2), lambda r: r["triggers"].reverse())
    with pytest.raises(IntegrityError, match="not the one that the record"):
        read_suspicion(swapped, MODEL)


NO_SHARES: list[Any] = ["all", 1.5, True, []]


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        place: Any = record
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(lambda record, key=key: record.pop(key) for key in ("verdict", "classes", "triggers", "noticed")),
        lambda record: record.pop("model_sha256"),
        _set("verdict", value="clean"),
        _set("verdict", value=["backdoor found"]),
        _set("verdict", value="undecided"),  # and a class is named
        _set("classes", value={"index": 2}),
        _set("classes", value="2"),
        _set("classes", value=[2]),
        *(_set("classes", 0, "index", value=value) for value in (4, -1, True, 2.0, "2", None, [2], 10**400)),
        *(
            _set("noticed", 0, "adjusted_p_value", value=value)
            for value in (-0.1, 2, None, "0.1", True, 10**400)
        ),
        _set("noticed", value=3),
        _set("noticed", value=["nothing"]),
        _set("noticed", 0, "classes", value=[{"index": 9}]),
        _set("triggers", value={}),
        _set("triggers", 0, "class", value=2),
        _set("triggers", 0, "class", "index", value=7),
        *(_set("triggers", 0, "success", value=value) for value in NO_SHARES),
        _set("model_sha256", value=["x"]),
    ],
)
def test_a_record_that_is_none_is_refused_with_a_typed_error(tmp_path: Path, change: Any) -> None:
    folder = written(tmp_path / "scan", audit(MODEL, 2), change)
    with pytest.raises(UnbackdoorError):
        read_suspicion(folder, MODEL)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"verdict": NaN}']
)
def test_a_file_of_anything_else_is_refused_with_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    for place in (tmp_path, tmp_path / "result.json"):
        with pytest.raises(UnbackdoorError):
            read_suspicion(place, MODEL)


def test_what_is_missing_or_no_path_is_refused_with_a_typed_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "scan", audit(MODEL, 2))
    (folder / "trigger-0" / "trigger.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    places: list[Any] = [folder, tmp_path / "empty", tmp_path / "nowhere", "x" * 5000, "a\0b", 7, {}]
    for place in places:
        with pytest.raises(InputError):
            read_suspicion(place, MODEL)


def test_records_of_other_verbs_are_no_scans(tmp_path: Path) -> None:
    done = unbackdoor.purify(MODEL, tiny_data(60), "none")
    page = done.save_report(tmp_path / "repair")
    with pytest.raises(InputError, match="no record of a scan"):
        read_suspicion(page.parent, MODEL)


# ---------------------------------------------------------------------------------------------------
# The verb


def test_a_repair_says_what_led_it_and_what_cannot_be_led(tmp_path: Path) -> None:
    folder = written(tmp_path / "scan", audit(MODEL, 2))
    done = unbackdoor.purify(MODEL, tiny_data(80, seed=3), "tac", options={"epochs": 1}, scan=folder)
    assert done.purified.evidence["target"] == 2 and done.led
    told = done.to_dict()
    assert told["suspicion"] == {
        "classes": [{"index": 2, "name": "left down", "p_value": 0.02}],
        "triggers": 1,
        "led_the_method": True,
    }
    assert any("began with class 2" in text for text in done.remarks)
    assert any("Class 2 was suspected" in text for text in told["remarks"])
    assert [r.trigger.label for r in done.residues] == [2]
    page = done.save_report(tmp_path / "repair").read_text()
    assert "began with class 2" in page
    other = unbackdoor.purify(MODEL, tiny_data(60), "none", scan=audit(MODEL, 2))
    assert not other.led and "cannot use what was suspected" in other.remarks[0]
    empty = unbackdoor.purify(MODEL, tiny_data(60), "none", scan=audit(MODEL, verdict="undecided"))
    assert "came to no finding" in empty.remarks[0] and not empty.led
    plain = unbackdoor.purify(MODEL, tiny_data(60), "none")
    assert plain.remarks == () and plain.to_dict()["suspicion"] is None


def test_a_trigger_leads_as_a_scan_does() -> None:
    done = unbackdoor.purify(
        MODEL,
        tiny_data(80, seed=3),
        "tac",
        options={"epochs": 1},
        triggers=[trigger(3)],
        scan=audit(MODEL, 2),
    )
    assert done.purified.evidence["target"] == 3
    assert done.suspicion is not None and done.suspicion.classes == (3, 2)
    assert [r.trigger.label for r in done.residues] == [3, 2]


def test_the_remarks_of_a_stranger_are_bounded() -> None:
    def purify(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> Purified:
        return Purified(model, {"remarks": remarks})

    part = replace(DEFENSES["none"], name="talkative", function=purify)
    for remarks, most in (  # noqa: B007  read by the method
        (["x" * 9999] * 999, 20),
        ("abc", 0),
        ({"a": 1}, 0),
        ([1, None], 2),
        (7, 0),
    ):
        done = unbackdoor.purify(MODEL, tiny_data(60), part)
        assert len(done.remarks) == most and all(len(text) <= 500 for text in done.remarks)


# ---------------------------------------------------------------------------------------------------
# Methods


BLOCKS = CleanData.split(block_data(160))
NC = {"steps": 120, "images": 16, "rounds": 1, "epochs": 1}


def corner(label: int, **more: Any) -> RecoveredTrigger:
    """Return the trigger of ``planted((2,))``: a black pixel in the first corner."""
    return trigger(label, planted(), 0.0, **more)


def searches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return search_triggers(*arguments, **options)

    monkeypatch.setattr("unbackdoor.defenses.neural_cleanse.search_triggers", counted)
    return made


def test_neural_cleanse_begins_with_the_trigger_and_does_not_search_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = searches(monkeypatch)
    out = run(
        "neural_cleanse", planted((2,)), BLOCKS, options=NC, suspicion=Suspicion.of_triggers([corner(2)])
    )
    assert made == []
    assert out.evidence["target"] == 2 and out.evidence["rounds"][0]["size"] == 1.0
    assert out.evidence["rounds"][0]["success"] == 1.0
    assert "began with a trigger" in out.evidence["remarks"][1]
    again = run("neural_cleanse", planted((2,)), BLOCKS, options={**NC, "rounds": 2})
    assert len(made) >= 1 and again.evidence["searched_first"]


def test_neural_cleanse_searches_for_the_named_class_where_the_trigger_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = searches(monkeypatch)
    idle = replace(corner(5), mask=torch.zeros(8, 8))
    for suspicion in (Suspicion((5,), (0.01,)), Suspicion.of_triggers([idle])):
        out = run("neural_cleanse", planted((2,)), BLOCKS, options=NC, suspicion=suspicion)
        assert out.evidence["target"] == 5  # although class 2 is reached first
    assert len(made) == 2
    assert any("searched anew" in text for text in out.evidence["remarks"])
    # What the user asks for stands above what is suspected.
    asked = run("neural_cleanse", planted((2,)), BLOCKS, options={**NC, "target": 2}, suspicion=suspicion)
    assert asked.evidence["target"] == 2


def test_neural_cleanse_goes_on_in_the_form_of_the_trigger() -> None:
    blend = RecoveredTrigger(2, torch.full((1, 8, 8), -0.9), None)
    for options, form in ((NC, "blend"), ({**NC, "form": "patch"}, "patch")):
        out = run(
            "neural_cleanse", planted((2,)), BLOCKS, options=options, suspicion=Suspicion.of_triggers([blend])
        )
        assert out.evidence["form"] == form
