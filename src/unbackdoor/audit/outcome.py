"""What a repair achieved, as far as that can be known without the attacker's trigger.

That a recovered trigger stopped working says little: networks obeyed the attacker's all the while. So
triggers are searched for anew, with other draws and images than the method's, in the original and in the
repaired model alike: only what found one before can witness that there is none any more. ``repaired`` is said
only where two kinds of search, or more, find nothing. :data:`SEARCHES` holds the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Literal, TypeVar

from unbackdoor.audit.budget import BudgetSpent, end_of, watched
from unbackdoor.audit.comparison import Accuracy
from unbackdoor.confinement import now
from unbackdoor.engine import rng
from unbackdoor.engine.differential_search import Difference, Opponents, Stage, window_places
from unbackdoor.engine.differential_survey import GAP, STRIDE
from unbackdoor.engine.inference import mode, predict, settle_layout
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import FEWEST, named_beforehand
from unbackdoor.engine.statistics.several_outliers import smallest_few
from unbackdoor.engine.trigger_search import Form, TriggerSearch, TriggerSearchConfig, search_triggers
from unbackdoor.engine.twin import USABLE, Twin, relearned_twin
from unbackdoor.engine.universal_changes import Form as DifferentialForm
from unbackdoor.errors import MethodFailed, UnbackdoorError
from unbackdoor.metrics import Rate
from unbackdoor.types import Classifier, CleanData

T = TypeVar("T")
OutcomeVerdict = Literal["repaired", "weakened", "not repaired", "undecided", "nothing was done"]
LEVEL = 0.05  # largest p-value at which a class counts as found that was suspected before it was tested
STRICT = 0.01  # likewise of any class: there are several searches, and each finds the easiest of all classes
WORKS = 0.5  # success from which a trigger is said to work
GONE = 0.1  # success up to which it is said not to: clean images of other classes are confused, too
AS_EASY = 1.5  # times the size that a class needed before, up to which it is reached as easily as before
FEWEST_SEARCHES = 2  # kinds of search that must find nothing any more
DAMAGED = 0.1  # loss of accuracy, at the lower end of its interval, from which the task itself is damaged
LEFT = 0.15  # gap beside a twin from which something is left, as in the repair `auto`
SECONDS = 240.0  # for all searches together
_STARTS = 4  # of each class; half of what a scan takes, as there are two such searches
_MAX_NAMED = 10  # classes that a sentence lists


@dataclass(frozen=True)
class Searched:
    """What one kind of search says of the original and of the repaired model.

    Attributes:
        search: The kind, in words.
        before: Classes that it finds a trigger towards, in the original.
        after: Likewise in the repaired model.
        as_easily: Those of them that are reached as easily as before.
        facts: JSON-ready numbers.
        failed: Why there is no answer; empty where there is.
    """

    search: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    as_easily: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""


# Arguments: the original, the repaired model, images without labels, suspected classes, the run.
Search = Callable[[Classifier, Classifier, CleanData, Sequence[int], Run], Searched]


@dataclass(frozen=True)
class Evidence:
    """What an outcome is concluded from.

    Attributes:
        changed: Whether any number of the model was changed.
        searches: What was found by searching anew.
        triggers: For every known trigger: its class, its success before and its success after.
        unlearned: Success, on held-out images of the original, of the changes that the method taught away; of
            those that it reported.
        accuracy: Clean accuracy before and after; None without labels.
        suspected: Classes that were suspected before the repair.
    """

    changed: bool
    searches: tuple[Searched, ...] = ()
    triggers: tuple[tuple[int, Rate, Rate], ...] = ()
    unlearned: tuple[float, ...] = ()
    accuracy: Accuracy | None = None
    suspected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a repair achieved.

    Attributes:
        verdict: ``repaired``, if no trigger is found any more; ``weakened``, if what is found works less or
            is larger, or too little is known to say more; ``not repaired``, if a trigger works as before;
            ``undecided``, if none was found before either; ``nothing was done``, if no number was changed.
        reasons: Sentences that explain it.
        searches: What was searched for anew.
    """

    verdict: OutcomeVerdict
    reasons: tuple[str, ...]
    searches: tuple[Searched, ...] = ()


def conclude(evidence: Evidence) -> Outcome:
    """Return the outcome; in doubt the worse one."""
    if not evidence.changed:
        return Outcome("nothing was done", ("No number of the model was changed.",))
    working = [(k, before, after) for k, before, after in evidence.triggers if before.value >= WORKS]
    answered = [one for one in evidence.searches if not one.failed]
    witnesses = [one for one in answered if one.before]
    reasons = [*map(_of_a_search, evidence.searches), *_of_triggers(evidence.triggers)]

    def outcome(verdict: OutcomeVerdict, *why: str) -> Outcome:
        return Outcome(verdict, (*why, *reasons), evidence.searches)

    if any(one.as_easily for one in answered) or any(after.value >= WORKS for _, _, after in working):
        return outcome("not repaired", "A trigger works as it did before.")
    if any(one.after for one in answered) or any(after.value > GONE for _, _, after in evidence.triggers):
        return outcome("weakened", "What is found is weaker than before, and not gone.")
    if not working and not witnesses:
        return outcome(
            "undecided",
            "No search found a trigger before the repair, and no known one worked, so that nothing can be "
            "said of what was achieved.",
        )
    seen = {k for one in witnesses for k in one.before} | {k for k, _, _ in working}
    doubts = list(_doubts(evidence, answered, bool(working), seen))
    if doubts:
        return outcome(
            "weakened", "What was found before is not found any more, and this proves little.", *doubts
        )
    return outcome("repaired", "No search finds a trigger any more.")


def _doubts(evidence: Evidence, answered: Sequence[Searched], working: bool, seen: set[int]) -> Iterable[str]:
    if len(answered) < FEWEST_SEARCHES:
        yield f"Only {len(answered)} of {len(evidence.searches)} kinds of search came to an answer."
    unseen = [k for k in evidence.suspected if k not in seen]
    if unseen:
        yield f"Nothing found a trigger towards {_named(unseen)} before the repair, which was suspected."
    if evidence.triggers and not working:
        yield "No known trigger worked on half of the images before the repair, so that it was a poor lead."
    poor = [share for share in evidence.unlearned if share < WORKS]
    if evidence.unlearned and len(poor) == len(evidence.unlearned):
        yield (
            f"What the method taught away worked on {100 * max(poor):.0f} % of the images that it was not "
            "made from, too few for it to be like the attacker's trigger."
        )
    accuracy = evidence.accuracy
    if accuracy is not None and accuracy.drop_interval[0] > DAMAGED:
        yield f"The repair cost {100 * accuracy.drop:.1f} points of accuracy: the task itself is damaged."


def _of_a_search(one: Searched) -> str:
    if one.failed:
        return f"The search for {one.search} came to no answer: {one.failed.rstrip('.')}."
    easily = f" ({_named(one.as_easily)} as easily as before)" if one.as_easily else ""
    before, after = (f"one towards {_named(found)}" if found else "none" for found in (one.before, one.after))
    return f"A new search for {one.search} finds {before} in the original, and {after} in the repair{easily}."


def _of_triggers(triggers: Iterable[tuple[int, Rate, Rate]]) -> Iterable[str]:
    for label, before, after in triggers:
        if not before.total:
            yield f"The known trigger towards class {label} could not be tried: no image is of another class."
        elif before.value < WORKS:
            yield (
                f"The known trigger towards class {label} worked on {100 * before.value:.0f} % of the images "
                "before the repair: it is poor, and what became of it says nothing."
            )
        else:
            yield (
                f"The known trigger towards class {label} worked on {100 * before.value:.0f} % of the images "
                f"and works on {100 * after.value:.0f} % now, which is no bound on the attacker's."
            )


def _named(classes: Sequence[int]) -> str:
    more = f" and {len(classes) - _MAX_NAMED} more" if len(classes) > _MAX_NAMED else ""
    return f"class {', '.join(map(str, classes[:_MAX_NAMED]))}{more}"


# ---------------------------------------------------------------------------------------------------
# Searching


def search_anew(
    before: Classifier,
    after: Classifier,
    data: CleanData,
    suspected: Sequence[int],
    run: Run,
    *,
    seconds: float | None = None,
) -> tuple[Searched, ...]:
    """Search for triggers in both models, in every way; what goes wrong in one search is its result.

    Args:
        before: The original; not changed.
        after: The repaired model; not changed.
        data: Clean images; ``select`` is what is measured on, best what the method did not have, and ``fit``
            is what a twin may learn from. Labels are not read.
        suspected: Classes that were suspected before, which need less evidence.
        run: The run of the repair; the draws here are others.
        seconds: For all of them together; None: four minutes. Each search has an equal share, and the later
            ones what the earlier ones leave.
    """
    whole = end_of(SECONDS if seconds is None else seconds)
    end = whole

    def limited(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for item in run.show(items, f"judging the repair: {label}", total):
            if end is not None and now() >= end:
                raise BudgetSpent("the time for judging the repair is over")
            yield item

    other = replace(run, seed=rng.derive_seed(run.seed, "judging the repair"), show=limited)
    data = replace(data, fit=replace(data.fit, labels=None), select=replace(data.select, labels=None))
    pair = [model.copy().to(run.device) for model in (before, after)]
    out = []
    for number, (name, search) in enumerate(SEARCHES.items()):
        try:
            if whole is not None:
                if now() >= whole:
                    raise BudgetSpent("the time was over before it began")
                end = now() + (whole - now()) / (len(SEARCHES) - number)
            with watched(end):
                for model in pair:
                    settle_layout(model, other)
                out.append(search(pair[0], pair[1], data, suspected, other))
        except BudgetSpent:
            out.append(Searched(name, failed="the time for it was over"))
        except (UnbackdoorError, RuntimeError, MemoryError) as error:  # a repair is not lost by being judged
            out.append(Searched(name, failed=str(error)[:300] or type(error).__name__))
    return tuple(out)


def search_by_size(
    before: Classifier, after: Classifier, data: CleanData, suspected: Sequence[int], run: Run, *, form: Form
) -> Searched:
    """Find the classes that need a much smaller change than the others; see ``engine/trigger_search.py``.

    A class that was suspected, or that the original gives away, is tested by itself in the repaired model,
    and counts as found as well where it needs hardly more than before.
    """
    if before.classes < FEWEST:
        return Searched(NAMES[form], failed=f"fewer than {FEWEST} classes cannot be compared")
    cfg = TriggerSearchConfig(starts=_STARTS)
    enough = max(min(before.classes, 8), math.ceil(before.classes / 3))
    look = partial(search_triggers, images=data.select, cfg=cfg, run=run, form=form, enough=enough)
    one, other = look(before), look(after)
    found = _apart(one, suspected)
    aims = tuple(dict.fromkeys((*suspected, *found)))
    easily = tuple(k for k in found if math.isfinite(other.sizes[k]) and _growth(one, other, k) <= AS_EASY)
    left = tuple(dict.fromkeys((*easily, *_apart(other, aims))))
    if not set(left) <= set(aims):  # some class is always the easiest: a new one must be found twice
        again = _apart(look(after, restart=1), aims)
        left = tuple(k for k in left if k in aims or k in again)
    sizes = [[_number(s.sizes[k]) for k in aims] for s in (one, other)]
    facts = {"classes": list(aims), "sizes_before": sizes[0], "sizes_after": sizes[1], "images": cfg.images}
    return Searched(NAMES[form], found, left, easily, facts)


def search_for_squares(
    before: Classifier, after: Classifier, data: CleanData, suspected: Sequence[int], run: Run
) -> Searched:
    """Find the classes that a small plain square leads to, by forward passes at all places.

    It is of another kind than searches that follow a gradient: these find textures, and leave the plain
    square open that the attacker may have used. A class counts that squares move more images to than to the
    class in the middle.
    """
    if before.classes < FEWEST:
        return Searched(SQUARES, failed=f"fewer than {FEWEST} classes cannot be compared")
    shares = []
    for model in (before, after):
        alone = Opponents(model, model, data.select, run)
        best = [0.0] * model.classes
        for one in alone.with_classes(alone.measure(alone.stamps(seed="judging"))):
            if one.change.label >= 0:
                best[one.change.label] = max(best[one.change.label], one.moved)
        shares.append(best)
    usual = [median(best) for best in shares]  # of a task that squares decide, this is large

    def apart(best: Sequence[float], usually: float, least: float) -> set[int]:
        return {k for k, share in enumerate(best) if share >= usually + least}

    found = tuple(sorted(apart(shares[0], usual[0], WORKS)))
    new = apart(shares[1], usual[1], WORKS)
    left = tuple(sorted(new | (set(found) & apart(shares[1], usual[1], GONE))))
    easily = tuple(sorted(set(found) & new))
    facts = {"largest_before": max(shares[0]), "largest_after": max(shares[1])}
    return Searched(SQUARES, found, left, easily, facts)


def search_beside_a_twin(
    before: Classifier, after: Classifier, data: CleanData, suspected: Sequence[int], run: Run
) -> Searched:
    """Find what moves a network and not a copy that learned its task anew; see ``engine/twin.py``.

    It asks about classes that were suspected before and no others: how large such gaps become by chance is
    not known well enough to accuse these. Each of the two models has a twin of its own, as that of the
    original may have kept some of the backdoor. It needs no number of classes.
    """
    if not suspected:
        return Searched(BESIDE_TWIN, failed="no class was suspected before, and it asks about such classes")
    first, second = (
        _gaps(_beside_twin(model, data, run, number), suspected)
        for number, model in enumerate((before, after))
    )
    found = tuple(k for k in suspected if first[k] >= GAP)
    left = tuple(k for k in suspected if second[k] >= (LEFT if k in found else GAP))
    easily = tuple(k for k in found if second[k] >= max(GAP, first[k] / AS_EASY))
    gaps = {"gaps_before": [*first.values()], "gaps_after": [*second.values()]}
    return Searched(BESIDE_TWIN, found, left, easily, {"classes": list(suspected), **gaps})


def _beside_twin(model: Classifier, data: CleanData, run: Run, number: int) -> Opponents:
    return Opponents(model, _twin(model, data, run, number).model, data.select, run)


def _twin(model: Classifier, data: CleanData, run: Run, number: int) -> Twin:
    """Return a twin that learned from the network's own answers; raise MethodFailed if it is too poor."""
    with mode(model, training=False):
        answers = predict(model, data.fit, run).argmax(1)
    own = replace(data.fit, labels=answers, class_names=model.class_names)
    twin = relearned_twin(model, CleanData.split(own, augmentation=data.augmentation), run, number=number)
    if not twin.usable:
        raise MethodFailed(
            "a twin is too damaged to compare with", expected=f"{USABLE:.0%}", got=f"{twin.agreement:.0%}"
        )
    return twin


def _gaps(pair: Opponents, classes: Sequence[int]) -> dict[int, float]:
    """Return for each class the largest gap of any change towards it; 0 where it is not moved more."""
    found: list[Difference] = []
    places = window_places(pair.model.input_shape, STRIDE)
    windows = (Stage(3, 8, twin=False, images=4), Stage(6, 4), Stage(10, 2))
    for k in classes:
        seed = f"judging {k}"
        changes = pair.search("window", [k], places=places, stages=windows, seed=seed)
        for form in _BESIDE_TWIN:
            changes += pair.search(form, [k], stages=(Stage(24, 1),), seed=seed)
        found += pair.measure(changes, seed="judging")
    return {k: max([0.0, *(d.gap for d in found if d.change.label == k)]) for k in classes}


def _apart(search: TriggerSearch, suspected: Sequence[int]) -> tuple[int, ...]:
    """Return the classes that need too little: any, corrected for their number, and the suspected ones."""
    logs = search.sizes.clamp_max(search.limit).log().tolist()
    named = [k for k in suspected if math.isfinite(search.sizes[k]) and named_beforehand(logs, k) <= LEVEL]
    return tuple(dict.fromkeys((*named, *smallest_few(search.sizes.log(), level=STRICT).positions)))


def _growth(before: TriggerSearch, after: TriggerSearch, k: int) -> float:
    return float(after.sizes[k] / before.sizes[k])


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


NAMES: Mapping[Form, str] = {"patch": "a small patch", "blend": "a faint pattern"}
SQUARES = "a plain square"
BESIDE_TWIN = "what moves it and not a re-learned twin"
_BESIDE_TWIN: tuple[DifferentialForm, ...] = ("patch", "blend", "frequency", "warp")
SEARCHES: dict[str, Search] = {
    BESIDE_TWIN: search_beside_a_twin,
    **{NAMES[form]: partial(search_by_size, form=form) for form in NAMES},
    SQUARES: search_for_squares,
}
