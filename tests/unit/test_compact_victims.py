"""Victims in half precision: measured anew, hashed anew, taken over like any other, or left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.exchange import CELL, MODEL, import_victims
from unbackdoor.bench.judge import Scores
from unbackdoor.bench.steps import model_of
from unbackdoor.bench.store import Store
from unbackdoor.metrics import Rate
from unbackdoor.types import Classifier

ROOT = Path(__file__).parents[2]
COMMITTED = next((ROOT / "victims" / "cifar10-small-v1").glob("badnets-*"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = ROOT / "scripts" / "compact_victims.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(asr: float) -> Scores:
    return Scores(Rate(8707, 10_000), Rate(round(asr * 9000), 9000), Rate(316, 9000))


def test_a_victim_is_rounded_and_taken_over(script: ModuleType, tmp_path: Path) -> None:
    seen = []

    def score(model: Classifier, truth: AttackTruth, dataset: str) -> Scores:
        seen.append((model.architecture, truth.attack, dataset))
        return scores(0.9601)

    assert script.compact(COMMITTED, tmp_path / "out", score) == ""
    assert seen == [("preact_resnet18[width=16]", "badnets", "cifar10")]
    (written,) = (tmp_path / "out").iterdir()
    assert (written / MODEL).stat().st_size < 0.52 * (COMMITTED / MODEL).stat().st_size
    assert all(
        t.dtype.itemsize == 2 for t in load_file(written / MODEL).values() if t.dtype.is_floating_point
    )
    assert json.loads((written / CELL).read_text())["result"]["scores"]["asr"] == pytest.approx(
        0.9601, abs=1e-4
    )
    assert next(model_of(written / MODEL).network.parameters()).dtype.itemsize == 4  # as a cell takes it
    with Store(tmp_path / "store") as store:
        assert len(import_victims(store, tmp_path / "out")) == 1


def test_a_victim_that_rounding_changes_is_left_out(script: ModuleType, tmp_path: Path) -> None:
    fault = script.compact(COMMITTED, tmp_path, lambda model, truth, dataset: scores(0.955))
    assert "ASR moved from 0.9600 to 0.9550" in fault
    assert not list(tmp_path.iterdir())
