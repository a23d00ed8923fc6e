"""A store of 100,000 rows: what a driver pays for an answer, and how long the commands take.

    python benchmarks/bench_scale.py [--rows 100000] [--pairs 3] [--json bench_scale.json]

The store is made up, through the store's own functions, with 50 repairs for each victim; only the making is
done without waiting for the disk. Measured are

- an answer: what the driver does between an answer and the next job, with every commit on the disk, against
  the plain way, which reads the state of every cell and walks all of them. This is the headline. Half of
  the cells are finished then.
- a registration of a suite that the store knows, against the first one, which is what every start cost.
- the commands ``status``, ``export``, ``report`` and ``diff``, each as a process of its own from start to
  end, with all rows finished. One row in a hundred has an error.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from _harness import Ratio, Result, parser
from unbackdoor.bench.driver import Agenda, drive
from unbackdoor.bench.store import Store

LABEL = "scale-v1"
SLOTS = 200
REPAIRS = 50  # of each victim
ATTACKS = ("badnets", "badnets_all_to_all", "blended", "wanet", "sig", "none")
DEFENSES = ("none", "ft", "random_prune", "fp", "rnp")
Entry = tuple[dict[str, Any], dict[str, Any]]


def key_of(*words: object) -> str:
    """Return an address like those of real cells."""
    return hashlib.sha256(repr(words).encode()).hexdigest()


def cells(rows: int) -> Iterator[Entry]:
    """Yield victims, each before its repairs, with specifications and labels of the usual length."""
    shared = {
        "epoch": 1,
        "torch": "2.13",
        "precision": "auto",
        "data_sha256": [key_of("train"), key_of("test")],
    }
    budgets = [(count, seed) for count in (10, 100, 500) for seed in range(4)]
    kinds = list(itertools.islice(itertools.product(budgets, DEFENSES), REPAIRS))
    for victim in range(-(-rows // REPAIRS)):
        attack, parent = ATTACKS[victim % len(ATTACKS)], key_of("victim", victim)
        labels = {
            "suite": "scale", "version": 1, "dataset": "cifar10", "architecture": "preact_resnet18",
            "width": 16.0, "recipe": "plain", "attack": attack,
            "poison_rate": 0.0 if attack == "none" else (0.01, 0.05, 0.1)[victim % 3],
            "target": None if attack == "none" else 0, "victim_seed": victim,
        }  # fmt: skip
        recipe = {"epochs": 30, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
        spec = {**shared, "kind": "victim", "dataset": "cifar10", "recipe": recipe, "attack": attack}
        yield {"key": parent, "kind": "victim", "spec": spec, "parent": None}, labels
        for (count, seed), defense in kinds:
            options = {"epochs": 20, "batch_size": 64, "lr": 0.01, "tolerance": 0.02}
            repair = {
                **shared, "kind": "repair", "victim": parent, "defense": defense, "options": options,
                "clean_images": count, "seed": seed, "selection": "held-out clean",
            }  # fmt: skip
            more = {
                "defense": defense, "preset": "default", "selection": "held-out clean",
                "clean_images": count, "defender_seed": seed,
            }  # fmt: skip
            key = key_of(victim, count, seed, defense)
            yield {"key": key, "kind": "repair", "spec": repair, "parent": parent}, {**labels, **more}


def result_of(key: str, kind: str) -> dict[str, Any]:
    """Return a made-up result of the usual form; its numbers are drawn from the key."""
    draw = [int(key[at : at + 4], 16) / 0xFFFF for at in range(0, 16, 4)]
    rates = {"acc": 0.85 + 0.1 * draw[0], "asr": draw[1], "ra": 0.9 * (1 - draw[1])}
    if kind == "victim":
        rates["asr"] = 0.95 + 0.05 * draw[1]
    counts = {name: {"hits": round(10_000 * value), "total": 10_000} for name, value in rates.items()}
    out: dict[str, Any] = {"scores": {"counts": counts, **rates}, "seconds": 60 * draw[2], "peak_mb": 700.0}
    out["device"] = "made up"
    return out if kind == "victim" else {**out, "der": 0.5 + 0.5 * draw[3], "flags": []}


class Instant:
    """An engine that answers at once, and notes when each job came.

    Args:
        slots: Jobs at a time.
        jobs: After how many jobs it interrupts the driver.
    """

    def __init__(self, slots: int, jobs: int) -> None:
        self.slots = slots
        self.times: list[float] = []
        self._jobs = jobs

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        """Answer."""
        if len(self.times) >= self._jobs:
            raise KeyboardInterrupt
        self.times.append(time.perf_counter())
        future: Future[dict[str, Any]] = Future()
        future.set_result({"result": result_of(job["key"], job["kind"]), "seconds": 60.0, "log": ""})
        return future

    def close(self) -> None:
        """Do nothing."""


def until(driver: Callable[[Store, Instant], object], folder: Path, jobs: int) -> float:
    """Return the seconds from job to job with one slot, so that the driver looks after each answer."""
    engine = Instant(1, jobs)
    with Store(folder) as store:
        try:
            driver(store, engine)
        except KeyboardInterrupt:
            store.release()
    return (engine.times[-1] - engine.times[0]) / (len(engine.times) - 1)


def ours(store: Store, engine: Instant) -> None:
    """Drive as the program does."""
    drive(store, LABEL, engine, {})


def plain(store: Store, engine: Instant) -> None:
    """Drive as it is written first: read the states of all cells, walk all of them, do one, begin again."""
    members = store.members(LABEL)
    parents = {cell.key: cell for cell, _ in members}
    while True:
        store.reclaim()
        states = store.states(LABEL)
        for key, cell in parents.items():
            assert not (
                states[key] == "waiting" and cell.parent is not None and states[cell.parent] == "failed"
            )
        for key, cell in parents.items():
            if (
                states[key] == "waiting"
                and (cell.parent is None or states[cell.parent] == "done")
                and store.claim(key)
            ):
                parent = store.get(cell.parent) if cell.parent is not None else None
                job = {
                    "key": key,
                    "kind": cell.kind,
                    "spec": dict(cell.spec),
                    "victim": parent and parent.result,
                }
                answer = engine.submit(job).result()
                store.finish(key, answer["result"], seconds=answer["seconds"], log="")
                break
        states = store.states(LABEL)
        if not any(states[key] in ("waiting", "running") for key in parents):
            return


def finish(folder: Path, entries: Sequence[Entry]) -> None:
    """Finish cells that wait, without waiting for the disk."""
    with Store(folder) as store:
        store._db.execute("PRAGMA synchronous = OFF")
        for number, (cell, _) in enumerate(entries):
            if not store.claim(cell["key"]):
                continue  # a driver has done it
            if cell["kind"] == "repair" and number % 100 == 99:
                store.fail(cell["key"], "MethodFailed: it ran out of time", seconds=60.0)
            else:
                store.finish(cell["key"], result_of(cell["key"], cell["kind"]), seconds=60.0)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def command(folder: Path, *words: str) -> tuple[float, float]:
    """Return the seconds of a command, from its start to its end, and those that it kept a processor busy."""

    def call() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "unbackdoor", "bench", *words, "--store", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"bench {words[0]} failed: {done.stderr}")

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = timed(call)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=3)
    options.add_argument("--rows", type=int, default=100_000, help="repairs in the store")
    options.add_argument("--jobs", type=int, default=20, help="answers in each round of a driver")
    arguments = options.parse_args()
    if arguments.quick:
        arguments.rows, arguments.pairs, arguments.jobs = 300, 1, 4
    with tempfile.TemporaryDirectory(prefix="unbackdoor-benchmark-") as name:
        measure(arguments, Path(name))


def measure(arguments: argparse.Namespace, place: Path) -> None:
    """Do the work in a folder that is thrown away."""
    entries = list(cells(arguments.rows))
    folder, out = place / "store", place / "rows.jsonl"
    settings = {
        "rows": arguments.rows, "cells": len(entries), "jobs": arguments.jobs, "quick": arguments.quick,
    }  # fmt: skip
    result = Result(
        "bench_scale", f"{arguments.rows:,} rows of {len(entries) - arguments.rows:,} victims", settings
    )

    def register() -> None:
        with Store(folder) as store:
            store.register(LABEL, "0" * 64, "", entries)

    seconds: dict[str, list[float]] = {"first registration": [timed(register)]}
    finish(folder, entries[: len(entries) // 2])
    seconds["registration"] = [timed(register) for _ in range(arguments.pairs)]
    seconds["answer"], seconds["answer, plain"] = [], []
    for _ in range(arguments.pairs):
        seconds["answer"].append(until(ours, folder, arguments.jobs))
        seconds["answer, plain"].append(until(plain, folder, arguments.jobs))
    with Store(folder) as store:
        seconds["start of a driver"] = [timed(lambda: Agenda(store, LABEL))]
    finish(folder, entries[len(entries) // 2 :])
    page = place / "page"
    for words in (
        ("status",),
        ("export", LABEL, "--out", str(out)),
        ("diff", LABEL, str(out)),
        ("report", LABEL, "--out", str(page)),
    ):
        wall, busy = command(folder, *words)
        seconds[words[0]], seconds[f"{words[0]}, processor"] = [wall], [busy]
    result.add("an answer : reading all states", Ratio.of(seconds["answer, plain"], seconds["answer"]))
    first = seconds["first registration"] * arguments.pairs
    result.add("known suite : first registration", Ratio.of(first, seconds["registration"]))
    sizes = {
        "database_mb": (folder / "results.db").stat().st_size / 1e6,
        "export_mb": out.stat().st_size / 1e6,
        "report_html_mb": (page / "index.html").stat().st_size / 1e6,
        "report_md_mb": (page / "report.md").stat().st_size / 1e6,
    }
    result.facts["sizes"] = sizes
    for name in ("status", "export", "diff", "report"):
        busy = seconds[f"{name}, processor"][0]
        result.notes.append(f"bench {name}: {seconds[name][0]:.1f} s, {busy:.1f} s of them at work")
    result.notes.append(
        f"an answer: {1000 * min(seconds['answer']):.1f} ms; start of a driver: "
        f"{seconds['start of a driver'][0]:.1f} s; page: {sizes['report_html_mb']:.1f} MB"
    )
    result.show(seconds, arguments.json)


if __name__ == "__main__":
    main()
