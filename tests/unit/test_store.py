"""The store: claims, deaths, two drivers, full disks, and what a crash may cost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.store import Store
from unbackdoor.errors import InputError, IntegrityError

KEYS = [f"{n:064x}" for n in range(4)]


def entries() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    victim = {"key": KEYS[0], "kind": "victim", "spec": {"seed": 0}, "parent": None}
    repairs = [{"key": k, "kind": "repair", "spec": {"key": k}, "parent": KEYS[0]} for k in KEYS[1:]]
    return [(cell, {"attack": "badnets"}) for cell in (victim, *repairs)]


def opened(folder: Path) -> Store:
    store = Store(folder)
    store.register("demo-v1", "abc", "text", entries())
    return store


def test_a_cell_goes_its_way(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.counts("demo-v1")["waiting"] == 4
        assert store.claim(KEYS[0])
        assert not store.claim(KEYS[0])
        assert store.counts("demo-v1")["running"] == 1
        store.finish(KEYS[0], {"acc": 0.5}, seconds=1.5, log="said")
        cell = store.get(KEYS[0])
        assert cell is not None
        assert (cell.state, cell.result, cell.log, cell.tries) == ("done", {"acc": 0.5}, "said", 1)
        assert store.claim(KEYS[1])
        store.fail(KEYS[1], "it broke", seconds=0.1)
        assert not store.claim(KEYS[1])
        assert store.retry("demo-v1") == 1
        assert store.claim(KEYS[1])


def test_only_the_holder_may_finish(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as other:
        assert store.claim(KEYS[0])
        assert not other.claim(KEYS[0])
        with pytest.raises(IntegrityError, match="does not hold"):
            other.finish(KEYS[0], {}, seconds=0)
        assert other.reclaim() == 0  # the holder lives
        store.finish(KEYS[0], {}, seconds=0)
        with pytest.raises(IntegrityError):
            store.finish(KEYS[0], {}, seconds=0)


def test_nan_is_no_result(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.claim(KEYS[0])
        with pytest.raises(ValueError, match="Out of range float"):
            store.finish(KEYS[0], {"acc": float("nan")}, seconds=0)
        store.fail(KEYS[0], "nan", seconds=0)


def _claims_and_waits(folder: str, ready: Any) -> None:
    store = Store(Path(folder))
    store.claim(KEYS[0])
    ready.set()
    time.sleep(60)


def test_the_cells_of_a_killed_driver_come_back(tmp_path: Path) -> None:
    opened(tmp_path).close()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_claims_and_waits, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    with Store(tmp_path) as store:
        assert store.reclaim() == 0
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert store.reclaim() == 1
        assert store.claim(KEYS[0])
        cell = store.get(KEYS[0])
        assert cell is not None
        assert cell.tries == 2


def test_what_killed_drivers_left_behind_is_swept_up(tmp_path: Path) -> None:
    dead = "99999-0badc0de"
    with opened(tmp_path) as store, Store(tmp_path) as other:
        assert store.claim(KEYS[0])
        assert other.claim(KEYS[1])
        (tmp_path / "drivers" / dead).write_bytes(b"")
        for owner in (dead, store.owner, other.owner):
            (tmp_path / "work" / f"{owner}-0123" / "deeper").mkdir(parents=True)
        (tmp_path / "work" / f"{dead}-0123-sample").mkdir()
        draft = tmp_path / "checkpoints" / f".{KEYS[0]}.tmp-1-2"
        draft.parent.mkdir()
        draft.write_bytes(b"half")
        (tmp_path / "checkpoints" / KEYS[0]).write_bytes(b"whole")
        store.sweep()
        left = {folder.name for folder in (tmp_path / "work").iterdir()}
        assert left == {f"{store.owner}-0123", f"{other.owner}-0123"}
        assert {lock.name for lock in (tmp_path / "drivers").iterdir()} == {store.owner, other.owner}
        assert draft.exists()  # it may be the other driver's
        other.close()
        store.sweep()
        assert not draft.exists()
        assert (tmp_path / "checkpoints" / KEYS[0]).exists()
        assert [f.name for f in (tmp_path / "work").iterdir()] == [f"{store.owner}-0123"]


def test_several_drivers_may_make_one_store_at_once(tmp_path: Path) -> None:
    for n in range(15):
        gate = threading.Barrier(4)

        def open_it(place: Path, gate: threading.Barrier = gate) -> None:
            gate.wait()
            Store(place).close()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_it, [tmp_path / str(n)] * 4))


def test_closing_gives_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.claim(KEYS[0])
    store.close()
    with Store(tmp_path) as again:
        assert again.counts("demo-v1")["waiting"] == 4
        assert list((tmp_path / "drivers").iterdir()) == []


def test_a_changed_suite_under_its_label_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.register("demo-v1", "abc", "text", entries())
        with pytest.raises(IntegrityError, match="Raise the version"):
            store.register("demo-v1", "other", "text", entries())
        assert len(store.members("demo-v1")) == 4


def test_results_survive_another_registration(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.claim(KEYS[0])
        store.finish(KEYS[0], {"acc": 1.0}, seconds=0)
        store.register("other-v1", "def", "text", entries()[:2])
        assert store.counts("other-v1") == {"waiting": 1, "running": 0, "done": 1, "failed": 0}
        assert store.suites() == ["demo-v1", "other-v1"]


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        bad = [(entries()[0][0], {"attack": object()})]
        with pytest.raises(TypeError):
            store.register("broken-v1", "x", "text", bad)
        assert store.suites() == ["demo-v1"]


def test_garbage_is_what_no_suite_refers_to(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        stray = "f" * 64
        for key in (KEYS[0], stray):
            store.artefact(key).mkdir(parents=True)
        assert store.collect_garbage(dry_run=True) == [store.artefact(stray)]
        assert store.artefact(stray).exists()
        store.collect_garbage()
        assert not store.artefact(stray).exists()
        assert store.artefact(KEYS[0]).exists()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.db").write_text("this is not a database, but long enough to look at")
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path)
    later = tmp_path / "later"
    Store(later).close()
    db = sqlite3.connect(later / "results.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(IntegrityError, match="later version"):
        Store(later)
