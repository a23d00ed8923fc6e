"""Auto: find what moves a network and not its re-learned twin, and teach it away with the network's own answers.

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
from typing import Any

from unbackdoor.defenses.auto.teaching import Lesson, teach
from unbackdoor.engine.differential_search import Difference, Opponents, Stage, window_places
from unbackdoor.engine.differential_survey import (
    GAP,
    LEAD,
    STRIDE,
    UNTARGETED,
    Conviction,
    Survey,
    convictions,
    survey,
)
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.twin import USABLE, relearned_twin
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


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
    targets: int = option(3, "classes that are repaired at most", source="this project", ge=1)
    rounds: int = option(5, "rounds of search and teaching at most", source="this project", ge=1)
    steps: int = option(160, "steps of teaching in a round", source="docs/auto.md", ge=1)
    lr: float = option(0.005, "learning rate of the teaching", source="docs/auto.md", gt=0, le=1)
    tolerance: float = option(
        0.05,
        "largest share of held-out answers that a round may change before it is taken back",
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
    quick={"rounds": 1, "steps": 20},
)
def purify(model: Classifier, data: CleanData, cfg: AutoConfig, *, run: Run) -> Purified:
    """Compare with a twin, and teach away what moves the network alone."""
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
    result = survey(opponents, seed="first", whole=False)
    convicted = convictions(
        result, opponents, lambda: relearned_twin(model, data, run, number=1), gap=cfg.gap, lead=cfg.lead
    )[: cfg.targets]
    evidence |= _words(result, convicted)
    suspects = [one.label for one in convicted]
    if not suspects and cfg.precaution:
        suspects = sorted(range(model.classes), key=lambda k: -result.gaps()[k])[:1]
    if not suspects:
        return Purified(model, {**evidence, "decision": "no class convicted", "rounds": []})
    repaired, rounds, left = _repaired(model, opponents, data, result, suspects, cfg, run)
    decision = "nothing found any more" if left <= cfg.worth_teaching else "something is still found"
    return Purified(repaired, {**evidence, "decision": decision, "rounds": rounds, "gap_left": left})


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


def _repaired(
    model: Classifier,
    opponents: Opponents,
    data: CleanData,
    result: Survey,
    suspects: Sequence[int],
    cfg: AutoConfig,
    run: Run,
) -> tuple[Classifier, list[dict[str, Any]], float]:
    """Search and teach by turns; return the network, a record of each round, and the largest gap left."""
    current, lesson = model, Lesson(steps=cfg.steps, lr=cfg.lr)
    old: list[Difference] = []
    rounds: list[dict[str, Any]] = []
    left = 1.0
    for number in range(cfg.rounds + 1):
        against = opponents.with_model(current)
        # What the first search came to counts once more, and in every round what is found anew.
        fresh = list(result.differences) if number == 0 else []
        fresh += _search(against, suspects, number, stamps=number == 0)
        fresh = _worth(fresh, suspects, cfg)
        if not fresh:  # a plain square is looked for before nothing is said to be left
            fresh = _worth(_stamps(against, number), suspects, cfg)
        left = max((d.gap for d in fresh), default=0.0)
        if not fresh or number == cfg.rounds:
            break
        taught = teach(
            current, model, data.fit, fresh, old, lesson, run, augmentation=data.augmentation, number=number
        )
        kept, before = (_agreement(one, model, data.select, run) for one in (taught, current))
        record = {"changes": [[d.change.form, d.change.label, round(d.gap, 3)] for d in fresh[:8]]}
        rounds.append({**record, "number_of_changes": len(fresh), "agreement": round(kept, 4)})
        if kept < before - cfg.tolerance - 1e-6:  # the last term is for rounding
            rounds[-1]["taken_back"] = True
            break
        current, old = taught, [*old, *fresh]
    return current, rounds, left


def _worth(found: Sequence[Difference], suspects: Sequence[int], cfg: AutoConfig) -> list[Difference]:
    ours = [d for d in found if d.change.label in suspects and d.gap > cfg.worth_teaching]
    return sorted(ours, key=lambda d: -d.gap)[:24]


def _search(
    opponents: Opponents, suspects: Sequence[int], number: int, *, stamps: bool
) -> list[Difference]:
    """Search with all forms for what moves the network to the suspected classes."""
    changes = []
    places = window_places(opponents.model.input_shape, STRIDE, offset=2 * (number % 2))
    for k in suspects:
        seed = f"round {number}, {k}"
        stages = (Stage(4, 16, twin=False), Stage(6, 8), Stage(10, 6))
        changes += opponents.search("window", [k], places=places, stages=stages, seed=seed)
        changes += opponents.search("patch", [k], starts=2, stages=(Stage(27, 2),), seed=seed)
        changes += opponents.search("blend", [k], stages=(Stage(27, 1),), seed=seed)
        changes += opponents.search("warp", [k], stages=(Stage(27, 1),), seed=seed)
        changes += opponents.search("frequency", [k], stages=(Stage(27, 1),), seed=seed)
    found = opponents.measure(changes, seed=number)
    return found + (_stamps(opponents, number) if stamps else [])


def _stamps(opponents: Opponents, number: int) -> list[Difference]:
    return opponents.with_classes(opponents.measure(opponents.stamps(seed=number), seed=number))


def _agreement(one: Classifier, other: Classifier, images: Images, run: Run) -> float:
    with mode(one, training=False), mode(other, training=False):
        same = predict(one, images, run).argmax(1) == predict(other, images, run).argmax(1)
    return float(same.float().mean())
