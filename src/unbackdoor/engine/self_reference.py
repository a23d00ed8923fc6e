"""What a class needs, beside what it needs in re-learned twins: for networks of two to five classes.

Classes differ by nature, and with fewer than six there are too few to say what is usual. Twins
(engine/twin.py) learned the same task anew and mostly lost what the weights hide, so that a class has the
same nature in them. Three numbers are taken of each class, of the network and of three twins, all as
logarithms: the size of the smallest patch and of the faintest pattern that send images to it
(engine/trigger_search.py), and the loss under its best small stamp (engine/stamp_search.py). The difference
of a class is its number in the network less the median of the twins. What lowers all classes alike is the
difference of two trainings and no backdoor; it is taken off. A backdoor lowers one class.

How far differences spread without a backdoor is not known from one network. The spreads here are those of
clean networks that were trained for it, the tuning part of `scripts/few_classes.py`; the law has heavy tails
(Student's t with five degrees of freedom), because these networks had. The rates of the test part, which
nothing was chosen on, are in docs/results/few-classes.md.

Cost:    three twins, and for each of four networks a search for patches, one for patterns, and the stamps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor.engine.canonical_form import form_for_checks
from unbackdoor.engine.run import Run
from unbackdoor.engine.stamp_search import best_stamps
from unbackdoor.engine.statistics.class_residuals import student_tail
from unbackdoor.engine.trigger_search import Form, TriggerSearch, TriggerSearchConfig, search_triggers
from unbackdoor.engine.twin import Twin, relearned_twin
from unbackdoor.types import Classifier, CleanData

MOST_CLASSES = 5  # with more, classes are compared with one another
TWINS = 3
# Spreads of the differences of clean networks, whose images had 8 x 8 pixels. Those of patches grow with the
# image, which has room for more sizes: on traffic signs of 32 x 32 pixels they were three times as large.
# Between two classes a stamp that leads to one is far from the other, so that its losses differ by more.
SPREADS: Mapping[str, float] = {"patch": 0.4, "blend": 0.25, "stamp": 0.4}
_SIDE, _GROWTH = 8, 0.8
_STAMP_OF_TWO = 1.6
_FREEDOM = 5
_FORMS: tuple[Form, ...] = ("patch", "blend")
_UNREACHED = 0.3  # what a class that was never reached needs more than the largest change, as a logarithm
_LIFT = 0.02  # of a loss: less than a hundredth of it is the same answer
_DEPENDENCE = 1.3  # of the three p-values of a class, as in audit/evidence.py


@dataclass(frozen=True)
class SelfReference:
    """How far each class differs from the same class in the twins.

    Attributes:
        differences: (K,) by kind of change: ``patch``, ``blend``, ``stamp``; small is suspicious.
        p_values: (K,) of each class, over all kinds; not corrected for there being K.
        searches: The search of the network itself, by ``patch`` and ``blend``.
        twins: The twins.
    """

    differences: Mapping[str, Tensor]
    p_values: Tensor
    searches: Mapping[str, TriggerSearch]
    twins: tuple[Twin, ...]

    @property
    def p_value(self) -> float:
        """The smallest p-value, corrected for there being K."""
        return min(1.0, len(self.p_values) * float(self.p_values.min()))


def self_reference(
    model: Classifier,
    data: CleanData,
    run: Run,
    *,
    first: Twin | None = None,
    count: int = TWINS,
    search: TriggerSearchConfig | None = None,
) -> SelfReference | Twin:
    """Compare each class with itself in twins.

    Args:
        model: The suspicious network; not changed.
        data: Clean images with labels.
        run: Seed, device, precision and progress.
        first: A twin that was made before.
        count: Number of twins; the spreads are those of three.
        search: How changes are searched; the spreads are those of its defaults.

    Returns:
        The comparison; a twin alone where it is too damaged to compare with.

    Raises:
        MethodFailed: If the network gives all images to one class, or numbers that are not finite.
    """
    twins = [relearned_twin(model, data, run) if first is None else first]
    for number in range(1, count):
        twins.append(relearned_twin(model, data, run, number=number, strengths=(twins[0].strength,)))
    unusable = [one for one in twins if not one.usable]
    if unusable:
        return unusable[0]
    cfg = search or TriggerSearchConfig()
    needed, searches = _needed(model, data, cfg, run)
    beside = [_needed(one.model, data, cfg, run)[0] for one in twins]
    differences = {
        kind: differences_of(value, torch.stack([other[kind] for other in beside]))
        for kind, value in needed.items()
    }
    spreads = spreads_of(model.classes, model.input_shape)
    return SelfReference(differences, p_values_of(differences, spreads), searches, tuple(twins))


def differences_of(value: Tensor, twins: Tensor) -> Tensor:
    """Return how much less each class (K,) needs than in the twins (T, K), beyond what all classes do.

    Example:
        >>> twins = torch.tensor([[2.0, 3.0, 2.5], [2.2, 3.1, 2.4], [2.1, 2.9, 2.6]])
        >>> differences_of(torch.tensor([0.1, 3.0, 2.5]), twins).tolist()
        [-2.0, 0.0, 0.0]
    """
    own = value.double() - twins.double().median(0).values  # (K,)
    classes = len(own)
    others = own.expand(classes, classes)[~torch.eye(classes, dtype=torch.bool)].view(classes, -1)
    # Twins that are easier to move in another class say nothing against this one.
    return own - others.quantile(0.5, dim=1).clamp_max(0)


def spreads_of(classes: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Return the spread of each kind of difference, for networks of so many classes and images (C, H, W)."""
    larger = max(1.0, math.sqrt(shape[1] * shape[2]) / _SIDE) ** _GROWTH
    stamp = _STAMP_OF_TWO if classes == 2 else SPREADS["stamp"]
    return {**SPREADS, "patch": SPREADS["patch"] * larger, "stamp": stamp}


def p_values_of(differences: Mapping[str, Tensor], spreads: Mapping[str, float]) -> Tensor:
    """Return the p-value of each class (K,), over all kinds of changes: their harmonic mean."""
    each = torch.stack([student_tail(d / spreads[kind], _FREEDOM) for kind, d in differences.items()])
    return (_DEPENDENCE / (1 / each).mean(0)).clamp_max(1)


def _needed(
    model: Classifier, data: CleanData, cfg: TriggerSearchConfig, run: Run
) -> tuple[dict[str, Tensor], dict[str, TriggerSearch]]:
    """Return what each class needs (K,), by kind of change, and the search of each form."""
    images, form_of_all = replace(data.all, labels=None), form_for_checks(model, data, run)
    if form_of_all.model.classes == model.classes:
        model = form_of_all.model  # a loss means the same in all networks
    needed: dict[str, Tensor] = {}
    searches: dict[str, TriggerSearch] = {}
    for form in _FORMS:
        search = search_triggers(model, images, cfg, run, form=form)
        largest = torch.tensor(search.limit).double().log() + _UNREACHED
        sizes = search.sizes.double()
        needed[form] = torch.where(torch.isfinite(sizes), sizes.log(), largest)
        searches[form] = search
    needed["stamp"] = (best_stamps(model, images, run).losses + _LIFT).log()
    return needed, searches
