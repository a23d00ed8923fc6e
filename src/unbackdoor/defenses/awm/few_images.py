"""Work with a handful of images: views that enlarge the set, and steps that are drawn from it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from unbackdoor.data.batches import augment
from unbackdoor.types import Augmentation, Images

PIECES = 4  # batches that a pass is cut into at least, as far as there are images


def enlarged(images: Images, count: int, augmentation: Augmentation, generator: torch.Generator) -> Images:
    """Add fixed views of every image until there are at least ``count`` images, the originals first.

    The set itself is returned where it is large enough, or where its domain allows no augmentation.
    """
    copies = math.ceil(count / len(images))
    if copies < 2 or augmentation == "none":
        return images
    more = images.subset(torch.arange(len(images)).repeat(copies - 1))
    pixels = torch.cat([images.pixels, augment(more.pixels, augmentation, generator)])
    labels = None if images.labels is None else images.labels.repeat(copies)
    return replace(images, pixels=pixels, labels=labels)


def shuffled(count: int, batch_size: int, passes: int, generator: torch.Generator) -> list[Tensor]:
    """Return the rows of each step of some passes in which every image comes once, in batches of like size.

    However few images there are, a pass has several steps: how far an optimiser with steps of a given length
    can go must not hinge on the number of images.
    """
    pieces = max(math.ceil(count / batch_size), min(PIECES, count))
    orders = (torch.randperm(count, generator=generator) for _ in range(passes))
    return [rows for order in orders for rows in order.tensor_split(pieces)]


def with_replacement(count: int, batch_size: int, passes: int, generator: torch.Generator) -> list[Tensor]:
    """Return the rows of ``passes * (count // batch_size)`` steps, one at least, drawn independently."""
    steps = max(1, passes * (count // batch_size))
    return list(torch.randint(count, (steps, batch_size), generator=generator))
