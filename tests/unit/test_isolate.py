"""A step runs in a process of its own, and whatever it does there becomes a result or an error."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from unbackdoor.bench.isolate import Limits, call, log_of
from unbackdoor.errors import MethodFailed

LIMITS = Limits(seconds=60, memory_mb=512)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a secret and a work folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "truth.json").write_text("target 0", encoding="utf-8")
    return tmp_path


def run(name: str, store: Path, *, private: bool = True, limits: Limits = LIMITS, **task: object):  # type: ignore[no-untyped-def]
    return call(f"poisoned:{name}", task, store / "work", limits, private=store if private else None)


def test_an_honest_step_answers_and_leaves_its_files_and_log(store: Path) -> None:
    assert run("honest", store, number=21) == {"twice": 42}
    assert (store / "work" / "kept.txt").read_text(encoding="utf-8") == "kept"
    assert "working" in log_of(store / "work")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "ValueError: no such luck"),
        ("returns_nan", "could not be written"),
        ("returns_an_object", "could not be written"),
        ("exhausts_memory", "MemoryError"),
        ("kills_itself", "signal SIGKILL"),
        ("leaves", "exit status 7"),
    ],
)
def test_every_way_to_fail_is_an_error_with_its_reason(name: str, words: str, store: Path) -> None:
    with pytest.raises(MethodFailed, match=words):
        run(name, store)


def test_a_failed_step_leaves_its_traceback_in_the_log(store: Path) -> None:
    with pytest.raises(MethodFailed):
        run("raises", store)
    assert "about to fail" in log_of(store / "work")
    assert "Traceback" in log_of(store / "work")


def test_a_step_that_hangs_and_does_not_listen_is_ended(store: Path) -> None:
    start = time.monotonic()
    with pytest.raises(MethodFailed, match="ran out of time"):
        run("hangs", store, limits=Limits(seconds=1, memory_mb=512))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("name", ["writes_outside", "starts_a_program"])
def test_nothing_is_written_outside_the_folder(
    name: str, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    goal = tmp_path_factory.mktemp("elsewhere") / "file"
    with pytest.raises(MethodFailed, match="PermissionError"):
        run(name, store, path=str(goal))
    assert not goal.exists()


def test_nothing_is_removed_outside_the_folder(store: Path) -> None:
    with pytest.raises(MethodFailed, match="may not write outside"):
        run("removes_outside", store, path=str(store / "truth.json"))
    assert (store / "truth.json").exists()


def test_the_truth_cannot_be_read_by_a_method_and_can_by_the_judge(store: Path) -> None:
    secret = str(store / "truth.json")
    with pytest.raises(MethodFailed, match="may not read there"):
        run("reads_the_truth", store, path=secret)
    with pytest.raises(MethodFailed, match="may not read there"):
        run("reads_the_truth", store, path="../truth.json")
    assert run("reads_the_truth", store, private=False, path=secret) == {"truth": "target 0"}


def test_an_old_answer_is_never_taken_for_a_new_one(store: Path) -> None:
    (store / "work" / "result.json").write_text(json.dumps({"result": {"twice": 1}}), encoding="utf-8")
    with pytest.raises(MethodFailed, match="exit status 7"):
        run("leaves", store)
