"""A step runs in a process of its own, and whatever it does there becomes a result or an error."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from unbackdoor.bench import engines
from unbackdoor.errors import DiskFull, MethodFailed
from unbackdoor.isolate import Limits, call, log_of

LIMITS = Limits(seconds=600, memory_mb=512)  # a busy machine may take minutes to start a process

FOR_EVER = Limits(seconds=1e6, memory_mb=512)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a secret and a work folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "truth.json").write_text("target 0", encoding="utf-8")
    return tmp_path


def run(name: str, store: Path, *, private: bool = True, limits: Limits = LIMITS, **task: object):  # type: ignore[no-untyped-def]
    return call(f"poisoned:{name}", task, store / "work", limits, private=[store] if private else ())


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
    with pytest.raises(MethodFailed, match="ran out of time"):
        run("hangs", store, limits=Limits(seconds=1, memory_mb=512))


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opens_the_database", "may not open a database"),
        ("lists_the_store", "may not look there"),
        ("opens_a_socket", "may not do socket"),
        ("asks_for_a_name", "may not do socket"),
        ("forks", "may not do os.fork"),
        ("spawns", "may not start a program"),
    ],
)
def test_what_the_fence_refuses(name: str, words: str, store: Path) -> None:
    with pytest.raises(MethodFailed, match=words):
        run(name, store, path=str(store))


def test_temporary_files_are_made_in_the_folder(store: Path) -> None:
    made = Path(run("makes_a_temporary_file", store)["made"])
    assert made.is_relative_to(store / "work" / "tmp")


def test_a_full_disk_is_told_from_a_failure(store: Path) -> None:
    with pytest.raises(DiskFull, match="No space left"):
        run("finds_no_room", store)


def _driver(store: Path) -> None:
    run("tells_its_number", store)


def test_a_step_ends_with_its_driver_even_where_nobody_waits_for_that(store: Path) -> None:
    driver = multiprocessing.get_context("spawn").Process(target=_driver, args=(store,))
    driver.start()
    number = store / "work" / "pid"
    while not number.exists() or not number.read_text(encoding="utf-8"):
        assert driver.is_alive()
        time.sleep(0.05)
    step = int(number.read_text(encoding="utf-8"))
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGKILL)
    # The driver is not waited for here: its number stays taken, as in a container without an init.
    end = time.monotonic() + 240
    while time.monotonic() < end and not _gone(step):
        time.sleep(0.02)
    gone = _gone(step)
    driver.join()
    assert gone


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_closing_ends_a_job_that_goes_on_to_its_next_step(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def stubborn(job: object) -> dict[str, object]:
        for _ in range(2):
            begun.set()
            with contextlib.suppress(MethodFailed):
                run("hangs", store, limits=FOR_EVER)
        return {}

    monkeypatch.setattr(engines, "execute", stubborn)
    engine = engines.LocalEngine(1)
    engine.submit({})
    begun.wait()
    engine.close()  # where it does not end the second step, it waits until this test is out of time


def test_an_old_answer_is_never_taken_for_a_new_one(store: Path) -> None:
    (store / "work" / "result.json").write_text(json.dumps({"result": {"twice": 1}}), encoding="utf-8")
    with pytest.raises(MethodFailed, match="exit status 7"):
        run("leaves", store)
