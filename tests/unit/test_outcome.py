"""What a repair achieved: in doubt the worse, and "repaired" only where several searches find nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unbackdoor
from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit import outcome as judging
from unbackdoor.audit.comparison import Accuracy
from unbackdoor.audit.outcome import Evidence, Outcome, Searched, conclude, search_anew
from unbackdoor.audit.purifying import repaired_classes
from unbackdoor.cli.app import app
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import grubbs, named_beforehand
from unbackdoor.errors import MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import DEFENSES
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Purified

RUN = Run.create(policy="fp32")
IMAGES = block_data(64, seed=5)
DATA = CleanData(IMAGES, IMAGES)
CLOSED = Searched("a patch", (2,), ())
SILENT = Searched("a blend", (), ())
FAILED = Searched("a blend", failed="there was no time")
WORKED, WORKS, FAINT, GONE, NEVER = (Rate(hits, 100) for hits in (90, 70, 30, 3, 40))


def lost(count: int) -> Accuracy:
    whole = Rate(200, 200)
    return Accuracy(whole, Rate(200 - count, 200), count, 0, Rate(200 - count, 200), ())


@pytest.mark.parametrize(
    ("verdict", "evidence"),
    [
        ("nothing was done", Evidence(False, (CLOSED, SILENT), ((2, WORKED, GONE),))),
        # Two kinds of search find nothing any more, and one of them did, or a trigger worked.
        ("repaired", Evidence(True, (CLOSED, SILENT))),
        ("repaired", Evidence(True, (SILENT, SILENT), ((2, WORKED, GONE),))),
        ("repaired", Evidence(True, (CLOSED, CLOSED), ((2, WORKED, GONE),), (0.9, 0.2), lost(3))),
        # A residual success of a recovered trigger is never enough for it.
        ("weakened", Evidence(True, (), ((2, WORKED, GONE),))),
        ("weakened", Evidence(True, (SILENT,), ((2, WORKED, GONE),))),
        ("weakened", Evidence(True, (CLOSED, FAILED), ((2, WORKED, GONE),))),
        # What was unlearned, or the trigger that led it, did not generalise.
        ("weakened", Evidence(True, (CLOSED, SILENT), (), (0.34,))),
        ("weakened", Evidence(True, (CLOSED, SILENT), ((2, NEVER, GONE),))),
        ("weakened", Evidence(True, (CLOSED, SILENT), ((2, WORKED, GONE),), (0.1, 0.2))),
        # What was suspected was seen by nothing; what was seen is another class.
        ("weakened", Evidence(True, (CLOSED, SILENT), suspected=(5,))),
        ("weakened", Evidence(True, (CLOSED, SILENT), ((2, WORKED, GONE),), suspected=(2, 5))),
        ("repaired", Evidence(True, (CLOSED, SILENT), ((5, WORKED, GONE),), suspected=(2, 5))),
        # The task is damaged.
        ("weakened", Evidence(True, (CLOSED, SILENT), (), (), lost(60))),
        # Something is left.
        ("weakened", Evidence(True, (replace(CLOSED, after=(2,)), SILENT))),
        ("weakened", Evidence(True, (CLOSED, replace(SILENT, after=(5,))))),
        ("weakened", Evidence(True, (CLOSED, SILENT), ((2, WORKED, FAINT),))),
        ("weakened", Evidence(True, (CLOSED, SILENT), ((2, NEVER, FAINT),))),
        # It is as it was.
        ("not repaired", Evidence(True, (replace(CLOSED, after=(2,), as_easily=(2,)), SILENT))),
        ("not repaired", Evidence(True, (CLOSED, SILENT), ((2, WORKED, WORKS),))),
        ("not repaired", Evidence(True, (CLOSED, SILENT), ((1, WORKED, GONE), (2, WORKED, WORKS)))),
        # Nothing was known before.
        ("undecided", Evidence(True, (SILENT, SILENT))),
        ("undecided", Evidence(True)),
        ("undecided", Evidence(True, (FAILED, FAILED), ((2, NEVER, GONE),))),
        ("undecided", Evidence(True, (SILENT, SILENT), ((2, Rate(0, 0), Rate(0, 0)),))),
    ],
)
def test_the_rule(verdict: str, evidence: Evidence) -> None:
    done = conclude(evidence)
    assert done.verdict == verdict
    assert done.reasons and all(text.endswith(".") for text in done.reasons)
    assert not evidence.changed or len(done.reasons) > len(evidence.searches)


def test_no_single_kind_of_evidence_says_repaired() -> None:
    """Of everything that a repair can show, each piece by itself is too little."""
    alone = [
        Evidence(True, (CLOSED,)),
        Evidence(True, (SILENT, SILENT, SILENT)),
        Evidence(True, (), ((1, WORKED, Rate(0, 100)), (2, WORKED, Rate(0, 100)))),
        Evidence(True, (), (), (1.0, 1.0)),
        Evidence(True, (), (), (), lost(0)),
    ]
    assert all(conclude(one).verdict != "repaired" for one in alone)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_STARTS", 2)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search finds the class before and nothing after."""
    searches = {name: lambda *_, name=name: Searched(name, (2,)) for name in ("a patch", "a blend")}
    monkeypatch.setattr(judging, "SEARCHES", searches)


# ---------------------------------------------------------------------------------------------------
# The searches, on networks whose backdoor is written by hand


def scaled(model: Classifier, factor: float, label: int = 2, column: int = 8) -> Classifier:
    """Return a copy in which one weight is multiplied; by default the backdoor's of ``planted((2,))``."""
    out = model.copy()
    with torch.no_grad():
        out.network.fc.weight[label, column] *= factor  # type: ignore[union-attr,operator,index]
    return out


def only(model: Classifier, label: int) -> Classifier:
    """Return ``planted((2, 5))`` with one of its two backdoors."""
    return scaled(model, 0.0, 7 - label, 8 if label == 5 else 9)


@pytest.mark.parametrize(
    ("before", "after", "found", "left", "easily"),
    [
        (planted((2,)), planted(), {2}, set(), set()),
        (planted((2,)), scaled(planted((2,)), 0.99), {2}, {2}, {2}),
        (planted((2,)), scaled(planted((2,)), 0.4), {2}, {2}, set()),  # a larger one does it still
        (planted((2, 5)), only(planted((2, 5)), 5), {2, 5}, {5}, {5}),
        (only(planted((2, 5)), 2), only(planted((2, 5)), 5), {2}, {5}, set()),  # the repair opens another
    ],
)
def test_triggers_are_found_before_and_after(
    quick: None, before: Classifier, after: Classifier, found: Any, left: Any, easily: Any
) -> None:
    states = before.sha256(), after.sha256()
    for one in search_anew(before, after, DATA, (), RUN):
        if one.search == judging.BESIDE_TWIN:  # which asks about suspected classes
            assert "no class was suspected" in one.failed
            continue
        assert not one.failed
        if one.search == judging.SQUARES:  # a plain square is not each of these backdoors' way in
            assert set(one.before) <= found and set(one.after) <= left and set(one.as_easily) <= left
        else:
            assert (set(one.before), set(one.after)) == (found, left)
            # No patch is smaller than a pixel, and a weaker backdoor may need no more than one as well.
            upper = left if one.search == judging.NAMES["patch"] else easily
            assert easily <= set(one.as_easily) <= upper
        json.dumps(dict(one.facts), allow_nan=False)
    assert (before.sha256(), after.sha256()) == states
    assert not before.training and not after.training


@pytest.mark.parametrize(
    ("before", "after", "suspected", "found", "left"),
    [
        (planted((2,)), planted(), (2,), (2,), ()),
        (planted((2, 5)), planted(), (5, 2), (5, 2), ()),
        (planted((2, 5)), only(planted((2, 5)), 5), (2, 5), (2, 5), (5,)),
        (planted((2,)), scaled(planted((2,)), 0.99), (2,), (2,), (2,)),
        (only(planted((2, 5)), 2), only(planted((2, 5)), 5), (5,), (), (5,)),  # the repair opens it
        (planted(), planted(), (2,), (), ()),
    ],
)
def test_beside_a_twin_suspected_classes_are_found_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
    before: Classifier,
    after: Classifier,
    suspected: Any,
    found: Any,
    left: Any,
) -> None:
    monkeypatch.setattr(judging, "SEARCHES", {judging.BESIDE_TWIN: judging.search_beside_a_twin})
    (one,) = search_anew(before, after, DATA, suspected, RUN)
    assert (one.failed, one.before, one.after) == ("", found, left)
    assert set(one.as_easily) == set(found) & set(left)
    assert one.facts["classes"] == list(suspected) and len(one.facts["gaps_after"]) == len(suspected)


def test_beside_a_twin_few_classes_can_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SEARCHES", {judging.BESIDE_TWIN: judging.search_beside_a_twin})
    images = CleanData(tiny_data(16), tiny_data(16))
    (one,) = search_anew(tiny_classifier(), tiny_classifier(), images, (1,), RUN)
    assert "fewer than" not in one.failed


@pytest.mark.parametrize(
    ("said", "classes"),
    [
        ({"targets": [3, 1]}, (3, 1)),
        ({"target": 2}, (2,)),
        ({"targets": []}, ()),
        ({"targets": [-1, 8, True, "2", 1.0, None]}, ()),
        ({"target": None}, ()),
        ({}, ()),
    ],
)
def test_the_classes_that_a_method_acted_on_are_judged(said: dict[str, Any], classes: Any) -> None:
    assert repaired_classes(said, 8) == classes


def test_each_search_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow one does not take the time of those behind it."""
    clock = [100.0]

    def slow(*_: Any) -> Searched:
        (*_, run) = _
        for _step in run.show(range(1000), "steps", None):
            clock[0] += 1
        return Searched("slow")

    monkeypatch.setattr(judging, "now", lambda: clock[0])
    monkeypatch.setattr(judging, "end_of", lambda seconds: clock[0] + seconds)
    monkeypatch.setattr(judging, "watched", lambda end: nullcontext())
    monkeypatch.setattr(judging, "SEARCHES", {"slow": slow, "quick": lambda *_: Searched("quick", (1,))})
    one, other = search_anew(planted(), planted(), DATA, (), RUN, seconds=60)
    assert "over" in one.failed and other.before == (1,)


def test_labels_are_not_shown_and_the_draws_are_not_those_of_the_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, int]] = []

    def look(before: Any, after: Any, data: Any, suspected: Any, run: Run) -> Searched:
        seen.append((data.fit.labels, data.select.labels, run.seed))
        assert suspected == (4,)
        return Searched("a look")

    monkeypatch.setattr(judging, "SEARCHES", {"a look": look})
    for seed in (0, 1):
        search_anew(planted(), planted(), DATA, (4,), replace(RUN, seed=seed))
    assert [labels for *labels, _ in seen] == [[None, None], [None, None]]
    assert len({0, 1, *(seed for *_, seed in seen)}) == 4


@pytest.mark.parametrize("error", [MethodFailed("no"), RuntimeError("out of memory"), MemoryError()])
def test_what_goes_wrong_in_a_search_is_its_result(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> Searched:
        raise error

    monkeypatch.setattr(judging, "SEARCHES", {"one": fail, "other": lambda *_: Searched("other", (1,))})
    one, other = search_anew(planted(), planted(), DATA, (), RUN)
    assert one.failed and one.search == "one" and other.before == (1,)


def test_few_classes_no_time_and_a_network_that_is_no_more_come_to_no_answer(quick: None) -> None:
    few_images = CleanData(tiny_data(20), tiny_data(20))
    few = search_anew(tiny_classifier(), tiny_classifier(), few_images, (), RUN)
    assert all("fewer than 6 classes" in one.failed for one in few if one.search != judging.BESIDE_TWIN)
    late = search_anew(planted((2,)), planted(), DATA, (), RUN, seconds=1e-9)
    assert all("time" in one.failed for one in late)
    broken = planted((2,))
    with torch.no_grad():
        broken.network.fc.weight.zero_()
    ruined = search_anew(planted((2,)), broken, DATA, (), RUN)
    others = [one for one in ruined if one.search not in (judging.SQUARES, judging.BESIDE_TWIN)]
    assert all("to one class" in one.failed for one in others)


def test_a_class_named_beforehand_needs_less_evidence_than_the_smallest_of_many() -> None:
    numbers = [1.0, 1.2, 0.8, 1.1, 0.9, 1.05, 0.95, 0.5]
    _, corrected = grubbs(numbers, 7)
    assert 8 * named_beforehand(numbers, 7) == pytest.approx(corrected)
    assert named_beforehand(numbers, 1) > 0.5
    assert named_beforehand([1.0, 1.0, 0.5], 2) == 0.0 and named_beforehand([1.0, 1.0, 1.0], 2) == 1.0


# ---------------------------------------------------------------------------------------------------
# The verb


OPENED: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of four classes, which are too few for the searches, and images."""
    torch.save({"net": dict(tiny_classifier().network.state_dict())}, tmp_path / "model.pth")
    images = tiny_data(80, seed=11)
    labels, names = images.truth.numpy(), np.array(images.class_names)
    np.savez(tmp_path / "clean.npz", images=images.pixels.numpy()[:, 0], labels=labels, class_names=names)
    return tmp_path / "model.pth", tmp_path / "clean.npz"


def command(files: tuple[Path, Path], folder: Path, method: str, *more: str | Path) -> Any:
    opened = ("--arch", OPENED["arch"], "--mean", "0.35", "--std", "0.25")
    typed = ("purify", files[0], "--data", files[1], "--method", method, "--out", folder / "out.pth")
    return CliRunner().invoke(app, [*map(str, (*typed, *opened, *more))])


def surgeon(operate: Callable[[Any], Any], **evidence: Any) -> Any:
    """Return a method that changes the head of a planted network by hand."""

    def purify(model: Classifier, data: Any, cfg: Any, *, run: Any) -> Purified:
        with torch.no_grad():
            operate(model.network.fc.weight)  # type: ignore[union-attr]
        return Purified(model, evidence)

    return replace(DEFENSES["none"], name="surgeon", function=purify)


def cut(weight: Any) -> None:
    weight[2, 8] = 0


def corner(label: int, **more: Any) -> RecoveredTrigger:
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1.0
    return RecoveredTrigger(label, torch.zeros(1, 8, 8), mask, **more)


def purified(
    operate: Callable[[Any], Any] = cut, evidence: dict[str, Any] | None = None, **options: Any
) -> Any:
    part = surgeon(operate, **(evidence or {}))
    return unbackdoor.purify(planted((2,)), block_data(160), part, **options)


def test_a_repair_that_works_is_called_that_and_one_that_does_not_is_not(quick: None) -> None:
    good = purified(triggers=[corner(2)])
    assert good.outcome.verdict == "repaired", good.outcome
    told = good.to_dict()["outcome"]
    assert told["verdict"] == "repaired" and len(told["searches"]) == len(judging.SEARCHES)
    assert told["searches"][0]["found_before"] == [{"index": 2, "name": "block 2"}]
    # It was called repaired at an attack success of 100 %.
    idle = purified(lambda weight: weight[2, 8].mul_(0.97), triggers=[corner(2)])
    assert idle.outcome.verdict == "not repaired"
    nothing = purified(lambda weight: None)
    assert nothing.outcome.verdict == "nothing was done" and nothing.outcome.searches == ()


def test_what_was_unlearned_must_have_generalised(closed: None) -> None:
    for shares, verdict in (([0.9], "repaired"), (0.8, "repaired"), ([0.3], "weakened"), (0.2, "weakened")):
        assert purified(evidence={"held_out_success": shares}).outcome.verdict == verdict
    for nonsense in ("all", [None, "x"], [7], float("nan"), {"a": 1}):  # a method may be of anybody
        assert purified(evidence={"held_out_success": nonsense}).outcome.verdict == "repaired"
    # A trigger that its scan tried on images that it was not made from.
    poor = purified(triggers=[corner(2, success=0.34)])
    assert poor.outcome.verdict == "weakened" and any("it is poor" in text for text in poor.outcome.reasons)


def test_without_time_nothing_is_called_repaired(quick: None) -> None:
    assert purified(triggers=[corner(2)], search_budget=1e-9).outcome.verdict == "weakened"
    assert purified(search_budget=1e-9).outcome.verdict == "undecided"


def test_the_page_says_what_was_achieved(closed: None, tmp_path: Any) -> None:
    page = purified().save_report(tmp_path / "good").read_text()
    assert "Repaired: no trigger is found any more" in page and "A new search for a patch" in page
    bad = (
        purified(lambda weight: weight[2, 8].mul_(0.97), triggers=[corner(2)])
        .save_report(tmp_path / "bad")
        .read_text()
    )
    assert "Not repaired" in bad and "was repaired by" not in bad


CODES = {"repaired": 0, "not repaired": 1, "weakened": 4, "undecided": 4, "nothing was done": 4}


@pytest.mark.parametrize("verdict", CODES)
def test_the_command_says_it_and_returns_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path], tmp_path: Path, verdict: Any
) -> None:
    from unbackdoor.audit import purifying

    said = Outcome(verdict, ("Because of this.",))
    monkeypatch.setattr(purifying, "conclude", lambda evidence: said)
    outcome = command(files, tmp_path, "none", "--report", tmp_path / "report")
    assert outcome.exit_code == CODES[verdict], outcome.output
    printed = " ".join(outcome.stdout.split())
    assert f"Outcome: {verdict}. Because of this." in printed
    assert f"Report: {tmp_path}/report/report.html" in printed.replace("/ ", "/")
    assert (tmp_path / "out.pth").exists()
    for scan in (tmp_path / "report", tmp_path / "report" / "result.json"):
        lost = command(files, tmp_path, "none", "--force", "--report", tmp_path / "report", "--scan", scan)
        assert lost.exit_code == 2 and "would replace an input" in " ".join(lost.stderr.split())
    again = command(files, tmp_path, "none", "--json", "--force")
    assert json.loads(again.stdout)["outcome"]["verdict"] == verdict
    assert again.exit_code == CODES[verdict]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_promise_writes_its_report_and_no_model(
    files: tuple[Path, Path], tmp_path: Path, as_json: bool
) -> None:
    harsh = ("--set", "tolerance=1", "--set", "step=0.1", "--max-accuracy-drop", "0")
    outputs = ("--report", tmp_path / "report", "--patch", tmp_path / "p")
    outcome = command(files, tmp_path, "random_prune", *harsh, *outputs, *(["--json"] if as_json else []))
    assert outcome.exit_code == 1 and "thrown away" in " ".join(outcome.stderr.split())
    record = json.loads((tmp_path / "report" / "result.json").read_text())
    assert record["promise"]["kept"] is False and record["outcome"]["verdict"] == "not repaired"
    assert "is broken" in (tmp_path / "report" / "report.html").read_text()
    assert "model" not in record and "patch" not in record
    assert {path.name for path in tmp_path.iterdir()} == {"report", "model.pth", "clean.npz"}
    if as_json:
        assert json.loads(outcome.stdout) == record
    else:
        assert "is broken" in " ".join(outcome.stdout.split()) and "Report:" in outcome.stdout


def test_what_was_refused_can_be_looked_at_and_not_be_saved(files: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"tolerance": 1.0, "step": 0.1}
    model, data = files
    with pytest.raises(unbackdoor.PromiseBroken) as caught:
        unbackdoor.purify(model, data, "random_prune", options=options, max_accuracy_drop=0.0, **OPENED)
    refused = caught.value.refused
    assert refused.promise is not None and refused.promise.kept is False
    assert refused.save_report(tmp_path / "report").exists()
    for write in (refused.save, refused.save_patch):
        with pytest.raises(unbackdoor.PromiseBroken, match="thrown away"):
            write(tmp_path / "out.pth", force=True)
    assert not (tmp_path / "out.pth").exists()


def test_the_loss_is_called_what_it_is() -> None:
    images, own = tiny_data(80), tiny_data(40, seed=3)
    model = tiny_classifier()
    wrong = replace(own, labels=(own.truth + (torch.arange(40) < 8)) % 4)
    assert unbackdoor.purify(model, images, "none").loss_bias == "pessimistic"  # all right
    assert unbackdoor.purify(model, images, "none", proof=wrong).loss_bias == "fair"
    assert unbackdoor.purify(model, wrong, "none", proof=wrong).loss_bias == "flattered"
    assert unbackdoor.purify(model, tiny_data(8), "none").loss_bias == "unknown"
    told = unbackdoor.purify(model, images, "none").to_dict()
    assert told["accuracy_loss_is"] == "pessimistic" and told["accuracy_flattered_because"]


def test_without_a_method_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch, files: tuple[Path, Path], tmp_path: Path
) -> None:
    from unbackdoor.audit import purifying

    assert purifying.DEFAULT_METHOD == "auto"
    monkeypatch.setattr(purifying, "DEFAULT_METHOD", "none")
    assert unbackdoor.purify(tiny_classifier(), tiny_data(40)).purified.method["name"] == "none"
    files[0].with_name("x").mkdir()
    typed = ("purify", files[0], "--data", files[1], "--out", tmp_path / "x" / "out.pth", "--json")
    outcome = CliRunner().invoke(app, [*map(str, typed), "--arch", OPENED["arch"]])
    assert json.loads(outcome.stdout)["method"]["name"] == "none"
