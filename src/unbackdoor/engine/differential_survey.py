"""One search of all forms for what moves a network and not its twin, and whether that convicts a class.

The gap of a class is the largest one of any change towards it. Two twins of one network differ as well, by
chance alone: the same searches between them, in both directions, give gaps that no backdoor is behind. A
class is convicted whose gap is large in itself, and larger than the largest of as many gaps of that law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.differential_search import Difference, Opponents, Stage, window_places
from unbackdoor.engine.twin import Twin
from unbackdoor.engine.universal_changes import Form, UniversalChange

UNTARGETED = -1
GAP = 0.35  # no smaller gap convicts
LEAD = 0.5  # of a class over all others of the same form: it convicts whatever the twin does
LEVEL = 0.05
STRIDE = 4  # pixels between two windows
_TARGETED: tuple[Form, ...] = ("patch", "blend", "warp", "frequency", "colour")
_PLAIN = 0.6  # gap at which a class is plain enough to spare the longer searches
_SETS = 20_000


@dataclass(frozen=True)
class Survey:
    """What one search of all forms came to.

    Attributes:
        differences: Every change that came to the end of its search, largest gap first.
        classes: K.
        whole: Whether all forms were searched, or a plain case ended it before.
    """

    differences: tuple[Difference, ...]
    classes: int
    whole: bool

    def best(self, label: int) -> Difference | None:
        """Return the change with the largest gap towards a class; -1 for away from the predicted one."""
        return next((d for d in self.differences if d.change.label == label), None)

    def gaps(self) -> list[float]:
        """Return the largest gap of every class (K,); 0 where no change moves the network more."""
        best = [self.best(k) for k in range(self.classes)]
        return [0.0 if one is None else max(0.0, one.gap) for one in best]


@dataclass(frozen=True)
class Conviction:
    """A class that the survey convicts.

    Attributes:
        label: The class; -1 where answers change without leading to one class.
        gap: Its largest gap, or its lead.
        reason: Why, in words.
        p_value: How often the largest of as many gaps between twins is as large; None where only the lead
            convicts.
    """

    label: int
    gap: float
    reason: str
    p_value: float | None


def survey(opponents: Opponents, *, seed: str, whole: bool) -> Survey:
    """Search with every form, towards every class and away from the predicted one.

    Args:
        opponents: The network, its twin, and the images.
        seed: Names the draws.
        whole: Whether all forms are searched even if a class is plain before.
    """
    classes = list(range(opponents.model.classes))
    differences: list[Difference] = []
    ended = False
    for search in _searches(opponents, classes, seed):
        differences += opponents.with_classes(opponents.measure(search()))
        ended = not whole and max(d.gap for d in differences) >= _PLAIN
        if ended:
            break
    return Survey(tuple(sorted(differences, key=lambda d: -d.gap)), len(classes), not ended)


def _searches(
    opponents: Opponents, classes: Sequence[int], seed: str
) -> list[Callable[[], list[UniversalChange]]]:
    """Return the searches, the cheapest first."""
    places = window_places(opponents.model.input_shape, STRIDE)

    def untargeted(form: Form, starts: int) -> list[UniversalChange]:
        return opponents.search(form, [UNTARGETED], starts=starts, stages=(Stage(24, starts),), seed=seed)

    def windows(labels: Sequence[int], stages: tuple[Stage, ...], single: bool) -> list[UniversalChange]:
        return opponents.search("window", labels, places=places, stages=stages, seed=seed, single=single)

    every = [lambda form=form: targeted(opponents, form, classes, seed) for form in _TARGETED]
    every += [lambda form=form: untargeted(form, 2 if form == "patch" else 1) for form in ("patch", "blend", "warp")]
    anywhere = (Stage(4, 10, twin=False), Stage(8, 3), Stage(8, 3))
    of_each = (Stage(3, 3, twin=False), Stage(6, 1), Stage(10, 1))
    return [
        *every,
        lambda: opponents.stamps(seed=seed),
        lambda: windows([UNTARGETED], anywhere, False),
        lambda: windows(classes, of_each, True),
    ]


def targeted(
    opponents: Opponents, form: Form, classes: Sequence[int], seed: str
) -> list[UniversalChange]:
    """Return the four best changes of a form towards any of the classes."""
    return opponents.search(form, classes, stages=(Stage(12, 4), Stage(20, 4)), seed=seed)


def convictions(
    result: Survey, opponents: Opponents, other_twin: Callable[[], Twin], *, gap: float = GAP, lead: float = LEAD
) -> list[Conviction]:
    """Return what the survey convicts, strongest first.

    Args:
        result: The survey.
        opponents: The network, the twin of the survey, and the images.
        other_twin: Makes a second twin; called only if a gap is large enough to ask for the law of chance.
        gap: No smaller gap convicts.
        lead: Lead of a class over all others of one form that convicts by itself.
    """
    out: dict[int, Conviction] = {}
    large = [d for d in result.differences if d.gap >= gap]
    if large:
        null = _between_twins(opponents, other_twin())
        for one in large:
            label = one.change.label
            if label in out:
                continue
            p = tail_of_largest(one.gap, null, tests=max(len(result.differences), 1))
            if p <= LEVEL:
                words = f"a {one.change.form} moves the network by {one.gap:.2f} more than its twin"
                out[label] = Conviction(label, one.gap, words, p)
    for form in _TARGETED:
        moved = [0.0] * result.classes
        for d in result.differences:
            if d.change.form == form and d.change.label >= 0:
                moved[d.change.label] = max(moved[d.change.label], d.moved)
        first, second = sorted(moved, reverse=True)[:2]
        label = moved.index(first)
        if first - second >= lead and label not in out:
            out[label] = Conviction(label, first - second, f"a {form} leads to it and to no other class", None)
    if len(out) > 1:
        out.pop(UNTARGETED, None)  # classes that explain the change of answers take its place
    return sorted(out.values(), key=lambda one: -one.gap)


def _between_twins(opponents: Opponents, other: Twin) -> Tensor:
    """Return gaps (n,) between two twins, of the forms and classes that searches of a survey begin with."""
    classes = list(range(opponents.model.classes))
    gaps = []
    other_model = other.model
    for first, second in ((other_model, opponents.twin), (opponents.twin, other_model)):
        pair = Opponents(first, second, opponents.images, opponents.run)
        for form in ("patch", "blend"):
            changes = targeted(pair, form, classes, "between twins")  # type: ignore[arg-type]
            gaps += [d.gap for d in pair.measure(changes)]
    return torch.tensor(gaps, dtype=torch.float64)


def tail_of_largest(value: float, null: Tensor, *, tests: int) -> float:
    """Return how often the largest of ``tests`` normal numbers lies as far out as the value.

    Centre and spread are those of the null numbers (n,), whose own uncertainty is part of the law; it is
    simulated with a fixed seed, so that the smallest answer is 1 / 20,001.
    """
    n = len(null)
    spread = float(null.std().clamp_min(0.03))  # a few equal numbers have no spread
    observed = (value - float(null.mean())) / spread
    draws = rng.generator(0, "null law of the largest gap", n, tests)
    numbers = torch.randn(_SETS, n, generator=draws, dtype=torch.float64)
    mean, deviation = numbers.mean(1), numbers.std(1)
    largest = torch.full((_SETS,), -torch.inf, dtype=torch.float64)
    for _ in range(tests):
        largest = torch.maximum(largest, torch.randn(_SETS, generator=draws, dtype=torch.float64))
    beyond = int(((largest - mean) / deviation >= observed).sum())
    return (1 + beyond) / (1 + _SETS)
