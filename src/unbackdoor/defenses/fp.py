"""Fine-pruning: cut the features that sleep on clean images, then fine-tune what is left.

Paper:   Liu, Dolan-Gavitt & Garg, "Fine-Pruning", RAID 2018, arXiv 1805.12185.
Needs:   clean images and labels.          Changes: columns of the last linear layer, then all weights.
Departs: how far to prune is decided on held-out clean images (the public code looks at the test set), and
         the last step that was still acceptable is kept (the public code keeps the one after it). The cut
         columns stay cut during the fine-tuning, whose learning rate is lowered where it destroys the network
         (engine/fine_tuning.py).
Cost:    1 forward over the clean set, at most 1/step forwards over the held-out images, then as ``ft``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.heads import Head, find_head
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


class FPConfig(Config):
    """Options of fine-pruning."""

    tolerance: float = option(
        0.1, "largest loss of held-out accuracy by pruning", source="BackdoorBench", ge=0, le=1
    )
    step: float = option(0.01, "share of the features cut at a time", source="BackdoorBench, fp", gt=0, le=1)
    epochs: int = option(
        100, "passes of the fine-tuning; 0 for none", source="BackdoorBench, fp", ge=0, le=10_000
    )
    lr: float = option(0.01, "peak learning rate of the fine-tuning", source="BackdoorBench, fp", gt=0, le=1)
    batch_size: int = option(256, "images a step", source="BackdoorBench, fp", ge=2)


@defense(
    "fp",
    config=FPConfig,
    paper="arXiv:1805.12185",
    needs={"images", "labels"},
    quick={"epochs": 1, "step": 0.1},
)
def purify(model: Classifier, data: CleanData, cfg: FPConfig, *, run: Run) -> Purified:
    """Prune dormant features while the held-out accuracy holds, then fine-tune."""
    head = find_head(model)
    order = mean_features(model, head, data.fit, run).argsort()  # (D,) most dormant first

    def pruned(share: float) -> Classifier:
        out = model.copy()
        cut_features(out, head.name, order[: round(share * head.features)])
        return out

    levels = [float(level) for level in np.arange(cfg.step, 1.0, cfg.step)]
    choice = harshest_within(model, levels, pruned, data, run, tolerance=cfg.tolerance)
    out, cut = choice.model, order[: round((choice.level or 0.0) * head.features)]
    evidence = {"features": head.features, "cut": len(cut), "choice": choice.evidence()}
    if cfg.epochs:
        recipe = Recipe(epochs=cfg.epochs, lr=cfg.lr, batch_size=cfg.batch_size, schedule="cosine")
        tuned = fine_tune(out, data.all, recipe, run, augmentation=data.augmentation)
        out, evidence["lr"] = tuned.model, tuned.lr
        cut_features(out, head.name, cut)
    return Purified(out, evidence)


@torch.no_grad()
def cut_features(model: Classifier, head: str, index: Tensor) -> None:
    """Zero the columns of the head that read the given features, in place."""
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    layer.weight[:, index.to(layer.weight.device)] = 0  # (K, D)


def mean_features(model: Classifier, head: Head, images: Images, run: Run) -> Tensor:
    """Return the mean input (D,) of the head over the images."""
    total = torch.zeros(head.features)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.add_(inputs[0].detach().float().sum(0).cpu())

    handle = head.module.register_forward_pre_hook(add)
    try:
        predict(model, images, run)
    finally:
        handle.remove()
    return total / len(images)
