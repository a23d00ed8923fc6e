"""Neural Cleanse: the class that a far smaller change sends all images to is the suspect.

A universal change towards every class is looked for in one batch, under a budget that rises for all of them
alike (engine/trigger_search.py). Two numbers of a class are tested for a few that are too small: the
logarithm of the loss at one small budget, and the logarithm of the size at which the class is reached.
Classes that were given up enter the test as "larger than all others". Normal numbers are the null law, all
other classes tell its centre and spread, and there may be several targets.

A search can end in a poor change, and chance can make a class stand out once. So the search is repeated on
other images, and a class must stand out in most of the searches: of R p-values the one in the middle counts,
the k-th smallest with k = floor(R / 2) + 1, times R / k. That is a p-value whatever the searches have in
common (Rueger's bound). Searches that cannot change the verdict any more are not made.
Clean networks have classes that need little; only much less than all others counts.

Paper:   Wang et al., "Neural Cleanse", S&P 2019. Preset ``blend``: universal perturbations as in
         Moosavi-Dezfooli et al., CVPR 2017.
Needs:   clean images; labels are not looked at.
Departs: see engine/trigger_search.py; the paper's index of 2 by the median absolute deviation is met by the
         smallest of ten normal numbers in every third set. The loss at a fixed budget is this project's, and
         so is the preset ``blend``, which looks for a faint pattern over the whole image in the place of a
         patch.
Cost:    see engine/trigger_search.py; times k, and up to `restarts` times where the searches disagree.
Blind:   all-to-all attacks, where no change sends all images to one class; triggers that differ from image
         to image; with fewer than six classes there is no verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.engine.statistics.several_outliers import Outliers, smallest_few
from unbackdoor.engine.trigger_search import (
    Form,
    TriggerSearch,
    TriggerSearchConfig,
    search_triggers,
    success,
)
from unbackdoor.registry import Variant, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, Images, ScanReport, Verdict, require_fit

RECOVERED = "success of the recovered trigger"
_FAINT = "Is there a class that an unusually faint pattern turns all images into?"
# Budgets at which losses are compared: a square with an eighth of the image's sides, and the length that
# every pixel changed by 8 of 255 has. Both stand for "hardly to be seen", and neither for any trigger.
_FIXED: dict[Form, float] = {"patch": 1 / 64, "blend": 8 / 255}
_TESTS = 2


class NeuralCleanseConfig(TriggerSearchConfig):
    """Options of the scan."""

    form: Form = option(
        "patch",
        "patch: mask and pattern, the size is the sum of the mask; blend: something added to all pixels, the "
        "size is its length",
        source="Neural Cleanse: patch",
    )
    budget: float = option(
        0.0,
        "budget at which losses are compared: share of the image that the mask covers, or root mean square "
        "of the perturbation; 0: 1/64 of the image, or 8/255",
        source="this project: what is hardly seen, fixed before any result was",
        ge=0,
        le=0.5,
    )
    restarts: int = option(
        3,
        "searches on different images, in most of which a suspect must stand out",
        source="this project",
        ge=1,
    )
    waited: float = option(
        1 / 3,
        "share of the classes, but at least 8 of them, that are reached before the others are given up",
        source="this project: what is tested are the smallest",
        gt=0,
        le=1,
    )
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@scanner(
    "neural_cleanse",
    config=NeuralCleanseConfig,
    paper="IEEE S&P 2019",
    needs={"images"},
    presets={"blend": {"form": "blend"}},
    question="Is there a class that an unusually small patch turns all images into?",
    cost=40,
    variants={"blend": Variant(_FAINT, {"form": "blend"})},
    quick={"steps": 30, "images": 8},
)
def scan(model: Classifier, data: CleanData, cfg: NeuralCleanseConfig, *, run: Run) -> ScanReport:
    """Look for the smallest change towards every class, test the smallest, and try the suspect's trigger."""
    require_fit(model, data.fit)
    images, skipped = replace(data.fit, labels=None), {}
    enough = max(min(model.classes, 8), math.ceil(cfg.waited * model.classes))
    parts = _parts(images, cfg, run)
    if len(parts) == 1 and cfg.restarts > 1:
        skipped["different images"] = f"{len(images)} images are too few to share out; all searches use all"
    majority = cfg.restarts // 2 + 1
    limit = cfg.level / _TESTS * majority / cfg.restarts  # for the p-value of one search and one test
    fixed = cfg.budget or _FIXED[cfg.form]
    searches: list[TriggerSearch] = []
    tests: list[tuple[Outliers, Outliers]] = []
    for restart in range(cfg.restarts):
        part = parts[restart % len(parts)]
        searches.append(
            search_triggers(model, part, cfg, run, form=cfg.form, enough=enough, fixed=fixed, restart=restart)
        )
        tests.append(_tests(searches[-1], enough, limit))
        if model.classes < FEWEST or _settled(tests, majority, cfg.restarts - majority, limit):
            break
    by_loss, by_size = ([t[i] for t in tests] for i in range(_TESTS))
    losses = _mean([s.losses for s in searches])
    sizes = _mean([s.sizes.clamp_max(s.limit) for s in searches])
    findings = [
        _finding("loss at a small budget", searches, by_loss, cfg, losses),
        _finding("size of the change that reaches the class", searches, by_size, cfg, sizes),
    ]
    findings.sort(key=lambda finding: 1.0 if finding.p_value is None else finding.p_value)
    best = findings[0]
    suspect = best.classes[0]
    smallest = min(searches, key=lambda s: float(s.trigger_sizes[suspect]))
    findings.append(_recovered_trigger(model, data, smallest, suspect, run))
    if data.select_is_fit:
        skipped["held-out success"] = (
            "too few images to hold any out; the trigger was tried on those it was made with"
        )
    if best.p_value is None:
        skipped["outlier test"] = f"fewer than {FEWEST} classes can be compared; the numbers are reported"
        return ScanReport("undecided", tuple(findings), skipped=skipped, coverage=("triggers",))
    verdict: Verdict = "backdoor found" if best.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, tuple(findings), skipped=skipped, coverage=("triggers", "outlier test"))


def _parts(images: Images, cfg: NeuralCleanseConfig, run: Run) -> list[Images]:
    """Return disjoint parts of the images, one for each search; all of them once where there are too few."""
    if len(images) // cfg.restarts < cfg.images:
        return [images]
    order = torch.randperm(len(images), generator=run.generator("images of the searches"))
    return [images.subset(rows) for rows in order.tensor_split(cfg.restarts)]


def _tests(search: TriggerSearch, enough: int, level: float) -> tuple[Outliers, Outliers]:
    losses = torch.where(search.compared, search.losses.double().clamp_min(1e-12).log(), torch.inf)
    # Beyond those waited for, the order is not sure: a class given up early might have passed another.
    limit = losses.sort().values[enough - 1]
    losses = torch.where(losses <= limit, losses, torch.inf)
    return smallest_few(losses, level=level), smallest_few(search.sizes.log(), level=level)


def _settled(tests: Sequence[tuple[Outliers, Outliers]], majority: int, spare: int, limit: float) -> bool:
    """Return whether further searches cannot change the verdict."""
    for one in zip(*tests, strict=True):
        if _agreed(one, majority):
            return True
        if sum((t.p_value or 0.0) > limit for t in one) <= spare:
            return False
    return True


def _agreed(tests: Sequence[Outliers], majority: int) -> list[int]:
    """Return the classes that stand apart in at least so many searches."""
    votes = Counter(k for test in tests for k in test.positions)
    return [k for k, count in votes.items() if count >= majority]


def _finding(
    name: str,
    searches: Sequence[TriggerSearch],
    tests: Sequence[Outliers],
    cfg: NeuralCleanseConfig,
    values: Tensor,
) -> Finding:
    """Return the outcome in the middle as one finding; searches that were not made count as p = 1."""
    majority = cfg.restarts // 2 + 1
    ranked = sorted(tests, key=lambda t: t.p_value or 0.0)[:majority]
    common = sorted(_agreed(tests, majority), key=lambda k: float(values[k]))
    classes = tuple(common) or (int(values.argmin()),)
    middle, p_value = ranked[-1], None
    if middle.p_value is not None:
        factor = _TESTS * cfg.restarts / majority
        # Without a class in common the searches found another one each time.
        uncorrected = middle.p_value if common or factor * middle.p_value > cfg.level else 1.0
        p_value = min(1.0, factor * uncorrected) if len(ranked) == majority else 1.0
    unreached = max(int((~torch.isfinite(s.sizes)).sum()) for s in searches)
    return Finding(
        statistic=f"{name} ({cfg.form})",
        value=middle.statistic,
        direction="large: a few classes need far less than the others, in deviations of logarithms",
        threshold=math.nan if middle.critical is None else middle.critical,
        threshold_source=f"normal numbers, simulated; {_TESTS} tests share level {cfg.level:g}; "
        f"{majority} of {cfg.restarts} searches must agree, {len(tests)} were made; "
        f"{unreached} of {len(values)} classes given up at size {searches[0].limit:.3g}",
        p_value=p_value,
        classes=classes,
        per_class=tuple(values.tolist()),
    )


def _recovered_trigger(
    model: Classifier, data: CleanData, search: TriggerSearch, label: int, run: Run
) -> Finding:
    """Return how the recovered trigger does on images that it was not made with."""
    trigger, size = search.triggers[label], float(search.trigger_sizes[label])
    rate = success(model, trigger, data.select, run)
    return Finding(
        statistic=RECOVERED,
        value=rate.value if rate.total else 0.0,
        direction="large: the change, the same for all, sends held-out images to the class; clean networks "
        f"have such changes as well, with larger sizes than this one's {size:.3g}",
        threshold=math.inf,
        threshold_source="none: it is shown, not judged",
        classes=(trigger.label,),
        trigger=replace(trigger, success=rate.value if rate.total else None),
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.double() for v in values]).mean(0)
