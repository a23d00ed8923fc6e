"""The driver: gives waiting cells to an engine, and alone writes what comes back.

Everything that makes a run resumable is here and in the store; an engine may lose any job at any time.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from unbackdoor.bench.engines import Answer, Engine
from unbackdoor.bench.store import Cell, Store

_LOOK = 0.5  # seconds between two looks at the clock
_LOOK_AT_STORE = 5.0  # seconds between two looks at what other drivers did, while all slots are busy
LOST = "its victim failed"


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
    budget: float | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Run the waiting cells of a registered suite.

    Args:
        store: Open store in which the suite is registered.
        label: Of the suite.
        engine: Where cells run; it is left open.
        place: What every job is told about the machine: store, data root, cache, device, limits.
        only: Pattern over ``dataset/architecture/attack/defense``; victims that are needed run too.
        budget: Seconds after which no cell is left running.
        watch: Called about twice a second.

    Returns:
        True if no cell that was asked for is left; False if the budget ended first.

    Cells that were running when this function is left, by an error or by Ctrl-C, are put back.
    """
    progress = Progress()
    end = None if budget is None else time.monotonic() + budget
    running: dict[Future[Answer], Cell] = {}
    members = store.members(label)
    cells = {cell.key: cell for cell, _ in members}
    names = {cell.key: name_of(labels) for cell, labels in reversed(members)}
    asked = _asked(members, only)
    states: Mapping[str, str] = {}
    looked = -_LOOK_AT_STORE
    try:
        while True:
            late = end is not None and time.monotonic() >= end
            if time.monotonic() - looked >= _LOOK_AT_STORE or len(running) < engine.slots:
                looked = time.monotonic()
                store.reclaim()
                states = store.states(label)
                _fail_orphans(store, asked, cells, states)
                if not late:
                    _start(store, engine, asked, cells, states, names, running, progress, place)
            progress.counts = Counter({"waiting": 0, "running": 0, "done": 0, "failed": 0})
            progress.counts.update(states.values())
            watch(progress)
            if late or (not running and not any(states[key] in ("waiting", "running") for key in asked)):
                return not late
            done, _ = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            if not running:
                time.sleep(_LOOK)  # the rest is with other drivers
            for future in done:
                _record(store, running.pop(future), future.result(), progress)
            if done:
                states = store.states(label)
    finally:
        store.release()


def _start(
    store: Store,
    engine: Engine,
    asked: Iterable[str],
    cells: Mapping[str, Cell],
    states: Mapping[str, str],
    names: Mapping[str, str],
    running: dict[Future[Answer], Cell],
    progress: Progress,
    place: Mapping[str, Any],
) -> None:
    """Claim ready cells in order until every slot has one."""
    for key in asked:
        if len(running) >= engine.slots:
            return
        cell = cells[key]
        ready = states[key] == "waiting" and (cell.parent is None or states[cell.parent] == "done")
        if ready and store.claim(key):
            job = _job(store, cell, place)
            running[engine.submit(job)] = cell
            progress.running[key] = (names[key], job["work"], time.monotonic())


def name_of(labels: Mapping[str, Any]) -> str:
    """Return the path-like name of a cell that ``only`` is matched against."""
    parts = [labels["dataset"], f"{labels['architecture']}-{labels['width']:g}", labels["attack"]]
    if "defense" in labels:
        parts += [
            labels["defense"] if labels["preset"] == "default" else f"{labels['defense']}:{labels['preset']}"
        ]
    return "/".join(parts)


def _asked(members: Iterable[tuple[Cell, Mapping[str, Any]]], only: str | None) -> list[str]:
    """Return the keys that match, in order, each with its victim before it and none twice."""
    keys: dict[str, None] = {}
    for cell, labels in members:
        name = name_of(labels)
        if only is None or fnmatchcase(name, only) or fnmatchcase(name, f"*{only}*"):
            if cell.parent is not None:
                keys.setdefault(cell.parent)
            keys.setdefault(cell.key)
    return list(keys)


def _fail_orphans(
    store: Store, asked: Iterable[str], cells: Mapping[str, Cell], states: Mapping[str, str]
) -> None:
    for key in asked:
        parent = cells[key].parent
        orphan = states[key] == "waiting" and parent is not None and states[parent] == "failed"
        if orphan and store.claim(key):
            store.fail(key, LOST, seconds=0.0)


def _job(store: Store, cell: Cell, place: Mapping[str, Any]) -> dict[str, Any]:
    parent = store.get(cell.parent) if cell.parent is not None else None
    return {
        "key": cell.key,
        "kind": cell.kind,
        "spec": dict(cell.spec),
        "victim": None if parent is None or parent.result is None else dict(parent.result),
        "work": uuid.uuid4().hex,
        "place": dict(place),
    }


def _record(store: Store, cell: Cell, answer: Answer, progress: Progress) -> None:
    progress.running.pop(cell.key, None)
    progress.finished += 1
    progress.seconds += answer["seconds"]
    if "error" in answer:
        store.fail(cell.key, answer["error"], seconds=answer["seconds"], log=answer["log"])
    else:
        store.finish(cell.key, answer["result"], seconds=answer["seconds"], log=answer["log"])
