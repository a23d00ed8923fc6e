"""A cluster of processes on this machine: equal rows, killed workers, a lost scheduler, GPU slots."""

from __future__ import annotations

import json
import os
import pickletools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench import engines
from unbackdoor.bench.cells import plan
from unbackdoor.bench.driver import drive
from unbackdoor.bench.engines import DaskEngine, Engine, LocalEngine
from unbackdoor.bench.results import rows_of
from unbackdoor.bench.rows import Row
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import Suite
from unbackdoor.data.datasets import load_dataset
from unbackdoor.errors import EngineFailed, InputError, MissingExtra

pytest.importorskip("distributed", reason="clusters need Dask (extra: dask)")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
cloudpickle = pytest.importorskip("cloudpickle")
psutil = pytest.importorskip("psutil")
# Dask draws the pauses of its connections from the global generator.
pytestmark = [pytest.mark.leaves_traces, pytest.mark.timeout(1800)]

EPOCHS = 100  # seconds of training, written down after each epoch: time enough to lose a worker in
BATCH = 64
SUITE = Suite.model_validate(
    {
        "name": "cluster",
        "version": 1,
        "about": "One victim and three repairs.",
        "precision": "fp32",
        "data": [{"name": "digits"}],
        "model": [{"architecture": "small_cnn", "widths": [8]}],
        "recipe": [{"changes": {"epochs": EPOCHS, "batch_size": BATCH, "augmentation": "none"}}],
        "attack": [{"name": "badnets"}],
        "defender": {"clean_images": [10]},
        "defense": [
            {"name": "none"},
            {"name": "ft", "options": {"epochs": 2}},
            {"name": "random_prune", "options": {"step": 0.2}},
        ],
        "limit": {"seconds": 600, "memory_mb": 2048},
    }
)
LIMITS = {"seconds": 600, "memory_mb": 2048, "threads": 1}
JOB = {"kind": "victim", "key": "0" * 64, "spec": {}, "victim": None, "work": "w", "place": {"store": "s"}}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before the policing starts: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    with Store(folder) as store:
        cells = plan(SUITE, {"digits": load_dataset("digits")})
        store.register(SUITE.label, SUITE.sha256(), "", [cell.entry() for cell in cells])
        yield store


def driven(folder: Path, engine: Engine) -> list[Row]:
    """Run the suite to its end and return its rows."""
    with opened(folder) as store:
        assert drive(store, SUITE.label, engine, {"store": str(folder), "limits": LIMITS}, budget=600)
        return rows_of(store, SUITE.label)


def same(rows: list[Row]) -> list[dict[str, Any]]:
    """Return what must be equal bit for bit: all columns but time and memory."""
    return [row.model_dump(exclude={"seconds", "peak_mb", "commit"}) for row in rows]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of the local engine."""
    engine = LocalEngine(2)
    try:
        rows = driven(tmp_path_factory.mktemp("local"), engine)
    finally:
        engine.close()
    assert [row.error for row in rows] == [None] * 3
    return rows


class Recording:
    """An engine that keeps the jobs and the answers of another one."""

    def __init__(self, engine: Engine) -> None:
        self.slots, self._engine = engine.slots, engine
        self.jobs: list[dict[str, Any]] = []
        self.answers: list[Future[dict[str, Any]]] = []

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        self.jobs.append(job)
        self.answers.append(self._engine.submit(job))
        return self.answers[-1]

    def close(self) -> None:
        self._engine.close()


def listening(*roots: psutil.Process) -> set[str]:
    """Return the addresses on which processes and their children wait for connections."""
    processes = [p for root in roots for p in (root, *root.children(recursive=True))]
    return {
        c.laddr.ip
        for p in processes
        for c in p.net_connections(kind="inet")
        if c.status == psutil.CONN_LISTEN
    }


def wait_for(what: Callable[[], Any], seconds: float = 600) -> Any:
    """Return the first value of a function that is not empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


class Cluster:
    """A scheduler and workers started on the command line, as documented, each a process of its own."""

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self.file = folder / "scheduler.json"
        self._processes, self._log = processes, folder / "cluster.log"
        self.scheduler = self.start("scheduler", "--port", "0", "--scheduler-file", str(self.file))
        wait_for(self._is_written)

    def _is_written(self) -> bool:
        """Workers read the file at once, and end where the scheduler has not filled it yet."""
        try:
            return bool(json.loads(self.file.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError):
            return False

    def start(self, *words: str) -> psutil.Process:
        """Start ``dask WORDS`` on the loopback interface."""
        command = [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1"]
        log = self._processes.enter_context(self._log.open("ab"))
        process = subprocess.Popen(
            [*command, "--dashboard-address", "127.0.0.1:0"], stdout=log, stderr=subprocess.STDOUT
        )
        self._processes.callback(end, process)
        return psutil.Process(process.pid)

    def worker(self, *words: str) -> psutil.Process:
        """Start a worker with its nanny."""
        return self.start("worker", "--scheduler-file", str(self.file), "--nthreads", "1", *words)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended, and its children."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as processes:
        yield Cluster(tmp_path, processes)


@pytest.mark.slow
def test_its_own_cluster_is_the_local_engine_on_loopback_only(tmp_path: Path, local: list[Row]) -> None:
    engine = Recording(DaskEngine(2))
    try:
        rows = driven(tmp_path, engine)
        assert listening(psutil.Process()) == {"127.0.0.1"}
    finally:
        engine.close()
    assert same(rows) == same(local)
    assert len(engine.jobs) == 4
    for job, answer in zip(engine.jobs, engine.answers, strict=True):
        assert json.loads(json.dumps(job, allow_nan=False)) == job
        assert json.loads(json.dumps(answer.result(), allow_nan=False)) == answer.result()


@pytest.mark.slow
def test_a_killed_worker_costs_an_epoch_and_no_row(
    tmp_path: Path, local: list[Row], cluster: Cluster
) -> None:
    workers = [cluster.worker(), cluster.worker()]
    engine = DaskEngine(2, address=str(cluster.file))
    client = engine._client
    store = tmp_path / "store"
    try:
        client.wait_for_workers(2, timeout=600)
        assert listening(cluster.scheduler, *workers) == {"127.0.0.1"}
        pids = client.run(os.getpid)
        with ThreadPoolExecutor(1) as thread:
            rows = thread.submit(driven, store, engine)
            first = wait_for(lambda: told(store))
            wait_for(lambda: any((store / "checkpoints").glob("[0-9a-f]*")))
            (busy,) = (address for address, keys in client.processing().items() if keys)
            psutil.Process(pids[busy]).kill()
            again = wait_for(lambda: [steps for steps in told(store) if steps not in first])
            assert same(rows.result(600)) == same(local)
    finally:
        engine.close()
    # The reporter says how many steps a try has before it: the second has those after the last whole epoch.
    images = 1200 - 60
    steps_an_epoch = -(-images // BATCH)
    assert first == [EPOCHS * steps_an_epoch]
    assert again[0] < first[0]
    assert again[0] % steps_an_epoch == 0
    with Store(store) as opened_again:
        (victim,) = (c for c, _ in opened_again.members(SUITE.label) if c.kind == "victim")
        assert victim.tries == 1  # the cluster tried again, and the driver did not need to


def told(store: Path) -> list[int]:
    """Return how many steps the running trainings have before them."""
    totals = []
    for file in (store / "work").glob("*/progress.json"):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it is being written
        if said["label"] == "training":
            totals.append(said["total"])
    return totals


@pytest.mark.slow
def test_a_scheduler_that_vanishes_ends_the_run_and_loses_nothing(tmp_path: Path, cluster: Cluster) -> None:
    cluster.worker()
    store = tmp_path / "store"
    engine = DaskEngine(1, address=str(cluster.file))
    try:
        engine._client.wait_for_workers(1, timeout=600)
        with ThreadPoolExecutor(1) as thread:
            rows = thread.submit(driven, store, engine)
            wait_for(lambda: told(store))
            cluster.scheduler.kill()
            with pytest.raises(EngineFailed, match="scheduler-connection-lost"):
                rows.result(600)
    finally:
        engine.close()
    with Store(store) as left:
        assert left.counts(SUITE.label) == {"waiting": 4, "running": 0, "done": 0, "failed": 0}


def test_a_cell_waits_for_a_worker_with_its_resources(tmp_path: Path, cluster: Cluster) -> None:
    cluster.worker()
    engine = DaskEngine(1, address=str(cluster.file), resources={"GPU": 1})
    client = engine._client
    job = {**JOB, "place": {"store": str(tmp_path), "limits": LIMITS}}
    try:
        engine._client.wait_for_workers(1, timeout=600)
        answer = engine.submit(job)
        wait_for(lambda: client.run_on_scheduler(states_of_tasks) == ["no-worker"])
        assert not answer.done()
        cluster.worker("--resources", "GPU=1", "--name", "with-gpu")
        assert "MethodFailed: KeyError" in answer.result(600)["error"]  # it ran: its empty spec is no victim
    finally:
        engine.close()


def states_of_tasks(dask_scheduler: Any) -> list[str]:
    """Return the state of every task that a scheduler holds; run there."""
    return [task.state for task in dask_scheduler.tasks.values()]


def test_only_a_function_by_its_name_and_json_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Client:
        def submit(self, *arguments: Any, **options: Any) -> Any:
            sent.extend(arguments)
            return self

        def add_done_callback(self, callback: Any) -> None:
            pass

    engine = object.__new__(DaskEngine)
    monkeypatch.setattr(engine, "_client", Client(), raising=False)
    monkeypatch.setattr(engine, "_resources", {}, raising=False)
    engine.submit(JOB)
    function, job = sent
    assert names_in(cloudpickle.dumps(function)) == ["unbackdoor.bench.work", "execute"]
    assert names_in(cloudpickle.dumps(job)) == []
    assert json.loads(json.dumps(job)) == job


def names_in(data: bytes) -> list[str]:
    """Return what a pickle would import; every object of a class needs such a name."""
    texts: list[str] = []
    found: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("STACK_GLOBAL", "GLOBAL"):
            found += texts[-2:] if code.name == "STACK_GLOBAL" else str(argument).split()
        if isinstance(argument, str):
            texts.append(argument)
    return found


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match="scheduler file cannot be read"):
        DaskEngine(1, address=str(tmp_path / "no.json"))
    with pytest.raises(EngineFailed, match="cannot be reached"):
        DaskEngine(1, address="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[dask\]"):
        DaskEngine(1)


class Ended:
    """A task of Dask that raised."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def result(self) -> None:
        raise self._error


def test_a_cell_that_kills_workers_fails_and_a_cluster_that_cannot_run_any_ends_the_run() -> None:
    from distributed import KilledWorker

    engine = object.__new__(DaskEngine)
    engine._address = "tcp://127.0.0.1:9"
    answer: Future[dict[str, Any]] = Future()
    worker = type("Worker", (), {"address": "tcp://127.0.0.1:1"})()
    engine._settle(Ended(KilledWorker("cell", worker, 3)), answer)
    assert answer.result()["error"].startswith("KilledWorker: Attempted to run task 'cell' on 4")
    answer = Future()
    engine._settle(Ended(ModuleNotFoundError("No module named 'unbackdoor'")), answer)
    with pytest.raises(EngineFailed, match="No module named 'unbackdoor'"):
        answer.result()
