"""The driver: gives waiting cells to an engine, and alone writes what comes back.

Everything that makes a run resumable is here and in the store; an engine may lose any job at any time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from typing import Any

from unbackdoor.bench.engines import Engine
from unbackdoor.bench.jobs import Answer, make_job
from unbackdoor.bench.store import Cell, State, Store
from unbackdoor.errors import DiskFull, IntegrityError

_POLL_SECONDS = 0.5  # between two checks of the clock and of the running cells
_STORE_POLL_SECONDS = 5.0  # between two reads of other drivers' changes, while all slots are busy
LOST = "its victim failed"
_OPEN = ("waiting", "running")


@dataclass
class Progress:
    """How far a run is, for the live table.

    Attributes:
        counts: Cells by state.
        running: Labels of the running cells, with the name of their work folder and their start.
        finished: Cells finished by this driver, and their summed seconds.
    """

    counts: Counter[str] = field(default_factory=Counter)
    running: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    finished: int = 0
    seconds: float = 0.0

    def left_seconds(self, slots: int) -> float | None:
        """Estimate the time left from the mean of the finished cells, or None before the first."""
        if not self.finished:
            return None
        left = self.counts.get("waiting", 0) + len(self.running) / 2
        return left * self.seconds / self.finished / max(1, slots)


def drive(
    store: Store,
    label: str,
    engine: Engine,
    place: Mapping[str, Any],
    *,
    only: str | None = None,
    part: str | None = None,
    budget: float | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run the waiting cells of a registered suite.

    Args:
        store: Open store in which the suite is registered.
        label: Of the suite.
        engine: Where cells run; it is left open.
        place: What every job needs to know about the machine: store, data root, cache, device, limits.
        only: Pattern over ``dataset/architecture/attack/defense``; victims that are needed run too. The
            victims themselves have ``victim`` in the place of the defense.
        part: Run this part alone of a suite that is split into ``tuning`` and ``test``.
        budget: Seconds after which no cell is left running.
        watch: Called about twice a second.
        asked_to_stop: Called as often, and before a cell is claimed.

    Returns:
        True if no cell that was asked for is left; False if the budget ended first.

    Raises:
        KeyboardInterrupt: Once ``asked_to_stop`` says so.
        DiskFull: If there was no room for a cell or its result. That is no cell's failure.

    Cells that were running when this function is left, by an error or by Ctrl-C, are put back. A signal
    handler should set what ``asked_to_stop`` reads and raise nothing: raised between any two bytecodes, an
    exception leaves the locks of futures and conditions taken.
    """
    store.sweep()
    progress = Progress()
    end = None if budget is None else time.monotonic() + budget
    running: dict[Future[Answer], Cell] = {}
    agenda = Agenda(store, label, only, part)
    progress.counts = agenda.counts
    polled = -_STORE_POLL_SECONDS
    try:
        while True:
            _stop_if_asked(asked_to_stop)
            late = end is not None and time.monotonic() >= end
            if time.monotonic() - polled >= _STORE_POLL_SECONDS or len(running) < engine.slots:
                polled = time.monotonic()
                store.reclaim()
                agenda.refresh()
                if not late:
                    _start(store, engine, agenda, running, progress, place, asked_to_stop)
            watch(progress)
            if late or (not running and not agenda.left):
                return not late
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            if not running:
                time.sleep(_POLL_SECONDS)  # the rest is with other drivers
            for future in done:
                _record(store, running.pop(future), future.result(), progress)
            if done:
                agenda.refresh()
    finally:
        store.release()


class Agenda:
    """What is to do in a suite, kept in memory and brought up to date from the store's changes alone.

    The cost of :meth:`refresh` grows with the number of changes and not with the size of the suite, so that a
    driver can call it after every answer.

    Args:
        store: Open store in which the suite is registered.
        label: Of the suite.
        only: See :func:`drive`.
        part: See :func:`drive`.

    Attributes:
        counts: Cells of the suite by state.
        left: How many of the cells that were asked for are waiting or running, whoever runs them.
        names: Of the cells that were asked for, by key.
    """

    def __init__(self, store: Store, label: str, only: str | None = None, part: str | None = None) -> None:
        self._store = store
        self._seen = store.last_change()  # read first: changes made meanwhile are reported again
        self._states: dict[str, State] = {}
        self.counts: Counter[str] = Counter({"waiting": 0, "running": 0, "done": 0, "failed": 0})
        self.left = 0
        members = [(key, parent, name_of(labels)) for key, parent, labels in store.outline(label)]
        self.names = {key: name for key, _, name in reversed(members)}
        self._parents = {key: parent for key, parent, _ in members}
        self._order = _matching(members, only, part)
        self._places = {key: place for place, key in enumerate(self._order)}
        self._repairs: dict[str, list[str]] = {}
        for key in self._order:
            if (parent := self._parents[key]) is not None:
                self._repairs.setdefault(parent, []).append(key)
        self._ready: list[int] = []  # a heap of places; what is no longer ready is dropped when it comes up
        self._orphans: list[str] = []
        states = store.states(label)
        for key in self._parents:  # victims stand before their repairs
            self._enter(key, states[key])

    def refresh(self) -> None:
        """Apply the changes of the store, and mark the repairs failed whose victim failed."""
        self._apply_changes()
        if self._orphans:
            self._store.give_up(self._orphans, LOST)
            self._orphans = []
            self._apply_changes()

    def next(self) -> str | None:
        """Return the first cell that could start, each once until it waits anew; None where there is none."""
        while self._ready:
            key = self._order[heappop(self._ready)]
            if self._startable(key):
                return key
        return None

    def _apply_changes(self) -> None:
        self._seen, changes = self._store.changes(self._seen)
        for key, state in changes:
            if key in self._states:
                self._enter(key, state)

    def _enter(self, key: str, state: State) -> None:
        before = self._states.get(key)
        self._states[key] = state
        self.counts[state] += 1
        if before is not None:
            self.counts[before] -= 1
        if key not in self._places:
            return
        self.left += (state in _OPEN) - (before in _OPEN)
        if state == "waiting":
            self._offer(key)
        elif state in ("done", "failed"):
            for repair in self._repairs.get(key, ()):
                if self._states.get(repair) == "waiting":
                    self._offer(repair)

    def _offer(self, key: str) -> None:
        parent = self._parents[key]
        if parent is not None and self._states[parent] == "failed":
            self._orphans.append(key)
        elif self._startable(key):
            heappush(self._ready, self._places[key])

    def _startable(self, key: str) -> bool:
        parent = self._parents[key]
        return self._states[key] == "waiting" and (parent is None or self._states[parent] == "done")


def _start(
    store: Store,
    engine: Engine,
    agenda: Agenda,
    running: dict[Future[Answer], Cell],
    progress: Progress,
    place: Mapping[str, Any],
    asked_to_stop: Callable[[], bool],
) -> None:
    """Claim ready cells in order until every slot has one."""
    while len(running) < engine.slots and (key := agenda.next()) is not None:
        _stop_if_asked(asked_to_stop)
        claimed, cell = store.claim(key), store.get(key)
        if cell is None:
            raise IntegrityError(
                "a cell of the suite was removed from the store while it ran",
                where=key,
                remedy="Start the run again",
            )
        if not claimed:
            continue  # another driver was faster; the next refresh shows it
        parent = store.get(cell.parent) if cell.parent is not None else None
        job = make_job(cell, parent, owner=store.owner, place=place)
        running[engine.submit(job)] = cell
        progress.running[key] = (agenda.names[key], job["work"], time.monotonic())
    agenda.refresh()


def _stop_if_asked(asked_to_stop: Callable[[], bool]) -> None:
    if asked_to_stop():
        raise KeyboardInterrupt


def name_of(labels: Mapping[str, Any]) -> str:
    """Return the path-like name of a cell that ``only`` is matched against."""
    parts = [labels["dataset"], f"{labels['architecture']}-{labels['width']:g}", labels["attack"]]
    method = labels.get("defense") or labels.get("scanner")
    if method:
        parts.append(method if labels["preset"] == "default" else f"{method}:{labels['preset']}")
        parts.append(f"images={labels['clean_images']}")
        parts += [f"altered={labels['altered']}"] if labels.get("altered") else []
        parts.append(f"sample={labels['defender_seed']}")
    else:
        parts.append("victim")
    parts += [f"rate={labels['poison_rate']:g}", f"seed={labels['victim_seed']}", labels["recipe"]]
    if labels.get("part"):
        parts.append(f"part={labels['part']}")
    return "/".join(parts)


def matches(name: str, only: str | None = None, part: str | None = None) -> bool:
    """Return whether the name of a cell fits a pattern and a part; None fits all."""
    if part is not None and not name.endswith(f"/part={part}"):
        return False
    only = only and only.replace("[", "[[]")  # names of networks have brackets, patterns have none
    return only is None or fnmatchcase(name, only) or fnmatchcase(name, f"*{only}*")


def _matching(
    members: Iterable[tuple[str, str | None, str]], only: str | None, part: str | None
) -> list[str]:
    """Return the keys whose names match, in order, each with its victim before it and none twice."""
    keys: dict[str, None] = {}
    for key, parent, name in members:
        if matches(name, only, part):
            if parent is not None:
                keys.setdefault(parent)
            keys.setdefault(key)
    return list(keys)


def _record(store: Store, cell: Cell, answer: Answer, progress: Progress) -> None:
    progress.running.pop(cell.key, None)
    if "halt" in answer:
        raise DiskFull(answer["halt"].rstrip("."), remedy="Finished cells are kept; start again to go on")
    progress.finished += 1
    progress.seconds += answer["seconds"]
    if "error" in answer:
        store.fail(cell.key, answer["error"], seconds=answer["seconds"], log=answer["log"])
    else:
        store.finish(cell.key, answer["result"], seconds=answer["seconds"], log=answer["log"])
