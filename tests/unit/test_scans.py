"""Scans: through the trusted caller, as cells of a suite, as rows, and as a table of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_suite import TEXT, fake_data, written
from tiny import tiny_data
from unbackdoor.attacks import poison
from unbackdoor.bench import scan_step, steps
from unbackdoor.bench.cells import plan
from unbackdoor.bench.judge import judge_scan
from unbackdoor.bench.results import scans_of, summarise_scans, write_parquet
from unbackdoor.bench.rows import Row, ScanRow, read_scans, write_rows
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import load_suite
from unbackdoor.engine.canonical_form import CanonicalForm
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import ConfigError, IntegrityError, MethodFailed
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.registry import SCANNERS, Config, Part, option
from unbackdoor.report.benchmark import bench_report
from unbackdoor.report.html import to_html
from unbackdoor.report.markdown import to_markdown
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport

Trained = tuple[Classifier, CleanData]
LABELS = {
    "suite": "try", "version": 1, "dataset": "digits", "architecture": "small_cnn", "width": 8.0,
    "recipe": "plain", "poison_rate": 0.1, "victim_seed": 0, "scanner": "rogue", "clean_images": 10,
    "defender_seed": 0,
}  # fmt: skip


class RogueConfig(Config):
    """One option."""

    level: float = option(0.5, "a level", source="this test", ge=0, le=1)


def part(report: Callable[[Classifier, CleanData], Any]) -> Part[Any]:
    """Return a scanner that returns what ``report`` returns."""

    def look(model: Classifier, data: CleanData, cfg: Config, *, run: Any) -> Any:
        return report(model, data)

    return Part("rogue", "scanner", look, RogueConfig, "", frozenset({"images"}))


def finding(**changes: Any) -> Finding:
    """Return a finding that a caller accepts, but for what is changed."""
    values: dict[str, Any] = {"classes": (1,), "p_value": 0.01, "per_class": (0.1, 0.9, 0.2, 0.3), **changes}
    artefacts = {"trigger": torch.zeros(1, 8, 8)}
    return Finding("norm", 0.1, "small is suspicious", 0.05, "level", artefacts=artefacts, **values)


def found(**changes: Any) -> ScanReport:
    """Return a report with one finding."""
    return ScanReport("backdoor found", (finding(**changes),), coverage=("rogue",))


@pytest.fixture
def rogue() -> Iterator[None]:
    """Enter a scanner for the length of a test."""
    table = SCANNERS._loaded()
    table["rogue"] = part(lambda m, d: found())
    yield
    del table["rogue"]


def test_a_report_comes_back_timed_and_described(tiny: Trained) -> None:
    report = scan(part(lambda m, d: found()), *tiny, seed=3)
    assert report.verdict == "backdoor found"
    assert report.seconds > 0
    assert (report.method["name"], report.method["seed"]) == ("rogue", 3)
    assert report.method["options"] == {"level": 0.5}


@pytest.mark.parametrize(
    "report",
    [
        "guilty",
        replace(found(), verdict="guilty"),
        found(classes=(4,)),
        found(classes=(-1,)),
        found(p_value=1.5),
        found(p_value=float("nan")),
        found(per_class=(0.1, 0.2)),
    ],
    ids=["no report", "verdict", "class 4", "class -1", "p 1.5", "p nan", "short table"],
)
def test_a_report_that_says_nothing_usable_is_refused(tiny: Trained, report: Any) -> None:
    with pytest.raises(MethodFailed, match="scanner 'rogue'"):
        scan(part(lambda m, d: report), *tiny)


def test_a_scanner_only_looks(tiny: Trained) -> None:
    model, data = tiny[0].copy(), tiny[1]

    def meddles(given: Classifier, shown: CleanData) -> ScanReport:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return found()

    with pytest.raises(IntegrityError, match="the weights"):
        scan(part(meddles), model, data)


def test_a_suite_plans_scans_beside_repairs(rogue: None, tmp_path: Path) -> None:
    plain = plan(load_suite(written(tmp_path)), fake_data())
    text = TEXT + '[[scanner]]\nname = "rogue"\noptions = { level = 0.25 }\n'
    suite = load_suite(written(tmp_path, text))
    cells = plan(suite, fake_data())
    scans = [cell for cell in cells if cell.kind == "scan"]
    assert len(scans) == 2 * 2  # victims x seeds
    assert [c.key for c in cells if c.kind != "scan"] == [c.key for c in plain]
    assert scans[0].spec["options"] == {"level": 0.25}
    assert not {"attack", "target", "poison_rate"} & set(scans[0].spec)
    assert scans[0].labels["preset"] == "default*"
    assert suite.sha256() != load_suite(written(tmp_path)).sha256()


def test_faults_of_scanners_are_reported_with_the_others(rogue: None, tmp_path: Path) -> None:
    text = TEXT.replace('"badnets"', '"badnet"') + '[[scanner]]\nname = "rouge"\n'
    with pytest.raises(ConfigError) as caught:
        load_suite(written(tmp_path, text))
    assert "did you mean 'rogue'" in str(caught.value)
    assert "badnet" in str(caught.value)


def test_a_step_leaves_findings_and_artefacts(rogue: None, tiny: Trained, tmp_path: Path) -> None:
    model, _ = tiny
    images = tiny_data(20)
    facts = {"class_names": json.dumps(images.class_names), "augmentation": "none"}
    save_file({"pixels": images.pixels, "labels": images.truth}, tmp_path / steps.SAMPLE, metadata=facts)
    save_model(model.copy(), tmp_path / steps.MODEL)
    spec = {"scanner": "rogue", "options": {"level": 0.5}, "seed": 1, "precision": "fp32"}
    answer = scan_step.scan_step({"spec": spec, "place": {}}, tmp_path)
    assert json.loads(json.dumps(answer)) == answer
    assert (answer["verdict"], answer["classes"], answer["p_value"]) == ("backdoor found", [1], 0.01)
    assert load_file(tmp_path / steps.ARTEFACTS)["0.trigger"].shape == (1, 8, 8)
    (kept,) = json.loads((tmp_path / steps.EVIDENCE).read_text(encoding="utf-8"))["findings"]
    assert kept["statistic"] == "norm"


def test_a_step_shows_the_scanner_what_a_scan_shows_it(
    tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tiny[0], tiny_data(40)
    facts = {"class_names": json.dumps(images.class_names), "augmentation": "none"}
    save_file({"pixels": images.pixels, "labels": images.truth}, tmp_path / steps.SAMPLE, metadata=facts)
    save_model(model.copy(), tmp_path / steps.MODEL)
    forms = []

    def captured(*args: Any, form: CanonicalForm | None, **more: Any) -> ScanReport:
        forms.append(form)
        return scan(*args, form=form, **more)

    scan = scan_step.scan
    monkeypatch.setattr(scan_step, "scan", captured)
    spec = {"scanner": "weight_statistics", "options": {}, "seed": 1, "precision": "fp32"}
    scan_step.scan_step({"spec": spec, "place": {}}, tmp_path)
    (form,) = forms
    assert form is not None
    assert form.kept == (0, 1, 2, 3)


def test_options_with_several_values_come_out_of_a_cell_as_they_went_in() -> None:
    given = json.loads(json.dumps({"references": (0.1, 0.2)}))
    config = SCANNERS["rnp_vote"].configure(given)
    assert config.model_dump()["references"] == (0.1, 0.2)


def test_what_json_cannot_say_is_left_out_of_the_evidence(tiny: Trained, tmp_path: Path) -> None:
    model, _ = tiny
    images = tiny_data(40)
    facts = {"class_names": json.dumps(images.class_names), "augmentation": "none"}
    save_file({"pixels": images.pixels, "labels": images.truth}, tmp_path / steps.SAMPLE, metadata=facts)
    save_model(model.copy(), tmp_path / steps.MODEL)
    spec = {"scanner": "neural_cleanse", "options": {"steps": 20}, "seed": 1, "precision": "fp32"}
    scan_step.scan_step({"spec": spec, "place": {}}, tmp_path)
    kept = json.loads((tmp_path / steps.EVIDENCE).read_text(encoding="utf-8"))["findings"]
    assert None in [one["threshold"] for one in kept]  # shown, not judged


@pytest.mark.parametrize(
    ("attack", "verdict", "classes", "right", "target"),
    [
        ("badnets", "backdoor found", [2], True, True),
        ("badnets", "backdoor found", [1], True, False),
        ("badnets", "no evidence found", [], False, False),
        ("badnets", "undecided", [2], None, True),
        ("badnets_all_to_all", "backdoor found", [1], True, None),
        ("none", "backdoor found", [1], False, None),
        ("none", "no evidence found", [], True, None),
    ],
)
def test_the_judge_of_scans(attack: str, verdict: str, classes: list[int], right: Any, target: Any) -> None:
    options = {} if attack == "none" else {"target": 2}
    _, truth = poison(tiny_data(80), attack, options, seed=0)
    assert judge_scan(verdict, classes, truth) == {"right": right, "target_found": target}


def scanned(attack: str, verdict: str, **changes: Any) -> ScanRow:
    """Return a row."""
    return ScanRow(**{**LABELS, "attack": attack, "verdict": verdict, "seconds": 1.0, **changes})


def test_counts_over_scans(tmp_path: Path) -> None:
    rows = [
        scanned("badnets", "backdoor found", target_found=True, classes=(0,)),
        scanned("sig", "undecided", target_found=False),
        scanned("wanet", "backdoor found", target_found=True, flags=("attack did not take",)),
        scanned("none", "backdoor found"),
        scanned("none", "undecided", victim_seed=1),
        scanned("none", None, victim_seed=2, error="MethodFailed: boom"),
    ]
    (s,) = summarise_scans(rows)
    assert (s.found, s.missed, s.undecided, s.backdoored, s.target) == (1, 0, 1, 2, (1, 2))
    assert (s.alarms, s.undecided_clean, s.clean, s.failed) == (1, 1, 2, 1)
    write_rows(tmp_path / "try.scans.jsonl", rows)
    assert read_scans(tmp_path / "try.scans.jsonl") == rows
    pq = pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "scans.parquet", rows, ScanRow)
    table = pq.read_table(tmp_path / "scans.parquet").to_pylist()
    assert table[0]["classes"] == [0]
    assert table[0]["target_found"] is True


def test_the_report_counts_scans_of_the_same_victims() -> None:
    pytest.importorskip("matplotlib")
    shared = {name: value for name, value in LABELS.items() if name != "scanner"}
    repairs = [Row(**shared, attack="badnets", defense="none", acc=0.9, asr=1.0, ra=0.0, der=0.5)]
    scans = [scanned("badnets", "backdoor found", target_found=True), scanned("none", "undecided")]
    made = bench_report(repairs, scans=scans)
    assert "1 of 1" in to_html(made)
    assert "Scanners" in to_markdown(made)
    assert "Scanners" not in to_markdown(bench_report(repairs))


def test_rows_of_scans_come_from_the_store(tmp_path: Path) -> None:
    victim = {"key": "v" * 64, "kind": "victim", "spec": {}, "parent": None}
    labels = {**LABELS, "attack": "badnets"}
    cells = [
        (victim, {k: v for k, v in labels.items() if k not in ("scanner", "clean_images", "defender_seed")}),
        ({"key": "a" * 64, "kind": "scan", "spec": {}, "parent": "v" * 64}, labels),
        ({"key": "b" * 64, "kind": "scan", "spec": {}, "parent": "v" * 64}, {**labels, "defender_seed": 1}),
    ]
    with Store(tmp_path) as store:
        store.register("try-v1", "x", "", cells)
        store.claim("v" * 64)
        store.finish("v" * 64, {"scores": {"acc": 0.9, "asr": 0.5, "ra": 0.1}}, seconds=1.0)
        store.claim("a" * 64)
        told = {"verdict": "undecided", "classes": [3], "statistic": "norm", "value": 1.5, "p_value": None}
        told |= {"right": None, "target_found": False, "seconds": 2.0, "commit": "abc"}
        store.finish("a" * 64, told, seconds=2.0)
        store.claim("b" * 64)
        store.fail("b" * 64, "MethodFailed: boom", seconds=1.0)
        one, other = scans_of(store, "try-v1")
    assert (one.verdict, one.classes, one.acc_before) == ("undecided", (3,), 0.9)
    assert one.flags == ("attack did not take",)
    assert (other.verdict, other.error) == (None, "MethodFailed: boom")
