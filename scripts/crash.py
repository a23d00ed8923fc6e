"""Kill a run of a suite at random moments, start it again each time, and say whether anything was lost.

    python scripts/crash.py smoke-v1 --kills 50 --seed 0
    python scripts/crash.py smoke-v1 --only '*/badnets/*' --kills 50 --folder /tmp/crash

The suite runs once undisturbed. Then it runs in another store, and its driver is killed with SIGKILL: at
random moments, and, because those are over in milliseconds, also on purpose where a cell's artefacts are
being moved to their address and where its result is being committed. Only kills that hit a driver with a
running cell are counted. A suite that ends before all kills are used is run again in a new store. At the
end rows and weights must be those of the undisturbed run, bit for bit, and nothing may lie about. The
verdict is printed as JSON; the exit code is 0 if it is good and 1 if it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from unbackdoor.bench.results import rows_of
from unbackdoor.bench.steps import MODEL, REPAIRED
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import SHIPPED
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.decode import processors
from unbackdoor.files import sha256_file
from unbackdoor.opening.classifier_files import load_model

_MARK = "UNBACKDOOR_CRASH_RUN"  # in the environment of the driver and so of all that it starts
_POLL_SECONDS = 0.0005  # between two checks for a moment that lasts milliseconds
_PATIENCE = 600.0  # seconds to wait for the chosen moment before giving it up
_MUST_DIE = 600.0  # seconds that the driver's processes have to follow it; a starting server imports first
_AIMS = (("any", 0.6), ("publish", 0.15), ("commit", 0.15), ("start", 0.1))
_OWN_TIME = {"seconds", "peak_mb", "commit"}  # the columns that two runs may differ in


@dataclass
class Experiment:
    """What is run, and what was seen so far.

    Attributes:
        command: The driver's command line without its store.
        folder: Where the stores are.
        workers: Cells at a time.
        draw: Source of all moments.
        ready: Seconds that a driver takes to its first cell.
        span: Longest wait before a kill in seconds; grows while nothing gets done.
        kills: Drivers that were killed with a cell running.
        early: Drivers that were killed before their first cell.
        phases: What the counted kills interrupted.
        faults: What must not have happened.
        slowest_end: Longest time in seconds that a process outlived its driver.
    """

    command: list[str]
    folder: Path
    workers: int
    draw: random.Random
    ready: float = 0.0
    span: float = 1.0
    kills: int = 0
    early: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_end: float = 0.0

    def start(self, store: Path) -> tuple[subprocess.Popen[bytes], str]:
        """Start a driver; return it with the mark of its processes."""
        mark = uuid.uuid4().hex
        return subprocess.Popen(
            [*self.command, "--store", str(store)],
            env={**os.environ, _MARK: mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ), mark


def undisturbed(run: Experiment, store: Path) -> float:
    """Run to the end; return the seconds from the first cell on."""
    start = time.monotonic()
    driver, _ = run.start(store)
    while driver.poll() is None and not _working(store):
        time.sleep(0.01)
    run.ready = time.monotonic() - start
    _end(driver, run)
    return time.monotonic() - start - run.ready


def one_life(run: Experiment, store: Path) -> bool:
    """Start a driver and kill it; return False if it had finished everything before."""
    (aim,) = run.draw.choices([name for name, _ in _AIMS], [share for _, share in _AIMS])
    before, done = _working(store), _published(store)
    driver, mark = run.start(store)
    if aim == "start":
        _wait(driver, run.draw.uniform(0, run.ready))
    else:
        while driver.poll() is None and not _working(store) - before:
            time.sleep(_POLL_SECONDS)
        if aim == "any":
            _wait(driver, run.draw.uniform(0, run.span))
        else:
            _watch(driver, store, aim, before, done)
            time.sleep(run.draw.uniform(0, 0.004))
    driver.kill()
    if driver.wait() == 0:
        return False
    _outlived(run, mark)
    if driver.returncode != -9:
        assert driver.stderr is not None
        run.faults.append(f"exit code {driver.returncode}: {driver.stderr.read()[-500:]!r}")
    phases = list(_interrupted(store, _working(store) - before))
    run.phases.update(phases)
    run.kills += bool(phases)
    run.early += not phases
    # A cell that takes longer than the longest wait would never be finished.
    run.span = run.span if _published(store) - done else 1.3 * run.span
    return True


def faults_of(store: Path, reference: Path, allowed: int) -> Iterator[str]:
    """Yield everything that is wrong with a store whose suite has ended.

    Args:
        store: Its folder.
        reference: The store of the undisturbed run.
        allowed: How many cells the kills may have cost.
    """
    expected = _states(reference)
    if _states(store) != expected:
        yield f"the cells are {_states(store)} and not {expected}"
    for name in ("work", "drivers", "checkpoints"):
        left = sorted(file.name for file in (store / name).iterdir()) if (store / name).exists() else []
        if left:
            yield f"{len(left)} left in {name}: {left[:3]}"
    drafts = [str(file.relative_to(store)) for file in store.rglob(".*")]
    if drafts:
        yield f"{len(drafts)} drafts left: {drafts[:3]}"
    with Store(store) as opened:
        members = [cell for label in opened.suites() for cell, _ in opened.members(label)]
        tries = sum(cell.tries for cell in members)
        if tries > expected["done"] + allowed:
            yield f"{tries} cells were started, more than {expected['done']} and {allowed} lost to kills"
        finished = {cell.key for cell in members if cell.state == "done"}
        there = {folder.name for folder in opened.artefacts.glob("*/*")}
        if finished != there:
            yield f"{len(finished - there)} artefacts are missing and {len(there - finished)} too many"
        for cell in members:
            if cell.state == "done":
                yield from _unloadable(opened.artefact(cell.key), cell.kind)
    for sample in (store / "samples").glob("*"):
        with safe_open(sample, framework="pt") as file:
            _ = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a dict
    with sqlite3.connect(store / "results.db") as db:
        (verdict,) = db.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        yield f"the database is damaged: {verdict}"


def differences(reference: Path, store: Path) -> Iterator[str]:
    """Yield where two finished stores differ in their rows or their weights."""
    rows, others = _rows(reference), _rows(store)
    if len({json.dumps(row, sort_keys=True) for row in others}) != len(others):
        yield "a row is there twice"
    if len(rows) != len(others):
        yield f"{len(rows)} rows became {len(others)}"
    for row, other in zip(rows, others, strict=False):
        changed = {name: (row[name], other[name]) for name in row if row[name] != other[name]}
        if changed:
            yield f"{row['attack']}/{row['defense']}/{row['clean_images']}: {changed}"
    weights, others_weights = _weights(reference), _weights(store)
    for name in weights.keys() | others_weights.keys():
        if weights.get(name) != others_weights.get(name):
            yield f"{name} has other bytes"


# ---------------------------------------------------------------------------------------------------


def _states(store: Path) -> dict[str, int]:
    with Store(store) as opened:
        (label,) = opened.suites()
        return opened.counts(label)


def _working(store: Path) -> set[str]:
    with suppress(FileNotFoundError):
        return {folder.name for folder in (store / "work").iterdir()}
    return set()


def _published(store: Path) -> set[str]:
    return {folder.name for folder in (store / "artefacts").glob("*/*")}


def _wait(driver: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)


def _watch(driver: subprocess.Popen[bytes], store: Path, aim: str, before: set[str], done: set[str]) -> None:
    """Wait until a cell's last step has answered, or until its artefacts stand at their address."""
    end = time.monotonic() + _PATIENCE
    while driver.poll() is None and time.monotonic() < end:
        if aim == "commit" and _published(store) - done:
            return
        for name in _working(store) - before if aim == "publish" else ():
            if (store / "work" / name / "result.json").exists() and _step(store / "work" / name) in (
                "training",
                "judge",
            ):
                return
        time.sleep(_POLL_SECONDS)


def _step(folder: Path) -> str:
    """Return which step of a cell a work folder belongs to."""
    try:
        task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "between steps"
    for word, step in (("checkpoint", "training"), ("sample", "sample"), ("victim", "judge")):
        if word in task:
            return step
    return "method"


def _interrupted(store: Path, folders: set[str]) -> Iterator[str]:
    """Yield what a killed driver was doing, from what it left behind."""
    for name in folders:
        step = _step(store / "work" / name)
        answered = (store / "work" / name / "result.json").exists()
        yield step if not answered else "publish" if step in ("training", "judge") else "between steps"
    with tempfile.TemporaryDirectory() as copies:
        # Read from a copy: opening the database would do the repair that the next driver shall do.
        for file in store.glob("results.db*"):
            shutil.copy(file, copies)
        with suppress(sqlite3.Error):
            db = sqlite3.connect(Path(copies) / "results.db")
            running = [key for (key,) in db.execute("SELECT key FROM cell WHERE state = 'running'")]
            db.close()
            uncommitted = set(running) & _published(store)
            if uncommitted:
                yield "commit"
            elif running and not folders:
                yield "claim"


def _outlived(run: Experiment, mark: str) -> None:
    """Wait for the driver's processes to follow it; end those that do not, and note it."""
    start = time.monotonic()
    while (left := _marked(mark)) and time.monotonic() - start < _MUST_DIE:
        time.sleep(0.02)
    run.slowest_end = max(run.slowest_end, time.monotonic() - start)
    if left:
        for pid in left:
            run.faults.append(f"a process outlived its driver by {_MUST_DIE:g} s: {_command(pid)}")
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


def _marked(mark: str) -> list[int]:
    marker = f"{_MARK}={mark}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # What has ended and was not waited for has no environment any more.
            if marker in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
    return pids


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return "gone"


def _end(driver: subprocess.Popen[bytes], run: Experiment) -> None:
    _, said = driver.communicate()
    if driver.returncode:
        run.faults.append(f"exit code {driver.returncode}: {said[-500:]!r}")


def _rows(store: Path) -> list[dict[str, Any]]:
    with Store(store) as opened:
        (label,) = opened.suites()
        return [row.model_dump(exclude=_OWN_TIME) for row in rows_of(opened, label)]


def _weights(store: Path) -> dict[str, str]:
    files = [*store.glob("artefacts/*/*/*.safetensors"), *store.glob("artefacts/*/*/*.truth.json")]
    return {str(file.relative_to(store)): sha256_file(file) for file in files}


def _unloadable(folder: Path, kind: str) -> Iterator[str]:
    try:
        load_model(folder / (MODEL if kind == "victim" else REPAIRED))
        if kind == "victim":
            load_truth(folder / MODEL)
        else:
            json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
        yield f"{kind} {folder.name[:12]} cannot be loaded: {error}"


def main() -> int:
    """Run the experiment and print its verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="label of a suite")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run only what matches; see unbackdoor bench run --help")
    # One thread each: two threads that wait for each other on a busy machine take many times as long.
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--suites", type=Path, default=SHIPPED)
    parser.add_argument("--folder", type=Path, help="where the stores are made and kept; default: nowhere")
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "unbackdoor", "bench", "run", options.suite, "--suites", str(options.suites),
        "--workers", str(options.workers), "--quiet", *(["--only", options.only] if options.only else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run = Experiment(command, folder, options.workers, random.Random(options.seed))
        verdict = experiment(run, options.kills)
    print(
        json.dumps({"suite": options.suite, "only": options.only, "seed": options.seed, **verdict}, indent=2)
    )
    return 0 if verdict["good"] else 1


def experiment(run: Experiment, kills: int) -> dict[str, Any]:
    """Run undisturbed, then with kills, and compare."""
    reference = run.folder / "undisturbed"
    seconds = undisturbed(run, reference)
    cells = len(_published(reference))
    if _states(reference)["failed"]:
        run.faults.append(f"cells failed in the undisturbed run: {_states(reference)}")
    # Twice the mean wait; half a cell is lost by each kill.
    run.span = 2 * (seconds / max(kills, 1) + seconds / max(cells, 1) / 2)
    stores: list[Path] = []
    start = time.monotonic()
    while run.kills < kills and not run.faults:
        stores.append(run.folder / f"killed-{len(stores)}")
        first = run.kills
        while run.kills < kills and not run.faults and one_life(run, stores[-1]):
            pass
        _end(run.start(stores[-1])[0], run)
        run.faults += faults_of(stores[-1], reference, (run.kills - first) * run.workers)
        run.faults += differences(reference, stores[-1])
    return {
        "good": not run.faults and run.kills >= kills,
        "kills": run.kills,
        "kills_before_the_first_cell": run.early,
        "interrupted": dict(sorted(run.phases.items())),
        "rounds": len(stores),
        "cells": cells,
        "workers": run.workers,
        "seconds_undisturbed": round(seconds, 1),
        "seconds_to_the_first_cell": round(run.ready, 1),
        "seconds_with_kills": round(time.monotonic() - start, 1),
        "slowest_end_of_a_process": round(run.slowest_end, 2),
        "faults": run.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
