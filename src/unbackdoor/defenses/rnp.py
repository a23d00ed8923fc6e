"""Reconstructive neuron pruning: forget the clean task, relearn it by switching channels off, prune those.

Unlearning clean images leaves the channels of the backdoor standing. Relearning the same images while
channels may only be scaled down switches off what stands in the way of the clean task; in the original
network exactly these channels are pruned.

Paper:   Li, Lyu, Ma, Koren, Lyu, Li & Jiang, ICML 2023, arXiv 2305.14876.
Needs:   clean images and labels.          Changes: batch-norm scales (or channels), set to zero.
Departs: the stop is checked every step, and a step that falls below the stop band is taken back (see
         engine/unlearning.py); clipping works, so does a limit to the fall of one step, and a channel is
         scored by the mean of its mask over the relearning, because many last masks are exactly 0 and leave
         no order (preset ``reference``: none of these three). The threshold is chosen on held-out clean
         images, where the public code sweeps it against the true attack. In all presets the rate of the
         ascent doubles where thirty steps forget nothing, and never falls (the code: at its epochs 10 and
         20). Preset ``stored-statistics`` normalises by the stored statistics in both stages, as the pruned
         network will. Which channels one run finds depends on the order of a few dozen steps; preset
         ``ensemble`` averages the scores of five runs, none of which is chosen by its success. Preset
         ``robust`` prunes while the held-out predictions stay as they were, whether right or wrong: accuracy
         on a hundred images is too coarse to show a loss of two points.
Cost:    runs x (unlearning steps + recover epochs x N / batch) x (1 forward + 1 backward), plus the sweep.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.inference import correctly_classified, labelled_by_model
from unbackdoor.engine.mask_relearning import recover
from unbackdoor.engine.masks import Site, fold, keep_above, removed
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.engine.unlearning import unlearn
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import ONE_A_CLASS, Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class RNPConfig(Config):
    """Options of RNP."""

    unlearn_lr: float = option(
        0.01, "step of the ascent", source="reference code, --unlearning_lr", gt=0, le=1
    )
    clip: float = option(20.0, "largest gradient norm of the ascent", source="reference code", gt=0)
    margin: float = option(
        0.1,
        "unlearn down to chance + margin",
        source="reference code, --clean_threshold 0.20 of 10 classes",
        gt=0,
        lt=1,
    )
    max_drop: float = option(0.15, "largest fall of accuracy in one step", source="this project", gt=0, le=1)
    max_steps: int = option(500, "steps after which unlearning is given up", source="this project", ge=1)
    recover_lr: float = option(
        0.04, "step on the masks", source="reference code, --recovering_lr 0.2 times --alpha 0.2", gt=0, le=10
    )
    recover_epochs: int = option(20, "passes of the relearning", source="reference code", ge=1, le=10_000)
    averaged: bool = option(
        True,
        "score a channel by the mean of its mask over the relearning, not by the last mask",
        source="this project: many last masks are exactly 0, which leaves no order among them",
    )
    momentum: float = option(0.9, "momentum of SGD in both stages", source="reference code", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty of the ascent", source="reference code", ge=0, le=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    batch_norm: Literal["batch", "frozen"] = option(
        "batch",
        "statistics that normalise in both stages: the batch's or the stored ones",
        source="reference code",
    )
    tolerance: float = option(
        0.02,
        "largest loss of held-out accuracy by pruning, or share of changed or lost predictions",
        source="BackdoorBenchmark's port, delta",
        ge=0,
        le=1,
    )
    criterion: Literal["accuracy", "agreement", "kept"] = option(
        "accuracy",
        "what must not fall on held-out images: accuracy, agreement with the model itself, or that on those "
        "that it knows",
        source="BackdoorBenchmark's port",
    )
    step: float = option(
        0.05, "distance of the thresholds that are tried", source="reference code", gt=0, le=1
    )
    runs: int = option(
        1,
        "unlearn and recover so often, with draws of their own, and average the scores of the channels",
        source="reference code, which does it once",
        ge=1,
        le=1000,
    )
    highest: float = option(0.95, "highest threshold that is tried", source="reference code", gt=0, le=1)


@defense(
    "rnp",
    config=RNPConfig,
    paper="arXiv:2305.14876",
    needs={"images", "labels", ONE_A_CLASS},
    presets={
        "reference": {"clip": 1e9, "max_drop": 1.0, "averaged": False},
        "stored-statistics": {"batch_norm": "frozen"},
        "ensemble": {"runs": 5},
        "robust": {"criterion": "agreement", "tolerance": 0.08},
    },
    quick={"recover_epochs": 3, "batch_size": 32, "step": 0.2, "max_steps": 40, "unlearn_lr": 0.1},
)
def purify(model: Classifier, data: CleanData, cfg: RNPConfig, *, run: Run) -> Purified:
    """Unlearn, recover channel masks, prune the original network."""
    sites = prunable_sites(model)
    scores, score_evidence = averaged_scores(model, sites, data, cfg, run)
    levels = [0.0, *(float(level) for level in np.arange(cfg.step, cfg.highest + 1e-9, cfg.step))]
    selection_data = data
    if cfg.criterion == "agreement":
        selection_data = replace(data, select=labelled_by_model(model, data.select, run))
    elif cfg.criterion == "kept":
        selection_data = replace(data, select=correctly_classified(model, data.select, run))
    choice = harshest_within(
        model,
        levels,
        lambda level: fold(model, sites, keep_above(scores, level)),
        selection_data,
        run,
        tolerance=cfg.tolerance,
    )
    cut = keep_above(scores, choice.level) if choice.level is not None else {}
    evidence: dict[str, Any] = {
        **score_evidence,
        "choice": choice.evidence(),
        "channels": sum(site.shape[0] for site in sites),
        "cut": removed(cut),
        "cut_per_layer": {name: int((mask == 0).sum()) for name, mask in cut.items()},
    }
    return Purified(choice.model.copy(), evidence)


def averaged_scores(
    model: Classifier, sites: list[Site], data: CleanData, cfg: RNPConfig, run: Run
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Unlearn and recover once or several times.

    A run whose unlearning fails is left out and reported. The first run draws as a single run would.

    Returns:
        The mean score of every channel in [0, 1] by site; and the evidence of the first run that succeeded,
        with how many did.

    Raises:
        MethodFailed: If every unlearning fails; the first failure.
    """
    run_scores: list[dict[str, Tensor]] = []
    run_evidence: list[dict[str, Any]] = []
    failures: list[MethodFailed] = []
    for r in range(cfg.runs):
        own = run if r == 0 else replace(run, seed=rng.derive_seed(run.seed, "rnp run", r))
        try:
            unlearned = unlearn(
                model,
                data.fit,
                own,
                lr=cfg.unlearn_lr,
                batch_size=cfg.batch_size,
                momentum=cfg.momentum,
                weight_decay=cfg.weight_decay,
                clip=cfg.clip,
                margin=cfg.margin,
                max_drop=cfg.max_drop,
                max_steps=cfg.max_steps,
                batch_norm=cfg.batch_norm,
                augmentation=data.augmentation,
            )
        except MethodFailed as error:
            failures.append(error)
            continue
        scores, recovered = recover(
            unlearned.model,
            sites,
            data,
            own,
            lr=cfg.recover_lr,
            epochs=cfg.recover_epochs,
            batch_size=cfg.batch_size,
            momentum=cfg.momentum,
            averaged=cfg.averaged,
            batch_norm=cfg.batch_norm,
        )
        run_scores.append(scores)
        run_evidence.append({"unlearning": unlearned.evidence(), "recovery": recovered})
    if not run_scores:
        raise failures[0]
    evidence = dict(run_evidence[0])
    if cfg.runs > 1:
        evidence["runs"] = {"averaged": len(run_scores), "failed": [str(error) for error in failures]}
    mean = {name: torch.stack([one[name] for one in run_scores]).mean(0) for name in run_scores[0]}
    return (mean if len(run_scores) > 1 else run_scores[0]), evidence
