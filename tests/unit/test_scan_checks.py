"""What a scan runs stands in the registration of scanners, so that a plug-in's is a check like any other."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unbackdoor.audit
from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.audit.checks import available_checks, default_checks
from unbackdoor.audit.json_records import audit_json
from unbackdoor.audit.scanning import scan
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.networks import build
from unbackdoor.registry import SCANNERS, SCREENERS, Config, References, Variant, option, scanner
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport

DATA = CleanData.split(tiny_data(40, seed=3))
OWN = [
    "logit_leak", "recall", "weight_statistics", "tac", "stamp_library", "mm_bd", "neural_cleanse",
    "neural_cleanse:blend", "label_mapping", "self_reference",
]  # fmt: skip


class StrangerConfig(Config):
    """One option."""

    label: int = option(1, "class that is accused", source="this test", ge=0)


@pytest.fixture(autouse=True)
def _no_strangers() -> Iterator[None]:
    list(SCANNERS)
    before = dict(SCANNERS._parts)
    yield
    SCANNERS._parts.clear()
    SCANNERS._parts.update(before)


def register(**facts: Any) -> None:
    """Register a scanner as a plug-in would, at run time."""

    @scanner("stranger", config=StrangerConfig, **facts)
    def look(model: Classifier, data: CleanData, cfg: StrangerConfig, *, run: Any) -> ScanReport:
        trigger = RecoveredTrigger(cfg.label, torch.ones(1, 8, 8), torch.eye(8), success=0.5)
        finding = Finding(
            "size", 1.0, "small: suspicious", 0.5, "made up", 0.001, (cfg.label,), trigger=trigger
        )
        return ScanReport("backdoor found", (finding,), coverage=("size",))


def test_the_checks_of_this_package_are_those_that_they_were() -> None:
    checks = default_checks()
    assert [check.name for check in checks] == OWN
    assert {c.name: dict(c.options) for c in checks if c.options} == {
        "neural_cleanse:blend": {"form": "blend"}
    }
    assert checks[6].question != checks[7].question and all(c.question.endswith("?") for c in checks)


def test_a_scanner_of_a_plug_in_is_a_check_with_its_question_its_variants_and_its_trigger() -> None:
    register(question="Is it strange?", cost=25, variants={"other": Variant("Otherwise?", {"label": 2})})
    assert [c.name for c in default_checks()] == [*OWN[:4], "stranger", "stranger:other", *OWN[4:]]
    both = ["stranger", "stranger:other"]
    audit = scan(tiny_classifier("conv-bn"), DATA, checks=both, thorough=True)
    assert [(c.check.question, c.classes) for c in audit.checks] == [
        ("Is it strange?", (1,)),
        ("Otherwise?", (2,)),
    ]
    assert audit.verdict == "backdoor found"
    assert [(t.check, t.label, t.success) for t in audit.triggers] == [
        ("stranger", 1, 0.5),
        ("stranger:other", 2, 0.5),
    ]


def test_a_scanner_without_a_question_runs_only_where_it_is_named() -> None:
    register()
    assert [c.name for c in default_checks()] == OWN
    assert {"stranger", "rnp_vote"} <= {c.name for c in available_checks()}
    (checked,) = scan(tiny_classifier("conv-bn"), DATA, checks="stranger").checks
    assert checked.status == "ran" and checked.check.question


def test_a_variant_whose_options_do_not_fit_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ConfigError, match=r"variant 'odd' of the scanner 'stranger'.*did you mean 'label'"):
        register(variants={"odd": Variant("Odd?", {"lable": 2})})


def test_a_check_that_is_named_twice_cannot_agree_with_itself() -> None:
    with pytest.raises(InputError, match="named twice: got tac"):
        scan(tiny_classifier("conv-bn"), DATA, checks=["tac", "mm_bd", "tac"])
    with pytest.raises(
        InputError, match=r"unknown check 'neural_clense' \(did you mean 'neural_cleanse'\?\)"
    ):
        scan(tiny_classifier("conv-bn"), DATA, checks=["neural_clense"])


def test_options_are_laid_over_those_of_a_check_and_told_before_the_work() -> None:
    register(question="Is it strange?", variants={"other": Variant("Otherwise?", {"label": 2})})
    model, both = tiny_classifier("conv-bn"), ["stranger", "stranger:other"]
    audit = scan(model, DATA, checks=both, options={"stranger:other": {"label": 3}}, thorough=True)
    assert [c.classes for c in audit.checks] == [(1,), (3,)]
    with pytest.raises(ConfigError, match=r"did you mean 'label'"):
        scan(model, DATA, checks=both, options={"stranger": {"lable": 3}})
    with pytest.raises(InputError, match="options for 'stranger:else'"):
        scan(model, DATA, checks=both, options={"stranger:else": {}})


class CalibratedConfig(Config):
    """What clean models say."""

    known: tuple[float, ...] = option((), "sizes in clean models", source="this test")
    level: float = option(0.05, "a level", source="this test")


def test_a_scanner_of_a_plug_in_is_calibrated_by_scans_of_clean_models(tmp_path: Path) -> None:
    references = References("size", "known", frozenset({"level"}))

    @scanner("calibrated", config=CalibratedConfig, question="Large?", cost=1, references=references)
    def look(model: Classifier, data: CleanData, cfg: CalibratedConfig, *, run: Any) -> ScanReport:
        value = float(next(model.parameters()).detach().abs().sum())
        return ScanReport("undecided", (Finding("size", value, "large", 0.5, f"{cfg.known}"),))

    files, sizes = [], []
    for seed in range(2):
        clean = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=NAMES, seed=seed)
        sizes.append(float(next(clean.parameters()).detach().abs().sum()))
        audit = scan(clean, DATA, checks="calibrated", options={"calibrated": {"level": 0.1}})
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps(audit_json(audit, NAMES)), encoding="utf-8")
    suspect = tiny_classifier("conv-bn")
    audit = scan(suspect, DATA, checks="calibrated", references=files)
    report = audit.checks[0].report
    assert report is not None and report.method["options"]["known"] == pytest.approx(tuple(sizes))
    few = CleanData.split(tiny_data(20, seed=3))
    with pytest.raises(InputError, match=r"of another kind.*got different clean images"):
        scan(suspect, few, checks="calibrated", references=files)


def _strings(path: Path) -> Iterator[str]:
    """Yield the strings and the names of modules of a file, without its documentation."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if documentation:
            node.value.value = ""  # type: ignore[attr-defined]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


# The Python interface to the further uses of one paper's unlearning; no verb of the audit reads it.
OF_ONE_METHOD = "unlearning.py"


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(Path(unbackdoor.audit.__file__).parent.glob("*.py")) if p.name != OF_ONE_METHOD],
    ids=lambda p: p.name,
)
def test_the_audit_knows_no_scanner_by_name(path: Path) -> None:
    names = {*SCANNERS, *SCREENERS, *(check.name for check in available_checks())}
    for text in _strings(path):
        assert not text.startswith(("unbackdoor.scanners", "unbackdoor.screeners")), text
        assert text.split(":")[0] not in names, text
        assert text != f"unbackdoor.audit.{OF_ONE_METHOD.removesuffix('.py')}", text
