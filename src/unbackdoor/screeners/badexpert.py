"""BaDExpert: one copy forgets the clean task and keeps the backdoor, another forgets the backdoor; ask both.

Experts are taught wrong labels of clean images in small steps until they have lost the task. The shadow is
fine-tuned on right labels. An image is suspicious where the experts still give the network's own class, and
more so where the shadow does not.

Paper:   Xie, Qi, He, Li, Wang & Mittal, "BaDExpert: extracting backdoor functionality for accurate backdoor
         input detection", ICLR 2024, arXiv 2308.12439.
Needs:   clean images and labels; scores are compared with the held-out part.
Departs: the score is the difference of the two log-probabilities instead of an angle between probabilities,
         and an input has a p-value over clean images. Wrong labels are drawn anew in every pass. Several
         experts are averaged, because one alone is a matter of luck; their rate doubles after ten passes.
Cost:    experts x passes + epochs passes of training over the clean images, three forwards of the inputs.
Blind:   backdoors that are forgotten with the task; clean images of the class that experts fall to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.inference import accuracy, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, classes_of, conformal_p_values, judged
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit


class BaDExpertConfig(ScreenerConfig):
    """Options of expert and shadow."""

    lr: float = option(1e-4, "learning rate of the experts, AdamW", source="the paper", gt=0, le=1)
    forgotten: float = option(
        0.2, "clean accuracy at which an expert has lost the task", source="the paper: chance", gt=0, lt=1
    )
    experts: int = option(3, "experts, of other wrong labels each", source="this project; the paper: 1", ge=1)
    rounds: int = option(
        100,
        "passes of an expert at most; every ten double the rate",
        source="this project",
        ge=1,
        le=1000,
    )
    batch_size: int = option(64, "images of a step", source="this project; the paper: 128", ge=2)
    shadow_epochs: int = option(10, "epochs of the shadow", source="the paper", ge=0, le=1000)
    shadow_lr: float = option(0.01, "peak learning rate of the shadow", source="common practice", gt=0, le=1)
    uses: Literal["both", "expert"] = option(
        "both", "expert: without the shadow", source="the paper: both; the other is an ablation"
    )


@screener(
    "badexpert",
    config=BaDExpertConfig,
    paper="arXiv:2308.12439",
    needs={"images", "labels"},
    quick={"shadow_epochs": 2, "experts": 1, "lr": 0.002},
)
def screen(
    model: Classifier, data: CleanData, inputs: Images, cfg: BaDExpertConfig, *, run: Run
) -> Screening:
    """Score inputs by how much more the expert is of the network's opinion than the shadow is.

    Raises:
        InputError: If the clean images are of one class, so that no label is wrong.
        MethodFailed: If the expert does not forget.
    """
    require_fit(model, inputs)
    experts, left, passes = [], [], []
    for number in range(cfg.experts):
        seeded = replace(run, seed=rng.derive_seed(run.seed, "expert", number))
        expert, accuracy_left, taken = forgetful(model, data.fit, cfg, seeded)
        experts.append(expert)
        left.append(accuracy_left)
        passes.append(taken)
    shadow = None
    if cfg.uses == "both" and cfg.shadow_epochs:
        recipe = Recipe(
            epochs=cfg.shadow_epochs, batch_size=cfg.batch_size, lr=cfg.shadow_lr, schedule="cosine"
        )
        shadow = fine_tune(model, data.fit, recipe, run, augmentation=data.augmentation).model
    scores, predicted = _scores(model, experts, shadow, inputs, run)
    clean_scores, _ = _scores(model, experts, shadow, data.select, run)
    return judged(
        scores,
        conformal_p_values(scores, clean_scores),
        predicted,
        cfg.alpha,
        len(clean_scores),
        passes_of_the_experts=passes,
        clean_images_they_still_know=left,
    )


def forgetful(
    model: Classifier, images: Images, cfg: BaDExpertConfig, run: Run
) -> tuple[Classifier, float, int]:
    """Return a copy that learned wrong labels, its accuracy on the right ones, and the passes it took."""
    if model.classes < 2:
        raise InputError("there is no wrong label", expected="two classes or more", got=model.classes)
    limit = max(cfg.forgotten, 1.2 / model.classes)
    expert, left = model.copy().to(run.device), 1.0
    for number in range(cfg.rounds):
        how: dict[str, Any] = {
            "lr": min(cfg.lr * 2 ** (number // 10), 1.0),
            "schedule": "constant",
            "weight_decay": 0.0,
        }
        recipe = Recipe(epochs=1, batch_size=cfg.batch_size, optimizer="adamw", **how)
        seeded = replace(run, seed=rng.derive_seed(run.seed, "pass", number))
        # Drawn anew, so that no other mapping of classes is learned in the place of the task.
        by = 1 + torch.randint(
            model.classes - 1, images.truth.shape, generator=seeded.generator("wrong labels")
        )
        wrong = replace(images, labels=(images.truth + by) % model.classes)
        # The running statistics stay: what is forgotten is in the weights.
        train(expert, wrong, recipe, seeded, label="the expert", batch_norm="frozen")
        left = accuracy(expert, images, run)
        if left <= limit:
            return expert, left, number + 1
    raise MethodFailed("the expert does not forget the clean task", expected=f"at most {limit:.2f}", got=left)


def _scores(
    model: Classifier, experts: Sequence[Classifier], shadow: Classifier | None, images: Images, run: Run
) -> tuple[Tensor, Tensor]:
    """Return scores (N,) and the network's own classes (N,)."""
    own = classes_of(model, images, run)

    def opinion(network: Classifier) -> Tensor:
        with mode(network, training=False):
            logits = predict(network, images, run)
        if not bool(torch.isfinite(logits).all()):
            raise MethodFailed("a fine-tuned copy gives logits that are not finite", where=images.name)
        return logits.log_softmax(1).gather(1, own[:, None])[:, 0]  # (N,)

    forgotten = torch.stack([opinion(expert) for expert in experts]).mean(0)  # (N,)
    return forgotten - (opinion(shadow) if shadow is not None else 0.0), own
