"""The audit of an ONNX file on the command line: as it comes, without naming an architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")

import torch
from click.testing import Result
from typer.testing import CliRunner

from graphs import folded, node, write_onnx
from unbackdoor.cli import app
from unbackdoor.data.datasets import load_dataset
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.networks import build
from unbackdoor.weights.read import read_state

# The first import of scikit-learn draws random numbers.
pytestmark = pytest.mark.leaves_traces


def call(*arguments: str | Path) -> Result:
    # In this process, because importing torch takes longer than all the rest.
    return CliRunner().invoke(app, [*map(str, arguments), "--quiet"], catch_exceptions=False)


def told(result: Result) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network that knows the digits, exported with its norms folded, and clean images."""
    folder = tmp_path_factory.mktemp("onnx")
    data = load_dataset("digits")
    shape, names = data.train.shape, data.train.class_names
    model = build("small_cnn[width=8]", input_shape=shape, class_names=names, seed=0)
    recipe = Recipe(epochs=4, batch_size=32, optimizer="adamw", lr=0.005)
    train(model, data.train, recipe, Run.create(seed=0, policy="fp32"))
    write_onnx(folder / "model.onnx", *folded(model.eval()), shape=("b", *shape))
    few = data.test.subset(range(100))
    np.savez(
        folder / "clean.npz",
        images=few.pixels.numpy()[:, 0],
        labels=few.truth.numpy(),
        class_names=np.array(few.class_names),
    )
    return folder / "model.onnx", folder / "clean.npz"


def test_scan_purify_verify_and_patch(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    looked = told(call("inspect", model, "--json"))
    assert looked["graph"]["problem"] is None and looked["graph"]["operators"] == 12

    found = told(call("scan", model, "--data", data, "--checks", "tac", "--json", "--report", tmp_path / "r"))
    assert [check["status"] for check in found["checks"]] == ["ran"]
    assert found["opened"]["architecture"]["source"] == "the file's own graph"
    assert found["opened"]["clean_accuracy"]["value"] > 0.8
    assert "own graph" in (tmp_path / "r" / "report.html").read_text()

    # The suffix is that of the original where none is typed.
    out, patch = tmp_path / "repaired.onnx", tmp_path / "repair.patch"
    repair = ("--method", "ft", "--set", "epochs=1", "--out", tmp_path / "repaired", "--patch", patch)
    done = call("purify", model, "--data", data, *repair, "--json")
    assert done.exit_code == 4, done.output  # it is not shown to be repaired
    assert told(done)["model"] == str(out) and out.with_suffix(".json").exists()
    before, after = read_state(model), read_state(out)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    checked = told(call("verify", model, out, "--data", data, "--budget", "10", "--json"))
    assert checked["opened"]["after"]["architecture"]["source"] == "the file's own graph"
    assert checked["comparison"]["changes"] and not checked["comparison"]["identical"]

    reverted = tmp_path / "reverted.onnx"
    for arguments in (
        ("revert", out, patch, "--out", reverted),
        ("apply", model, patch, "--out", tmp_path / "again.onnx"),
    ):
        used = CliRunner().invoke(app, ["patch", *map(str, arguments)])
        assert used.exit_code == 0, used.output
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_state(reverted).items())


def test_what_cannot_be_is_said_before_the_work(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    wrong = call("purify", model, "--data", data, "--method", "ft", "--out", tmp_path / "x.safetensors")
    said = " ".join(wrong.stderr.split())
    assert wrong.exit_code == 2 and "no other file can hold it" in said and "ends in .onnx" in said
    path = write_onnx(tmp_path / "m.onnx", [node("LSTM")], {"w": torch.ones(3)})
    refused = call("scan", path, "--data", data)
    assert refused.exit_code == 3 and "LSTM" in refused.stderr
