"""Feature shift tuning: learn a new head, away from the old one, and let the features follow.

Paper:   Min et al., "Towards stable backdoor purification through feature shift tuning", NeurIPS 2023,
         arXiv 2310.01875.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: with few images there are more passes, so that there are 200 steps at least: 15 passes over 500
         images are 60 steps, which teach no head (``reference``: 15 passes). The held-out images are trained
         on as well, since nothing is selected. The new biases start at zero, the new weights at the norm of
         the old ones, which they have after the first step of the released code. A learning rate that
         destroys the network is lowered tenfold (engine/descent.py). ``many-classes`` has the weaker pull
         that the authors use there.
Cost:    epochs x (1 forward + 1 backward) over the clean set.
Blind:   a clean network pays as well, since its head is learned anew; with a few images a class it is ruined.
"""

from __future__ import annotations

from dataclasses import replace

from unbackdoor.engine.descent import at_bearable_rate
from unbackdoor.engine.feature_shift import HeadRelearning, Initial, Layers, relearn_head
from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class FSTConfig(Config):
    """Options of FST."""

    strength: float = option(0.2, "alpha, factor on the sum of W * W0", source="reference code", ge=0)
    epochs: int = option(15, "passes over the clean images", source="WhoDunnett's port", ge=1, le=10_000)
    min_steps: int = option(200, "steps at the least; with few images more passes", source="as d3", ge=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    lr: float = option(0.01, "peak learning rate of the cosine schedule", source="reference code", gt=0, le=1)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    weight_decay: float = option(0.0, "L2 penalty", source="WhoDunnett's port", ge=0, le=1)
    layers: Layers = option(
        "last",
        "the last layer only, or all fully connected ones behind the features",
        source="reference code",
    )
    initial: Initial = option(
        "random",
        "first weights: random, opposite (-W0), prototypes (mean features of the classes), least-squares",
        source="reference code",
    )


@defense(
    "fst",
    config=FSTConfig,
    paper="arXiv:2310.01875",
    needs={"images", "labels"},
    presets={"reference": {"min_steps": 1}, "many-classes": {"strength": 0.05}},
    quick={"epochs": 2, "min_steps": 120, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: FSTConfig, *, run: Run) -> Purified:
    """Learn the head anew and away from the old one, with all other weights."""
    settings = HeadRelearning(**cfg.model_dump())
    out, evidence = at_bearable_rate(
        model,
        data.all,
        cfg.lr,
        lambda lr: relearn_head(
            model, data.all, replace(settings, lr=lr), run, augmentation=data.augmentation
        ),
        run,
    )
    return Purified(out, evidence)
