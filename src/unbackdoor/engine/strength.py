"""Choose how strongly soft masks act, from clean images that they were not learned on.

Masks m act with strength s as 1 - s (1 - m): nothing at 0, all of them at 1. As everywhere, the choice sees
no trigger, no target class and no test image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbackdoor.engine.masks import Site, fold
from unbackdoor.engine.passes import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, Images

LEVELS = tuple(i / 10 for i in range(1, 11))


@dataclass(frozen=True)
class Strength:
    """The chosen strength and how it was chosen.

    Attributes:
        level: In 0..1; 0 where even the mildest level costs too much.
        base: Accuracy of the unmasked model on the images that decide.
        trace: (level, accuracy) of every level that was tried.
    """

    level: float
    base: float
    trace: tuple[tuple[float, float], ...]

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record."""
        return {"level": self.level, "base_accuracy": self.base, "trace": [list(step) for step in self.trace]}


def either_half(images: Images, generator: torch.Generator) -> list[tuple[Images, Images]]:
    """Return two ways to learn on one half of the images and to judge on the other.

    For a defender who can hold nothing out. A class that is missing from one half suffers there, so that the
    judgement errs on the side of mild masks; views of images that were learned on err on the other, and
    were found to stay at 100 % while the network lost a third of its accuracy.
    """
    order = torch.randperm(len(images), generator=generator)
    one, other = (images.subset(rows) for rows in order.tensor_split(2))
    return [(one, other), (other, one)]


def strongest_within(
    model: Classifier,
    sites: Sequence[Site],
    trials: Sequence[tuple[Mapping[str, Tensor], Images]],
    run: Run,
    *,
    tolerance: float,
) -> Strength:
    """Return the last strength before the accuracy first falls more than ``tolerance`` below the start.

    Args:
        model: The unmasked classifier.
        sites: What is masked.
        trials: Masks by site, and images that these masks were not learned on; all of them count alike.
        run: Device and precision.
        tolerance: Largest accepted loss of accuracy, in 0..1.
    """

    def share(networks: Sequence[Classifier]) -> float:
        counts = [len(held) for _, held in trials]
        rates = [accuracy(net, held, run) for net, (_, held) in zip(networks, trials, strict=True)]
        return sum(n * rate for n, rate in zip(counts, rates, strict=True)) / sum(counts)

    base = share([model] * len(trials))
    best, trace = 0.0, []
    for level in LEVELS:
        reached = share([fold(model, sites, softened(values, level)) for values, _ in trials])
        trace.append((level, reached))
        if reached < base - tolerance - 1e-6:  # the last term is for rounding
            break
        best = level
    return Strength(best, base, tuple(trace))


def softened(values: Mapping[str, Tensor], level: float) -> dict[str, Tensor]:
    """Return masks that act with a strength in 0..1."""
    return {name: 1 - level * (1 - mask) for name, mask in values.items()}
