"""The steps of an audit while it runs: a table in a terminal, a line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from unbackdoor.cli.output import complain
from unbackdoor.cli.progress import Display
from unbackdoor.confinement import now
from unbackdoor.report.words import duration
from unbackdoor.text import printable

if TYPE_CHECKING:
    from unbackdoor.audit.steps import Step

T = TypeVar("T")
_STYLES = {"to come": "dim", "running": "bold", "failed": "red", "left out": "dim"}


def step_rows(steps: Sequence[Step]) -> list[tuple[str, str, str, str, str, str]]:
    """Return name, what is done, estimate, status, result and time of each step as texts."""
    return [
        (
            step.name,
            step.what,
            "" if step.estimate is None else _about(step.estimate),
            step.status,
            _result(step),
            duration(step.seconds) if step.seconds else "",
        )
        for step in steps
    ]


def _result(step: Step) -> str:
    if step.status in ("done", "to come"):
        return step.result
    return f"{step.status}: {step.result}" if step.result else step.status


class StepDisplay(Display):
    """Shows the steps with their results, the running one with the time left, and those to come.

    Args:
        quiet: Show nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._steps: Sequence[Step] = ()
        self._end: float | None = None
        self._written: set[tuple[str, str]] = set()
        self._planned = False
        self._loop = ""
        self._running_since: dict[str, float] = {}
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(
                console=self._console, transient=True, refresh_per_second=4, get_renderable=self._table
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield the items, and show in the running step how far the loop has come."""
        if self._live is None:
            return super().__call__(items, label, total)
        if total is None and isinstance(items, Sized):
            total = len(items)
        return self._counted(items, printable(label), total)

    def _counted(self, items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
        outer = self._loop
        try:
            for done, item in enumerate(items):
                self._loop = f"{label} {done}/{total}" if total else f"{label} {done}"
                yield item
        finally:
            self._loop = outer

    def show_steps(self, steps: Sequence[Step], end: float | None) -> None:
        """Take all steps in their order, and when the budget ends."""
        self._steps, self._end = steps, end
        for step in steps:
            if step.status == "running":
                self._running_since.setdefault(step.name, now())
        if self._live is not None or self._quiet:
            return
        if not self._planned and any(step.estimate is not None for step in steps):
            self._planned = True
            coming = [step for step in steps if step.status == "to come" and step.estimate is not None]
            complain("plan: " + ", ".join(f"{s.name} {_about(s.estimate or 0)}" for s in coming))
        for step in steps:
            if step.status in ("to come", "running") or (step.name, step.status) in self._written:
                continue
            self._written.add((step.name, step.status))
            took = f" ({duration(step.seconds)})" if step.seconds else ""
            complain(f"{step.name}: {step.status}{', ' if step.result else ''}{step.result}{took}")

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        grid = Table(title=self._title(), title_justify="left", expand=True)
        grid.add_column("step", no_wrap=True)
        grid.add_column("", no_wrap=True)
        grid.add_column("result", ratio=1, no_wrap=True, overflow="ellipsis")
        grid.add_column("time", justify="right", no_wrap=True)
        for step in self._steps:
            result, time = step.result or step.what, duration(step.seconds) if step.seconds else ""
            if step.status == "running":
                result, time = self._loop or step.what, self._time_left(step)
            elif step.status == "to come" and step.estimate is not None:
                time = f"about {_about(step.estimate)}"
            cells = (step.name, step.status, result, time)
            grid.add_row(*(Text(printable(cell), style=_STYLES.get(step.status, "")) for cell in cells))
        return grid

    def _time_left(self, step: Step) -> str:
        if step.estimate is None:
            return ""
        left = step.estimate - (now() - self._running_since.get(step.name, now()))
        return f"{_about(left)} left" if left > 0 else "longer than planned"

    def _title(self) -> str:
        done = sum(step.status not in ("to come", "running") for step in self._steps)
        left = "" if self._end is None else f"; {_about(max(self._end - now(), 0))} of the budget left"
        return f"{done} of {len(self._steps)} steps ended{left}"


def _about(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    return duration(float(round(seconds))) if seconds >= 60 else f"{seconds:.0f} s"
