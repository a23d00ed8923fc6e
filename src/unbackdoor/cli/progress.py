"""Progress bars with the time left, on standard error; quiet where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TypeVar

from unbackdoor.text import printable

T = TypeVar("T")
QUIET_SECONDS = 20.0  # between two lines of progress where there is no terminal


class Display:
    """Shows loops as bars in a terminal, and as a line now and then elsewhere.

    It is itself the progress function that the library takes, and a context that owns the screen lines.

    Args:
        quiet: Show nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console  # late, because the first line of a command must not wait for it
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, quiet=quiet)
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield the items and show how far the loop has come."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        if self._quiet:
            return items
        label = printable(label)  # it may hold the name of a file
        return (
            self._with_bar(items, label, total) if self._console.is_terminal else _lines(items, label, total)
        )

    def _with_bar(self, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        from rich.markup import escape

        task = self._bars.add_task(escape(label), total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last = now
            share = f"{done + 1}/{total}" if total else str(done + 1)
            left = f", {(now - start) / (done + 1) * (total - done - 1):.0f} s left" if total else ""
            print(f"{label}: {share}{left}", file=sys.stderr, flush=True)
