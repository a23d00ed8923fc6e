"""Choose how long soft masks learn and how strongly they act, from clean images they were not learned on.

Masks m act with strength s as 1 - s (1 - m): nothing at 0, all of them at 1. As everywhere, the choice sees
no trigger, no target class and no test image. The images that decide carry the labels that the model itself
gives them (``engine.inference.labelled_by_model``), so that the measure is the share of predictions that
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.defenses.awm.few_images import enlarged
from unbackdoor.engine.inference import accuracy, labelled_by_model
from unbackdoor.engine.masks import Site, fold
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, CleanData, Images

LEVELS = tuple(i / 10 for i in range(1, 11))
Masks = Mapping[str, Tensor]
# (images, label, held-out images that end the rounds, rounds at most) -> masks, record of each round.
Learn = Callable[[Images, str, Images | None, int], tuple[Masks, list[dict[str, Any]]]]


@dataclass(frozen=True)
class MaskStrength:
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


def two_fold_splits(images: Images, generator: torch.Generator) -> list[tuple[Images, Images]]:
    """Return two ways to learn on one half of the images and to judge on the other.

    For a defender who can hold nothing out. A class that is missing from one half loses accuracy there, so
    that the judgement errs towards mild masks. Views of images that were learned on err towards strong masks:
    they stayed at 100 % while the network lost a third of its accuracy.
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
) -> MaskStrength:
    """Return the last strength before the accuracy first falls more than ``tolerance`` below the start.

    Args:
        model: The unmasked classifier.
        sites: What is masked.
        trials: Masks by site, and images that these masks were not learned on; all of them count alike.
        run: Device and precision.
        tolerance: Largest accepted loss of accuracy, in 0..1.
    """

    def share(networks: Sequence[Classifier]) -> float:
        counts = [len(images) for _, images in trials]
        rates = [accuracy(net, images, run) for net, (_, images) in zip(networks, trials, strict=True)]
        return sum(n * rate for n, rate in zip(counts, rates, strict=True)) / sum(counts)

    base = share([model] * len(trials))
    best, trace = 0.0, []
    for level in LEVELS:
        share_kept = share([fold(model, sites, softened(values, level)) for values, _ in trials])
        trace.append((level, share_kept))
        if share_kept < base - tolerance - 1e-6:  # the last term is for rounding
            break
        best = level
    return MaskStrength(best, base, tuple(trace))


def softened(values: Mapping[str, Tensor], level: float) -> dict[str, Tensor]:
    """Return masks that act with a strength in 0..1."""
    return {name: 1 - level * (1 - mask) for name, mask in values.items()}


class EarlyStopping:
    """Ends the rounds when too many held-out predictions have changed; the masks of the round before count.

    Args:
        network: The network as it is masked now.
        held_out: Images labelled as the model classifies them; None never ends the rounds.
        run: Device and precision.
        tolerance: Share of the labels that may be missed, in 0..1.

    Attributes:
        values: Masks of the last round within the tolerance, or of the first.
        stopped: True once a round was beyond the tolerance.
    """

    def __init__(self, network: nn.Module, held_out: Images | None, run: Run, tolerance: float) -> None:
        self._network, self._held_out, self._run = network, held_out, run
        self._lowest = 1 - tolerance - 1e-6  # the last term is for rounding
        self.values: list[Tensor] = []
        self.stopped = False

    def end_round(self, values: Sequence[Tensor]) -> dict[str, Any]:
        """Measure a finished round with its masks; return the record of it."""
        record: dict[str, Any] = {}
        if self._held_out is not None:
            record["held_out"] = accuracy(self._network, self._held_out, self._run)
            self.stopped = record["held_out"] < self._lowest
        if not self.values or not self.stopped:
            self.values = [value.detach().clone() for value in values]
        return {**record, "stopped": self.stopped}


def learned_within(
    model: Classifier,
    sites: Sequence[Site],
    data: CleanData,
    learn: Learn,
    run: Run,
    *,
    rounds: int,
    views: int,
    tolerance: float,
) -> tuple[dict[str, Tensor], list[dict[str, Any]], MaskStrength]:
    """Learn masks for as many rounds, and let them act as strongly, as held-out predictions allow.

    Where nothing can be held out, each half of the images judges what was learned on the other. The masks are
    then learned on all images, for as many rounds as the worse half allows; both halves choose the strength.

    Args:
        model: The unmasked classifier.
        sites: What is masked.
        data: Clean images.
        learn: See :data:`Learn`.
        run: Seed, device and precision.
        rounds: Rounds at most.
        views: Fewer held-out images than this are enlarged to this many augmented views.
        tolerance: Share of the predictions that may change, in 0..1.
    """

    def judging_images(images: Images, label: str) -> Images:
        enlarged_images = enlarged(images, views, data.augmentation, run.generator("held", label))
        return labelled_by_model(model, enlarged_images, run)

    if data.select_is_fit:
        halves = two_fold_splits(data.fit, run.generator("halves"))
        judges = [judging_images(held_out, f"half {i}") for i, (_, held_out) in enumerate(halves)]
        results = [learn(half, f"half {i}", judges[i], rounds) for i, (half, _) in enumerate(halves)]
        trials = [(result[0], held_out) for result, held_out in zip(results, judges, strict=True)]
        allowed_rounds = min(sum(not record["stopped"] for record in result[1]) for result in results)
        values, trace = learn(data.fit, "all", None, max(1, allowed_rounds))
    else:
        held_out = judging_images(data.select, "all")
        values, trace = learn(data.fit, "all", held_out, rounds)
        trials = [(values, held_out)]
    strength = strongest_within(model, sites, trials, run, tolerance=tolerance)
    return softened(values, strength.level), trace, strength
