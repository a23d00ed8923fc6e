"""FT-SAM: fine-tune with sharpness-aware steps, which shrink the neurons that a backdoor rests on.

Every step takes the gradient at weights that were moved uphill, each in proportion to its own size, and
applies it to the weights as they were.

Paper:   Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization",
         ICCV 2023, arXiv 2304.11823; the adaptive step: Kwon et al., ICML 2021, arXiv 2102.11600.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the held-out images are trained on as well, since nothing is selected. A learning rate that destroys
         the network is lowered tenfold (engine/descent.py).
Cost:    epochs x (2 forward + 2 backward) over the clean set.
Blind:   what flat minima do not forget, such as the backdoor of a network that was trained this way itself.
         The smoothed labels, which are part of the method, shrink the margins of the repaired network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class FTSAMConfig(Config):
    """Options of FT-SAM."""

    rho: float = option(
        2.0,
        "length of the move, in weights relative to their own sizes",
        source="BackdoorBench, ft-sam",
        gt=0,
    )
    label_smoothing: float = option(
        0.1, "mass moved off the true label", source="BackdoorBench, ft-sam", ge=0, lt=1
    )
    epochs: int = option(100, "passes over the clean images", source="BackdoorBench, ft-sam", ge=1, le=10_000)
    lr: float = option(
        0.01, "peak learning rate of the cosine schedule", source="BackdoorBench, ft-sam", gt=0, le=1
    )
    batch_size: int = option(256, "images a step", source="BackdoorBench, ft-sam", ge=2)
    momentum: float = option(0.9, "momentum of SGD", source="BackdoorBench, ft-sam", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty", source="BackdoorBench, ft-sam", ge=0, le=1)


@defense(
    "ft_sam",
    config=FTSAMConfig,
    paper="arXiv:2304.11823",
    needs={"images", "labels"},
    quick={"epochs": 2, "lr": 0.001, "rho": 0.5},  # at 0.01 two epochs may undo a tiny transformer
)
def purify(model: Classifier, data: CleanData, cfg: FTSAMConfig, *, run: Run) -> Purified:
    """Fine-tune all weights with adaptive sharpness-aware steps."""

    def tuned(lr: float) -> Classifier:
        out = model.copy()

        def loss(batch: Batch) -> Tensor:
            logits = logits_of(out, batch.pixels, run)  # (B, K)
            return F.cross_entropy(logits, batch.labels, label_smoothing=cfg.label_smoothing)

        recipe = Recipe(
            epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, momentum=cfg.momentum,
            weight_decay=cfg.weight_decay, schedule="cosine",
        )  # fmt: skip
        descend(
            *(out, data.all, recipe, loss, run),
            augmentation=data.augmentation,
            displace=lambda weights: ascent(weights, cfg.rho),
        )
        return out

    return Purified(*at_bearable_rate(model, data.all, cfg.lr, tuned, run))


def ascent(weights: Sequence[nn.Parameter], rho: float) -> list[Tensor]:
    """Return for weights w with gradients g the moves rho w^2 g / ||(|w| g)||, the norm over all weights."""
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    scaled = [w.detach().abs() * g for w, g in zip(weights, gradients, strict=True)]
    length = torch.stack([s.norm() for s in scaled]).norm() + 1e-12
    return [rho * w.detach().abs() * s / length for w, s in zip(weights, scaled, strict=True)]
