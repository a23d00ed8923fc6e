"""Where cells run: processes of this machine, or a Dask cluster. Neither schedules anything of its own.

An engine takes jobs and gives futures; which job comes next, what is stored and when to stop is the
driver's business. Both engines run the same function on the same JSON.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from unbackdoor import isolate
from unbackdoor.bench.jobs import Answer, Job
from unbackdoor.bench.work import execute
from unbackdoor.errors import EngineFailed, InputError, MissingExtra

_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.05  # between two readings of a scheduler file


class Engine(Protocol):
    """Runs jobs.

    Attributes:
        slots: How many jobs it can run at a time.
    """

    slots: int

    def submit(self, job: Job) -> Future[Answer]:
        """Start a job as soon as there is a slot."""
        ...

    def close(self) -> None:
        """End what is running and give back all resources."""
        ...


class LocalEngine:
    """Processes of this machine, one for each step of a cell.

    Args:
        workers: Cells at a time.
    """

    def __init__(self, workers: int) -> None:
        self.slots = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cell")
        self._running: set[Future[Answer]] = set()

    def submit(self, job: Job) -> Future[Answer]:
        """Start a job in a waiting thread, which starts its processes."""
        future = self._pool.submit(execute, job)
        self._running = {other for other in self._running if not other.done()} | {future}
        return future

    def close(self) -> None:
        """Kill the processes and wait for the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        # Without the cancelled ones: the loop below would wait for them for ever.
        self._running = {future for future in self._running if not future.cancelled()}
        # More than once: a thread between two steps starts the next one after everything was ended.
        isolate.end_all()
        while wait(self._running, timeout=0.1).not_done:
            isolate.end_all()


class DaskEngine:
    """A Dask cluster: an existing one by address, or worker processes on the loopback interface.

    Args:
        workers: Worker processes of a cluster of its own; cells at a time on an existing one.
        address: Scheduler such as ``tcp://host:8786``, the JSON file in which it wrote its address, or None
            for a cluster of its own. The engine waits until the file has its content.
        resources: What a worker must have free for a cell, such as ``{"GPU": 1}``; until there is such a
            worker the cell waits.

    A cell whose worker dies is tried on another one, as often as the scheduler allows (three times, unless
    ``distributed.scheduler.allowed-failures`` says otherwise); then it failed. Anything else that a task
    raises means that the cluster cannot run cells, and the future raises EngineFailed.

    Raises:
        MissingExtra: Without distributed.
        InputError: If the scheduler file does not name an address in time.
        EngineFailed: If the scheduler cannot be reached.
    """

    def __init__(
        self,
        workers: int,
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        try:
            import distributed
        except ImportError:
            raise MissingExtra("distributed", "dask", "running on a cluster") from None
        self.slots = workers
        self._resources = dict(resources or {})
        self._cluster: Any = None
        if address is None:
            self._cluster = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # None would take a fixed port, which may be in use
                resources=self._resources or None,
                silence_logs=40,
            )
        self._address = address if address is None else _address(address)
        try:
            self._client = distributed.Client(self._cluster or self._address, timeout=_CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise EngineFailed(
                "the scheduler cannot be reached",
                got=error,
                where=address,
                remedy="Start it with: dask scheduler",
            ) from error

    def submit(self, job: Job) -> Future[Answer]:
        """Send a job to the cluster and follow it."""
        # Its own key: an equal job sent again, after a failure, must run again.
        task = self._client.submit(execute, job, pure=False, resources=self._resources or None)
        future: Future[Answer] = Future()
        task.add_done_callback(lambda done: self._settle(done, future))
        return future

    def close(self) -> None:
        """Leave the cluster; end it where it is our own."""
        with contextlib.suppress(Exception):
            self._client.close(timeout=10)
        if self._cluster is not None:
            with contextlib.suppress(Exception):
                self._cluster.close(timeout=10)

    def _settle(self, task: Any, future: Future[Answer]) -> None:
        from distributed import KilledWorker

        try:
            future.set_result(task.result())
        except KilledWorker as error:  # it ended every worker that tried it: a fact about the cell
            future.set_result({"error": f"{type(error).__name__}: {error}", "seconds": 0.0, "log": ""})
        except BaseException as error:  # noqa: BLE001  it must not end with this thread
            future.set_exception(
                EngineFailed(
                    "the cluster lost a cell or could not run it",
                    got=f"{type(error).__name__}: {error}",
                    where=self._address,
                    remedy="See that the scheduler lives and its workers have this version of unbackdoor, "
                    "and run the same command again: finished cells stay",
                )
            )


def _address(text: str) -> str:
    """Return the address of a scheduler; where a file was given, once the scheduler has written it there.

    A scheduler that is just being started makes its file empty and fills it later, in pieces, so that a file
    that is missing or is no JSON yet may be whole a moment later.

    Raises:
        InputError: If it is not within the time that a connection may take.
    """
    if not text.endswith(".json"):
        return text
    end = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            address = json.loads(Path(text).read_text(encoding="utf-8"))["address"]
            if not isinstance(address, str) or not address:
                raise ValueError(f"its address is {address!r}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if time.monotonic() >= end:
                raise InputError(
                    "the scheduler file cannot be read",
                    expected='a JSON object with an "address"',
                    got=f"{type(error).__name__}: {error}, after {_CONNECT_SECONDS:g} s",
                    where=text,
                    remedy="Start the scheduler with: dask scheduler --scheduler-file FILE",
                ) from error
            time.sleep(_POLL_SECONDS)
        else:
            return address
