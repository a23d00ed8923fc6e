"""The driver against an engine that answers at once, never, or with failure."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from unbackdoor import __version__
from unbackdoor.bench import repairs as repairs_module
from unbackdoor.bench.code_version import repair_version, victim_version
from unbackdoor.bench.driver import LOST, Agenda, _matching, drive, name_of
from unbackdoor.bench.engines import LocalEngine
from unbackdoor.bench.jobs import make_job, read_job
from unbackdoor.bench.repairs import running_commit
from unbackdoor.bench.results import UNRECORDED, differences, rows_of, summarise
from unbackdoor.bench.store import Cell, Store
from unbackdoor.bench.work import execute
from unbackdoor.errors import DiskFull, EngineFailed, IntegrityError

RATES = {"acc": 0.9, "asr": 1.0, "ra": 0.0}
LABELS = {
    "suite": "demo", "version": 1, "dataset": "digits", "architecture": "small_cnn", "width": 8.0,
    "recipe": "plain", "attack": "badnets", "poison_rate": 0.1, "target": 0, "victim_seed": 0,
}  # fmt: skip


def opened(folder: Path, repairs: int = 3) -> Store:
    store = Store(folder)
    victim = {"key": "v" * 64, "kind": "victim", "spec": {}, "parent": None}
    entries: list[tuple[dict[str, Any], dict[str, Any]]] = [(victim, LABELS)]
    for n in range(repairs):
        cell = {"key": f"{n:064x}", "kind": "repair", "spec": {"n": n}, "parent": "v" * 64}
        more = {"defense": "ft", "preset": "default", "selection": "held-out clean"}
        entries.append((cell, {**LABELS, **more, "clean_images": 10, "defender_seed": n}))
    store.register("demo-v1", "x", "", entries)
    return store


class Fake:
    """Answers in the calling thread; keeps what it was asked."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any] | None], slots: int = 2) -> None:
        self.slots, self.answer, self.jobs = slots, answer, []  # type: ignore[var-annotated]

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        self.jobs.append(job)
        future: Future[dict[str, Any]] = Future()
        answer = self.answer(job)
        if answer is not None:
            future.set_result({"seconds": 1.0, "log": "", **answer})
        return future

    def close(self) -> None:
        pass


def fine(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "victim":
        return {"result": {"scores": RATES}}
    return {"result": {"scores": {**RATES, "asr": 0.1}, "der": 0.95, "seconds": 2.0}}


def test_everything_is_done_victims_first_and_once(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        engine = Fake(fine)
        assert drive(store, "demo-v1", engine, {"store": "x"})
        assert [job["kind"] for job in engine.jobs] == ["victim", "repair", "repair", "repair"]
        assert engine.jobs[1]["victim"] == {"scores": RATES}
        assert store.counts("demo-v1")["done"] == 4
        again = Fake(fine)
        assert drive(store, "demo-v1", again, {})
        assert again.jobs == []


def test_a_failed_victim_fails_its_repairs_with_the_reason(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert drive(store, "demo-v1", Fake(lambda job: {"error": "MethodFailed: no luck"}), {})
        rows = rows_of(store, "demo-v1")
        assert [row.error for row in rows] == [LOST] * 3
        assert store.retry("demo-v1") == 4
        assert drive(store, "demo-v1", Fake(fine), {})
        assert [row.error for row in rows_of(store, "demo-v1")] == [None] * 3


def test_a_failed_repair_is_a_row_beside_the_others(tmp_path: Path) -> None:
    def sometimes(job: dict[str, Any]) -> dict[str, Any]:
        return {"error": "boom"} if job["spec"].get("n") == 1 else fine(job)

    with opened(tmp_path) as store:
        assert drive(store, "demo-v1", Fake(sometimes), {})
        rows = rows_of(store, "demo-v1")
        assert [row.error for row in rows] == [None, "boom", None]
        assert rows[1].acc is None
        (summary,) = summarise(rows)
        assert (summary.failed, summary.asr.n, summary.asr.value) == (1, 2, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("only", "jobs"), [("*/badnets/ft", 4), ("ft", 4), ("nothing", 0), ("digits/*/badnets", 4)]
)
def test_only_what_matches_runs_with_its_victim(tmp_path: Path, only: str, jobs: int) -> None:
    with opened(tmp_path) as store:
        engine = Fake(fine)
        assert drive(store, "demo-v1", engine, {}, only=only)
        assert len(engine.jobs) == jobs


def test_the_budget_ends_a_run_and_gives_back_what_runs(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert not drive(store, "demo-v1", Fake(lambda job: None), {}, budget=0.3)
        assert store.counts("demo-v1") == {"waiting": 4, "running": 0, "done": 0, "failed": 0}


def test_ctrl_c_gives_back_what_runs(tmp_path: Path) -> None:
    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            drive(store, "demo-v1", Fake(lambda job: None), {}, watch=interrupt)
        assert store.counts("demo-v1")["running"] == 0


def test_asked_to_stop_it_claims_nothing_more(tmp_path: Path) -> None:
    engine = Fake(lambda job: None)
    with opened(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt):
            drive(store, "demo-v1", engine, {}, asked_to_stop=lambda: len(engine.jobs) == 1)
        assert len(engine.jobs) == 1
        assert store.counts("demo-v1")["running"] == 0


def test_an_engine_whose_jobs_are_still_queued_closes() -> None:
    engine = LocalEngine(1)
    begun, may_end = threading.Event(), threading.Event()
    engine._pool.submit(lambda: (begun.set(), may_end.wait()))
    begun.wait()
    queued = engine.submit({"kind": "never started"})
    threading.Timer(0.2, may_end.set).start()
    engine.close()
    assert queued.cancelled()


def test_a_full_disk_stops_the_run_and_fails_no_cell(tmp_path: Path) -> None:
    def full(job: dict[str, Any]) -> dict[str, Any]:
        return fine(job) if job["kind"] == "victim" else {"error": "x", "halt": "the disk is full (there)."}

    with opened(tmp_path) as store:
        with pytest.raises(DiskFull, match=r"the disk is full \(there\)\. Finished cells are kept"):
            drive(store, "demo-v1", Fake(full), {})
        assert store.counts("demo-v1") == {"waiting": 3, "running": 0, "done": 1, "failed": 0}


def test_two_drivers_share_and_nothing_is_done_twice(tmp_path: Path) -> None:
    engines = [Fake(fine, slots=1), Fake(fine, slots=1)]
    opened(tmp_path, repairs=12).close()

    def one_driver(engine: Fake) -> bool:
        with Store(tmp_path) as store:
            return drive(store, "demo-v1", engine, {})

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one_driver, engines)) == [True, True]
    keys = [job["key"] for engine in engines for job in engine.jobs]
    assert len(keys) == len(set(keys)) == 13


def test_differences_are_found_by_experiment(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        drive(store, "demo-v1", Fake(fine), {})
        rows = rows_of(store, "demo-v1")
    assert differences(rows, rows) == []
    other = [rows[0].model_copy(update={"asr": 0.2}), rows[1]]
    changed, gone = differences(rows, other)
    assert changed.columns == {"asr": (0.1, 0.2)}
    assert gone.kind == "only in A"
    assert differences(rows[:1], other[:1], tolerance=0.2) == []


def test_an_agenda_follows_what_others_do(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as other:
        agenda = Agenda(store, "demo-v1")
        assert (agenda.left, agenda.next()) == (4, "v" * 64)
        assert agenda.next() is None  # its repairs wait for it
        other.claim("v" * 64)
        other.release()
        agenda.refresh()
        assert agenda.next() == "v" * 64  # it waits anew
        other.claim("v" * 64)
        other.finish("v" * 64, {"scores": RATES}, seconds=0)
        agenda.refresh()
        assert (agenda.left, agenda.next()) == (3, f"{0:064x}")
        other.claim(f"{1:064x}")
        agenda.refresh()
        assert (agenda.next(), agenda.next()) == (f"{2:064x}", None)
        assert agenda.counts == {"waiting": 2, "running": 1, "done": 1, "failed": 0}


def test_a_retry_beside_a_running_driver_gives_nothing_up(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as other:
        agenda = Agenda(store, "demo-v1")
        other.claim("v" * 64)
        other.fail("v" * 64, "boom", seconds=0)
        agenda.refresh()
        assert agenda.counts["failed"] == 4
        assert agenda.left == 0
        assert other.retry("demo-v1") == 4
        agenda.refresh()
        assert (agenda.left, agenda.next()) == (4, "v" * 64)


def test_a_cell_that_was_removed_ends_the_run(tmp_path: Path) -> None:
    with opened(tmp_path) as store, Store(tmp_path) as other:

        def remove(progress: object) -> None:
            if not gone:
                gone.append(True)
                other.register("demo-v1", "x", "", [])
                other.collect_garbage()

        gone: list[bool] = []
        with pytest.raises(IntegrityError, match="was removed"):
            drive(store, "demo-v1", Fake(fine, slots=1), {}, watch=remove)


def test_an_answer_costs_what_changed_and_not_what_there_is(tmp_path: Path) -> None:
    counted: list[int] = []
    for repairs in (20, 400):
        with opened(tmp_path / str(repairs), repairs) as store:
            steps = [0]

            def step(steps: list[int] = steps) -> int:
                steps[0] += 1
                return 0

            agenda = Agenda(store, "demo-v1")
            store._db.set_progress_handler(step, 100)
            for _ in range(10):
                key = agenda.next()
                assert key is not None
                assert store.claim(key)
                store.finish(key, fine({"kind": "victim"})["result"], seconds=0)
                agenda.refresh()
            counted.append(steps[0])
    assert counted[1] <= 2 * counted[0] + 10


def test_a_result_that_names_no_commit_is_marked_and_a_new_one_always_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new(job: dict[str, Any]) -> dict[str, Any]:
        answer = fine(job)
        commit = {} if job["spec"].get("n") == 1 else {"commit": running_commit()}
        return {"result": {**answer["result"], **commit}}

    # As in an installed package, where git is missing, or does not answer in time.
    monkeypatch.setattr(repairs_module, "commit_of", lambda folder, tracked: "")
    running_commit.cache_clear()
    try:
        with opened(tmp_path) as store:
            assert drive(store, "demo-v1", Fake(new), {})
            rows = rows_of(store, "demo-v1")
    finally:
        running_commit.cache_clear()
    assert [row.commit for row in rows] == [f"v{__version__}", "", f"v{__version__}"]
    assert [UNRECORDED in row.flags for row in rows] == [False, True, False]


def test_a_job_is_built_and_read_in_one_form() -> None:
    victim = cell("victim", {"attack": "sig", "architecture": "small_cnn[width=8]", "code": VICTIM})
    repair = cell("repair", {"defense": "ft", "code": REPAIR, "victim": victim.key}, parent=victim.key)
    for one, parent in ((victim, None), (repair, victim)):
        job = make_job(one, parent, owner="me", place={"store": "s"})
        assert job["work"].startswith("me-")
        assert json.loads(json.dumps(job)) == job
        assert read_job(json.loads(json.dumps(job))) == job


@pytest.mark.parametrize("kind", ["victim", "repair", "scan"])
def test_a_worker_with_other_code_is_refused_whatever_the_cell(kind: str) -> None:
    victim = cell("victim", {"attack": "sig", "architecture": "small_cnn[width=8]", "code": "0" * 16})
    spec = {"defense": "ft", "scanner": "tac", "code": "0" * 16}
    job = make_job(
        victim if kind == "victim" else cell(kind, spec, parent=victim.key),
        None if kind == "victim" else victim,
        owner="me",
        place={"store": "s"},
    )
    with pytest.raises(EngineFailed, match="other code than the cell was planned with"):
        execute(job)


@pytest.mark.parametrize("missing", ["key", "kind", "spec", "victim", "work", "place"])
def test_a_job_of_another_form_is_refused(missing: str) -> None:
    job = dict(make_job(cell("victim", {}), None, owner="me", place={"store": "s"}))
    del job[missing]
    with pytest.raises(EngineFailed, match=f"wrong or missing: {missing}"):
        execute(job)


def cell(kind: str, spec: dict[str, Any], parent: str | None = None) -> Cell:
    """Return a cell that waits."""
    return Cell(kind[0] * 64, kind, spec, parent, "waiting", 0, None, None, None, None)


VICTIM, REPAIR = victim_version("sig", "small_cnn"), repair_version("ft", "sig", "small_cnn")


def test_only_reaches_victims_and_parts() -> None:
    labels = {
        "dataset": "digits", "architecture": "airbench[expansion=2]", "width": 32, "attack": "none",
        "poison_rate": 0, "victim_seed": 3, "recipe": "fast", "part": "test",
    }  # fmt: skip
    repair = {**labels, "defense": "ft", "preset": "default", "clean_images": 5, "defender_seed": 0}
    members = [("v", None, name_of(labels)), ("r", "v", name_of(repair))]
    assert _matching(members, "*/victim/*", None) == ["v"]
    assert _matching(members, "*/ft/*", "test") == ["v", "r"]
    assert _matching(members, None, "tuning") == []
    assert _matching(members, "airbench[expansion=2]-32/none/ft", None) == ["v", "r"]
