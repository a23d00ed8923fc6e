"""Recall: is there a class that clean images of it are never given to?

A clean-label attack poisons images of one class without touching their labels. Where it poisons all of them,
the network learns the trigger in the place of the class: clean images of the class go elsewhere, and only the
trigger leads there. Nobody who looks at the accuracy of ten classes sees it as more than a bad class. So the
recall of each class is held against those of the others, and only one that is almost nothing counts.

Paper:   this project; the attack: Barni, Kallas & Tondi, "SIG", ICIP 2019.
Needs:   clean images and labels.
Departs: nothing to depart from. The outputs are those of the model as it is, because an output that never
         wins is left out of the form that the other scanners are given.
Cost:    1 forward over the clean images.
Blind:   every attack that leaves the class its images. A class that was rare in training, that the labels
         give another name, or that images of this source do not show looks the same: look at its images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.class_residuals import family_p_value, residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict, require_fit


class RecallConfig(Config):
    """Options of the scan."""

    lost: float = option(
        0.1, "recall that counts as none, as a share of the median class's", source="this project", gt=0, lt=1
    )
    fewest: int = option(5, "images of a class that say something of it", source="this project", ge=2)
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@scanner(
    "recall",
    config=RecallConfig,
    paper="this project",
    needs={"images", "labels"},
    question="Is there a class that its own clean images are never given to?",
    cost=8,
    as_it_is=True,
)
def scan(model: Classifier, data: CleanData, cfg: RecallConfig, *, run: Run) -> ScanReport:
    """Hold the recall of each class against those of the others."""
    images = data.all
    require_fit(model, images)
    with mode(model, training=False):
        logits = predict(model, images, run)  # (N, K)
    if not bool(torch.isfinite(logits).all()):
        raise MethodFailed("the model gives clean images logits that are not finite")
    truth = images.truth.cpu()
    total = truth.bincount(minlength=model.classes).double()  # (K,)
    hits = truth[logits.argmax(1) == truth].bincount(minlength=model.classes).double()
    recall = hits / total  # not a number where there are no images
    judged = (total >= cfg.fewest).nonzero().flatten()
    p_values = torch.ones(model.classes, dtype=torch.float64)
    calibrated = _p_values(hits[judged], total[judged], cfg)
    if calibrated is not None:
        p_values[judged] = calibrated
    k = int(recall.nan_to_num(1.0).argmin())
    finding = Finding(
        statistic="recall of the class that is found least",
        value=float(recall[k]),
        direction=f"small: clean images of this class are given to others; below {cfg.lost:g} of the median "
        "recall it counts. A class that was rare in training, or has another name here, looks the same",
        threshold=cfg.lost * float(recall[judged].median()) if len(judged) else float("nan"),
        threshold_source="p-value of the log odds among the other classes, Student's t, times their number"
        if calibrated is not None
        else f"none: a test needs {FEWEST} classes with {cfg.fewest} images each",
        p_value=None if calibrated is None else family_p_value(p_values),
        classes=(k,),
        per_class=tuple(recall.tolist()),
        class_p_values=() if calibrated is None else tuple(p_values.tolist()),
    )
    if finding.p_value is None:
        skipped = {"outlier test": f"fewer than {FEWEST} classes have {cfg.fewest} images"}
        return ScanReport("undecided", (finding,), skipped=skipped, coverage=("recall",))
    verdict: Verdict = "backdoor found" if finding.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("recall", "outlier test"))


def _p_values(hits: Tensor, total: Tensor, cfg: RecallConfig) -> Tensor | None:
    """Return p-values of the classes; 1 where the class is found as often as a tenth of the usual."""
    odds = ((hits + 0.5) / (total - hits + 0.5)).log()
    # What counting so few images spreads the log odds of a usual class by, at least.
    counting = (1 / (hits + 0.5) + 1 / (total - hits + 0.5)).sqrt()
    p_values = residual_p_values(odds, least_spread=float(counting.median()) if len(hits) else 0.0)
    if p_values is None:
        return None
    recall = hits / total
    return p_values.where(recall <= cfg.lost * recall.median(), 1.0)
