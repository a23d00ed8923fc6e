"""How much of a benchmark's time is not training, not repairing and not judging.

    python benchmarks/bench_overhead.py --store runs/bench --suite cifar10-small-v1 [--json FILE]
    python benchmarks/bench_overhead.py

Reads a store that ``unbackdoor bench run`` made (it is copied first) and divides the wall-clock time of the
runs among what is useful (training a victim, a method at work, the judge's forward passes) and what is
machinery:

- inside the steps: starting a process, reading models and data, hashing, checking, writing;
- between the steps: copying, moving to the address, the waiting for a process to end;
- the driver: from the end of a cell to the start of the next, commits included.

A slot that nothing could fill, because the cells that were left waited for a victim, counts as machinery too,
so a piece should have more cells than slots. Cells of before the parts were timed are left out of the shares
and named. Without ``--store`` a small piece on digits is run first, whose cells take a second each: it shows
how much a cell costs, and its share is that of a piece nobody would run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _harness import Ratio, Result, parser
from unbackdoor.bench.cells import plan
from unbackdoor.bench.driver import drive
from unbackdoor.bench.engines import LocalEngine
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import Suite
from unbackdoor.data.datasets import load_dataset

USEFUL = ("train", "method", "judge")
PAUSE = 60.0  # seconds without any running cell after which another run is taken to have begun


@dataclass(frozen=True)
class Done:
    """A finished cell.

    Attributes:
        kind: ``victim`` or ``repair``.
        start: Of the cell, in seconds of the clock.
        end: Likewise.
        timings: Seconds of its steps and their parts.
    """

    kind: str
    start: float
    end: float
    timings: dict[str, float]

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.end - self.start

    @property
    def useful(self) -> float:
        """Seconds of training, repairing and judging."""
        return sum(self.timings.get(part, 0.0) for part in USEFUL)

    @property
    def steps(self) -> float:
        """Seconds from the start of each process to its end."""
        return sum(seconds for part, seconds in self.timings.items() if part.endswith(" step"))


def read(folder: Path, suite: str | None) -> list[Done]:
    """Return the finished cells of a suite, or of all, in the order of their starts."""
    with tempfile.TemporaryDirectory(prefix="unbackdoor-benchmark-") as name:
        for file in folder.glob("results.db*"):
            shutil.copy(file, name)
        db = sqlite3.connect(Path(name) / "results.db")
        rows = db.execute(
            "SELECT kind, seconds, finished, result FROM cell WHERE state = 'done' "
            "AND (?1 IS NULL OR key IN (SELECT key FROM member WHERE suite = ?1))",
            (suite,),
        ).fetchall()
        db.close()
    cells = [
        Done(kind, finished - seconds, finished, json.loads(result).get("timings", {}))
        for kind, seconds, finished, result in rows
    ]
    return sorted(cells, key=lambda cell: cell.start)


def runs(cells: Sequence[Done]) -> list[list[Done]]:
    """Divide cells into those of each run, at every long pause."""
    out: list[list[Done]] = []
    end = -PAUSE
    for cell in cells:
        if cell.start - end > PAUSE or not out:
            out.append([])
        out[-1].append(cell)
        end = max(end, cell.end)
    return out


def slots_of(cells: Sequence[Done]) -> int:
    """Return how many cells ran at a time at most; a cell that starts when another ends is not beside it."""
    marks = sorted([(c.start, 1) for c in cells] + [(c.end, -1) for c in cells])
    most = now = 0
    for _, step in marks:
        now += step
        most = max(most, now)
    return most


def small_piece(folder: Path, repairs: int) -> None:
    """Run a piece on digits with one slot."""
    suite = Suite.model_validate(
        {
            "name": "overhead", "version": 1, "about": "", "precision": "fp32",
            "data": [{"name": "digits"}],
            "model": [{"architecture": "small_cnn", "widths": [8]}],
            "recipe": [{"changes": {"epochs": 4, "augmentation": "none"}}],
            "attack": [{"name": "badnets"}],
            "defender": {"clean_images": [10], "seeds": list(range(repairs))},
            "defense": [{"name": "ft"}],
            "limit": {"seconds": 300, "memory_mb": 2048},
        }
    )  # fmt: skip
    limits = {"seconds": 300, "memory_mb": 2048, "threads": 1}
    engine = LocalEngine(1)
    try:
        with Store(folder) as store:
            cells = plan(suite, {"digits": load_dataset("digits")})
            store.register(suite.label, suite.sha256(), "", [cell.entry() for cell in cells])
            drive(store, suite.label, engine, {"store": str(folder), "limits": limits})
    finally:
        engine.close()


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=1)
    options.add_argument("--store", type=Path, help="folder of a store; default: a small piece of its own")
    options.add_argument("--suite", help="its label; default: all of the store")
    options.add_argument(
        "--skip",
        type=int,
        default=0,
        help="finished cells at the beginning to leave out: a piece of few cells would charge to them what a "
        "whole run pays once, the start of the server that processes are forked from",
    )
    options.add_argument("--about", default="", help="what the piece is, for the record")
    arguments = options.parse_args()
    if arguments.store is not None:
        measure(arguments, read(arguments.store, arguments.suite))
        return
    with tempfile.TemporaryDirectory(prefix="unbackdoor-benchmark-") as name:
        small_piece(Path(name) / "store", 2 if arguments.quick else 6)
        measure(arguments, read(Path(name) / "store", None))


def measure(arguments: argparse.Namespace, cells_done: list[Done]) -> None:
    """Divide the time and print."""
    cells = [cell for cell in cells_done if cell.timings][arguments.skip :]
    if not cells:
        raise SystemExit("no cell of this store knows the times of its parts")
    wall = 0.0
    for run in runs(cells):
        wall += slots_of(run) * (max(cell.end for cell in run) - min(cell.start for cell in run))
    busy, useful = sum(cell.seconds for cell in cells), sum(cell.useful for cell in cells)
    steps = sum(cell.steps for cell in cells)
    shares = {
        "useful": useful / wall,
        "inside the steps": (steps - useful) / wall,
        "between the steps": (busy - steps) / wall,
        "the driver and empty slots": (wall - busy) / wall,
    }
    repairs = [cell for cell in cells if cell.kind == "repair"]
    subject = arguments.about or (
        f"suite {arguments.suite}" if arguments.store else "a small piece on digits"
    )
    settings = {
        "victims": len(cells) - len(repairs), "repairs": len(repairs),
        "left_out": sum(not cell.timings for cell in cells_done), "skipped": arguments.skip,
        "quick": arguments.quick,
    }  # fmt: skip
    result = Result("bench_overhead", subject, settings)
    result.add("without machinery : with it", Ratio.of([wall], [useful]))
    result.facts["shares"] = shares
    result.notes.append(
        "share of the wall-clock time: " + ", ".join(f"{k} {v:.2%}" for k, v in shares.items())
    )
    if settings["left_out"]:
        result.notes.append(f"{settings['left_out']} cells do not know the times of their parts: left out")
    seconds: dict[str, list[float]] = {"wall": [wall], "useful": [useful]}
    for kind in ("victim", "repair"):
        of_kind = [cell for cell in cells if cell.kind == kind]
        for part in sorted({part for cell in of_kind for part in cell.timings}):
            seconds[f"{kind}, {part}"] = [cell.timings.get(part, 0.0) for cell in of_kind]
        if of_kind:
            seconds[f"{kind}, machinery"] = [cell.seconds - cell.useful for cell in of_kind]
            each = sum(seconds[f"{kind}, machinery"]) / len(of_kind)
            result.notes.append(
                f"{len(of_kind)} {kind}s: machinery {each:.2f} s each, useful "
                f"{sum(cell.useful for cell in of_kind) / len(of_kind):.2f} s each"
            )
    result.show(seconds, arguments.json)


if __name__ == "__main__":
    main()
