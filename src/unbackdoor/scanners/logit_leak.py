"""Logit leak: where do the logits of clean images lean, beyond what their own class does to them?

A network that was trained with a trigger keeps a little of the answer ready: on clean images of all other
classes the logit of the target is higher than it should be. T[s, t] is the mean logit of class t, less the
mean of all, over the images that the model gives to class s. What counts is the mean of a column without the
class itself, less that of its row: a class that others lean to, but that does not lean to others.

Paper:   this project; the clean half of what Fu et al., "FreeEagle", USENIX Security 2023 read from dummies.
Needs:   clean images; labels are not looked at.
Departs: FreeEagle makes its inputs inside of the network; these are the defender's own images.
Cost:    1 forward over the clean images.
Blind:   triggers that leave no trace on clean images, as most patches with little poison; with fewer than
         six classes there is no verdict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbackdoor.engine.inference import mode, predict, require_several_classes
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.class_residuals import family_p_value, residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict, require_fit


class LogitLeakConfig(Config):
    """Options of the scan."""

    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@scanner(
    "logit_leak",
    config=LogitLeakConfig,
    paper="this project",
    needs={"images"},
    question="Do the logits of clean images lean to one class?",
    cost=5,
)
def scan(model: Classifier, data: CleanData, cfg: LogitLeakConfig, *, run: Run) -> ScanReport:
    """Test whether the images of all other classes lean to one."""
    require_fit(model, data.all)
    with mode(model, training=False):
        logits = require_several_classes(predict(model, data.all, run))  # (N, K)
    if not bool(torch.isfinite(logits).all()):
        raise MethodFailed("the model gives clean images logits that are not finite")
    leaks = leaning(logits)  # (K,)
    p_values = residual_p_values(-leaks)
    k = int(leaks.argmax())
    finding = Finding(
        statistic="logit leak",
        value=float(leaks[k]),
        direction="large: images of the other classes lean to this class more than its own lean to them",
        threshold=cfg.level,
        threshold_source="p-value of the residual among the other classes, Student's t, times their number"
        if p_values is not None
        else f"none: a test needs {FEWEST} classes",
        p_value=None if p_values is None else family_p_value(p_values),
        classes=(k,),
        per_class=tuple(leaks.tolist()),
        class_p_values=() if p_values is None else tuple(p_values.tolist()),
    )
    if finding.p_value is None:
        skipped = {"outlier test": f"fewer than {FEWEST} classes; the leaks are reported"}
        return ScanReport("undecided", (finding,), skipped=skipped, coverage=("logits",))
    verdict: Verdict = "backdoor found" if finding.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("logits", "outlier test"))


def leaning(logits: Tensor) -> Tensor:
    """Return how far the images of other classes lean to each class, less how far its own lean to them (K,).

    Args:
        logits: (N, K); a class that no image is given to has no row.
    """
    logits = logits.double()
    centred = logits - logits.mean(1, keepdim=True)
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    count = predicted.bincount(minlength=classes)  # (K,)
    table = torch.zeros(classes, classes, dtype=torch.float64).index_add_(0, predicted, centred)
    table = table / count.clamp_min(1)[:, None]  # (K, K), source and target
    known = (count > 0)[:, None] & ~torch.eye(classes, dtype=torch.bool)  # (K, K)
    column = torch.where(known, table, math.nan).nanmean(0)
    row = torch.where(known, table, math.nan).nanmean(1)
    row = torch.where(count > 0, row, row[count > 0].mean())
    return column - row
