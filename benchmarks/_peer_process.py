"""Run one script of BackdoorBench as its own program, with clocks, in an interpreter that has its packages.

    python _peer_process.py REPORT.json SCRIPT OPTION ...

Nothing of this project is imported. What is changed in the script's surroundings: pictures are drawn into
files; CIFAR-10 may be a part of itself, whose MD5 is another one; ``numpy.infty``, which NumPy 2 has no
more; and a device that one script has in its text. The report says how long the script ran behind its
reading of the attack result, how much of that were passes over test sets and the drawing of pictures, and
what the whole process took: seconds of processors, and its largest resident memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

REPLACED = {"device='cuda')": "device=args.device)"}  # in the text of i-bau.py


class Clocks:
    """Times of one script, in seconds.

    Attributes:
        start: When the attack result was read.
        aside: Spent on test sets and pictures since.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.aside = 0.0

    def put_on(self) -> None:
        """Put the clocks on what the script calls."""
        load, iterate = torch.load, DataLoader.__iter__

        def loading(*args: Any, **kwargs: Any) -> Any:
            out = load(*args, **kwargs)
            self.start, self.aside = time.perf_counter(), 0.0
            return out

        def iterating(loader: DataLoader[Any]) -> Any:
            batches = iterate(loader)
            return self._evaluating(batches) if of_tests(loader.dataset) else batches

        torch.load, DataLoader.__iter__ = loading, iterating  # type: ignore[method-assign]
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        Figure.savefig = self._drawing(Figure.savefig)  # type: ignore[method-assign]

    def _evaluating(self, batches: Any) -> Iterator[Any]:
        """Pass batches on; the time until the next one is asked for is that of the evaluation."""
        start = time.perf_counter()
        try:
            yield from batches
        finally:
            self.aside += time.perf_counter() - start

    def _drawing(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawing(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return draw(*args, **kwargs)
            finally:
                self.aside += time.perf_counter() - start

        return drawing

    def report(self) -> dict[str, float]:
        """Return what the clocks and the system say."""
        passed = time.perf_counter() - self.start
        return {"algorithm": passed - self.aside, "evaluation": self.aside, **used()}


def used() -> dict[str, float]:
    """Return what this process and those that it started took of the machine so far."""
    own, started = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + started.ru_utime + started.ru_stime
    return {"processor": seconds, "peak_mb": max(own.ru_maxrss, started.ru_maxrss) / 1024}


def of_tests(dataset: Any) -> bool:
    """Return whether images are of the test part, however often they are wrapped."""
    while dataset is not None:
        held = vars(dataset)
        if held.get("train") is False:
            return True
        dataset = held.get("wrapped_dataset", held.get("dataset"))
    return False


def surroundings() -> None:
    """Give the script what its old packages had."""
    if not hasattr(np, "infty"):
        setattr(np, "infty", np.inf)  # noqa: B010 - the rule against the old name sees an assignment
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        return
    CIFAR10._check_integrity = lambda self: True
    CIFAR10.meta = {**CIFAR10.meta, "md5": None}


def main() -> None:
    """Run the script and write the report."""
    report, script, *arguments = sys.argv[1:]
    text = Path(script).read_text(encoding="utf-8")
    for there, wanted in REPLACED.items():
        text = text.replace(there, wanted)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path.cwd())  # their packages, and none of the modules beside this file
    surroundings()
    clocks = Clocks()
    clocks.put_on()
    # A module of its own: names of the script must not replace those that the clocks use.
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = script
    try:
        exec(compile(text, script, "exec"), vars(program))
    finally:
        Path(report).write_text(json.dumps(clocks.report()), encoding="utf-8")


if __name__ == "__main__":
    main()
