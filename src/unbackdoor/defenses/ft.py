"""Fine-tuning: train all weights on the clean images and hope that the backdoor is forgotten.

Paper:   the baseline of Liu, Dolan-Gavitt & Garg, RAID 2018, arXiv 1805.12185; settings of BackdoorBench.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the held-out images are trained on as well, since nothing is selected. A learning rate that destroys
         the network, as this one does with many transformers, is lowered tenfold (engine/fine_tuning.py).
Cost:    epochs x (1 forward + 1 backward) over the clean set.
"""

from __future__ import annotations

from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class FTConfig(Config):
    """Options of fine-tuning."""

    epochs: int = option(100, "passes over the clean images", source="BackdoorBench, ft", ge=1, le=10_000)
    lr: float = option(
        0.01, "peak learning rate of the cosine schedule", source="BackdoorBench, ft", gt=0, le=1
    )
    batch_size: int = option(256, "images a step", source="BackdoorBench, ft", ge=2)
    momentum: float = option(0.9, "momentum of SGD", source="BackdoorBench, ft", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty", source="BackdoorBench, ft", ge=0, le=1)


@defense(
    "ft",
    config=FTConfig,
    paper="arXiv:1805.12185",
    needs={"images", "labels"},
    traits={"control"},
    quick={"epochs": 2, "lr": 0.001},  # at 0.01 two epochs may undo a tiny transformer
)
def purify(model: Classifier, data: CleanData, cfg: FTConfig, *, run: Run) -> Purified:
    """Fine-tune all weights by SGD with a cosine schedule."""
    recipe = Recipe(**cfg.model_dump(), schedule="cosine")
    tuned = fine_tune(model, data.all, recipe, run, augmentation=data.augmentation)
    return Purified(tuned.model, {"lr": tuned.lr, "losses": list(tuned.losses)})
