"""Neural Cleanse: the class that a far smaller change sends all images to is the suspect.

A universal change towards every class is looked for in one batch, under a budget that rises for all of them
alike, from several starts and on images that are drawn anew (engine/trigger_search.py). Where the median
class has come to a stated share of its first loss, the losses of all classes are read, and their logarithms
are tested for a few that are too small. Of many classes, those that never came so far enter the test as
"larger than all others". Normal numbers are the null law, all other classes tell its centre and spread, and
there may be several targets. Clean networks have classes that need little; only much less than all others
counts.

Paper:   Wang et al., "Neural Cleanse", S&P 2019. Preset ``blend``: universal perturbations as in
         Moosavi-Dezfooli et al., CVPR 2017.
Needs:   clean images; labels are not looked at.
Departs: see engine/trigger_search.py; the paper compares the sizes of the changes by an index of 2, which
         the smallest of ten normal numbers meets in every third set. The preset ``blend``, which looks for
         a faint pattern over the whole image in the place of a patch, is this project's.
Cost:    see engine/trigger_search.py.
Blind:   all-to-all attacks, where no change sends all images to one class; triggers that differ from image
         to image; with fewer than six classes there is no verdict.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.class_residuals import residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.engine.statistics.several_outliers import smallest_few
from unbackdoor.engine.trigger_search import (
    Form,
    TriggerSearch,
    TriggerSearchConfig,
    search_triggers,
    success,
)
from unbackdoor.registry import Variant, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict, require_fit

RECOVERED = "success of the recovered trigger"
_FAINT = "Is there a class that an unusually faint pattern turns all images into?"
_LIFT = 0.03  # of a loss over that of the median class: how much less than nothing is needed does not matter


class NeuralCleanseConfig(TriggerSearchConfig):
    """Options of the scan."""

    form: Form = option(
        "patch",
        "patch: mask and pattern, the size is the sum of the mask; blend: something added to all pixels, the "
        "size is its length",
        source="Neural Cleanse: patch",
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
    quick={"steps": 20, "images": 8, "starts": 4},
)
def scan(model: Classifier, data: CleanData, cfg: NeuralCleanseConfig, *, run: Run) -> ScanReport:
    """Look for the smallest change towards every class, test the smallest, and try the suspect's trigger."""
    require_fit(model, data.fit)
    search = search_triggers(model, replace(data.fit, labels=None), cfg, run, form=cfg.form, enough=1)
    values = _compared(search)  # (K,)
    test = smallest_few(values, level=cfg.level)
    # With classes that are not compared, the spread of the others is not that of all.
    complete = bool(search.compared.all())
    p_values = residual_p_values(values) if complete and test.p_value is not None else None
    suspects = test.positions or (test.index,)
    left_out = int((~search.compared).sum())
    finding = Finding(
        statistic=f"loss where the median class has given in ({cfg.form})",
        value=test.statistic,
        direction="large: a few classes give in far earlier than the others, in deviations of logarithms",
        threshold=math.nan if test.critical is None else test.critical,
        threshold_source=f"normal numbers, simulated; read at size {search.anchored:.3g}; {left_out} of "
        f"{len(values)} classes were given up before",
        p_value=test.p_value,
        classes=suspects,
        per_class=tuple(values.where(search.compared, math.nan).tolist()),
        class_p_values=() if p_values is None else tuple(p_values.tolist()),
    )
    findings = (finding, _recovered_trigger(model, data, search, suspects[0], run))
    skipped = {}
    if data.select_is_fit:
        skipped["held-out success"] = (
            "too few images to hold any out; the trigger was tried on those it was made with"
        )
    if finding.p_value is None:
        skipped["outlier test"] = f"fewer than {FEWEST} classes can be compared; the numbers are reported"
        return ScanReport("undecided", findings, skipped=skipped, coverage=("triggers",))
    verdict: Verdict = "backdoor found" if finding.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, findings, skipped=skipped, coverage=("triggers", "outlier test"))


def _compared(search: TriggerSearch) -> Tensor:
    """Return the logarithm of each class's loss over the median one (K,); infinite where it is not known."""
    losses = search.losses.double()
    shares = losses / losses[search.compared].median().clamp_min(1e-12)
    return torch.where(search.compared, (shares + _LIFT).log(), torch.inf)


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
