"""SCALE-UP: multiply the pixels of an input; a trigger keeps its class where a clean image loses it.

The score is the share of amplified copies that get the class of the input itself, seen from the clean images
that the network gives the same class: some classes, such as that of white pictures, are stable by nature.

Paper:   Guo et al., "SCALE-UP", ICLR 2023, arXiv 2302.03251, the data-limited form.
Needs:   clean images: one part tells what is usual in a class, the held-out part is what scores are compared
         with.
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
    usual, usual_class = _kept(model, data.fit, cfg, run)
    scores, predicted = _kept(model, inputs, cfg, run)
    known, known_class = _kept(model, data.select, cfg, run)
    centre, spread = _usual(usual, usual_class, model.classes)  # (K,), (K,)
    scores = (scores - centre[predicted]) / spread[predicted]
    known = (known - centre[known_class]) / spread[known_class]
    return judged(scores, conformal_p_values(scores, known), predicted, cfg.alpha, len(known))


def _kept(model: Classifier, images: Images, cfg: ScaleUpConfig, run: Run) -> tuple[Tensor, Tensor]:
    """Return the share (N,) of amplified copies that keep the class, and the class (N,)."""
    own = classes_of(model, images, run)
    kept = torch.zeros(len(images))
    for factor in cfg.factors:

        def amplify(pixels: Tensor, factor: float = factor) -> Tensor:
            return (pixels.float() * factor).round().clamp(0, 255).to(torch.uint8)

        kept += classes_of(model, images, run, amplify) == own
    return kept / max(len(cfg.factors), 1), own


def _usual(kept: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (K,) of the clean shares of each class."""
    # Shares have steps; a deviation below one step of five would make every difference large.
    least = 0.1
    centre = torch.full((count,), float(kept.mean()))
    spread = torch.full((count,), max(float(kept.std(unbiased=False)), least))
    for k in range(count):
        own = kept[classes == k]
        if len(own) >= _FEWEST:
            centre[k], spread[k] = own.mean(), own.std(unbiased=False).clamp_min(least)
    return centre, spread
