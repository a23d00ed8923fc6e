"""Choose how far to prune from held-out clean images alone.

Every pruning method makes a series of ever more pruned models; this rule chooses one of them. It never
sees a trigger, a target class or a test image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, CleanData


@dataclass(frozen=True)
class Choice:
    """The chosen level and how it was chosen.

    Attributes:
        level: The chosen level, or None if even the mildest costs too much.
        model: The model of that level; the unpruned one if there is none.
        base: Accuracy on the selection images before pruning, in 0..1.
        trace: (level, accuracy) of every level that was tried.
    """

    level: float | None
    model: Classifier
    base: float
    trace: tuple[tuple[float, float], ...]

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record."""
        return {"level": self.level, "base_accuracy": self.base, "trace": [list(step) for step in self.trace]}


def harshest_within(
    model: Classifier,
    levels: Sequence[float],
    prune: Callable[[float], Classifier],
    data: CleanData,
    run: Run,
    *,
    tolerance: float,
) -> Choice:
    """Return the last level before the held-out accuracy first falls more than ``tolerance`` below the start.

    Args:
        model: The unpruned model.
        levels: Mildest first.
        prune: Makes the model of a level.
        data: Its selection part decides.
        run: Device, precision and progress.
        tolerance: Largest accepted loss of accuracy, in 0..1. With fewer than 1 / tolerance images no image
            may be lost: allowing one cost ten points of test accuracy.
    """
    base = accuracy(model, data.select, run)
    lowest = base - tolerance - 1e-6  # the last term is for rounding
    best: tuple[float | None, Classifier] = (None, model)
    trace: list[tuple[float, float]] = []
    for level in levels:
        candidate = prune(level)
        trace.append((level, accuracy(candidate, data.select, run)))
        if trace[-1][1] < lowest:
            break
        best = (level, candidate)
    return Choice(best[0], best[1], base, tuple(trace))
