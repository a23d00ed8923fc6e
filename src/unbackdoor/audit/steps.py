"""The steps of an audit: what will be done, how long that may take, what was done, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from unbackdoor.confinement import now

Status = Literal["to come", "running", "done", "left out", "failed", "interrupted"]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Short; that of a check, or such as ``open``.
        what: What is done, in words.
        estimate: Seconds that it may take; None where nothing is known.
        status: How far it is.
        result: What came of it, or why it was left out, in words.
        seconds: Wall time that it took.
    """

    name: str
    what: str
    estimate: float | None = None
    status: Status = "to come"
    result: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "step": self.name,
            "what": self.what,
            "estimate": None if self.estimate is None else round(self.estimate, 1),
            "status": self.status,
            "result": self.result,
            "seconds": round(self.seconds, 3),
        }


@runtime_checkable
class ShowsSteps(Protocol):
    """A progress display that shows the steps as well; called whenever one of them has changed."""

    def show_steps(self, steps: Sequence[Step], end: float | None) -> None:
        """Take all steps in their order, and when the budget ends on the clock of ``confinement.now``."""
        ...


class Steps:
    """The steps of one audit in their order.

    Args:
        display: Told of every change if it is a :class:`ShowsSteps`.
        end: When the budget ends; None without one.
    """

    def __init__(self, display: object, end: float | None) -> None:
        self._display = display if isinstance(display, ShowsSteps) else None
        self._end = end
        self._steps: dict[str, Step] = {}
        self._begun: dict[str, float] = {}

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps.values())

    def __getitem__(self, name: str) -> Step:
        return self._steps[name]

    def add(self, *steps: Step) -> None:
        """Add steps at the end, or in the place of those of the same names."""
        self._steps |= {step.name: step for step in steps}
        self._tell()

    def remove(self, *names: str) -> None:
        """Take steps out that this model has no use for."""
        for name in names:
            del self._steps[name]
        self._tell()

    def insert(self, step: Step, *, after: str) -> None:
        """Add a step behind another one, or move it there."""
        self._steps.pop(step.name, None)
        pairs = list(self._steps.items())
        place = [name for name, _ in pairs].index(after) + 1
        self._steps = dict([*pairs[:place], (step.name, step), *pairs[place:]])
        self._tell()

    def begin(self, name: str) -> None:
        """Note that a step runs."""
        self._begun[name] = now()
        self._set(name, status="running")

    def end(self, name: str, result: str = "", status: Status = "done", seconds: float | None = None) -> None:
        """Note how a step ended."""
        took = now() - self._begun[name] if name in self._begun and seconds is None else seconds or 0.0
        self._set(name, status=status, result=result, seconds=took)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Run a step; an exception that passes through is its result."""
        self.begin(name)
        try:
            yield
        except KeyboardInterrupt:
            self.end(name, "it was interrupted", "interrupted")
            raise
        except Exception as error:
            self.end(name, str(error), "failed")
            raise
        if self._steps[name].status == "running":
            self.end(name)

    def leave_out(self, reason: str, *names: str, status: Status = "left out") -> None:
        """Note why steps that did not begin will not be done; all that are to come where none is named."""
        for step in list(self._steps.values()):
            if step.status == "to come" and (not names or step.name in names):
                self._steps[step.name] = replace(step, status=status, result=reason)
        self._tell()

    def _set(self, name: str, **values: Any) -> None:
        self._steps[name] = replace(self._steps[name], **values)
        self._tell()

    def _tell(self) -> None:
        if self._display is not None:
            self._display.show_steps(tuple(self._steps.values()), self._end)
