"""The audit: one answer from many checks, promises that are kept, and patches that lead back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.comparison import changed_tensors, compare_accuracy, paired_interval
from unbackdoor.audit.json_records import audit_json, purification_json, verification_json
from unbackdoor.audit.purifying import PromiseBroken, Residue, purify, split_proof
from unbackdoor.audit.scanning import Check, scan
from unbackdoor.audit.verification import verify
from unbackdoor.cli.verify import outcome
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, IntegrityError, UnsafeFile, UnsupportedModel
from unbackdoor.metrics import Rate
from unbackdoor.registry import DEFENSES, SCANNERS, Config
from unbackdoor.report.audit import Subject, audit_page
from unbackdoor.report.sarif import sarif
from unbackdoor.report.trigger_strips import Example
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import CleanData, Finding, Purified, ScanReport, Verdict
from unbackdoor.weights.patch import make_patch, read_patch, use_patch, write_patch

RUN = Run.create(policy="fp32")
NAMES = ("a", "b", "c", "d")


def says(name: str, p_value: float | None, verdict: Verdict = "no evidence found", **more: Any) -> Check:
    """Register a scanner that says the same of every model, and return its check."""

    def look(model: Any, data: Any, cfg: Any, *, run: Any) -> ScanReport:
        for _ in run.progress(range(more.get("steps", 1)), "looking"):
            pass
        if "error" in more:
            raise more["error"]
        finding = Finding(
            "size", 1.0, "small: easily reached", 0.5, "made up", p_value, more.get("classes", (1,)),
            (4.0, 1.0, 4.0, 5.0), trigger=more.get("trigger"),
        )  # fmt: skip
        return ScanReport(verdict, (finding,), coverage=("size",))

    look.__module__ = f"{__name__}.{name}"
    SCANNERS.register(name, config=Config, needs=more.get("needs", set()))(look)
    return Check(name, name, f"What does {name} say?")


@pytest.fixture(autouse=True)
def _no_strangers() -> Iterable[None]:
    list(SCANNERS)
    before = dict(SCANNERS._parts)
    yield
    SCANNERS._parts.clear()
    SCANNERS._parts.update(before)


def clean(count: int = 40) -> CleanData:
    return CleanData.split(tiny_data(count, seed=3))


def test_one_strong_check_decides_and_names_its_class() -> None:
    audit = scan(
        tiny_classifier("conv-bn"),
        clean(),
        checks=[says("weak", 0.4), says("strong", 0.001, "backdoor found", classes=(2,))],
    )
    assert audit.verdict == "backdoor found"
    assert audit.classes == (2,)
    assert [c.adjusted for c in audit.checks] == [0.4, 0.002]
    assert not audit.partial
    record = audit_json(audit, NAMES)
    json.dumps(record, allow_nan=False)
    assert record["classes"] == [{"index": 2, "name": "c"}]
    assert not set(audit.facts) & {"verdict", "classes", "checks", "triggers", "seconds"}


def test_many_looks_cost_no_more_false_alarms() -> None:
    checks = [says(f"look{i}", 0.02, "backdoor found", classes=(i % 3,)) for i in range(5)]
    assert scan(tiny_classifier("conv-bn"), clean(), checks=checks).verdict == "undecided"
    assert scan(tiny_classifier("conv-bn"), clean(), checks=checks[:1]).verdict == "backdoor found"


def test_two_checks_on_one_class_are_evidence_where_each_is_none() -> None:
    weak = [
        says("first", 0.03, "backdoor found", classes=(1,)),
        says("second", 0.03, "backdoor found", classes=(1,)),
    ]
    audit = scan(tiny_classifier("conv-bn"), clean(), checks=weak)
    assert (audit.verdict, audit.classes) == ("backdoor found", (1,))
    assert [c.adjusted for c in audit.checks] == [0.06, 0.06]
    (agreed,) = audit.agreed
    assert (agreed.label, agreed.checks) == (1, ("first", "second"))
    assert agreed.adjusted == pytest.approx(0.039)
    assert "first and second together" in audit.reasons[0]
    assert audit_json(audit, NAMES)["agreed"][0]["checks"] == ["first", "second"]
    log = sarif(audit, Path("m.pth"), NAMES, file_sha256="0" * 64)
    assert [r["ruleId"] for r in log["runs"][0]["results"]] == ["agreement"]
    apart = [weak[0], says("second", 0.03, "backdoor found", classes=(2,))]
    assert scan(tiny_classifier("conv-bn"), clean(), checks=apart).verdict == "undecided"


def test_what_cannot_calibrate_is_shown_and_not_counted() -> None:
    audit = scan(
        tiny_classifier("conv-bn"), clean(), checks=[says("unsure", 1e-6, "undecided"), says("quiet", 0.5)]
    )
    assert audit.verdict == "no evidence found"
    assert audit.checks[0].adjusted is None
    alone = scan(tiny_classifier("conv-bn"), clean(), checks=[says("unsure", 1e-6, "undecided")])
    assert alone.verdict == "undecided"


@pytest.mark.parametrize(
    "error, status, verdict, partial",
    [
        (RuntimeError("broke"), "failed", "undecided", True),
        (UnsupportedModel("no head", where="fc"), "skipped", "no evidence found", False),
    ],
)
def test_silence_counts_only_if_everything_ran(
    error: Exception, status: str, verdict: str, partial: bool
) -> None:
    audit = scan(
        tiny_classifier("conv-bn"), clean(), checks=[says("quiet", 0.5), says("broken", None, error=error)]
    )
    assert (audit.checks[1].status, audit.verdict, audit.partial) == (status, verdict, partial)
    assert str(error).split(" (")[0] in audit.checks[1].reason


def test_a_budget_ends_a_check_in_the_middle() -> None:
    slow = says("slow", 0.5, steps=10**9)
    audit = scan(tiny_classifier("conv-bn"), clean(), checks=[slow, says("late", 0.5)], budget=0.2)
    assert [c.status for c in audit.checks] == ["out of budget", "out of budget"]
    assert audit.verdict == "undecided"
    assert audit.partial and not audit.unsupported, "time was lacking, the model was not unfit"


def test_what_lacks_images_is_not_blamed_on_the_model() -> None:
    seeing = says("seeing", 0.5, needs={"images"})
    bent = says("bent", None, error=UnsupportedModel("no head", where="fc"))
    assert not scan(tiny_classifier("conv-bn"), None, checks=[seeing]).unsupported
    assert scan(tiny_classifier("conv-bn"), None, checks=[seeing, bent]).unsupported
    assert not scan(tiny_classifier("conv-bn"), None, checks=[bent, says("fit", 0.5)]).unsupported


def test_without_images_only_some_checks_run() -> None:
    checks = [
        says("blind", 0.5),
        says("seeing", 0.5, needs={"images"}),
        says("tagged", 0.5, needs={"labels"}),
    ]
    audit = scan(tiny_classifier("conv-bn"), None, checks=checks)
    assert [c.status for c in audit.checks] == ["ran", "skipped", "skipped"]
    assert audit.verdict == "undecided"
    images = replace(tiny_data(20), labels=None)
    unlabelled = scan(tiny_classifier("conv-bn"), CleanData.split(images), checks=checks)
    assert [c.status for c in unlabelled.checks] == ["ran", "ran", "skipped"]


def test_an_unknown_check_is_an_error() -> None:
    with pytest.raises(InputError, match="nonsense"):
        scan(tiny_classifier("conv-bn"), clean(), checks=["nonsense"])


def test_the_page_and_the_log_of_a_finding() -> None:
    trigger = RecoveredTrigger(2, torch.ones(1, 8, 8), torch.eye(8))
    found = says("strong", 0.001, "backdoor found", classes=(2,), trigger=trigger)
    model = tiny_classifier("conv-bn")
    broken = says("broken", None, error=RuntimeError("<b>"))
    audit = scan(model, clean(), checks=[found, broken], thorough=True)
    assert (audit.triggers[0].label, audit.triggers[0].check) == (2, "strong")
    pixels = tiny_data(4).pixels
    page = audit_page(
        Subject("<script>.pt", NAMES, warnings=["low accuracy"], command="unbackdoor scan"),
        audit=audit,
        examples=[[Example(one, one + 1, 0, (0, 2), 0) for one in pixels]],
    )
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "Evidence of a backdoor towards c (class 2)" in page
    assert page.count("data:image/png") == 2 + 3 * 4
    assert "a (class 0) &rarr; <b>c (class 2)</b>" in page and "repaired copy" in page
    assert "http" not in page.replace("http-equiv", "")
    log = sarif(audit, Path("model file.pt"), NAMES, file_sha256="0" * 64)
    json.dumps(log, allow_nan=False)
    (result,) = log["runs"][0]["results"]
    assert result["ruleId"] == "strong" and "'c' (class 2)" in result["message"]["text"]
    assert not log["runs"][0]["invocations"][0]["executionSuccessful"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model%20file.pt"


def test_a_thousand_classes_stay_readable() -> None:
    names = [f"class number {k}" for k in range(1000)]
    audit = scan(tiny_classifier("conv-bn"), clean(), checks=[says("quiet", 0.5)])
    finding = replace(audit.checks[0].report.findings[0], per_class=tuple(range(1000)))  # type: ignore[union-attr]
    checked = replace(audit.checks[0], report=replace(audit.checks[0].report, findings=(finding,)))  # type: ignore[type-var]
    page = audit_page(Subject("big", names), audit=replace(audit, checks=(checked,)))
    assert len(page) < 200_000
    assert "other classes" in page
    # On paper what is folded is shown, and nothing scrolls.
    assert "details::details-content" in page
    assert "pre-wrap" in page


def test_a_check_that_needs_more_images_is_skipped_with_its_reason() -> None:
    model = tiny_classifier("conv-bn")
    few = CleanData.split(tiny_data(model.classes - 1, seed=3))
    audit = scan(model, few, checks=["tac"])
    assert audit.checks[0].status == "skipped"
    assert "fewer images than classes" in audit.checks[0].reason


def test_purify_keeps_images_for_the_proof_and_tells_what_changed() -> None:
    model = tiny_classifier("conv-bn")
    done = purify(model, tiny_data(80, seed=5), "random_prune", max_accuracy_drop=1.0)
    assert done.accuracy is not None and not done.proof_is_fit
    assert done.facts["images_for_the_method"] + done.facts["images_for_the_proof"] == 80
    assert done.changes and done.facts["before_sha256"] == model.sha256()
    assert all(0 < c.channels <= c.of_channels for c in done.changes)
    json.dumps(purification_json(done, NAMES), allow_nan=False)
    page = audit_page(Subject("repaired", NAMES), purification=done)
    assert "What was changed" in page


def test_a_broken_promise_returns_nothing() -> None:
    def ruin(model: Any, data: Any, cfg: Any, *, run: Any) -> Purified:
        with torch.no_grad():
            for weight in model.parameters():
                weight.neg_()
        return Purified(model)

    part = replace(DEFENSES["none"], name="ruin", function=ruin)
    with pytest.raises(PromiseBroken, match="thrown away"):
        purify(tiny_classifier("conv-bn"), tiny_data(80, seed=5), part, max_accuracy_drop=0.05)
    assert purify(tiny_classifier("conv-bn"), tiny_data(80, seed=5), part).accuracy.drop > 0.05  # type: ignore[union-attr]


def test_a_promise_needs_labels() -> None:
    with pytest.raises(InputError, match="labelled"):
        purify(tiny_classifier("conv-bn"), replace(tiny_data(40), labels=None), "none", max_accuracy_drop=0.1)


def test_few_images_all_go_to_the_method() -> None:
    given, shown, same = split_proof(tiny_data(8))
    assert same and len(given) == len(shown) == 8


def test_verify_tells_two_models_apart() -> None:
    model = tiny_classifier("conv-bn")
    images = tiny_data(80, seed=7)
    same = verify(model, model.copy(), images, checks=[says("quiet", 0.5)])
    assert same.identical and same.agreement.value == 1 and not same.changes
    other = purify(model, images, "random_prune").model
    done = verify(model, other, images, checks=[says("quiet", 0.5)])
    assert not done.identical and done.changes
    json.dumps(verification_json(done, NAMES), allow_nan=False)
    assert "both models" in audit_page(Subject("pair", NAMES), verification=done)
    with pytest.raises(UnsupportedModel):
        from unbackdoor.networks import build

        verify(model, build("small_cnn[width=2]", input_shape=(1, 8, 8), class_names=["x", "y"]), images)


def test_a_comparison_without_a_recovered_trigger_proves_nothing() -> None:
    """The search on the first model ran out of time, the quicker one on the second did not."""
    model, images = tiny_classifier("conv-bn"), tiny_data(60, seed=5)
    done = verify(model, model.copy(), images, checks=[says("quiet", 0.5)])
    assert outcome(done) == 0
    late = replace(done.before.checks[0], status="out of budget", report=None)
    hasty = replace(done, before=replace(done.before, checks=(late,)))
    assert outcome(hasty) == 2
    shown = RecoveredTrigger(1, torch.zeros(1, 8, 8), torch.ones(8, 8), "given")
    assert outcome(replace(hasty, residues=(Residue(shown, Rate(9, 10), Rate(0, 10)),))) == 0
    assert outcome(replace(hasty, residues=(Residue(shown, Rate(9, 10), Rate(9, 10)),))) == 1


def test_the_paired_interval_covers_and_shrinks() -> None:
    low, high = paired_interval(5, 5, 100)
    assert low < 0 < high
    wide, narrow = paired_interval(10, 0, 100), paired_interval(100, 0, 1000)
    assert wide[0] < 0.1 < wide[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_accuracy_is_compared_image_by_image() -> None:
    model = tiny_classifier("conv-bn")
    result = compare_accuracy(model, model.copy(), tiny_data(20), RUN)
    assert result is not None and (result.lost, result.gained, result.drop) == (0, 0, 0.0)
    assert compare_accuracy(model, model, replace(tiny_data(20), labels=None), RUN) is None


# ---------------------------------------------------------------------------------------------------
# Patches


def _sparse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {name: tensor.clone() for name, tensor in state.items()}
    name = next(n for n, t in out.items() if t.dim() == 4)
    out[name][0] = 0
    return out


def _dense(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t * 1.01 if t.is_floating_point() else t + 1 for n, t in state.items()}


@pytest.mark.parametrize("change", [_sparse, _dense])
def test_a_patch_leads_there_and_back(change: Callable[[Any], Any], tmp_path: Path) -> None:
    before = tiny_classifier("conv-bn").network.state_dict()
    before["half"] = torch.linspace(-1, 1, 7).bfloat16()
    before["scalar"] = torch.tensor(3)
    after = change(before)
    write_patch(tmp_path / "a.patch", make_patch(before, after, {"method": "made up"}))
    patch = read_patch(tmp_path / "a.patch")
    there = use_patch(patch, before, "apply")
    assert all(torch.equal(there[n], after[n]) for n in after)
    back = use_patch(patch, there, "revert")
    assert all(torch.equal(back[n], before[n]) for n in before)
    assert patch.facts == {"method": "made up"}
    with pytest.raises(IntegrityError, match="already"):
        use_patch(patch, there, "apply")


def test_a_sparse_patch_is_small(tmp_path: Path) -> None:
    before = {"w": torch.linspace(-1, 1, 64 * 64 * 9).view(64, 64, 3, 3)}
    write_patch(tmp_path / "a.patch", make_patch(before, _sparse(before)))
    assert (tmp_path / "a.patch").stat().st_size < 64 * 9 * 8 + 1000


def test_a_patch_knows_its_model_and_refuses_damage(tmp_path: Path) -> None:
    before = {"w": torch.linspace(-1, 1, 64).view(8, 8)}
    patch = make_patch(before, {"w": before["w"] * 2})
    with pytest.raises(IntegrityError, match="other weights"):
        use_patch(patch, {"w": torch.ones(8, 8)}, "apply")
    entry = patch.entries["w"]
    import zlib

    bomb = replace(entry, packed=zlib.compress(bytes(10_000_000)))
    with pytest.raises(UnsafeFile, match="unpack"):
        use_patch(replace(patch, entries={"w": bomb}), before, "apply")
    with pytest.raises(InputError, match="damaged"):
        use_patch(replace(patch, entries={"w": replace(entry, packed=b"xx")}), before, "apply")
    with pytest.raises(IntegrityError):
        use_patch(replace(patch, entries={"v": entry}), before, "apply")
    path = tmp_path / "no.patch"
    path.write_bytes(b"not a patch at all")
    with pytest.raises(InputError):
        read_patch(path)
    with pytest.raises(InputError, match="form"):
        make_patch(before, {"w": torch.ones(4, 4)})
    with pytest.raises(InputError, match="different tensors"):
        make_patch(before, {"v": before["w"]})


def test_changes_are_counted_by_channel() -> None:
    before = {"w": torch.ones(4, 3), "same": torch.zeros(2)}
    after = {"w": before["w"].clone(), "same": torch.zeros(2)}
    after["w"][1, 0] = 2
    (change,) = changed_tensors(before, after)
    assert (change.name, change.changed, change.channels, change.of_channels) == ("w", 1, 1, 4)


def test_things_of_another_type_are_told_at_the_door() -> None:
    model, images = tiny_classifier("conv-bn"), tiny_data(40)
    data = CleanData.split(images)
    with pytest.raises(InputError, match=r"expected a Classifier, got str.*open_model"):
        scan("model.pth", data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected Images"):
        scan(model, "folder")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such device"):
        scan(model, data, device="cuda:99" if not torch.cuda.is_available() else "nowhere")
    # Images need not be split by the caller, and one check may be named without a list.
    assert scan(model, images, checks="weight_statistics").facts["images"] == 40
