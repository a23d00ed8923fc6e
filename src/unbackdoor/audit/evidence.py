"""Many p-values of one model compared with one level: each check alone, and checks that agree on a class.

Paper:   Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979);
         Wilson, "The harmonic mean p-value for combining dependent tests", PNAS 116 (2019).
Departs: the harmonic mean is taken over the checks that noticed the same class, whether or not it is the one
         that stands out most in them; every other check counts as p = 1. It is multiplied by 1.3, so that
         the whole, Holm's rule included, keeps its level also where the checks depend on each other or
         always name the same class (``tests/unit/test_evidence.py`` simulates both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NOTICED = 0.2  # p-value up to which a check counts as having noticed its class
DEPENDENCE = 1.3  # the most by which the harmonic mean was beyond its level in the simulations


@dataclass(frozen=True)
class Agreement:
    """Checks that noticed the same class.

    Attributes:
        label: The class.
        places: The checks, as places in the sequence that was given, smallest p-value first.
        p_value: Of all of them together, corrected for all checks.
    """

    label: int
    places: tuple[int, ...]
    p_value: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's rule, in the given order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    out, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = largest
    return out


def agreements(
    p_values: Sequence[float],
    classes: Sequence[Sequence[int]],
    tables: Sequence[Sequence[float]] | None = None,
) -> list[Agreement]:
    """Return where two checks or more noticed the same single class, the strongest agreement first.

    Args:
        p_values: One for each check that counts, in [0, 1].
        classes: What the finding of each of them points to. Findings that point to several classes, or to
            none, agree with nobody.
        tables: For each check, the p-values of all classes, uncorrected, and not a number for a class that
            it does not compare; empty where it has none. Where it has them, they say which classes it
            noticed, and what it points to does not matter.

    Example:
        >>> [(a.label, a.places) for a in agreements([0.03, 0.9, 0.02], [[4], [4], [4]])]
        [(4, (2, 0))]
        >>> round(agreements([0.03, 0.9, 0.02], [[4], [4], [4]])[0].p_value, 4)
        0.0468
    """
    noticed: dict[int, dict[int, float]] = {}  # by class: the check and its p-value
    for i, (p, pointed) in enumerate(zip(p_values, classes, strict=True)):
        table = tables[i] if tables is not None else ()
        compared = sum(not math.isnan(q) for q in table)
        single = {k: compared * q for k, q in enumerate(table) if not math.isnan(q)}
        if not table and len(pointed) == 1:
            single = {pointed[0]: p}
        for label, corrected in single.items():
            if corrected <= NOTICED:
                noticed.setdefault(label, {})[i] = corrected
    out = []
    for label, by_check in noticed.items():
        if len(by_check) > 1:
            weight = sum(1 / max(p, 1e-300) for p in by_check.values())
            joint = min(1.0, DEPENDENCE * len(p_values) / weight)
            out.append(Agreement(label, tuple(sorted(by_check, key=by_check.__getitem__)), joint))
    return sorted(out, key=lambda a: a.p_value)
