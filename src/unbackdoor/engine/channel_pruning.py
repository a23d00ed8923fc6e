"""Prune channels by a score: at a fixed threshold, or as far as the held-out images allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from unbackdoor.engine.channels import Scores, producers
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.masks import Site, fold, keep_above, norm_sites, removed, unit_sites
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.errors import InputError
from unbackdoor.registry import Config, option
from unbackdoor.types import Classifier, CleanData, Purified

# No more deviations above the mean can be had than (n - 1) / sqrt(n) among n channels: 22 among 512.
_HIGHEST = 10.0
_LOWEST = 0.5


class OutlierPruningConfig(Config):
    """Options of methods that cut the channels which stand out in their layer."""

    deviations: float = option(
        3.0,
        "a channel is cut that lies more than so many standard deviations off the mean of its layer",
        source="reference code of CLP, EP and BNP, u",
        gt=0,
        le=100,
    )
    choice: Literal["fixed", "held-out"] = option(
        "fixed",
        "fixed: cut at `deviations`; held-out: lower the threshold from 10 while the accuracy on held-out "
        "labelled images holds",
        source="the papers: fixed",
    )
    tolerance: float = option(
        0.02, "largest loss of held-out accuracy where these images choose", source="as rnp", ge=0, le=1
    )
    step: float = option(
        0.25, "distance of the thresholds that are tried there", source="this project", gt=0, le=10
    )


def filter_sites(model: Classifier) -> list[Site]:
    """Return one site for the output units of each layer besides the head, with the norm that reads them.

    With such a site at zero nothing of the unit is left: neither what it computes nor the shift of its norm.

    Raises:
        UnsupportedModel: If no layer could be the head; names the layers.
    """
    units = unit_sites(model, skip=(head_name(model),))
    norms = norm_sites(model, with_bias=True)
    owners = producers(model, norms)
    fed: dict[str, tuple[str, ...]] = {}
    for norm in norms:
        owner = owners[norm.name]
        if owner is not None:
            fed[owner] = fed.get(owner, ()) + norm.parameters
    return [Site(unit.name, unit.parameters + fed.get(unit.name, ()), unit.shape) for unit in units]


def deviations(scores: Mapping[str, Tensor]) -> Scores:
    """Return how many standard deviations (n - 1 in the divisor) each score lies above its layer's mean.

    A layer whose channels are all equal, or that has one channel, gives 0.
    """
    out: Scores = {}
    for name, score in scores.items():
        spread = float(score.std()) if len(score) > 1 else 0.0
        out[name] = (score - score.mean()) / spread if spread > 0 else score * 0
    return out


def prune_outliers(
    model: Classifier,
    sites: Sequence[Site],
    suspicion: Mapping[str, Tensor],
    cfg: OutlierPruningConfig,
    data: CleanData,
    run: Run,
) -> Purified:
    """Return the model without the channels whose suspicion stands out in their layer.

    Args:
        model: Not changed.
        sites: What may be cut.
        suspicion: (O,) by site, high for what is to be cut.
        cfg: How far.
        data: Its selection part decides where ``choice`` is held-out; else it is not looked at.
        run: Device, precision and progress.

    Raises:
        InputError: If held-out images are to choose, and there are none with labels.
    """
    scores = {name: -value for name, value in deviations(suspicion).items()}
    if cfg.choice == "fixed":
        cut = keep_above(scores, -cfg.deviations)
        return Purified(fold(model, sites, cut), cut_evidence(sites, cut))
    if not len(data.select) or data.select.labels is None:
        raise InputError(
            "there are no held-out images to choose the threshold with",
            expected="clean images with labels",
            got="none",
            remedy="Give labelled images, or leave the choice fixed",
        )
    levels = [-float(level) for level in np.arange(_HIGHEST, _LOWEST - 1e-9, -cfg.step)]
    return prune_by_scores(model, sites, scores, levels, data, run, tolerance=cfg.tolerance)


def prune_by_scores(
    model: Classifier,
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    levels: Sequence[float],
    data: CleanData,
    run: Run,
    *,
    tolerance: float,
) -> Purified:
    """Return the model without the channels whose score is at most the level that the held-out images allow.

    Args:
        model: Not changed.
        sites: What may be cut.
        scores: (O,) by site, low for what is to be cut first.
        levels: Mildest first.
        data: Its selection part decides.
        run: Device, precision and progress.
        tolerance: See :func:`unbackdoor.engine.selection.harshest_within`.
    """
    choice = harshest_within(
        model,
        levels,
        lambda level: fold(model, sites, keep_above(scores, level)),
        data,
        run,
        tolerance=tolerance,
    )
    cut = keep_above(scores, choice.level) if choice.level is not None else {}
    return Purified(choice.model.copy(), {"choice": choice.evidence(), **cut_evidence(sites, cut)})


def cut_evidence(sites: Sequence[Site], cut: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many channels there are and how many of each layer are cut, JSON-ready."""
    return {
        "channels": sum(site.shape[0] for site in sites),
        "cut": removed(cut),
        "cut_per_layer": {name: int((mask == 0).sum()) for name, mask in cut.items()},
    }
