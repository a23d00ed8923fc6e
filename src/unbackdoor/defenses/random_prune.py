"""Random pruning: cut channels at random, as far as the held-out accuracy allows.

A control: a pruning method that does not beat it has found nothing.

Paper:   none.
Needs:   clean images and labels.          Changes: channels, set to zero.
Departs: -
Cost:    at most 1/step forwards over the held-out images.
"""

from __future__ import annotations

import numpy as np
import torch

from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.masks import fold, keep_above, removed
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class RandomPruneConfig(Config):
    """Options of random pruning."""

    tolerance: float = option(0.02, "largest loss of held-out accuracy", source="as rnp", ge=0, le=1)
    step: float = option(0.005, "share of the channels cut at a time", source="this project", gt=0, le=1)


@defense(
    "random_prune",
    config=RandomPruneConfig,
    paper="a control",
    needs={"images", "labels"},
    traits={"control"},
    quick={"step": 0.1},
)
def purify(model: Classifier, data: CleanData, cfg: RandomPruneConfig, *, run: Run) -> Purified:
    """Cut ever more channels in a random order while the held-out accuracy holds."""
    sites = prunable_sites(model)
    draws = run.generator("order")
    # A channel is cut at level t if its uniform number is at most t: the same order at every level.
    order = {site.name: torch.rand(site.shape, generator=draws) for site in sites}
    levels = [float(level) for level in np.arange(cfg.step, 1.0, cfg.step)]
    choice = harshest_within(
        model,
        levels,
        lambda level: fold(model, sites, keep_above(order, level)),
        data,
        run,
        tolerance=cfg.tolerance,
    )
    cut = removed(keep_above(order, choice.level)) if choice.level is not None else 0
    total = sum(site.shape[0] for site in sites)
    return Purified(choice.model, {"channels": total, "cut": cut, "choice": choice.evidence()})
