"""The audit: a plan first, a budget that holds, steps that end alone, and one folder with everything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unbackdoor
from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor import confinement
from unbackdoor.audit import auditing, cost, scanning
from unbackdoor.audit.checks import Check
from unbackdoor.audit.cost import Cost
from unbackdoor.audit.outcome import Outcome
from unbackdoor.audit.steps import Step, Steps
from unbackdoor.cli.app import app
from unbackdoor.cli.audit import outcome
from unbackdoor.cli.steps import step_rows
from unbackdoor.engine import canonical_form
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError, MethodFailed, UnbackdoorError
from unbackdoor.metrics import Rate
from unbackdoor.registry import DEFENSES, SCANNERS, Config, defense, scanner
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, Purified, ScanReport
from unbackdoor.weights.patch import read_patch

OPTIONS: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
TYPED = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25"]


@pytest.fixture(autouse=True)
def _no_strangers() -> Iterator[None]:
    list(SCANNERS), list(DEFENSES)
    before = dict(SCANNERS._parts), dict(DEFENSES._parts)
    yield
    for registry, parts in zip((SCANNERS, DEFENSES), before, strict=True):
        registry._parts.clear()
        registry._parts.update(parts)  # type: ignore[arg-type]


def only(*names: str) -> None:
    for name in [name for name in SCANNERS if name not in names]:
        del SCANNERS._parts[name]


def says(name: str, p_value: float, label: int = 3, *, place: float = 10, raises: Any = None) -> str:
    """Register a check that says the same of every model."""

    def look(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        for _ in run.progress(range(2), "looking"):
            pass
        if raises is not None:
            raise raises
        finding = Finding(
            "size", 1.0, "small: easily reached", 0.5, "made up", p_value, (label,),
            tuple(1.0 if k == label else 4.0 + k for k in range(model.classes)),
        )  # fmt: skip
        return ScanReport(
            "backdoor found" if p_value < 0.05 else "no evidence found", (finding,), coverage=("size",)
        )

    look.__module__ = f"{__name__}.{name}"
    scanner(name, config=Config, question=f"What does {name} say?", cost=place)(look)
    return name


def mends(name: str = "mends", raises: Any = None) -> str:
    """Register a defense that takes the corners out of the planted network."""

    def purify(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> Purified:
        if raises is not None:
            raise raises
        with torch.no_grad():
            model.network.fc.weight[:, 8:] = 0  # type: ignore[union-attr, operator, index]
        return Purified(model)

    purify.__module__ = f"{__name__}.{name}"
    defense(name, config=Config)(purify)
    return name


class Watching:
    """A progress display that keeps what it is told of the steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def __call__(self, items: Any, label: str, total: int | None = None) -> Any:
        return items

    def show_steps(self, steps: Any, end: float | None) -> None:
        self.seen.append({step.name: step.status for step in steps})


def statuses(done: unbackdoor.Assessment) -> dict[str, str]:
    return {step.name: step.status for step in done.steps}


# ---------------------------------------------------------------------------------------------------
# What it does


def test_a_backdoor_is_found_recovered_repaired_and_verified() -> None:
    watching = Watching()

    def sees(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        images = data.fit.pixels.float() / 255
        with torch.no_grad():
            clean = model(images).mean(0)  # (K,)
            images[:, :, 0, 0] = 0
            weight = model(images).mean(0) - clean
        p_value = 1e-4 if float(weight.abs().max()) > 5 else 0.7
        finding = Finding(
            "weight", float(weight.max()), "large: a corner", 9.0, "made up", p_value,
            (int(weight.argmax()),), tuple(weight.tolist()),
        )  # fmt: skip
        return ScanReport("backdoor found" if p_value < 0.05 else "no evidence found", (finding,))

    scanner("corners", config=Config, question="Do corners decide?", cost=10)(sees)
    only("corners", says("quiet", 0.8, place=20))
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(), progress=watching)
    assert (done.verdict, done.classes) == ("backdoor found", (3,))
    assert done.purification is not None and done.outcome == done.purification.outcome.verdict
    assert set(statuses(done).values()) == {"done"}
    assert [step.name for step in done.steps] == [
        "open", "corners", "trigger", "quiet", "repair", "verify",
    ]  # the trigger as soon as a class is suspected  # fmt: skip
    assert [t.label for t in done.triggers] == [3] and done.success[0].value == 1
    (residue,) = done.residues
    assert residue.before.value == 1 and residue.after.value == 0
    assert done.verification is not None and done.verification.after.verdict == "no evidence found"
    assert done.accuracy == Rate(80, 80) and done.checks_done == (2, 2) and not done.partial
    assert outcome(done) == 1, "a repaired copy does not make the model a good one"
    judged = replace(done.purification, outcome=Outcome("repaired", ()))
    assert replace(done, purification=judged).outcome == "repaired"
    accused = replace(done.verification, after=done.verification.before)
    assert replace(done, purification=judged, verification=accused).outcome == "weakened"
    # The first thing that is told are all steps, and none has begun.
    assert set(watching.seen[0].values()) == {"to come"} and len(watching.seen[0]) == 6


def test_nothing_is_repaired_without_evidence() -> None:
    only(says("quiet", 0.6))
    done = unbackdoor.audit(planted(), block_data(80), mends())
    assert (done.verdict, done.outcome, done.purification) == ("no evidence found", None, None)
    assert statuses(done) == {
        "open": "done", "quiet": "done", "trigger": "left out", "repair": "left out", "verify": "left out",
    }  # fmt: skip
    assert outcome(done) == 0


def corner(label: int = 3, value: float = 0.0) -> RecoveredTrigger:
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    return RecoveredTrigger(label, torch.full((1, 8, 8), value), mask, "brought")


def test_a_trigger_that_was_brought_and_works_is_reason_enough() -> None:
    only(says("quiet", 0.6))
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(), triggers=[corner()])
    assert done.verdict == "no evidence found" and done.purification is not None
    assert done.residues[0].after.value == 0 and done.residues[0].trigger.check == "brought"
    other = unbackdoor.audit(planted((3,)), block_data(80), mends(), triggers=[corner(5, 1.0)])
    assert other.purification is None and other.success[0].value < 0.5


def test_a_copy_that_still_follows_the_trigger_is_not_repaired() -> None:
    only(says("sure", 1e-6))

    def harmless(model: Any, data: Any) -> None:
        with torch.no_grad():
            model.network.fc.bias += 0.01

    done = unbackdoor.audit(planted((3,)), block_data(80), harmless)
    assert done.outcome == "not repaired" and statuses(done)["verify"] == "done"
    assert unbackdoor.audit(planted((3,)), block_data(80), "none").outcome == "nothing was done"


def test_a_broken_promise_keeps_what_was_measured_and_writes_no_model(tmp_path: Path) -> None:
    only(says("sure", 1e-6))

    def ruin(model: Any, data: Any) -> None:
        with torch.no_grad():
            model.network.fc.weight.neg_()

    done = unbackdoor.audit(planted((3,)), block_data(80), ruin, max_accuracy_drop=5)
    assert statuses(done)["repair"] == "failed" and statuses(done)["verify"] == "left out"
    record = done.to_dict()["repair"]
    assert record["promise"]["kept"] is False and done.outcome == "not repaired"
    page = done.save_report(tmp_path / "out").read_text()
    assert "Do not deploy" in page and not list((tmp_path / "out").glob("repaired*"))


@pytest.mark.parametrize("error", [MethodFailed("it diverged"), RuntimeError("broke")])
def test_a_repair_that_fails_ends_itself_alone(error: Exception) -> None:
    only(says("sure", 1e-6))
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(raises=error))
    assert done.verdict == "backdoor found" and done.purification is None
    step = next(step for step in done.steps if step.name == "repair")
    assert step.status == "failed" and str(error).split()[0] in step.result
    assert statuses(done)["verify"] == "left out" and outcome(done) == 1


def test_a_check_that_crashes_leaves_the_others() -> None:
    only(says("broken", 0.5, raises=RuntimeError("broke")), says("quiet", 0.6, place=20))
    done = unbackdoor.audit(planted(), block_data(80), mends())
    assert statuses(done)["broken"] == "failed" and statuses(done)["quiet"] == "done"
    assert done.verdict == "undecided" and outcome(done) == 2


@pytest.mark.parametrize("where", ["check", "repair"])
def test_what_was_found_is_kept_when_it_is_interrupted(where: str, tmp_path: Path) -> None:
    stop = KeyboardInterrupt()
    only(says("sure", 1e-6), says("second", 0.5, place=20, raises=stop if where == "check" else None))
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(raises=stop if where == "repair" else None))
    assert done.interrupted and done.verdict == "backdoor found"
    assert statuses(done)["sure"] == "done" and statuses(done)["verify"] == "interrupted"
    assert done.save_report(tmp_path / "out").exists()


def test_labels_are_not_needed_to_find_it() -> None:
    images = replace(block_data(80), labels=None)
    done = unbackdoor.audit(planted((3,)), images, checks="weight_statistics", method="neural_cleanse")
    assert done.verdict == "backdoor found" and done.accuracy is None
    assert done.success[0].value == 1
    (repair,) = [step for step in done.steps if step.name == "repair"]
    assert repair.status == "left out" and "no labels" in repair.result


def test_without_images_what_needs_them_is_left_out(tmp_path: Path) -> None:
    only("weight_statistics", "tac")
    done = unbackdoor.audit(planted((3,)), None, mends())
    assert statuses(done) == {
        "open": "done", "weight_statistics": "done", "tac": "left out", "trigger": "left out",
        "repair": "left out", "verify": "left out",
    }  # fmt: skip
    assert "Do not deploy" in done.save_report(tmp_path / "out").read_text()


# ---------------------------------------------------------------------------------------------------
# The plan and the budget


def test_the_plan_alone_computes_nothing() -> None:
    only(says("sure", 1e-6))
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(), plan=True)
    assert done.planned_only and done.scan is None and done.verdict == "undecided"
    assert statuses(done) == {
        "open": "done",
        **dict.fromkeys(("sure", "trigger", "repair", "verify"), "to come"),
    }
    assert all(step.estimate is not None for step in done.steps[1:])
    assert done.to_dict()["scan"] is None
    with pytest.raises(InputError, match="nothing was audited"):
        done.save_report("nowhere")


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(confinement, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def costing(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every pass of an image take so many seconds by the estimate."""
    monkeypatch.setattr(auditing, "measured", lambda model, images, run: Cost(seconds, 8, len(images)))


def test_checks_that_cannot_end_in_time_are_left_out_and_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(says("cheap", 0.6, place=10), says("dear", 1e-9, place=40))
    costing(monkeypatch, 0.01)  # 80 passes, and 43,000 times 3 of them
    done = unbackdoor.audit(planted(), block_data(80), mends(), budget=300)
    assert statuses(done)["cheap"] == "done"
    (dear,) = [step for step in done.steps if step.name == "dear"]
    assert dear.status == "left out" and "it takes about 22 min, and 5 min were left" in dear.result
    assert done.verdict == "undecided" and done.partial and done.checks_done == (1, 2)
    assert done.scan is not None and done.scan.checks[1].status == "out of budget"
    assert any("dear" in reason and "22 min" in reason for reason in done.reasons)
    assert outcome(done) == 2


def test_the_time_of_a_repair_is_kept_back_once_a_class_is_suspected(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(says("sure", 1e-6, place=10), says("dear", 0.6, place=40))
    costing(monkeypatch, 0.001)  # the dear check takes 129 s, a repair 116 s; two thirds are enough
    left_out = unbackdoor.audit(planted((3,)), block_data(80), mends(), budget=150)
    assert statuses(left_out)["dear"] == "left out" and statuses(left_out)["repair"] == "done"
    room = unbackdoor.audit(planted((3,)), block_data(80), "mends", budget=800)
    assert statuses(room)["dear"] == "done"
    only("dear", says("calm", 0.6, place=11))
    unsuspected = unbackdoor.audit(planted((3,)), block_data(80), "mends", budget=150)
    assert statuses(unsuspected)["dear"] == "done"


def test_a_budget_that_is_spent_keeps_what_was_found(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    only(says("sure", 1e-6))
    costing(monkeypatch, 1e-6)

    def slow(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> Purified:
        clock.seconds += 1000
        model(data.fit.pixels.float() / 255)
        return Purified(model)

    slow.__module__ = f"{__name__}.slow"
    defense("slow", config=Config)(slow)
    done = unbackdoor.audit(planted((3,)), block_data(80), "slow", budget=100)
    assert done.verdict == "backdoor found" and done.purification is None
    (repair,) = [step for step in done.steps if step.name == "repair"]
    assert repair.status == "left out" and "budget was spent" in repair.result
    assert statuses(done)["trigger"] == "done" and statuses(done)["verify"] == "left out"


def test_a_search_for_a_trigger_is_shortened_or_left_out(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(says("sure", 1e-6))
    asked: list[int] = []
    real = auditing.invert

    def counted(model: Any, images: Any, classes: Any, cfg: Any, run: Any) -> Any:
        asked.append(cfg.steps)
        return real(model, images, classes, cfg, run)

    monkeypatch.setattr(auditing, "invert", counted)
    costing(monkeypatch, 0.01)  # 288 s for all 300 steps
    unbackdoor.audit(planted((3,)), block_data(80), mends(), budget=300)
    (steps,) = asked
    assert cost.FEWEST_RECOVERY_STEPS <= steps < cost.MOST_RECOVERY_STEPS
    done = unbackdoor.audit(planted((3,)), block_data(80), mends(), budget=40)
    assert len(asked) == 1 and statuses(done)["trigger"] == "left out"


def test_a_slow_network_is_timed_on_one_image(clock: Clock) -> None:
    model, seen = planted(), []

    def slow(module: Any, inputs: Any) -> None:
        seen.append(len(inputs[0]))
        clock.seconds += 2.0 * len(inputs[0])

    handle = model.network.register_forward_pre_hook(slow)  # type: ignore[union-attr]
    assert cost.measured(model, block_data(40), Run.create(policy="fp32")).seconds == 2.0 and seen == [1]
    handle.remove()


def test_the_form_of_a_slow_network_is_within_the_budget(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of it went on for minutes after the end."""
    only(says("quiet", 0.6))
    costing(monkeypatch, 1e-9)
    model, passes = planted(), []

    def slow(module: Any, inputs: Any) -> None:
        passes.append(1)
        clock.seconds += 1000

    monkeypatch.setattr(auditing._Work, "accuracy", lambda self: None)
    monkeypatch.setattr(
        scanning, "form_for_checks", lambda m, data, run: (slow(m, None), m(data.all.pixels / 255))
    )
    done = unbackdoor.audit(model, block_data(40), mends(), budget=100)
    assert done.verdict == "undecided" and passes == [1] and statuses(done)["quiet"] == "left out"


def wide(classes: int = 1000, side: int = 32) -> Classifier:
    """Return a small network with as many classes as the large ones have."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(32, classes),
        )  # fmt: skip
        network[4].bias.zero_()
    return Classifier(network, input_shape=(3, side, side), class_names=tuple(map(str, range(classes))))


def test_a_slow_network_with_a_thousand_classes_gets_its_cheap_checks(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of the network and a pass over all images took the whole budget: no check was done."""
    model, each = wide(), 0.15  # seconds of an image, as a 224-pixel ResNet-50 takes of one processor

    def slow(module: Any, inputs: Any) -> None:
        clock.seconds += each * len(inputs[0])

    torch.nn.Module.register_forward_pre_hook(model.network[0], slow)  # type: ignore[index, arg-type]
    draws = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (1000, 3, 1, 1), generator=draws, dtype=torch.uint8)
    pixels = colours.expand(-1, -1, 32, 32).contiguous()  # plain ones, so that many classes are answered
    images = unbackdoor.Images(pixels, torch.arange(1000), model.class_names, "a thousand")
    done = unbackdoor.audit(model, images, mends(), budget=300, device="cpu")
    said = statuses(done)
    cheap = ("logit_leak", "recall", "weight_statistics")
    assert [said[name] for name in cheap] == ["done"] * 3, {s.name: s.result for s in done.steps}
    assert said["neural_cleanse"] == said["mm_bd"] == "left out"
    assert clock.seconds <= 300 + each * 32
    assert done.scan is not None and done.scan.facts["images"] < 1000
    assert any("of the 1000 images" in reason for reason in done.reasons)
    assert any("neural_cleanse" in reason for reason in done.reasons)  # what was left out is named


def test_all_images_are_looked_at_where_the_time_allows(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(says("quiet", 0.6))
    costing(monkeypatch, 0.01)
    done = unbackdoor.audit(planted(), block_data(80), mends(), budget=300)
    assert done.scan is not None and done.scan.facts["images"] == 80
    assert not any("looked at" in reason for reason in done.reasons)


def test_the_images_for_the_cheap_checks_fit_into_their_time() -> None:
    checks = [Check(says(f"pass_{n}", 0.5, place=n), f"pass_{n}", "") for n in (5, 10, 20)]
    checks.append(Check(says("search", 0.5, place=40), "search", ""))
    for seconds in (0.0, 10.0, 60.0, 1000.0):
        count = Cost(0.1, 1000, 2000).images_within(seconds, checks)
        assert cost.FEWEST_CHECKED <= count <= 2000
        if count > cost.FEWEST_CHECKED:
            assert Cost(0.1, 1000, count).of_cheap(checks) <= seconds
        if count < 2000:
            assert Cost(0.1, 1000, count + 1).of_cheap(checks) > seconds
    assert Cost(0.1, 1000, 7).images_within(0.0, checks) == 7
    assert cost.FORM_IMAGES == canonical_form._IMAGES
    assert len(canonical_form._patterns(planted())) == cost.FORM_PATTERNS


def test_dearer_checks_get_larger_estimates() -> None:
    places = (5, 10, 15, 20, 25, 30, 35, 40)
    checks = [Check(says(f"at_{place}", 0.5, place=place), f"at_{place}", "") for place in places]
    for classes in (2, 10, 1000):
        one = Cost(0.001, classes, 200)
        estimates = [one.of_check(check) for check in checks]
        assert estimates == sorted(estimates) and estimates[0] > 0


# ---------------------------------------------------------------------------------------------------
# What is wrong with the question is said before anything slow


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "missing.pth"}, "missing.pth"),
        ({"data": "missing/"}, "no such file or folder"),
        ({"data": "cifar11"}, "unknown data set"),
        ({"proof": "missing.npz"}, "no such file or folder"),
        ({"triggers": ["missing/trigger-0"]}, "trigger does not exist"),
        ({"triggers": ["missing.png,class=1"]}, "trigger does not exist"),
        ({"triggers": [7]}, "another type"),
        ({"checks": ["tak"]}, "unknown check"),
        ({"checks": []}, "no check was named"),
        ({"options": {"tac": {"levels": 1}}}, "levels"),
        ({"method": "atuo"}, "unknown defense"),
        ({"method": 7}, "another type"),
        ({"method_options": {"nonsense": 1}}, "nonsense"),
        ({"preset": "nonsense"}, "unknown preset"),
        ({"max_accuracy_drop": 400}, "points in 0..100"),
        ({"promise": "firm"}, "no such rule"),
        ({"references": [Path("missing.json")]}, "missing.json"),
        ({"level": 0}, "level does not fit"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_nothing_is_opened_where_the_question_is_wrong(
    arguments: dict[str, Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(auditing, "open_case", opened)
    monkeypatch.setattr(auditing, "open_source", opened)
    given = {"model": planted(), "data": block_data(8), **arguments}
    with pytest.raises(UnbackdoorError, match=error):
        unbackdoor.audit(**given)


@pytest.mark.parametrize(
    "call",
    [
        lambda: unbackdoor.scan("m.pth", "x.npz", checks=["tak"]),
        lambda: unbackdoor.scan("m.pth", "x.npz", references=[Path("missing.json")]),
        lambda: unbackdoor.purify("m.pth", "x.npz", "nonsense"),
        lambda: unbackdoor.purify("m.pth", "x.npz", "fp", options={"nonsense": 1}),
        lambda: unbackdoor.purify("m.pth", "x.npz", "fp", triggers=["missing"]),
        lambda: unbackdoor.purify("m.pth", "x.npz", "fp", max_accuracy_drop=700),
        lambda: unbackdoor.verify("m.pth", "m.pth", "x.npz", checks=["tak"]),
        lambda: unbackdoor.verify("m.pth", "m.pth", "x.npz", triggers=["missing"]),
    ],
)
def test_the_parts_look_at_their_names_and_paths_first_too(
    call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from unbackdoor.audit import cases, verbs

    monkeypatch.chdir(tmp_path)
    for name in ("m.pth", "x.npz"):
        (tmp_path / name).write_bytes(b"not read")

    def opened(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was opened")

    for module, names in ((verbs, ("open_case", "open_pair_sources")), (cases, ("open_model",))):
        for name in names:
            monkeypatch.setattr(module, name, opened)
    with pytest.raises((InputError, ConfigError)):
        call()


# ---------------------------------------------------------------------------------------------------
# One folder, and the command


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    network = tiny_classifier("conv-bn").network
    torch.save({"net": dict(network.state_dict())}, tmp_path / "model.pth")
    images = tiny_data(60, seed=11)
    np.savez(
        tmp_path / "clean.npz",
        images=images.pixels.numpy()[:, 0],
        labels=images.truth.numpy(),
        class_names=np.array(images.class_names),
    )
    return tmp_path / "model.pth", tmp_path / "clean.npz"


def test_one_folder_holds_model_patch_record_and_page(files: tuple[Path, Path], tmp_path: Path) -> None:
    only(says("sure", 1e-6, 2))
    model, data = files
    done = unbackdoor.audit(model, data, "random_prune", **OPTIONS)
    out = tmp_path / "out"
    page = done.save_report(out, command="unbackdoor audit model.pth").read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html", "result.json", "repaired.pth", "repaired.json", "repair.patch", "trigger-0",
    }  # fmt: skip
    record = json.loads((out / "result.json").read_text())
    assert record["verdict"] == "backdoor found" and record["scan"]["verdict"] == "backdoor found"
    assert record["inspection"]["loading"] and record["repair"]["method"]["name"] == "random_prune"
    assert [s["status"] for s in record["steps"]].count("done") == len(record["steps"])
    assert {"guide": "MITRE ATLAS", "id": "AML.T0018"} in record["answers_to"]
    assert record["written"]["model"] == str(out / "repaired.pth")
    assert read_patch(out / "repair.patch")
    for words in ("repaired.pth", "AML.T0020", "C6.1.2", "NISTAML.023", "unbackdoor audit model.pth", "UTC"):
        assert words in page
    repaired = unbackdoor.open_model(out / "repaired.pth", images=data, **OPTIONS).model
    assert done.purification is not None and repaired.sha256() == done.purification.model.sha256()
    with pytest.raises(InputError, match="the file exists"):
        done.save_report(out)
    # A later audit without a repair leaves no repaired model of the earlier one.
    only(says("calm", 0.7))
    unbackdoor.audit(model, data, "random_prune", **OPTIONS).save_report(out, force=True)
    assert {path.name for path in out.iterdir()} == {"report.html", "result.json"}


def test_the_command_says_and_writes_the_same(files: tuple[Path, Path], tmp_path: Path) -> None:
    only(says("sure", 1e-6, 2))
    model, data = map(str, files)
    out = tmp_path / "out"
    words = ["audit", model, "--data", data, "--method", "random_prune", *TYPED]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert done.exit_code == 1
    assert "Verdict: backdoor found" in done.stdout and "checks done 1 of 1" in done.stdout
    lines = done.stderr.splitlines()
    assert any(line.startswith("plan: sure ") for line in lines)
    assert any(line.startswith("sure: done, backdoor found") for line in lines)
    assert any(line.startswith("repair: done") for line in lines)
    assert (out / "report.html").exists() and (out / "repaired.pth").exists()
    again = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert again.exit_code == 2 and "the file exists" in again.stderr and "plan:" not in again.stderr
    printed = CliRunner().invoke(app, [*words, "--json", "--quiet"])
    assert json.loads(printed.stdout)["outcome"] and not printed.stderr
    planned = CliRunner().invoke(app, [*words, "--plan", "--budget", "1h"])
    assert planned.exit_code == 0 and "sure" in planned.stdout and "if a backdoor is found" in planned.stdout


def test_steps_keep_their_order_and_their_ends() -> None:
    watching = Watching()
    steps = Steps(watching, None)
    steps.add(Step("a", "first"), Step("b", "second"), Step("c", "third"))
    with pytest.raises(ValueError, match="broke"), steps.running("a"):
        raise ValueError("broke")
    steps.insert(Step("new", "between"), after="a")
    steps.insert(replace(steps["c"], result="moved"), after="a")
    assert [step.name for step in steps] == ["a", "c", "new", "b"]
    steps.leave_out("no time", "b")
    steps.leave_out("the rest")
    assert [(step.status, step.result) for step in steps] == [
        ("failed", "broke"), ("left out", "the rest"), ("left out", "the rest"), ("left out", "no time"),
    ]  # fmt: skip
    assert len(watching.seen) == 7


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.001, "1 s"), (59, "59 s"), (150, "2 min"), (3600, "60 min"), (1e7, "2,778 h")]
)
def test_an_estimate_is_no_more_exact_than_it_is(seconds: float, words: str) -> None:
    assert step_rows([Step("a", "first", seconds)])[0][2] == words


def test_the_room_is_the_verb() -> None:
    """A submodule hides a function of its name as soon as it is imported."""
    code = "import unbackdoor; import unbackdoor.audit.scanning; print(callable(unbackdoor.audit))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
