"""Activation clustering: a poisoned class falls into two groups, and the smaller one is the poisoned images.

For every label, the features of its images are reduced to their main directions and cut into two groups.
Every class can be cut in two; in a poisoned one the cut is clear. The mean silhouette measures how
clear; a comparison with the other classes (engine/statistics/several_outliers.py) decides whether it is too
clear. An image's score is how much closer it lies to the smaller group; its p-value is that of the same score
among clean images.

Paper:   Chen et al., "Detecting backdoor attacks by activation clustering", SafeAI 2019, arXiv 1811.03728.
Needs:   the labels that the images were, or are to be, trained with. Clean labelled images make the p-values
         exact; without them they rest on the robust deviations of the class and a normal law.
Departs: principal instead of independent components; two-means in torch; no fixed limit for the silhouette
         or the size. With six classes or more, images of a class whose cut is not too clear are not called
         suspicious.
Cost:    1 forward over all images, one decomposition and a few two-means a class.
Blind:   low poison rates, where the smaller group is not the poisoned one; all-to-all attacks, where all
         classes are cut alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import (
    ScreenerConfig,
    conformal_p_values,
    features,
    judged,
    normal_p_values,
    standardised,
)
from unbackdoor.engine.statistics.several_outliers import smallest_few
from unbackdoor.registry import INPUT_LABELS, option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening

_ROUNDS = 50  # of two-means; it settles in far fewer
_STARTS = 5
_SAMPLED = 2000  # points of a class that the silhouette is taken over; distances grow with the square


class ClusteringConfig(ScreenerConfig):
    """Options of the clustering."""

    components: int = option(10, "main directions that are kept", source="the paper: 10", ge=1)
    fewest: int = option(10, "images of a class below which it is not looked at", source="this project", ge=4)
    level: float = option(0.05, "p-value up to which a cut is too clear", source="convention", gt=0, lt=1)


@screener("activation_clustering", config=ClusteringConfig, paper="arXiv:1811.03728", needs={INPUT_LABELS})
def screen(
    model: Classifier, data: CleanData, inputs: Images, cfg: ClusteringConfig, *, run: Run
) -> Screening:
    """Cut every class of a labelled set in two and score its images by the group they lie in."""
    latent, logits = features(model, inputs, run)
    clean = data.all if len(data) and data.fit.labels is not None else None
    clean_latent = features(model, clean, run)[0] if clean is not None else torch.zeros(0, latent.shape[1])
    scores, clean_scores = torch.zeros(len(inputs)), []
    silhouettes, shares = torch.full((model.classes,), torch.nan), torch.full((model.classes,), torch.nan)
    for k in range(model.classes):
        rows = (inputs.truth == k).nonzero().flatten()
        if len(rows) < cfg.fewest:
            continue
        centre, directions = _main(latent[rows].double(), cfg.components)
        points = (latent[rows].double() - centre) @ directions  # (n, d)
        centres, small = two_means(points, run.generator("two groups", k))
        some = torch.randperm(len(rows), generator=run.generator("silhouette", k))[:_SAMPLED]
        silhouettes[k], shares[k] = silhouette(points[some], small[some]), float(small.float().mean())
        others = clean_latent[clean.truth == k].double() if clean is not None else latent[:0].double()
        scores[rows], compared = standardised(
            _closer(points, centres), _closer((others - centre) @ directions, centres)
        )
        clean_scores.append(compared)
    pooled = torch.cat(clean_scores) if clean_scores else torch.zeros(0)
    p_values = conformal_p_values(scores, pooled) if len(pooled) else normal_p_values(scores)
    seen = torch.isfinite(silhouettes).nonzero().flatten()
    test = smallest_few(-silhouettes[seen], level=cfg.level) if len(seen) else None
    clear = [int(seen[i]) for i in test.positions] if test is not None else []
    screening = judged(
        scores,
        p_values,
        logits.argmax(1),
        cfg.alpha,
        len(pooled),
        suspicious_classes=clear,
        p_value_of_the_classes=test.p_value if test is not None else None,
        silhouettes={str(int(k)): float(silhouettes[k]) for k in seen},
        smaller_group={str(int(k)): float(shares[k]) for k in seen},
    )
    if test is None or test.p_value is None:
        return screening
    # The classes could be compared, so images of a class that is cut like the others are not suspicious.
    suspicious = screening.suspicious & torch.isin(inputs.truth.cpu(), torch.tensor(clear, dtype=torch.int64))
    return replace(
        screening, suspicious=suspicious, evidence={**screening.evidence, "suspicious": int(suspicious.sum())}
    )


def _main(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the main directions (D, d)."""
    centre = points.mean(0)
    directions = torch.linalg.svd(points - centre, full_matrices=False).Vh[:count]
    return centre, directions.T


def _closer(points: Tensor, centres: Tensor) -> Tensor:
    """Return by how much each point (n, d) is closer to the second centre than to the first, in [-1, 1]."""
    near = torch.cdist(points, centres)  # (n, 2)
    return (near[:, 0] - near[:, 1]) / near.amax(1).clamp_min(1e-12)


def two_means(points: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two centres (2, d), that of the larger group first, and who is in the smaller group (n,).

    The best of several starts; each takes two points, the second more likely the farther it is.
    """
    best, least = None, float("inf")
    for _ in range(_STARTS):
        first = points[int(torch.randint(len(points), (1,), generator=draws))]
        weights = (points - first).square().sum(1) + 1e-12
        centres = torch.stack([first, points[int(torch.multinomial(weights, 1, generator=draws))]])
        for _ in range(_ROUNDS):
            second = torch.cdist(points, centres).argmin(1) == 1
            if bool(second.all()) or not bool(second.any()):
                break
            moved = torch.stack([points[~second].mean(0), points[second].mean(0)])
            if torch.equal(moved, centres):
                break
            centres = moved
        spread = float(torch.cdist(points, centres).amin(1).square().sum())
        if spread < least:
            best, least = centres, spread
    assert best is not None
    second = torch.cdist(points, best).argmin(1) == 1
    return (best.flip(0), ~second) if int(second.sum()) * 2 > len(points) else (best, second)


def silhouette(points: Tensor, small: Tensor) -> float:
    """Return the mean silhouette of a cut in two, in [-1, 1]; 0 where one side is a single point or none."""
    sizes = torch.stack([(~small).sum(), small.sum()]).double()
    if float(sizes.min()) < 2:
        return 0.0
    distances = torch.cdist(points, points)  # (n, n)
    sums = torch.stack([distances[:, ~small].sum(1), distances[:, small].sum(1)], 1)  # (n, 2)
    side = small.long()
    own = sums.gather(1, side[:, None])[:, 0] / (sizes[side] - 1)
    other = sums.gather(1, 1 - side[:, None])[:, 0] / sizes[1 - side]
    return float(((other - own) / torch.maximum(own, other).clamp_min(1e-12)).mean())
