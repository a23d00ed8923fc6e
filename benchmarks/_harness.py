"""What every benchmark needs: contestants run in turn, ratios, and a description of the machine.

Times of a shared machine mean nothing by themselves. The contestants therefore run in turn, A B A B, each
ratio is that of two neighbours in time, and the median of the ratios is reported with both extremes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from unbackdoor.engine.precision import has_native_bf16

Seconds = dict[str, list[float]]
REPEATS = 5  # timings of each kind of pass, of which the median counts
# Read at the import, before this process adds to it; well above 0 says that somebody else is at work.
_LOAD = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contestant was than another.

    Attributes:
        median: Median of the pairs.
        low: Smallest of the pairs.
        high: Largest of the pairs.
        pairs: The ratio of each pair of neighbouring runs, in order.
    """

    median: float
    low: float
    high: float
    pairs: tuple[float, ...]

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """Divide seconds by seconds, pair by pair."""
        pairs = tuple(a / b for a, b in zip(slow, fast, strict=True))
        return cls(median(pairs), min(pairs), max(pairs), pairs)


def interleave(
    pairs: int, contestants: Mapping[str, Callable[[], object]], *, warmup: bool = True
) -> Seconds:
    """Run the contestants in turn and return the wall seconds of each run by name.

    Args:
        pairs: Rounds in which each of them runs once.
        contestants: Functions by name, in the order of a round.
        warmup: Run each once before, untimed: first calls choose kernels, start workers and fill caches.
    """
    if warmup:
        for contestant in contestants.values():
            contestant()
    seconds: Seconds = {name: [] for name in contestants}
    for _ in range(pairs):
        for name, contestant in contestants.items():
            gc.collect()  # nobody pays for what another one left behind
            start = time.perf_counter()
            contestant()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def usual(work: Callable[[], object]) -> float:
    """Return the median seconds of a piece of work, which is done once before; for rates of passes."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


@contextmanager
def stages(module: ModuleType, names: Mapping[str, str]) -> Iterator[dict[str, float]]:
    """Put clocks on functions of a method, which is one call, inside the block.

    Args:
        module: Where the method finds its stages.
        names: Label of each function by its name there.

    Yields:
        Seconds by label, summed over the calls.
    """
    seconds = dict.fromkeys(names.values(), 0.0)
    before = {name: getattr(module, name) for name in names}

    def clocked(name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = before[name](*args, **kwargs)
            seconds[names[name]] += time.perf_counter() - start
            return out

        return timed

    for name in names:
        setattr(module, name, clocked(name))
    try:
        yield seconds
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def describe_machine() -> dict[str, Any]:
    """Return what the ratios depend on; nothing that names the machine or its owner."""
    affinity = getattr(os, "sched_getaffinity", None)
    memory = None
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return {
        "cpu": str(
            torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        ),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "native_bf16": has_native_bf16(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": _LOAD,
    }


def parser(description: str, *, pairs: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--pairs", type=_positive, default=pairs, help="rounds; the median is over them")
    out.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="threads of torch")
    out.add_argument("--quick", action="store_true", help="tiny sizes and made-up data: does it run at all?")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return out


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


class Result:
    """The ratios of one benchmark; the first one is its headline.

    Args:
        benchmark: Its name.
        subject: What was measured, in one line.
        settings: Sizes and options, JSON-ready.

    Attributes:
        facts: Further entries of the JSON record.
        notes: Sentences shown below the table.
    """

    def __init__(self, benchmark: str, subject: str, settings: Mapping[str, Any]) -> None:
        self.benchmark = benchmark
        self.subject = subject
        self.settings = dict(settings)
        self.machine = describe_machine()
        self.ratios: dict[str, Ratio] = {}
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self._start = time.perf_counter()

    def add(self, label: str, ratio: Ratio) -> None:
        """Enter a ratio under the words it is shown with."""
        self.ratios[label] = ratio

    def show(self, seconds: Seconds, file: Path | None) -> None:
        """Print the table and the JSON line, and write the latter to a file where one is given.

        Args:
            seconds: What the ratios were made from; goes into the JSON only.
            file: See ``--json``.
        """
        machine = self.machine
        bf16 = "native bf16" if machine["native_bf16"] else "no native bf16"
        print(f"{self.benchmark}: {self.subject}")
        print(
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s), "
            f"{machine['memory_gib']} GiB, {bf16}, torch {machine['torch']}, load {machine['load']} before"
        )
        if self.settings.get("quick"):
            print("The sizes are tiny; these ratios say that it runs, and nothing else.")
        wide = max(len(label) for label in self.ratios)
        print(f"\n{'times as fast':<{wide}}  median     low    high")
        for label, ratio in self.ratios.items():
            print(f"{label:<{wide}}  {ratio.median:6.2f}  {ratio.low:6.2f}  {ratio.high:6.2f}")
        for note in self.notes:
            print(note)
        line = json.dumps(self.to_json(seconds))
        print(f"\n{line}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(line + "\n", encoding="utf-8")

    def to_json(self, seconds: Seconds) -> dict[str, Any]:
        """Return the record of the run."""
        label, headline = next(iter(self.ratios.items()))
        facts = {name: value for name, value in asdict(headline).items() if name != "pairs"}
        record: dict[str, Any] = _rounded(
            {
                "benchmark": self.benchmark,
                "subject": self.subject,
                "settings": self.settings,
                "machine": self.machine,
                "label": label,
                "ratio": facts,
                "pairs": headline.pairs,
                "ratios": {name.strip(): asdict(ratio) for name, ratio in self.ratios.items()},
                **self.facts,
                "seconds": seconds,
                "took": time.perf_counter() - self._start,
            }
        )
        return record


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
