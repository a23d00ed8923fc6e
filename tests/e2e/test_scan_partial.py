"""A scan that ends early prints and writes what had ended: on SIGTERM, on Ctrl-C, and out of budget."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny import tiny_classifier, tiny_data
from unbackdoor.opening.classifier_files import save_model

# Two scanners of a plug-in: one that ends, and one that says that it began and never ends. The clock of the
# scan stands still until the second has begun, so that no machine is too slow for the first.
PROGRAM = """
import signal, sys
from types import SimpleNamespace
from unbackdoor import cli, confinement
from unbackdoor.registry import Config, scanner
from unbackdoor.types import Finding, ScanReport

clock = [0.0]
confinement.time = SimpleNamespace(monotonic=lambda: clock[0])

@scanner("quick", config=Config, question="Quick?", cost=1)
def quick(model, data, cfg, *, run):
    finding = Finding("size", 1.0, "small", 0.5, "made up", 0.001, (2,))
    return ScanReport("backdoor found", (finding,), coverage=("size",))

@scanner("endless", config=Config, question="Endless?", cost=2)
def endless(model, data, cfg, *, run):
    for _ in run.progress(iter(int, 1), "waiting"):
        if clock[0]:
            signal.pause()
        clock[0] += 1000
        print("the second has begun", file=sys.stderr, flush=True)

# A shell that starts the tests in the background has its children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    save_model(tiny_classifier("conv-bn"), folder / "model.safetensors", history=[])
    images = tiny_data(40, seed=11)
    names = np.array(images.class_names)
    np.savez(folder / "clean.npz", images=images.pixels.numpy()[:, 0], labels=images.truth, class_names=names)
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    return folder


def start(case: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, case / "program.py", *arguments, "--data", case / "clean.npz", "--quiet"]
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


BOTH = ("--thorough", "--checks", "quick,endless")


def interrupted(program: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal once the second check has begun, and return exit code, output and complaints."""
    with program:  # closes its pipes, however this ends
        try:
            assert program.stderr is not None
            seen = ""
            while "the second has begun" not in seen:
                line = program.stderr.readline()
                assert line, f"it ended before: {seen}"
                seen += line
            program.send_signal(number)
            out, err = program.communicate(timeout=200)
        finally:
            program.kill()
    return program.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_leaves_the_checks_that_had_ended(
    case: Path, number: signal.Signals, tmp_path: Path
) -> None:
    outputs = ("--report", tmp_path / "out", "--sarif", tmp_path / "log.sarif", "--json")
    program = start(case, "scan", case / "model.safetensors", *BOTH, *outputs)
    code, out, err = interrupted(program, number)
    told: dict[str, Any] = json.loads(out)
    assert code == 130 and err.strip().endswith("interrupted")  # after the files that were written
    assert told["interrupted"] and told["partial"] and told["verdict"] == "backdoor found"
    assert [c["status"] for c in told["checks"]] == ["ran", "interrupted"]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == told
    assert "it was interrupted" in (tmp_path / "out" / "report.html").read_text()
    (run,) = json.loads((tmp_path / "log.sarif").read_text())["runs"]
    assert not run["invocations"][0]["executionSuccessful"] and run["properties"]["interrupted"]
    assert not list(tmp_path.rglob("*.tmp*"))


def test_an_interrupted_comparison_prints_what_had_ended(case: Path) -> None:
    model = case / "model.safetensors"
    program = start(case, "verify", model, model, "--json")
    code, out, _ = interrupted(program, signal.SIGTERM)
    told = json.loads(out)["comparison"]
    assert code == 130 and told["before"]["interrupted"] and told["after"]["interrupted"]
    assert told["before"]["checks"][0]["status"] == "ran" and told["identical"]


def test_out_of_budget_leaves_the_checks_that_had_ended(case: Path, tmp_path: Path) -> None:
    outputs = ("--report", tmp_path / "out", "--sarif", tmp_path / "log.sarif", "--json")
    model = case / "model.safetensors"
    program = start(case, "scan", model, *BOTH, "--budget", "600", *outputs)
    out, err = program.communicate(timeout=200)
    told = json.loads(out)
    assert program.returncode == 1, err  # what had ended is evidence
    assert told["partial"] and not told["interrupted"]
    assert [c["status"] for c in told["checks"]] == ["ran", "out of budget"]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == told
    assert (tmp_path / "log.sarif").exists() and (tmp_path / "out" / "report.html").exists()
