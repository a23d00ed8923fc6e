"""Auto: find what moves a network and not its re-learned twin, and teach it away.

A twin is made that knows the task and has mostly lost what the weights hide (engine/twin.py). Changes of the
input are sought that move the network and not the twin (engine/differential_search.py). Where there is none,
the network is returned as it came. Otherwise the changes are taught away, with the network's own answers as
targets, and the search begins again on what was taught, until a search of every form with other draws finds
nothing.

Paper:   none; this project. The twin is feature-shift tuning (NeurIPS 2023).
Needs:   clean images and labels; about ten of each class.
Changes: all weights; stored batch statistics stay.
Departs: -
Cost:    the twin, one search of all forms, and for a network with a backdoor some rounds of search and
         160 steps of teaching each.
Blind:   triggers that differ from image to image and share no direction; changes of more than the sizes that
         are searched; a backdoor that the twin keeps as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unbackdoor.defenses.auto.recall import lost_classes, relearned
from unbackdoor.defenses.auto.teaching import Lesson, teach
from unbackdoor.engine.differential_search import Difference, Opponents, Stage, window_places
from unbackdoor.engine.differential_survey import (
    GAP,
    LEAD,
    STRIDE,
    UNTARGETED,
    Conviction,
    Survey,
    surveyed,
)
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.self_reference import TWINS, self_reference
from unbackdoor.engine.twin import USABLE, Twin, relearned_twin
from unbackdoor.engine.universal_changes import Form, GivenChange
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import SUSPICION, Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified, require_one_a_class

_ANYWHERE: tuple[Form, ...] = ("patch", "blend", "warp", "frequency")
_PLAIN_SQUARE = 0.1  # share of the images from which a square is taught away, whatever the twin does
_STAMPS, _MOST, _SHOWN = 12, 24, 12  # plain squares and other changes of a round, and those in the evidence
_RATES = (1.0, 0.3)  # factors on the learning rate of a round


class AutoConfig(Config):
    """Options of the repair."""

    gap: float = option(GAP, "smallest gap that convicts a class", source="docs/auto.md", gt=0, lt=1)
    lead: float = option(
        LEAD,
        "lead of a class over all others of one form that convicts it, whatever its twin does",
        source="docs/auto.md",
        gt=0,
        le=1,
    )
    worth_teaching: float = option(
        0.15, "gap from which a change is taught away", source="docs/auto.md", gt=0, lt=1
    )
    twins: int = option(
        TWINS, "copies beside which two to five classes are compared", source="as self_reference", ge=1
    )
    targets: int = option(3, "classes that are repaired at most", source="this project", ge=1)
    rounds: int = option(5, "rounds of search and teaching at most", source="this project", ge=1)
    steps: int = option(160, "steps of teaching in a round", source="docs/auto.md", ge=1)
    lr: float = option(0.005, "learning rate of the teaching", source="docs/auto.md", gt=0, le=1)
    tolerance: float = option(
        0.05,
        "largest loss of accuracy on held-out images in a round, before it is tried at a milder rate",
        source="as tac",
        ge=0,
        le=1,
    )
    precaution: bool = option(
        False,
        "teach the strongest changes away even where no class is convicted",
        source="off: a clean network pays for it",
    )


@defense(
    "auto",
    config=AutoConfig,
    paper="this project",
    needs={"images", "labels"},
    traits={SUSPICION},
    quick={"rounds": 1, "steps": 20, "twins": 1},
)
def purify(model: Classifier, data: CleanData, cfg: AutoConfig, *, run: Run) -> Purified:
    """Compare with a twin, and teach away what moves the network alone."""
    require_one_a_class(model, data.all)
    twin = relearned_twin(model, data, run)
    evidence: dict[str, Any] = {
        "twin": {
            "strength": twin.strength,
            "agreement": twin.agreement,
            "tried": [list(one) for one in twin.tried],
        }
    }
    if not twin.usable:
        raise MethodFailed(
            "the re-learned twin is too damaged to compare with",
            expected=f"the network's answer on {USABLE:.0%} of the held-out images",
            got=f"{twin.agreement:.0%}",
            remedy="Give more clean images, or choose another method",
        )
    opponents = Opponents(model, twin.model, data.all, run)
    led = _led(opponents, cfg, run)
    evidence["remarks"] = _remarks(run, led)
    convicted: list[Conviction] = []
    if led:
        result = Survey(tuple(led), model.classes, whole=False)
        suspects = list(dict.fromkeys(d.change.label for d in led))[: cfg.targets]
    else:
        result, convicted, _ = surveyed(
            opponents,
            lambda: relearned_twin(model, data, run, number=1),
            lambda: self_reference(model, data, run, first=twin, count=cfg.twins),
            seed="first",
            whole=False,
            gap=cfg.gap,
            lead=cfg.lead,
        )
        suspects = [one.label for one in convicted][: cfg.targets]
    evidence |= _words(result, convicted)
    if not suspects and cfg.precaution:
        suspects = sorted(range(model.classes), key=lambda k: -result.gaps()[k])[:1]
    lost = [] if suspects else lost_classes(model, data.all, run)
    evidence["targets"] = [k for k in suspects if k != UNTARGETED] or lost
    if lost:
        relearned_model = relearned(model, twin.model, data, run)
        return Purified(relearned_model, {**evidence, "decision": "class relearned", "lost": lost})
    if not suspects:
        return Purified(model, {**evidence, "decision": "no class convicted", "rounds": []})
    repaired, rounds, left = _repaired(
        model, opponents, twin, data, result, suspects, cfg, run, led=bool(led)
    )
    decision = "nothing found any more" if left <= cfg.worth_teaching else "something is still found"
    return Purified(repaired, {**evidence, "decision": decision, "rounds": rounds, "gap_left": left})


def _led(opponents: Opponents, cfg: AutoConfig, run: Run) -> list[Difference]:
    """Return what moves the network alone to the classes that were suspected before; none if nothing does."""
    if run.suspicion is None or not run.suspicion.classes:
        return []
    given = [GivenChange(trigger, trigger.label) for trigger in run.suspicion.triggers]
    suspects = run.suspicion.classes[: cfg.targets]
    left = _Left(Survey((), opponents.model.classes, whole=False), suspects, cfg)
    found = left.worth(opponents.measure(given)) + left.search(opponents, 0, stamps=True)
    large = {d.change.label for d in found if d.gap >= cfg.gap}
    return [d for d in found if d.change.label in large]


def _remarks(run: Run, led: Sequence[Difference]) -> list[str]:
    if run.suspicion is None or not run.suspicion.classes or led:
        return []
    return [
        "Nothing that leads to the suspected classes moves the network more than its twin; "
        "the method searched all classes anew."
    ]


def _words(result: Survey, convicted: Sequence[Conviction]) -> dict[str, Any]:
    away = result.best(UNTARGETED)
    return {
        "gaps": [round(gap, 4) for gap in result.gaps()],
        "gap_away": 0.0 if away is None else round(away.gap, 4),
        "convicted": [
            {"class": one.label, "gap": round(one.gap, 4), "reason": one.reason, "p_value": one.p_value}
            for one in convicted
        ],
    }


class _Left:
    """Searches for what is left of the suspected classes, and says what of it is worth teaching away.

    A change is measured against the twin, and where the twin may have kept the backdoor, against what changes
    of its form do to the other classes. A plain square that moves many images is no natural one, whatever the
    twin does.
    """

    def __init__(self, result: Survey, suspects: Sequence[int], cfg: AutoConfig) -> None:
        self._suspects, self._cfg = suspects, cfg
        self._usual: dict[str, float] = {form: result.usual(form, suspects) for form in _ANYWHERE}

    def search(self, opponents: Opponents, number: int, *, stamps: bool) -> list[Difference]:
        """Return what is worth teaching, the largest excess first."""
        changes = []
        places = window_places(opponents.model.input_shape, STRIDE, offset=2 * (number % 2))
        for k in self._suspects:
            seed = f"round {number}, {k}"
            stages = (Stage(3, 16, twin=False, images=4), Stage(6, 8), Stage(10, 6))
            changes += opponents.search("window", [k], places=places, stages=stages, seed=seed)
            for form in _ANYWHERE:
                # One against the twin, and one that asks for nothing but the class.
                changes += opponents.search(form, [k], stages=(Stage(27, 1),), seed=seed)
                if k != UNTARGETED:
                    changes += opponents.search(form, [k], stages=(Stage(20, 1, twin=False),), seed=seed)
        return self.worth(opponents.measure(changes, seed=number)) + (
            self.stamps(opponents, number) if stamps else []
        )

    def stamps(self, opponents: Opponents, number: int) -> list[Difference]:
        """Return the plain squares that move images to the suspected classes."""
        found = opponents.with_classes(opponents.measure(opponents.stamps(seed=number), seed=number))
        ours = [d for d in found if d.change.label in self._suspects]
        return [d for d in ours if max(d.gap, d.moved - _PLAIN_SQUARE) > 0][:_STAMPS]

    def worth(self, found: Sequence[Difference]) -> list[Difference]:
        """Return those of the suspected classes whose excess is large enough, the largest first."""
        ours = [d for d in found if d.change.label in self._suspects]
        ours = [d for d in ours if self.excess(d) > self._cfg.worth_teaching]
        return sorted(ours, key=lambda d: -self.excess(d))[:_MOST]

    def excess(self, one: Difference) -> float:
        """Return by how much a change moves the network more than is natural, in [-1, 1]."""
        return max(one.gap, one.moved - self._usual.get(one.change.form, 1.0))


def _repaired(
    model: Classifier,
    opponents: Opponents,
    twin: Twin,
    data: CleanData,
    result: Survey,
    suspects: Sequence[int],
    cfg: AutoConfig,
    run: Run,
    *,
    led: bool,
) -> tuple[Classifier, list[dict[str, Any]], float]:
    """Search and teach by turns; return the network, a record of each round, and the largest excess left.

    A twin of the network as it was received keeps some of the backdoor, and hides as much of it. So when
    nothing is found any more, a twin of the network as it was taught takes its place for a last search.
    """
    current, lesson = model, Lesson(steps=cfg.steps, lr=cfg.lr)
    left = _Left(result, suspects, cfg)
    old: list[Difference] = []
    rounds: list[dict[str, Any]] = []
    renewed = False
    if led:  # what led is what this very search came to
        fresh = list(result.differences)
    else:
        fresh = left.worth(result.differences) + left.search(opponents, 0, stamps=True)
    for number in range(cfg.rounds):
        if not fresh:
            break
        best = accuracy(current, data.select, run)
        for rate in _RATES:
            taught = teach(
                current,
                model,
                data.fit,
                [(d.change, left.excess(d)) for d in fresh],
                [d.change for d in old],
                replace(lesson, lr=cfg.lr * rate),
                run,
                augmentation=data.augmentation,
                number=number,
            )
            held_out = accuracy(taught, data.select, run)
            if held_out >= best - cfg.tolerance - 1e-6:  # the last term is for rounding
                break
        shown = [[d.change.form, d.change.label, round(d.moved, 3), round(d.gap, 3)] for d in fresh]
        rounds.append(
            {
                "changes": shown[:_SHOWN],
                "number_of_changes": len(shown),
                "lr": cfg.lr * rate,
                "accuracy_before": round(best, 4),
                "accuracy": round(held_out, 4),
            }
        )
        if held_out < best - cfg.tolerance - 1e-6:
            rounds[-1]["taken_back"] = True
            break
        current, old = taught, [*old, *fresh]
        opponents = opponents.with_model(current)
        fresh = left.search(opponents, number + 1, stamps=True)
        if not fresh and not renewed:
            renewed = True
            again = relearned_twin(current, data, run, number=2 + number, strengths=(twin.strength,))
            rounds[-1]["new_twin"] = round(again.agreement, 4)
            if again.usable:
                opponents = Opponents(current, again.model, data.all, run)
                fresh = left.search(opponents, number + 1, stamps=False)
    return current, rounds, max((left.excess(d) for d in fresh), default=0.0)
