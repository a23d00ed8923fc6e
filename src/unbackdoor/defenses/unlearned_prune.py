"""Pruning by the unlearned: rank channels on the network that forgot, cut them in the original.

What stands out after clean unlearning is what clean images did not hold in place. Rankings of other removers
are computed on the unlearned network, each layer's scores standardised, and the original network is pruned
in that order.

Paper:   Li et al., ICML 2023, arXiv 2305.14876, backdoor removal; the scores: ``change`` arXiv 2405.20291
         (TSBD), ``lipschitz`` Zheng et al., ECCV 2022 (CLP), ``activation`` arXiv 1805.12185 (fine-pruning),
         ``recovery`` the masks of RNP itself.
Needs:   clean images and labels.          Changes: batch-norm scales (or channels), set to zero.
Departs: no remover is copied whole: one ladder, one rule on held-out clean images and no fine-tuning for all
         scores, so that they can be compared. TSBD zeroes single weights, CLP cuts above a fixed threshold,
         fine-pruning looks at the last layer only. Where a network normalises before it convolves, a norm has
         no kernel of its own: ``lipschitz`` and ``change`` then see its scale and shift alone.
Cost:    unlearning, then at most 1/step forwards over the held-out images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from unbackdoor.engine.channels import (
    Scores,
    lipschitz_bounds,
    mean_activations,
    places,
    prunable_sites,
    standardised,
    weight_changes,
)
from unbackdoor.engine.mask_relearning import recover
from unbackdoor.engine.masks import Site, fold, keep_above, removed
from unbackdoor.engine.repeated_unlearning import UnlearningConfig, unlearn_with
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.registry import ONE_A_CLASS, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

Ranking = Literal["change", "lipschitz", "activation", "recovery"]


class UnlearnedPruneConfig(UnlearningConfig):
    """Options of pruning by the unlearned network."""

    score: Ranking = option(
        "change",
        "what makes a channel suspicious: its weights changed most, it amplifies most, it sleeps on clean "
        "images, or relearning switches it off",
        source="arXiv:2405.20291, which finds it best",
    )
    recover_lr: float = option(
        0.04, "step on the masks of recovery", source="reference code of RNP, 0.2 times 0.2", gt=0, le=10
    )
    recover_epochs: int = option(
        20, "passes of the relearning of recovery", source="reference code of RNP", ge=1, le=10_000
    )
    tolerance: float = option(0.02, "largest loss of held-out accuracy", source="as rnp", ge=0, le=1)
    step: float = option(
        0.001,
        "share of the channels cut at a time",
        source="this project: in the public log of RNP the useful cuts are 0.5 to 0.85 % of the channels",
        gt=0,
        le=1,
    )


@defense(
    "unlearned_prune",
    config=UnlearnedPruneConfig,
    paper="arXiv:2305.14876",
    needs={"images", "labels", ONE_A_CLASS},
    presets={name: {"score": name} for name in ("lipschitz", "activation", "recovery")},
    quick={"batch_size": 32, "step": 0.1, "max_steps": 40, "unlearn_lr": 0.1},
)
def purify(model: Classifier, data: CleanData, cfg: UnlearnedPruneConfig, *, run: Run) -> Purified:
    """Unlearn, score the channels, prune the original network in that order."""
    sites = prunable_sites(model)
    unlearned = unlearn_with(model, data.fit, cfg, run, augmentation=data.augmentation)
    scores = suspicion(model, unlearned.model, sites, data, cfg, run)
    out = pruned(model, sites, scores, data, cfg, run)
    return replace(out, evidence={"unlearning": unlearned.evidence(), **out.evidence})


def pruned(
    model: Classifier,
    sites: list[Site],
    scores: Scores,
    data: CleanData,
    cfg: UnlearnedPruneConfig,
    run: Run,
) -> Purified:
    """Cut the channels with the highest scores as far as the held-out accuracy allows."""
    order = places(scores)
    levels = [float(level) for level in np.arange(cfg.step, 1.0, cfg.step)]
    choice = harshest_within(
        model,
        levels,
        lambda level: fold(model, sites, keep_above(order, level)),
        data,
        run,
        tolerance=cfg.tolerance,
    )
    cut = keep_above(order, choice.level) if choice.level is not None else {}
    evidence: dict[str, Any] = {
        "choice": choice.evidence(),
        "channels": sum(site.shape[0] for site in sites),
        "cut": removed(cut),
        "cut_per_layer": {name: int((mask == 0).sum()) for name, mask in cut.items()},
    }
    return Purified(choice.model.copy(), evidence)


def suspicion(
    model: Classifier,
    unlearned: Classifier,
    sites: list[Site],
    data: CleanData,
    cfg: UnlearnedPruneConfig,
    run: Run,
) -> Scores:
    """Return the score (O,) of every channel by site, high for what is to be cut first."""
    if cfg.score == "change":
        return standardised(weight_changes(model, unlearned, sites))
    if cfg.score == "lipschitz":
        return standardised(lipschitz_bounds(unlearned, sites))
    if cfg.score == "activation":
        return standardised({n: -a for n, a in mean_activations(unlearned, sites, data.fit, run).items()})
    masks, _ = recover(
        unlearned,
        sites,
        data,
        run,
        lr=cfg.recover_lr,
        epochs=cfg.recover_epochs,
        batch_size=cfg.batch_size,
        momentum=cfg.momentum,
        batch_norm=cfg.batch_norm,
    )
    return {name: 1 - mask.cpu() for name, mask in masks.items()}
