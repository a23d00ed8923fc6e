"""What MLflow is told of a result, with a library in its place that remembers it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.errors import InputError, MissingExtra


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kept: dict[str, Any] = {"files": {}}

    @contextlib.contextmanager
    def start_run(run_name: str) -> Iterator[Any]:
        kept["name"] = run_name
        yield SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_artifacts(folder: str) -> None:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                kept["files"][path.relative_to(folder).as_posix()] = path.read_bytes()

    fake = SimpleNamespace(
        set_tracking_uri=lambda uri: kept.update(uri=uri),
        set_experiment=lambda name: kept.update(experiment=name),
        start_run=start_run,
        set_tags=lambda tags: kept.update(tags=tags),
        log_params=lambda params: kept.update(params=params),
        log_metrics=lambda metrics: kept.update(metrics=metrics),
        log_artifacts=log_artifacts,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return kept


def test_a_scan_is_logged_with_its_report(told: dict[str, Any]) -> None:
    audit = unbackdoor.scan(tiny_classifier("conv-bn"), tiny_data(40), checks=["weight_statistics"])
    assert unbackdoor.log_to_mlflow(audit, uri="file:x", experiment="e") == "r1"
    assert (told["uri"], told["experiment"], told["name"]) == ("file:x", "e", "audit")
    assert told["tags"]["verdict"] == audit.verdict and told["params"]["verdict"] == audit.verdict
    assert "checks.weight_statistics.seconds" in told["metrics"] and told["metrics"]["images"] == 40
    assert {"record.json", "report/report.html", "report/result.json"} <= told["files"].keys()
    assert json.loads(told["files"]["record.json"])["verdict"] == audit.verdict
    names = (*told["metrics"], *told["params"])
    assert all(set(name) <= set("_-/. ") or name.replace(".", "").isascii() for name in names)


def test_a_repair_is_logged_with_its_model(told: dict[str, Any]) -> None:
    done = unbackdoor.purify(tiny_classifier("conv-bn"), tiny_data(60), "random_prune")
    unbackdoor.log_to_mlflow(done)
    assert told["metrics"]["accuracy.drop"] == done.to_dict()["accuracy"]["drop"]
    assert any(name.startswith("model/") for name in told["files"])


def test_faults_are_told(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no result"):
        unbackdoor.log_to_mlflow(7)
    audit = unbackdoor.scan(tiny_classifier("conv-bn"), tiny_data(40), checks=["weight_statistics"])

    def refuse(name: str) -> None:
        raise ConnectionError("refused\nand more")

    monkeypatch.setattr(sys.modules["mlflow"], "set_experiment", refuse)
    with pytest.raises(InputError, match="did not take the result"):
        unbackdoor.log_to_mlflow(audit)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[mlflow\]"):
        unbackdoor.log_to_mlflow(audit)
