"""Progress in a notebook, where nobody asked for a display and nothing else shows that a cell works."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from unbackdoor.text import printable
from unbackdoor.types import Progress, silent

T = TypeVar("T")
SWITCH = "UNBACKDOOR_PROGRESS"  # 0 turns it off


def in_notebook() -> bool:
    """Tell whether this is the kernel of a notebook."""
    if "ipykernel" not in sys.modules or os.environ.get(SWITCH) == "0":
        return False
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def shown(progress: Progress) -> Progress:
    """Return the display that was asked for; in a notebook, where none was, a bar that goes away."""
    return _bar if progress is silent and in_notebook() else progress


def _bar(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _yielded(items, label, total)


def _yielded(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    from rich.markup import escape
    from rich.progress import Progress as RichProgress

    with RichProgress(transient=True) as bars:
        task = bars.add_task(escape(printable(label)), total=total)
        for item in items:
            yield item
            bars.advance(task)
