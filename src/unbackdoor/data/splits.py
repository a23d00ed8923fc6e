"""Seeded, disjoint splits: what the model is trained on, and what the defender holds."""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.errors import ConfigError, InputError
from unbackdoor.types import Images

POOL_FRACTION = 0.05  # share of every class that is kept out of all training, for defenders
SPLIT_SEED = 0  # one split for all, so that a defender's images are never in any training set


def reserve(
    images: Images, *, fraction: float = POOL_FRACTION, seed: int = SPLIT_SEED
) -> tuple[Images, Images]:
    """Keep a share of every class out of training, as the pool that the defender draws from.

    Args:
        images: The official training images, labelled.
        fraction: Share of each class that goes into the pool, in (0, 1); at least one image of each class
            does, and at least one stays.
        seed: Seed of the draw.

    Returns:
        The training part and the pool; together every image once, each in the original order.

    Raises:
        ConfigError: If the fraction is out of range.
        InputError: If a class has fewer than two images.

    Example:
        >>> images = Images(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40) % 2, ("a", "b"))
        >>> [len(part) for part in reserve(images, fraction=0.1)]
        [36, 4]
    """
    if not 0 < fraction < 1:
        raise ConfigError("the split", [f"fraction must lie in (0, 1), got {fraction}"])
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.zeros(len(images), dtype=torch.bool)
    for k, rows in enumerate(_rows_by_class(images)):
        if len(rows) < 2:
            raise _too_few(images, k, 2, len(rows), "Add images of the class; one must stay in each part")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        pooled[_random_rows(rows, count, generator)] = True
    train, pool = (~pooled).nonzero().flatten(), pooled.nonzero().flatten()
    return images.subset(train), images.subset(pool, name=f"{images.name} (defender's pool)")


def draw_clean(
    pool: Images,
    *,
    count: int | None = None,
    per_class: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
) -> Images:
    """Draw the defender's clean images from the pool, balanced over the classes.

    Args:
        pool: Labelled images that no model was trained on.
        count: Images in total, at least 1; ``count // K`` of each class, and one more of classes chosen by
            the seed. What a small class lacks is drawn from the others, as evenly as they allow.
        per_class: Images of each class, at least 1.
        fraction: Share of each class in (0, 1], at least one image.
        seed: Seed of the draw.

    Returns:
        The drawn images, in the order of the pool.

    Raises:
        ConfigError: If not exactly one of the three amounts is given, or it is out of range.
        InputError: If a class, or for ``count`` the whole pool, has fewer images than asked for.

    Example:
        >>> images = Images(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40) % 2, ("a", "b"))
        >>> draw_clean(images, per_class=3).truth.bincount()
        tensor([3, 3])
    """
    _require_one(count, per_class, fraction)
    generator = torch.Generator().manual_seed(seed)
    by_class = _rows_by_class(pool)
    if count is not None:
        counts = [count // pool.classes] * pool.classes
        for k in torch.randperm(pool.classes, generator=generator)[: count % pool.classes].tolist():
            counts[k] += 1
        counts = _as_balanced_as_possible(counts, [len(rows) for rows in by_class], pool, generator)
    elif per_class is not None:
        counts = [per_class] * pool.classes
    else:
        assert fraction is not None
        counts = [max(1, round(fraction * len(rows))) for rows in by_class]
    chosen = []
    for k, (rows, number) in enumerate(zip(by_class, counts, strict=True)):
        if len(rows) < number:
            raise _too_few(pool, k, number, len(rows), "Ask for fewer images, or give a larger pool")
        chosen.append(_random_rows(rows, number, generator))
    return pool.subset(torch.cat(chosen).sort().values, name=f"{pool.name} (clean)")


def _as_balanced_as_possible(
    counts: list[int], available: list[int], pool: Images, generator: torch.Generator
) -> list[int]:
    if sum(counts) > sum(available):
        raise InputError(
            "there are too few images",
            expected=f"at least {sum(counts)}",
            got=sum(available),
            where=pool.name,
            remedy="Ask for fewer images, or give a larger pool",
        )
    shares = [min(number, limit) for number, limit in zip(counts, available, strict=True)]
    lacking = sum(counts) - sum(shares)
    while lacking:
        # One round gives every class that still has images one more, in an order that the seed draws.
        for k in torch.randperm(len(available), generator=generator).tolist():
            if lacking and shares[k] < available[k]:
                shares[k] += 1
                lacking -= 1
    return shares


def _require_one(count: int | None, per_class: int | None, fraction: float | None) -> None:
    amounts = {"count": count, "per_class": per_class, "fraction": fraction}
    specified = [name for name, value in amounts.items() if value is not None]
    faults = []
    if len(specified) != 1:
        got = ", ".join(specified) or "none"
        faults.append(f"exactly one of count, per_class and fraction must be given, got {got}")
    faults += [
        f"{name} must be at least 1, got {value}"
        for name, value in (("count", count), ("per_class", per_class))
        if value is not None and value < 1
    ]
    if fraction is not None and not 0 < fraction <= 1:
        faults.append(f"fraction must lie in (0, 1], got {fraction}")
    if faults:
        raise ConfigError("the clean set", faults)


def _rows_by_class(images: Images) -> list[Tensor]:
    labels = images.truth.cpu()
    return [(labels == k).nonzero().flatten() for k in range(images.classes)]


def _random_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _too_few(images: Images, k: int, expected: int, got: int, remedy: str) -> InputError:
    return InputError(
        f"the class {images.class_names[k]!r} has too few images",
        expected=f"at least {expected}",
        got=got,
        where=f"{images.name}, label {k}",
        remedy=remedy,
    )
