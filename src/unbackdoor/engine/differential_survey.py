"""One search of all forms for what moves a network and not its twin, and whether that convicts a class.

The gap of a class is the largest one of any change towards it. A class is convicted whose gap is large in
itself, and larger than chance explains. With six classes or more chance is what the other classes show: the
twin took away what a class has by nature, so gaps can be compared where plain successes cannot. With fewer,
each class is compared with itself in three twins (engine/self_reference.py): almost anything moves a network
of two classes, and whether a gap is large cannot be said. For changes that lead to no class, the same search
between networks without a backdoor gives the law: what moves one of two twins and not the other, and what
moves the twin and not the network.

A shift of colours convicts nothing: networks have a class that they give to whatever is too bright, and twins
have another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.differential_search import Difference, Opponents, Stage, window_places
from unbackdoor.engine.self_reference import MOST_CLASSES, SelfReference
from unbackdoor.engine.twin import Twin
from unbackdoor.engine.universal_changes import Form, UniversalChange

UNTARGETED = -1
GAP = 0.35  # no smaller gap convicts
LEAD = 0.5  # of a class over all others of the same form: it convicts whatever the twin does
LEVEL = 0.05
FEWEST = MOST_CLASSES + 1  # classes that can be compared with one another
STRIDE = 4  # pixels between two windows
_TARGETED: tuple[Form, ...] = ("patch", "blend", "warp", "frequency", "colour")
_CONVICTING: tuple[Form, ...] = ("blend", "patch", "warp", "frequency", "window")
PLAIN = 0.6  # gap at which a class is plain: the longer searches are spared, and a second one may be a target
_NULL = 8  # gaps of a form and a pair that the law of chance is made of
_SETS = 20_000
MASKED = 2  # further classes of plain gaps that may have a backdoor
_FEWEST_LEFT = 4  # classes that a law is made of
_NUMBERS = 4_000_000  # simulated numbers at most
_LEAST_SPREAD = 0.03  # of gaps; a few equal numbers have none


@dataclass(frozen=True)
class Survey:
    """What one search of all forms came to.

    Attributes:
        differences: Every change that came to the end of its search, largest gap first.
        classes: K.
        whole: Whether all forms were searched, or a plain case ended it before.
        searches: How many were made.
    """

    differences: tuple[Difference, ...]
    classes: int
    whole: bool
    searches: int = 0

    def best(self, label: int) -> Difference | None:
        """Return the change with the largest gap towards a class; -1 for away from the predicted one."""
        return next((d for d in self.differences if d.change.label == label), None)

    def usual(self, form: Form, suspects: Sequence[int]) -> float:
        """Return how far a form moves images to the best class that is not suspected; 1 if unknown."""
        others = [
            d.moved
            for d in self.differences
            if d.change.form == form and d.change.label >= 0 and d.change.label not in suspects
        ]
        return max(others, default=1.0)

    def others(self, form: Form, label: int) -> Tensor:
        """Return the largest gaps of a form towards all other classes, (K - 1,); 0 where none came so far."""
        best = torch.zeros(self.classes, dtype=torch.float64)
        for d in self.differences:
            if d.change.form == form and d.change.label >= 0:
                best[d.change.label] = max(float(best[d.change.label]), d.gap)
        return torch.cat([best[:label], best[label + 1 :]])

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


def survey(opponents: Opponents, *, seed: str, whole: bool, begun: Survey | None = None) -> Survey:
    """Search with every form, towards every class and away from the predicted one.

    Args:
        opponents: The network, its twin, and the images.
        seed: Names the draws.
        whole: Whether all forms are searched even if a class is plain before.
        begun: A survey of the same networks and draws that ended early; it is gone on with.
    """
    classes = list(range(opponents.model.classes))
    differences = [] if begun is None else list(begun.differences)
    searches = _searches(opponents, classes, seed)
    made = 0 if begun is None else begun.searches
    for search in searches[made:]:
        differences += opponents.with_classes(opponents.measure(search()))
        made += 1
        if not whole and max(d.gap for d in differences) >= PLAIN:
            break
    ordered = tuple(sorted(differences, key=lambda d: -d.gap))
    return Survey(ordered, len(classes), made == len(searches), made)


def _searches(
    opponents: Opponents, classes: Sequence[int], seed: str
) -> list[Callable[[], list[UniversalChange]]]:
    """Return the searches, the cheapest first."""
    places = window_places(opponents.model.input_shape, STRIDE)

    def untargeted(form: Form, starts: int) -> list[UniversalChange]:
        return opponents.search(form, [UNTARGETED], starts=starts, stages=(Stage(24, starts),), seed=seed)

    def windows_anywhere() -> list[UniversalChange]:
        stages = (Stage(3, 10, twin=False, images=4), Stage(8, 3), Stage(8, 3))
        return opponents.search("window", [UNTARGETED], places=places, stages=stages, seed=seed)

    every = [lambda form=form: targeted(opponents, form, classes, seed) for form in _TARGETED]
    every += [
        lambda form=form: untargeted(form, 2 if form == "patch" else 1) for form in ("patch", "blend", "warp")
    ]
    return [
        *every,
        lambda: opponents.stamps(seed=seed),
        windows_anywhere,
        lambda: windows_of_each(opponents, classes, seed),
    ]


def targeted(
    opponents: Opponents, form: Form, classes: Sequence[int], seed: str, *, keep: int = 5
) -> list[UniversalChange]:
    """Return the best changes of a form towards any of the classes."""
    return opponents.search(form, classes, stages=(Stage(12, keep), Stage(20, keep)), seed=seed)


def windows_of_each(opponents: Opponents, classes: Sequence[int], seed: str) -> list[UniversalChange]:
    """Return the best window of each class, of all places."""
    places = window_places(opponents.model.input_shape, STRIDE)
    stages = (Stage(2, 3, twin=False, images=4), Stage(6, 1), Stage(10, 1))
    return opponents.search("window", classes, places=places, stages=stages, seed=seed, single=True)


def surveyed(
    opponents: Opponents,
    other_twin: Callable[[], Twin],
    beside_twins: Callable[[], SelfReference | Twin],
    *,
    seed: str,
    whole: bool,
    gap: float = GAP,
    lead: float = LEAD,
) -> tuple[Survey, list[Conviction], float]:
    """Return a survey and what :func:`convictions` says of it.

    A class whose gap is plain ends the search early. Where it is not convicted after all, because another
    class stands out in the same form, the longer searches are made: they may tell the two apart.

    Args:
        opponents: The network, its twin, and the images.
        other_twin: See :class:`ChanceLaw`.
        beside_twins: Compares classes with themselves in twins; called where there are too few to compare
            with one another.
        seed: Names the draws.
        whole: Whether all forms are searched in any case.
        gap: See :func:`convictions`.
        lead: See :func:`convictions`.
    """
    result, law = survey(opponents, seed=seed, whole=whole), ChanceLaw(opponents, other_twin)
    if result.classes < FEWEST:
        asked = max(result.gaps()) >= gap
        return result, *(_beside_twins(result, beside_twins()) if asked else ([], 1.0))
    convicted, p_value = convictions(result, law, gap=gap, lead=lead)
    if convicted or result.whole:
        return result, convicted, p_value
    result = survey(opponents, seed=seed, whole=True, begun=result)
    return result, *convictions(result, law, gap=gap, lead=lead)


def _beside_twins(result: Survey, found: SelfReference | Twin) -> tuple[list[Conviction], float]:
    """Return the class that needs less than in its twins, if there is one, and the p-value."""
    if isinstance(found, Twin) or found.p_value > LEVEL:
        return [], 1.0 if isinstance(found, Twin) else found.p_value
    label = int(found.p_values.argmin())
    best = result.best(label)
    words = "it needs less of a change than in copies that learned the task anew"
    return [Conviction(label, 0.0 if best is None else best.gap, words, found.p_value)], found.p_value


def convictions(
    result: Survey, law: ChanceLaw, *, gap: float = GAP, lead: float = LEAD
) -> tuple[list[Conviction], float]:
    """Return what the survey convicts, strongest first, and the p-value of its largest gap.

    The p-value is 1 where no gap is large enough to ask for the law of chance. Changes that lead to no class
    are judged where all was searched and no class is convicted: a class that is would explain them.

    Args:
        result: The survey.
        law: Of gaps between the networks of the survey.
        gap: No smaller gap convicts.
        lead: Lead of a class over all others of one form that convicts by itself.
    """
    out: dict[int, Conviction] = {}
    large = [d for d in result.differences if d.gap >= gap]
    smallest = _convict(out, [d for d in large if d.change.label != UNTARGETED], result, law)
    for form in _CONVICTING:
        moved = [0.0] * result.classes
        for d in result.differences:
            if d.change.form == form and d.change.label >= 0:
                moved[d.change.label] = max(moved[d.change.label], d.moved)
        first, second = sorted(moved, reverse=True)[:2]
        label = moved.index(first)
        if first - second >= lead and label not in out:
            out[label] = Conviction(
                label, first - second, f"a {form} leads to it and to no other class", None
            )
    if not out and result.whole:
        away = _convict(out, [d for d in large if d.change.label == UNTARGETED], result, law)
        smallest = min(smallest, away)
    return sorted(out.values(), key=lambda one: -one.gap), smallest


def _convict(
    out: dict[int, Conviction], large: Sequence[Difference], result: Survey, law: ChanceLaw
) -> float:
    """Add what the law convicts, and return the smallest p-value."""
    smallest = 1.0
    for form in _CONVICTING:
        for one in (d for d in large if d.change.form == form and d.change.label not in out):
            p_value = min(1.0, len(_CONVICTING) * law.tail(result, form, one.change.label, one.gap))
            smallest = min(smallest, p_value)
            if p_value <= LEVEL:
                words = f"a {form} moves the network by {one.gap:.2f} more than its twin"
                out[one.change.label] = Conviction(one.change.label, one.gap, words, p_value)
    return smallest


class ChanceLaw:
    """The law of gaps without a backdoor: of the other classes, or of networks that have none.

    Args:
        opponents: The network, the twin of the survey, and the images.
        other_twin: Makes a second twin; called only if a gap asks for networks without a backdoor.
    """

    def __init__(self, opponents: Opponents, other_twin: Callable[[], Twin]) -> None:
        self._opponents, self._other_twin = opponents, other_twin
        self._pairs: list[Opponents] = []
        self._gaps: dict[str, list[Tensor]] = {}

    def tail(self, result: Survey, form: Form, label: int, gap: float) -> float:
        """Return how often the largest of as many gaps of the form is as large by chance."""
        if label != UNTARGETED:
            return tail_among(gap, result.others(form, label))
        if form not in self._gaps:
            found = [[d.gap for d in pair.measure(_again(pair, form))] for pair in self._networks()]
            self._gaps[form] = [torch.tensor(gaps, dtype=torch.float64) for gaps in found]
        # Of several laws the widest is believed.
        return max(tail_of_largest(gap, null, tests=len(null)) for null in self._gaps[form])

    def _networks(self) -> list[Opponents]:
        if not self._pairs:
            one, other, model = self._opponents.twin, self._other_twin().model, self._opponents.model
            pairs = [(one, other), (other, one), (one, model)]
            self._pairs = [Opponents(*pair, self._opponents.images, self._opponents.run) for pair in pairs]
        return self._pairs


def _again(pair: Opponents, form: Form) -> list[UniversalChange]:
    """Return what the survey's search of the form comes to between two other networks."""
    classes = list(range(pair.model.classes))
    if form == "window":
        return windows_of_each(pair, classes, "chance")
    return targeted(pair, form, classes, "chance", keep=_NULL)


def tail_of_largest(value: float, null: Tensor, *, tests: int) -> float:
    """Return how often the largest of ``tests`` normal numbers lies as far out as the value.

    Centre and spread are those of the null numbers (n,), whose own uncertainty is part of the law; it is
    simulated with a fixed seed, so that the smallest answer is 1 / 20,001.
    """
    spread = float(null.std().clamp_min(_LEAST_SPREAD))
    observed = (value - float(null.mean())) / spread
    law = _law(len(null), tests)
    return (1 + int((law >= observed).sum())) / (1 + _SETS)


def tail_among(value: float, others: Tensor) -> float:
    """Return how often the gap of a class lies as far above those of the other classes by chance.

    A second target would hide the first, as it widens the spread that the first is measured in. So where
    several gaps are plain, the class is also held against the classes that have none, under the law of
    numbers without their next few. Smaller gaps are not: by nature two or three classes stand a little apart
    from the others, and networks without a backdoor would be accused.

    Args:
        value: The gap of the class, which may be any of the largest.
        others: Gaps of the other classes, (K - 1,).
    """
    found = _tail_above(value, others, left_out=0)
    rest = others[others < PLAIN]
    left_out = len(others) - len(rest)
    if value < PLAIN or not 1 <= left_out <= MASKED or len(rest) < _FEWEST_LEFT:
        return found
    return min(1.0, 2 * min(found, _tail_above(value, rest, left_out=left_out)))


def _tail_above(value: float, rest: Tensor, *, left_out: int) -> float:
    observed = (value - float(rest.mean())) / float(rest.std().clamp_min(_LEAST_SPREAD))
    law = _trimmed_law(1 + left_out + len(rest), left_out)
    return (1 + int((law >= observed).sum())) / (1 + len(law))


@lru_cache(maxsize=16)
def _trimmed_law(n: int, left_out: int) -> Tensor:
    """Return draws of how far the largest of n normal numbers is above those without the next few."""
    draws = rng.generator(0, "null law of the trimmed gaps", n, left_out)
    numbers = torch.randn(min(_SETS, _NUMBERS // n), n, generator=draws, dtype=torch.float64)
    numbers = numbers.sort(1, descending=True).values
    rest = numbers[:, 1 + left_out :]
    return (numbers[:, 0] - rest.mean(1)) / rest.std(1)


@lru_cache(maxsize=16)
def _law(n: int, tests: int) -> Tensor:
    draws = rng.generator(0, "null law of the largest gap", n, tests)
    numbers = torch.randn(_SETS, n, generator=draws, dtype=torch.float64)
    largest = torch.full((_SETS,), -torch.inf, dtype=torch.float64)
    for _ in range(tests):
        largest = torch.maximum(largest, torch.randn(_SETS, generator=draws, dtype=torch.float64))
    return (largest - numbers.mean(1)) / numbers.std(1)
