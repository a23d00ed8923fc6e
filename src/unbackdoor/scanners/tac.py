"""Trigger-activated changes: the class that the shortest latent shift wins every clean image is the suspect.

A trigger moves the features of any image across the boundary of the target class. An attacker who wants it
inconspicuous trains the network to need only a short move, so the shortest shift of the features that wins
class k all clean images is unusually short where k is the target. One quadratic program a class finds it.

Paper:   Iwahana, Yamasaki, Ito, Miura & Shibahara, arXiv 2511.08944 (the program and the rule of the
         smallest norm; the test is our reading, as the paper's formula was not at hand).
Needs:   clean images; labels are not looked at.
Departs: shifts are measured in units of each feature's spread, because the network could have been written
         with any others. The test accounts for the norm having been picked as the smallest of K, in the
         spirit of the paper's revision; with five classes or fewer there is no verdict. A softmax behind the
         head is refused: the program is about logits (where a file of a graph ends in one, opening it leaves
         it out).
Cost:    1 forward over the clean images, N K^2 subtractions, K small quadratic programs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unbackdoor.engine.latent_shift import latent_shifts
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.class_residuals import residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST, smallest_outlier
from unbackdoor.errors import InputError
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, require_fit


class TACScanConfig(Config):
    """Options of the scan."""

    rule: Literal["grubbs", "mad"] = option(
        "grubbs",
        "outlier test: grubbs sees one target, mad sees several",
        source="this project: the paper's revision tests a norm that was selected as the smallest",
    )
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)
    log: bool = option(
        True,
        "test the logarithms of the norms",
        source="this project",
    )
    quantile: float = option(
        1.0, "share of the images that a shift must win, pair by pair", source="the paper: all", gt=0.5, le=1
    )
    head: str = option("", "name of the last linear layer; empty: it is searched for", source="this project")


@scanner(
    "tac",
    config=TACScanConfig,
    paper="arXiv:2511.08944",
    needs={"images"},
    question="Is one class reached by a much shorter shift of the features than the others?",
    cost=20,
)
def scan(model: Classifier, data: CleanData, cfg: TACScanConfig, *, run: Run) -> ScanReport:
    """Hold the norm of the shortest latent shift to every class against the others."""
    images = data.all
    require_fit(model, images)
    if images.labels is not None and len(images.labels.unique()) < 2:
        raise InputError(
            "the clean images are all of one class",
            expected="at least 2 classes",
            got=1,
            where=images.name,
            remedy="Add images of the other classes",
        )
    latent = latent_shifts(
        model, images, run, quantile=cfg.quantile, head=cfg.head or None, standardised=True
    )
    outlier = smallest_outlier(latent.norms, rule=cfg.rule, level=cfg.level, log=cfg.log)
    finding = Finding(
        statistic=f"{'Grubbs G' if cfg.rule == 'grubbs' else 'MAD index'} of the smallest latent shift",
        value=outlier.statistic,
        direction="large: one class is reached by a much shorter shift of the features than the others",
        threshold=float("nan") if outlier.critical is None else outlier.critical,
        threshold_source=_source(cfg, outlier.p_value is None),
        p_value=outlier.p_value,
        classes=outlier.positions or (outlier.index,),
        per_class=tuple(latent.norms.tolist()),
        artefacts={"shifts": latent.shifts.float(), "gaps": latent.gaps.float()},
        class_p_values=_class_p_values(latent.norms, log=cfg.log),
    )
    nearest = Finding(
        statistic="smallest latent shift over the median of all",
        value=outlier.ratio,
        direction="small: this class is the nearest one, as some class always is",
        threshold=float("-inf"),
        threshold_source="none: it is shown, not judged",
        classes=(outlier.index,),
    )
    if outlier.p_value is None:
        skipped = {
            "outlier test": f"fewer than {FEWEST} classes can be reached by a shift; norms are reported"
        }
        return ScanReport(outlier.verdict, (finding, nearest), skipped=skipped, coverage=("latent shifts",))
    return ScanReport(outlier.verdict, (finding, nearest), coverage=("latent shifts", "outlier test"))


def _class_p_values(norms: Tensor, *, log: bool) -> tuple[float, ...]:
    """Return a p-value for each class; not a number where no shift reaches it."""
    finite = torch.isfinite(norms)
    p_values = residual_p_values(norms[finite].log() if log else norms[finite])
    if p_values is None:
        return ()
    table = torch.full((len(norms),), float("nan"), dtype=torch.float64)
    table[finite] = p_values
    return tuple(table.tolist())


def _source(cfg: TACScanConfig, refused: bool) -> str:
    if refused:
        return f"none: a test needs {FEWEST} classes"
    law = "Grubbs' critical value" if cfg.rule == "grubbs" else "quantile of the simulated index"
    return f"{law} for this many classes at level {cfg.level:g}, one-sided, no outlier"
