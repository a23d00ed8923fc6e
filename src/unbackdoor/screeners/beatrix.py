"""Beatrix: how features go together; a trigger brings together what clean images of its class never do.

For every class, the products of features of clean images (Gram matrices of their powers) have a usual range.
The score is how far an input lies outside of the ranges of the class that the network gives it.

Paper:   Ma, Wang, Sun, Xu, Wen & Feng, "The Beatrix resurrections: robust backdoor detection via Gram
         matrices", NDSS 2023, arXiv 2209.11715.
Needs:   clean images: one part gives the ranges, scores are compared with the held-out part. The class of a
         clean image is the network's own.
Departs: the features are the inputs of the head, averaged over places, at most ``width`` of them. Ranges are
         the median and multiples of the median absolute deviation; a class with few clean images has those of
         all. The paper's test of whole classes is left out; an input has a p-value over clean images.
Cost:    1 forward; orders x width^2 numbers for each image, a batch at a time.
Blind:   networks that give triggered images the features of the target class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, conformal_p_values, features, judged
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit

_FEWEST = 5  # clean images of a class, below which their range says nothing
_BATCH = 256  # images whose products are in memory at a time


class BeatrixConfig(ScreenerConfig):
    """Options of the Gram matrices."""

    orders: int = option(
        4, "powers of the features, from 1 on", source="this project; the paper: 8", ge=1, le=16
    )
    width: int = option(64, "features at most; those that vary most", source="this project", ge=1, le=1024)
    deviations: float = option(
        10.0, "half a range in median absolute deviations", source="the paper", gt=0, le=1000
    )


@screener("beatrix", config=BeatrixConfig, paper="arXiv:2209.11715", needs={"images"})
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: BeatrixConfig, *, run: Run) -> Screening:
    """Score inputs by how far products of their features lie outside of what their class has."""
    require_fit(model, inputs)
    latent, logits = features(model, inputs, run)
    fit, fit_logits = features(model, data.fit, run)
    select, select_logits = features(model, data.select, run)
    for values in (latent, logits, fit, fit_logits, select, select_logits):
        if not bool(torch.isfinite(values).all()):
            raise MethodFailed("the model gives images features or logits that are not finite")
    chosen = fit.var(0, unbiased=False).argsort(descending=True, stable=True)[: cfg.width]
    unit = fit[:, chosen].abs().mean().clamp_min(1e-12)  # powers of large numbers would overflow
    latent, fit, select = ((x[:, chosen] / unit).double() for x in (latent, fit, select))
    predicted, fit_class, select_class = (x.argmax(1) for x in (logits, fit_logits, select_logits))
    scores, clean_scores = torch.zeros(len(latent)), torch.zeros(len(select))
    for k in torch.cat([predicted, select_class]).unique().tolist():
        own = fit[fit_class == k] if int((fit_class == k).sum()) >= _FEWEST else fit
        middle, spread = _range(own, cfg)  # (orders, P), (orders, P)
        for values, classes, out in ((latent, predicted, scores), (select, select_class, clean_scores)):
            rows = (classes == k).nonzero().flatten()
            out[rows] = _deviation(values[rows], middle, spread, cfg)
    return judged(
        scores,
        conformal_p_values(scores, clean_scores),
        predicted,
        cfg.alpha,
        len(clean_scores),
        features=len(chosen),
    )


def gram(values: Tensor, order: int) -> Tensor:
    """Return products (N, P) of the powers of features (N, D), each pair once, as roots of the order."""
    powers = values.pow(order)
    products = powers[:, :, None] * powers[:, None]  # (N, D, D)
    rows, columns = torch.triu_indices(values.shape[1], values.shape[1]).unbind()
    pairs = products[:, rows, columns]
    return pairs.sign() * pairs.abs().pow(1 / order)


def _range(values: Tensor, cfg: BeatrixConfig) -> tuple[Tensor, Tensor]:
    """Return the middle and half the width of the usual range of every product, both (orders, P)."""
    middles, widths = [], []
    for order in range(1, cfg.orders + 1):
        products = torch.cat([gram(part, order) for part in values.split(_BATCH)])
        middle = products.median(0).values
        middles.append(middle)
        widths.append((products - middle).abs().median(0).values * cfg.deviations)
    return torch.stack(middles), torch.stack(widths)


def _deviation(values: Tensor, middle: Tensor, width: Tensor, cfg: BeatrixConfig) -> Tensor:
    """Return how far the products of each image (N, D) lie outside of the ranges on average, in widths."""
    out = []
    for part in values.split(_BATCH):
        total = torch.zeros(len(part), dtype=torch.float64)
        for order in range(1, cfg.orders + 1):
            beyond = (gram(part, order) - middle[order - 1]).abs() - width[order - 1]
            # A product that is the same in all clean images has no width of its own.
            total += (beyond.clamp_min(0) / (width[order - 1] + width[order - 1].mean() + 1e-9)).mean(1)
        out.append(total / cfg.orders)
    return torch.cat(out).float() if out else torch.zeros(0)
