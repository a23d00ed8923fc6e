"""The store: claims, deaths, two drivers, full disks, and what a crash may cost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
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
    while True:  # until it is killed
        time.sleep(1)


def test_the_cells_of_a_killed_driver_come_back(tmp_path: Path) -> None:
    opened(tmp_path).close()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_claims_and_waits, args=(str(tmp_path), ready), daemon=True)
    process.start()
    assert ready.wait(600)
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


def test_an_interrupt_while_the_lock_is_made_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as store:
        store.claim(KEYS[0])
    assert list((tmp_path / "drivers").iterdir()) == []


def test_an_interrupt_anywhere_in_a_claim_can_be_cleaned_up(tmp_path: Path) -> None:
    steps = 0

    def interrupting(at: int) -> Any:
        """Return a trace function that raises where Ctrl-C could: before the bytecode of this number."""

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal steps
            # Not in what a garbage collection calls, where it would reach nobody.
            if Path(frame.f_code.co_filename).name not in ("store.py", "contextlib.py"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                steps += 1
                if steps == at:
                    raise KeyboardInterrupt
            return trace

        return trace

    with opened(tmp_path) as store:
        store.claim(KEYS[1])  # its lock is made
        before, at = sys.gettrace(), 0
        while steps == at:
            steps, at = 0, at + 1
            sys.settrace(interrupting(at))
            try:
                store.claim(KEYS[0])
            except KeyboardInterrupt:
                # Here as in a driver: what was cut off is still held by the traceback.
                sys.settrace(before)
                store.release()
            finally:
                sys.settrace(before)
        assert at > 100
        assert store.release() == 1  # the last claim was not interrupted


def test_what_is_left_of_a_cut_off_transaction_is_no_trouble_after_the_store(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        left = store._transaction()
        left.__enter__()  # and the interrupt came before the block
    del left  # what it would raise here is an error of this test


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


def test_changes_are_told_once_in_order_and_whoever_made_them(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as other:
        assert store.changes(0) == (0, [])
        other.claim(KEYS[1])
        store.claim(KEYS[0])
        seen, changes = store.changes(0)
        assert changes == [(KEYS[1], "running"), (KEYS[0], "running")]
        assert store.last_change() == seen
        store.finish(KEYS[0], {}, seconds=0)
        assert store.changes(seen)[1] == [(KEYS[0], "done")]
        before = store.last_change()
        store.register("demo-v1", "abc", "text", entries()[:1])  # the three repairs belong to nobody now
        other.release()
        store.collect_garbage()
        assert store.get(KEYS[1]) is None
        assert store.last_change() >= before  # a removed cell does not turn the count back


def test_a_known_registration_writes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as watcher:
        before = watcher._db.execute("PRAGMA data_version").fetchone()[0]
        store.register("demo-v1", "abc", "text", entries())
        assert watcher._db.execute("PRAGMA data_version").fetchone()[0] == before
        changed = [*entries()[:3], (entries()[3][0], {"attack": "blended"})]
        store.register("demo-v1", "abc", "text", changed)
        assert watcher.outline("demo-v1")[3][2] == {"attack": "blended"}
        store.register("demo-v1", "abc", "text", changed[:2])
        assert [key for key, _, _ in watcher.outline("demo-v1")] == KEYS[:2]


def test_only_orphans_are_given_up(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.give_up(KEYS[1:], "no victim")
        assert store.counts("demo-v1")["waiting"] == 4  # the victim has not failed
        store.claim(KEYS[0])
        store.fail(KEYS[0], "boom", seconds=0)
        store.give_up(KEYS[1:3], "no victim")
        assert [(cell.key, cell.error) for cell, _ in store.failed("demo-v1")] == [
            (KEYS[0], "boom"), (KEYS[1], "no victim"), (KEYS[2], "no victim"),
        ]  # fmt: skip


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    opened(tmp_path).close()
    db = sqlite3.connect(tmp_path / "results.db")
    db.executescript(
        "DROP TABLE pinned; DROP TRIGGER cell_changes; DROP TABLE clock; DROP INDEX cell_changed; "
        "ALTER TABLE cell DROP COLUMN changed; PRAGMA user_version = 1;"
    )
    old = sqlite3.connect(tmp_path / "results.db", isolation_level=None)  # a driver of before, at work
    old.execute("UPDATE cell SET state = 'running', owner = 'old' WHERE key = ?", (KEYS[0],))
    with Store(tmp_path) as store:
        old.execute("UPDATE cell SET state = 'done', owner = NULL, result = '{}' WHERE key = ?", (KEYS[0],))
        assert store.changes(0)[1] == [(KEYS[0], "done")]
        assert store.counts("demo-v1")["waiting"] == 3
    old.close()
    db.close()
