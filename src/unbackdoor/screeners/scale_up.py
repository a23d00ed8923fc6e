"""SCALE-UP: multiply the pixels of an input; a trigger keeps its class where a clean image loses it.

The score is the share of amplified copies that get the class of the input itself, seen from the clean images
that the network gives the same class: some classes, such as that of white pictures, are stable by nature.

Paper:   Guo et al., "SCALE-UP", ICLR 2023, arXiv 2302.03251, the data-limited form.
Needs:   clean images: one part gives the usual scores of a class, scores are compared with those of the
         held-out part.
Departs: an input has a p-value over clean images instead of a limit of 0.5. A class with fewer than five
         clean images is seen from all of them.
Cost:    (inputs + clean images) x (factors + 1) forwards.
Blind:   faint triggers on bright pictures, where amplifying erases them; scores have few steps, so that
         many images share a p-value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, classes_of, conformal_p_values, judged
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit

_FEWEST = 5  # clean images of a class, below which their deviation says nothing


class ScaleUpConfig(ScreenerConfig):
    """Options of SCALE-UP."""

    factors: tuple[float, ...] = option(
        (3.0, 5.0, 7.0, 9.0, 11.0), "factors of the pixels", source="the paper"
    )


@screener("scale_up", config=ScaleUpConfig, paper="arXiv:2302.03251", needs={"images"})
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: ScaleUpConfig, *, run: Run) -> Screening:
    """Score inputs by how their class survives amplification."""
    require_fit(model, inputs)
    fit_shares, fit_class = _agreements(model, data.fit, cfg, run)
    scores, predicted = _agreements(model, inputs, cfg, run)
    clean_scores, clean_class = _agreements(model, data.select, cfg, run)
    centre, spread = _class_statistics(fit_shares, fit_class, model.classes)  # (K,), (K,)
    scores = (scores - centre[predicted]) / spread[predicted]
    clean_scores = (clean_scores - centre[clean_class]) / spread[clean_class]
    return judged(scores, conformal_p_values(scores, clean_scores), predicted, cfg.alpha, len(clean_scores))


def _agreements(model: Classifier, images: Images, cfg: ScaleUpConfig, run: Run) -> tuple[Tensor, Tensor]:
    """Return the share (N,) of amplified copies that keep the class, and the class (N,)."""
    own = classes_of(model, images, run)
    agreeing = torch.zeros(len(images))
    for factor in cfg.factors:

        def amplify(pixels: Tensor, factor: float = factor) -> Tensor:
            return (pixels.float() * factor).round().clamp(0, 255).to(torch.uint8)

        agreeing += classes_of(model, images, run, amplify) == own
    return agreeing / max(len(cfg.factors), 1), own


def _class_statistics(shares: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (K,) of the clean shares of each class."""
    # Shares have steps; a deviation below one step of five would make every difference large.
    least = 0.1
    centre = torch.full((count,), float(shares.mean()))
    spread = torch.full((count,), max(float(shares.std(unbiased=False)), least))
    for k in range(count):
        own = shares[classes == k]
        if len(own) >= _FEWEST:
            centre[k], spread[k] = own.mean(), own.std(unbiased=False).clamp_min(least)
    return centre, spread
