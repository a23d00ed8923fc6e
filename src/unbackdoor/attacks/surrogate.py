"""A benign network of the attacker's own, for triggers that are learned before anything is poisoned."""

from __future__ import annotations

import torch

from unbackdoor.attacks.truth import AttackConfig
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.networks import build
from unbackdoor.registry import option
from unbackdoor.types import Classifier, Images


class SurrogateConfig(AttackConfig):
    """Options of attacks that learn on a benign network of their own."""

    surrogate_width: int = option(
        16, "width of the benign small CNN", source="this project: seconds on one core", ge=2, le=256
    )
    surrogate_epochs: int = option(5, "epochs of its training", source="this project", ge=1, le=1000)
    surrogate_images: int = option(
        4000, "clean training images that it learns from, at most", source="this project", ge=2
    )


def surroundings(seed: int, attack: str, run: Run) -> Run:
    """Return a run on the CPU in fp32, whatever the victim is trained in: seconds, and the same bytes."""
    return Run.create(seed=rng.derive_seed(seed, attack), policy="fp32", progress=run.show)


def some_of(images: Images, most: int, run: Run) -> Images:
    """Return a random part of the images, in their order."""
    rows = torch.randperm(len(images), generator=run.generator("images"))[:most]
    return images.subset(rows.sort().values)


def surrogate(images: Images, cfg: SurrogateConfig, run: Run, *, label: str) -> Classifier:
    """Return the benign network, trained on these clean images."""
    values = images.pixels.float().div(255).transpose(0, 1).flatten(1)  # (C, N * H * W)
    model = build(
        f"small_cnn[width={cfg.surrogate_width}]",
        input_shape=images.shape,
        class_names=images.class_names,
        mean=values.mean(1).tolist(),
        std=values.std(1).clamp_min(0.01).tolist(),
        seed=rng.derive_seed(run.seed, "surrogate"),
    )
    recipe = Recipe(epochs=cfg.surrogate_epochs, batch_size=64, optimizer="adamw", lr=0.003)
    train(model, images, recipe, run, label=f"{label}'s benign network")
    return model
