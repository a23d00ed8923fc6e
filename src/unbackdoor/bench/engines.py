"""Where cells run: processes of this machine, or a Dask cluster. Neither schedules anything of its own.

An engine takes jobs and gives futures; which job comes next, what is stored and when to stop is the
driver's business. Both engines run the same function on the same JSON.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from unbackdoor.bench import isolate
from unbackdoor.bench.work import execute
from unbackdoor.errors import InputError, MissingExtra

Job = dict[str, Any]
Answer = dict[str, Any]


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

    def submit(self, job: Job) -> Future[Answer]:
        """Start a job in a waiting thread, which starts its processes."""
        return self._pool.submit(execute, job)

    def close(self) -> None:
        """Kill the processes and wait for the threads."""
        isolate.end_all()
        self._pool.shutdown(wait=True, cancel_futures=True)


class DaskEngine:
    """A Dask cluster: an existing one by address, or worker processes on the loopback interface.

    Args:
        workers: Worker processes of a cluster of its own; cells at a time on an existing one.
        address: Scheduler such as ``tcp://host:8786``, or None for a cluster of its own.
        resources: What a worker must have free for a cell, such as ``{"GPU": 1}``.
        retries: How often a cell is tried again when its worker dies.
    """

    def __init__(
        self,
        workers: int,
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        retries: int = 2,
    ) -> None:
        try:
            import dask
            import distributed
        except ImportError:
            raise MissingExtra("distributed", "dask", "running on a cluster") from None
        self.slots = workers
        self._resources = dict(resources or {})
        self._retries = retries
        self._cluster: Any = None
        # A worker starts processes of its own, one for each step, which daemons may not.
        dask.config.set({"distributed.worker.daemon": False})
        if address is None:
            self._cluster = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                resources=self._resources or None,
                silence_logs=40,
            )
        try:
            self._client = distributed.Client(self._cluster or address, timeout=30)
        except (OSError, TimeoutError) as error:
            raise InputError("the scheduler cannot be reached", got=str(error), where=address) from error

    def submit(self, job: Job) -> Future[Answer]:
        """Send a job to the cluster and follow it."""
        # Its own key: an equal job sent again, after a failure, must run again.
        task = self._client.submit(
            execute, job, pure=False, retries=self._retries, resources=self._resources or None
        )
        future: Future[Answer] = Future()
        task.add_done_callback(lambda done: _settle(done, future))
        return future

    def close(self) -> None:
        """Leave the cluster; end it where it is our own."""
        with contextlib.suppress(Exception):
            self._client.close(timeout=10)
        if self._cluster is not None:
            with contextlib.suppress(Exception):
                self._cluster.close(timeout=10)


def _settle(task: Any, future: Future[Answer]) -> None:
    try:
        future.set_result(task.result())
    except BaseException as error:  # noqa: BLE001  a lost worker is an answer too
        if not future.done():
            future.set_result({"error": f"{type(error).__name__}: {error}", "seconds": 0.0, "log": ""})
