"""Decoding in a process of its own, which leaves the pixels in a file that is checked against its hash."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from unbackdoor import confinement
from unbackdoor.data.cache import load
from unbackdoor.errors import InputError
from unbackdoor.types import Images, Progress

T = TypeVar("T")


def decoded(function: str, task: Mapping[str, Any], stored: Path, size: int, progress: Progress) -> Images:
    """Return the images that a function in another process decoded.

    Args:
        function: Importable name; it gets the task, and stores the images under ``task["stored"]``.
        task: JSON-ready; ``path`` is what is read.
        stored: Where the images go, as :func:`unbackdoor.data.cache.store` writes them.
        size: Bytes of what is read.
        progress: Shows what the other process reports.

    Raises:
        UnbackdoorError: As the function raised it.
        UnsafeFile: If it took too much time or memory, or died.
    """
    bar: Iterator[None] | None = None
    shown, over = 0, False

    def steps() -> Iterator[None]:
        while not over:
            yield None

    def tick(report: Mapping[str, Any] | None) -> None:
        nonlocal bar, shown
        if report is None:
            return
        if bar is None:
            bar = iter(progress(steps(), str(report["label"]), int(report["total"])))
        while shown < int(report["done"]):
            next(bar, None)
            shown += 1

    confinement.run(function, {**task, "stored": str(stored.absolute())}, size, task["path"], tick=tick)
    over = True
    if bar is not None:
        next(bar, None)
    images = load(stored)
    if images is None:
        raise InputError("the decoded images were changed", where=stored, remedy="Try again")
    return images


def reporting(task: Mapping[str, Any]) -> Progress:
    """Return the progress display of the other process, which writes down how far it has come."""
    report = Path(task["progress"])

    def show(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for done, item in enumerate(items):
            draft = report.with_suffix(".tmp")
            draft.write_text(
                json.dumps({"label": label, "done": done, "total": total or 0}), encoding="utf-8"
            )
            draft.replace(report)
            yield item

    return show
