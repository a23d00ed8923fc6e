"""Turn a clean training set into a poisoned one and the truth about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbackdoor.attacks.truth import BATCH, AttackTruth, of_classes
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.types import Images


def poison(
    images: Images,
    attack: str,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    run: Run | None = None,
) -> tuple[Images, AttackTruth]:
    """Poison a labelled training set.

    Args:
        images: Clean training images; not changed.
        attack: Registered name, ``none`` for the clean control.
        options: Options of the attack.
        seed: Seed of the trigger and of the choice of images.
        run: Surroundings in which a learned trigger is learned; by default the CPU in fp32, in silence.

    Returns:
        The images in the same order, some of them triggered and relabelled, and the truth.

    Raises:
        ConfigError: If an option does not fit, or the images do not allow it; see :func:`impossible`.
        InputError: If the attack controls the training, so that no set of images carries it.
    """
    truth = prepare(images, attack, options, seed=seed)
    learning = truth.trigger.learning
    if learning is None:
        return spread(images, truth)
    if learning.train is not None:
        raise InputError(
            f"the attack {attack!r} controls the training, and poisons no set of images",
            remedy="Train a victim with it",
        )
    run = run or Run.create(seed=seed, policy="fp32")
    return spread(images, truth.learned(learning.fit(images, run)))


def prepare(
    images: Images, attack: str, options: Mapping[str, Any] | None = None, *, seed: int = 0
) -> AttackTruth:
    """Return an attack that these clean training images allow, before anything is learned or poisoned.

    Raises:
        ConfigError: If an option does not fit, or the images do not allow it; see :func:`impossible`.
    """
    truth = AttackTruth.describe(attack, options, shape=images.shape, classes=images.classes, seed=seed)
    if faults := impossible(images, truth):
        raise ConfigError(f"the attack {attack!r}", faults)
    return truth


def spread(images: Images, truth: AttackTruth) -> tuple[Images, AttackTruth]:
    """Poison a labelled training set with a prepared attack whose trigger, if it learns, is learned.

    Returns:
        The images in the same order, some of them triggered and relabelled, and the truth with the rows.
    """
    trigger, seed = truth.trigger, truth.seed
    if trigger.mapping == "none":
        return images, truth

    labels, target_labels = images.truth, truth.targets_of(images)
    candidates, count = _candidates(images, truth), _poison_count(images, truth)
    order = torch.randperm(len(candidates), generator=rng.generator(seed, "poisoned rows"))
    rows = candidates[order[:count]].sort().values
    pixels, new_labels = images.pixels.clone(), labels.clone()
    if trigger.in_training is None:
        pixels[rows] = stamped(images.pixels[rows], truth)
    else:
        draws = rng.generator(seed, "poisoned images")
        for part_rows in rows.split(BATCH):
            pixels[part_rows] = trigger.in_training(images.pixels[part_rows], draws)
    new_labels[rows] = target_labels[rows]

    decoys = torch.zeros(0, dtype=torch.int64)
    if trigger.decoy is not None and trigger.decoy_rate:
        rest = of_classes(labels, trigger.decoy_sources)
        rest[rows] = False
        free = rest.nonzero().flatten()
        share = min(round(trigger.decoy_rate * len(images)), len(free))
        draws = rng.generator(seed, "decoys")
        decoys = free[torch.randperm(len(free), generator=draws)[:share]].sort().values
        for part_rows in decoys.split(BATCH):
            pixels[part_rows] = trigger.decoy(images.pixels[part_rows], draws)

    poisoned = replace(images, pixels=pixels, labels=new_labels)
    return poisoned, replace(truth, poisoned=rows, decoys=decoys)


def impossible(images: Images, truth: AttackTruth) -> list[str]:
    """Return in words what an attack requires and these clean training images do not allow."""
    target = truth.options["target"]
    if target >= images.classes:
        return [f"target: must be below {images.classes} classes, got {target}"]
    trigger = truth.trigger
    if trigger.mapping == "none" or (trigger.learning is not None and trigger.learning.train is not None):
        return []  # nothing is poisoned, or anew in every batch
    available, requested = len(_candidates(images, truth)), _poison_count(images, truth)
    if requested <= available:
        return []
    kind = f"of class {target}" if trigger.clean_label else "outside the target class"
    if trigger.sources:
        kind = f"of class {', '.join(map(str, trigger.sources))}"
    return [
        f"poison_rate {truth.options['poison_rate']} asks for {requested} images {kind}, "
        f"and there are {available}; the highest possible rate is {available / _rate_base(images, truth):.4f}"
    ]


def _candidates(images: Images, truth: AttackTruth) -> Tensor:
    """Return the rows (M,) that may be poisoned: of the target class for clean labels, else of others."""
    already = truth.targets_of(images) == images.truth
    may_be = already if truth.trigger.clean_label else ~already
    return (may_be & of_classes(images.truth, truth.trigger.sources)).nonzero().flatten()


def _poison_count(images: Images, truth: AttackTruth) -> int:
    return round(float(truth.options["poison_rate"]) * _rate_base(images, truth))


def _rate_base(images: Images, truth: AttackTruth) -> int:
    """Return the number of images that the poison rate is a share of."""
    if truth.options.get("rate_of") == "target":
        return int((images.truth == truth.options["target"]).sum())
    return len(images)


def stamped(pixels: Tensor, truth: AttackTruth) -> Tensor:
    """Return triggered uint8 pixels (N, C, H, W), a bounded batch at a time."""
    parts = [truth.trigger.stamp(part) for part in pixels.split(BATCH)]
    return torch.cat(parts) if parts else pixels.clone()
