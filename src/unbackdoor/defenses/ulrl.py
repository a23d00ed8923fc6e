"""Unlearn, then relearn: new weights for the class whose row of the last layer unlearning moves most.

Paper:   Min, Pham & Sun, "Unified neural backdoor removal with only few clean samples through unlearning and
         relearning" (ULRL), arXiv 2405.14781.
Needs:   clean images and labels.          Changes: one or two rows of the last layer, then all weights.
Departs: the unlearning stops in a band above chance whatever the classes, and takes back what overshoots
         (engine/unlearning.py). Where no row stands out, the public code fine-tunes all the same and says
         nothing; here the evidence then has no suspicious class, and preset ``leave`` changes nothing. A
         learning rate that destroys the network is lowered (engine/fine_tuning.py).
Cost:    unlearning, then epochs x (1 forward + 1 backward) over the images.
Blind:   backdoors into more than ``most`` classes (all-to-all), and those that do not show in the last layer;
         of fewer than six classes hardly any can stand out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.heads import AffineHead, find_affine_head
from unbackdoor.engine.repeated_unlearning import UnlearningConfig, unlearn_with
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Objective, Recipe
from unbackdoor.registry import ONE_A_CLASS, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

_NORMAL = 0.6745  # median absolute deviation of a normal law with deviation 1


class ULRLConfig(UnlearningConfig):
    """Options of ULRL."""

    threshold: float = option(
        3.5,
        "modified z-score (by median and median absolute deviation) from which a row is suspicious",
        source="reference code",
        gt=0,
        le=100,
    )
    most: int = option(2, "rows that are made new at most", source="reference code", ge=1, le=1000)
    epochs: int = option(20, "passes of the relearning", source="reference code", ge=1, le=10_000)
    lr: float = option(
        5e-3, "peak of the cosine schedule of the relearning", source="reference code", gt=0, le=1
    )
    repulsion: float = option(
        0.7, "weight of the new rows' cosine with the old ones", source="reference code", ge=0, le=100
    )
    when_none: Literal["relearn", "leave"] = option(
        "relearn", "what is done where no row stands out", source="reference code"
    )


@defense(
    "ulrl",
    config=ULRLConfig,
    paper="arXiv:2405.14781",
    needs={"images", "labels", ONE_A_CLASS},
    presets={"leave": {"when_none": "leave"}},
    quick={"batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1, "epochs": 2, "lr": 0.001},
)
def purify(model: Classifier, data: CleanData, cfg: ULRLConfig, *, run: Run) -> Purified:
    """Unlearn to find the suspicious rows of the head, draw them anew, and fine-tune."""
    head = find_affine_head(model)
    unlearned = unlearn_with(model, data.fit, cfg, run, augmentation=data.augmentation)
    with torch.no_grad():
        change = head.of(unlearned.model).module.weight - head.module.weight
        scores = modified_z_scores(change.abs().flatten(1).sum(1).cpu())  # (K,)
    suspicious = [int(k) for k in scores.argsort(descending=True)[: cfg.most] if scores[k] > cfg.threshold]
    evidence: dict[str, Any] = {
        "unlearning": unlearned.evidence(),
        "scores": scores.tolist(),
        "suspicious": suspicious,
        "targets": suspicious,
    }
    if not suspicious and cfg.when_none == "leave":
        return Purified(model, evidence)
    old = head.module.weight.detach().flatten(1)[suspicious].clone()  # (S, D)
    out = model.copy()
    renew_rows(head.of(out), suspicious, run)

    def objective(trained: Classifier) -> Objective:
        weight = head.of(trained).module.weight

        def loss(logits: Tensor, labels: Tensor, step: int) -> Tensor:
            rows = weight.flatten(1)[suspicious]
            return F.cross_entropy(logits, labels) + cfg.repulsion * F.cosine_similarity(rows, old).sum()

        return loss

    recipe = Recipe(
        epochs=cfg.epochs,
        lr=cfg.lr,
        batch_size=cfg.batch_size,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        schedule="cosine",
    )
    tuned = fine_tune(out, data.all, recipe, run, augmentation=data.augmentation, objective=objective)
    return Purified(tuned.model, {**evidence, "lr": tuned.lr, "losses": list(tuned.losses)})


def modified_z_scores(values: Tensor) -> Tensor:
    """Return 0.6745 (value - median) / MAD; 0 for all where more than half of the values are equal."""
    middle = values.median()
    spread = (values - middle).abs().median()
    return _NORMAL * (values - middle) / spread if float(spread) > 0 else torch.zeros_like(values)


@torch.no_grad()
def renew_rows(head: AffineHead, rows: list[int], run: Run) -> None:
    """Draw rows of the head uniformly from +-sqrt(2 / D) and set their biases to 0, in place."""
    bound = (2 / head.features) ** 0.5
    weight, bias = head.module.weight, head.module.bias
    draws = run.generator("new rows")
    for row in rows:
        new = (2 * torch.rand(head.features, generator=draws) - 1) * bound
        weight[row] = new.view_as(weight[row]).to(weight)
        if bias is not None:
            bias[row] = 0.0
