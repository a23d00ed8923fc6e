"""Every benchmark runs from end to end at tiny sizes, and the ratios are made as the harness says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    """The harness as a module; the benchmarks are scripts and no package."""
    name = "benchmark_harness"
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / "_harness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def test_the_comparison_with_released_code_asks_for_a_checkout(tmp_path: Path) -> None:
    """That code is not ours, so only this can be tested here."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "authors.py"), "--victim", "any.safetensors"],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("name at least one checkout")


SLOW = ["training", "rnp", "awm", "ims", "tac", "tac_repair", "bench_scale", "bench_overhead", "waiting"]


@pytest.mark.parametrize("name", ["loading", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_runs_and_prints_ratios(name: str, tmp_path: Path) -> None:
    """In a process of its own, with no data set at hand, because ``--quick`` makes its images up."""
    if name == "loading":
        pytest.importorskip("pyarrow", reason="the Parquet files of this benchmark need pyarrow")
    if name == "bench_scale":
        pytest.importorskip("matplotlib", reason="the page of this benchmark has charts (extra: report)")
    if name == "bench_overhead":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    if name in ("tac", "tac_repair"):
        pytest.importorskip("scipy", reason="the solver is SciPy's (extra: scan)")
    file = tmp_path / "result.json"
    command = [
        sys.executable,
        str(BENCHMARKS / f"{name}.py"),
        "--quick",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    surroundings = {key: value for key, value in os.environ.items() if key != "UNBACKDOOR_DATA"}
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**surroundings, "OMP_NUM_THREADS": "1", "UNBACKDOOR_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == record
    assert record["benchmark"] == name
    assert 0 < record["ratio"]["low"] <= record["ratio"]["median"] <= record["ratio"]["high"]
    assert len(record["pairs"]) == 1
    assert record["label"] in done.stdout
    assert record["machine"]["threads"] == 1
    assert not (tmp_path / "cache").exists()  # nothing is left behind in the user's cache


def test_the_command_line_asks_for_threads_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    from unbackdoor.__main__ import main

    monkeypatch.setattr(sys, "argv", ["unbackdoor", "--version"])
    for before, after in (("ACTIVE", "ACTIVE"), (None, "PASSIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
        main()
        assert os.environ["OMP_WAIT_POLICY"] == after


def test_a_ratio_is_the_median_of_neighbours(harness: ModuleType) -> None:
    ratio = harness.Ratio.of([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert ratio.pairs == (2.0, 3.0, 4.0)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 4.0)


def test_contestants_take_turns(harness: ModuleType) -> None:
    calls: list[str] = []
    contestants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = harness.interleave(2, contestants)
    assert calls == ["a", "b"] * 3  # the first round is for warming up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    calls.clear()
    harness.interleave(1, contestants, warmup=False)
    assert calls == ["a", "b"]


def test_the_machine_is_described_without_naming_it(harness: ModuleType) -> None:
    described = harness.describe_machine()
    assert set(described) == {
        *("cpu", "cores", "threads", "memory_gib", "native_bf16", "torch", "python", "system", "load")
    }
    assert str(Path.home()) not in json.dumps(described)
