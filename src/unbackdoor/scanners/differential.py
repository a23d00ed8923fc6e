"""Differential: what moves the network and not its re-learned twin is not of the task.

Classes differ by nature, and any comparison of classes accuses the natural favourites. The twin is a copy
that learned the same task anew and mostly lost what the weights hide, so that it has the same favourites
(engine/twin.py). Changes of several forms are sought that move the network and leave the twin alone
(engine/differential_search.py). With two to five classes it accuses the class that needs less of a change
than in three twins, as the check `self_reference` does.

Paper:   none; this project. The twin is feature-shift tuning (Min et al., NeurIPS 2023).
Needs:   clean images and labels; about ten of each class.
Departs: -
Cost:    one or two trainings of a few hundred steps, and a search of every form with two networks.
Blind:   a backdoor that the twin keeps as well; triggers that differ from image to image without a common
         direction.
"""

from __future__ import annotations

import math
from dataclasses import replace

from unbackdoor.engine.differential_search import Opponents
from unbackdoor.engine.differential_survey import GAP, UNTARGETED, Survey, surveyed
from unbackdoor.engine.run import Run
from unbackdoor.engine.self_reference import TWINS, self_reference
from unbackdoor.engine.twin import USABLE, relearned_twin
from unbackdoor.registry import Config, option, scanner
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict, require_fit


class DifferentialConfig(Config):
    """Options of the scan."""

    gap: float = option(GAP, "smallest gap that counts", source="docs/auto.md", gt=0, lt=1)
    twins: int = option(
        TWINS, "copies beside which two to five classes are compared", source="as self_reference", ge=1
    )
    whole: bool = option(
        False, "search all forms even if a class is plain before", source="this project: time"
    )


@scanner(
    "differential",
    config=DifferentialConfig,
    paper="this project",
    needs={"images", "labels"},
    cost=60,
    quick={"twins": 1},
)
def scan(model: Classifier, data: CleanData, cfg: DifferentialConfig, *, run: Run) -> ScanReport:
    """Compare the network with a twin, and the gap with that between two twins."""
    require_fit(model, data.fit)
    twin = relearned_twin(model, data, run)
    if not twin.usable:
        reason = (
            f"the re-learned twin agrees on {twin.agreement:.0%} of the held-out images only, and at least "
            f"{USABLE:.0%} are needed; more clean images help"
        )
        return ScanReport("undecided", skipped={"comparison with a twin": reason})
    opponents = Opponents(model, twin.model, data.all, run)
    result, convicted, p_value = surveyed(
        opponents,
        lambda: relearned_twin(model, data, run, number=1),
        lambda: self_reference(model, data, run, first=twin, count=cfg.twins),
        seed="first",
        whole=cfg.whole,
        gap=cfg.gap,
        lead=math.inf,
    )
    classes = tuple(one.label for one in convicted if one.label != UNTARGETED)
    largest = result.differences[0]
    finding = Finding(
        statistic="gap between the network and its re-learned twin",
        value=largest.gap,
        direction="large: a change moves the network and does not move a copy that learned the task anew",
        threshold=cfg.gap,
        threshold_source="this project; the p-value is of the law of such gaps between two twins",
        p_value=p_value,
        classes=classes,
        per_class=tuple(result.gaps()),
        trigger=_trigger(classes[0], result, opponents) if classes else None,
    )
    verdict: Verdict = "backdoor found" if convicted else "no evidence found"
    coverage = ("changes of every form",) if result.whole else ("changes of the cheaper forms",)
    return ScanReport(verdict, (finding,), coverage=coverage)


def _trigger(label: int, result: Survey, opponents: Opponents) -> RecoveredTrigger | None:
    """Return the change with the largest gap towards the class, of those that can be drawn."""
    shape = opponents.model.input_shape
    for one in result.differences:
        trigger = one.change.trigger(shape, label) if one.change.label == label else None
        if trigger is not None:
            # Measured on images that the search may have drawn: a gap is of all of them.
            return replace(trigger, success=None)
    return None
