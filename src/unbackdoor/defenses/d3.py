"""D3: learn the head anew, as far from the old one as its norm allows, and only what is not learned yet.

Like feature shift tuning, with the distance of the weights in the place of their inner product, and with a
cross-entropy that counts only above a small value, so that the pull has the last word.

Paper:   "Backdoor mitigation by distance-driven detoxification", ICCV 2025, arXiv 2411.09585.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: with few images there are more passes, so that there are 200 steps at least. The biases of the head
         start at zero, because one that favours the target class would survive (``reference``: they keep
         their value, and 100 passes are 100 passes). A learning rate that destroys the network is lowered
         tenfold (engine/descent.py). The held-out images are trained on as well, since nothing is selected.
         The first weights are random, as the authors advise; ``opposite`` starts at the farthest point,
         -W0, and ``prototypes`` at the mean features of the classes, for many classes with few images.
Cost:    epochs x (1 forward + 1 backward) over the clean set.
Blind:   a clean network pays as well, since its head is learned anew; with a few images a class it is ruined.
"""

from __future__ import annotations

from dataclasses import replace

from unbackdoor.engine.descent import BatchNorm, at_bearable_rate
from unbackdoor.engine.feature_shift import Bias, HeadRelearning, Initial, Layers, relearn_head
from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class D3Config(Config):
    """Options of D3."""

    strength: float = option(1.0, "factor on the distance of the weights", source="reference code", ge=0)
    clean_weight: float = option(0.5, "lambda, factor on the cross-entropy", source="reference code", gt=0)
    hinge: float = option(
        0.1, "epsilon, cross-entropy of an image that counts as none", source="reference code", ge=0
    )
    epochs: int = option(100, "passes over the clean images", source="reference code", ge=1, le=10_000)
    min_steps: int = option(
        200, "steps at the least; with few images more passes", source="this project", ge=1
    )
    batch_size: int = option(256, "images a step", source="reference code", ge=2)
    lr: float = option(0.01, "peak learning rate of the cosine schedule", source="reference code", gt=0, le=1)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    layers: Layers = option(
        "last",
        "the last layer only, or all fully connected ones behind the features",
        source="reference code",
    )
    initial: Initial = option(
        "random",
        "first weights: random, opposite (-W0), prototypes (mean features of the classes), least-squares",
        source="the paper",
    )
    bias: Bias = option(
        "zero", "whether the biases of the head start at zero or as they were", source="this project"
    )
    batch_norm: BatchNorm = option(
        "batch",
        "whether the batch's statistics normalise, or the stored ones, which keeps more accuracy and more of "
        "the backdoor",
        source="reference code",
    )


@defense(
    "d3",
    config=D3Config,
    paper="arXiv:2411.09585",
    needs={"images", "labels"},
    presets={
        "reference": {"min_steps": 1, "bias": "keep"},
        "opposite": {"initial": "opposite"},
        "prototypes": {"initial": "prototypes"},
    },
    quick={"epochs": 2, "min_steps": 150, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: D3Config, *, run: Run) -> Purified:
    """Learn the head anew, away from the old one, with all other weights."""
    settings = HeadRelearning(**cfg.model_dump(), term="distance")
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
