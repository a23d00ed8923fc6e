"""Turn a clean training set into a poisoned one and the truth about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbackdoor.attacks.truth import AttackTruth
from unbackdoor.engine import rng
from unbackdoor.errors import ConfigError
from unbackdoor.registry import ATTACKS
from unbackdoor.types import Images

BATCH = 1024  # images stamped at a time; bounds the float copies that some triggers make


def poison(
    images: Images, attack: str, options: Mapping[str, Any] | None = None, *, seed: int = 0
) -> tuple[Images, AttackTruth]:
    """Poison a labelled training set.

    Args:
        images: Clean training images; not changed.
        attack: Registered name, ``none`` for the clean control.
        options: Options of the attack.
        seed: Seed of the trigger and of the choice of images.

    Returns:
        The images in the same order, some of them triggered and relabelled, and the truth.

    Raises:
        ConfigError: If an option does not fit, or there are fewer images to poison than the rate asks for.
    """
    part = ATTACKS[attack]
    config = part.configure(options)
    values = config.model_dump()
    if values["target"] >= images.classes:
        raise ConfigError(
            f"the attack {attack!r}",
            [f"target: must be below {images.classes} classes, got {values['target']}"],
        )
    trigger = part.function(config, shape=images.shape, classes=images.classes, seed=seed)
    truth = AttackTruth(part.name, values, images.shape, images.classes, seed, trigger)
    if trigger.mapping == "none":
        return images, truth

    labels = images.truth
    wanted = truth.wanted(labels)
    candidates = ((wanted == labels) if trigger.clean_label else (wanted != labels)).nonzero().flatten()
    count = round(values["poison_rate"] * len(images))
    if count > len(candidates):
        kind = "images of the target class" if trigger.clean_label else "images outside the target class"
        highest = len(candidates) / len(images)
        raise ConfigError(
            f"the attack {attack!r}",
            [
                f"poison_rate: {values['poison_rate']} of {len(images)} images asks for {count} {kind}, "
                f"and there are {len(candidates)}; the highest possible rate is {highest:.4f}"
            ],
        )
    order = torch.randperm(len(candidates), generator=rng.generator(seed, "poisoned rows"))
    rows = candidates[order[:count]].sort().values
    pixels, new_labels = images.pixels.clone(), labels.clone()
    pixels[rows] = stamped(images.pixels[rows], truth)
    new_labels[rows] = wanted[rows]

    decoys = torch.zeros(0, dtype=torch.int64)
    if trigger.decoy is not None and trigger.decoy_rate:
        rest = torch.ones(len(images), dtype=torch.bool)
        rest[rows] = False
        free = rest.nonzero().flatten()
        share = min(round(trigger.decoy_rate * len(images)), len(free))
        draws = rng.generator(seed, "decoys")
        decoys = free[torch.randperm(len(free), generator=draws)[:share]].sort().values
        for part_rows in decoys.split(BATCH):
            pixels[part_rows] = trigger.decoy(images.pixels[part_rows], draws)

    poisoned = replace(images, pixels=pixels, labels=new_labels)
    return poisoned, replace(truth, poisoned=rows, decoys=decoys)


def stamped(pixels: Tensor, truth: AttackTruth) -> Tensor:
    """Return triggered uint8 pixels (N, C, H, W), a bounded batch at a time."""
    parts = [truth.trigger.stamp(part) for part in pixels.split(BATCH)]
    return torch.cat(parts) if parts else pixels.clone()
