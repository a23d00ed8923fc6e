"""Defenders whose images are not the ideal ones: unbalanced, mislabelled, shifted, foreign.

A suite names such an alteration; the sample is drawn from the same pool, and altered by the same seed. No
cell without an alteration runs anything of this module, and its code is in no other version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.bench.steps import SAMPLE, data_of
from unbackdoor.data.conform import conform
from unbackdoor.data.datasets import dataset_names, load_dataset
from unbackdoor.data.own_set import load_own_set
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.rng import generator
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.files import atomic_write
from unbackdoor.types import Images


class Alteration(BaseModel):
    """What is done to a defender's images; several may be done at once, in the order of the fields.

    Attributes:
        foreign: Another set, from which the images are drawn in the place of the pool: a data set by its
            name, or a folder of that name in the data root. Of it come the classes that both have.
        classes: Names of our classes by those of the foreign set, where they differ.
        imbalance: Images of the largest class for one of the smallest. The classes follow a geometric row, in
            an order that the seed draws (long-tailed, Cui et al., CVPR 2019, arXiv 1901.05555); 1 is
            balanced.
        brightness: Factor on all pixels.
        blur: Deviation of a Gaussian that the images are convolved with, in pixels.
        mislabelled: Share of the images that get the label of another class, at least one image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    foreign: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$")
    classes: Mapping[str, str] = {}
    imbalance: float = Field(default=1, ge=1, le=1000)
    brightness: float = Field(default=1, gt=0, le=4)
    blur: float = Field(default=0, ge=0, le=16)
    mislabelled: float = Field(default=0, ge=0, lt=1)


def altered(pool: Images, alteration: Alteration, *, count: int, seed: int) -> Images:
    """Draw a defender's images from a pool, and alter them.

    Args:
        pool: Labelled images; the foreign ones, where there are some, by :func:`same_classes`.
        alteration: What is done.
        count: Number of images.
        seed: Of the draw and of the alteration.

    Raises:
        InputError: If the pool, or a class of it, has too few images.
    """
    if alteration.imbalance == 1:
        sample = draw_clean(pool, count=count, seed=seed)
    else:
        sample = _long_tailed(pool, alteration.imbalance, count, seed)
    pixels, labels = sample.pixels, sample.truth
    if alteration.brightness != 1:
        pixels = (pixels.double() * alteration.brightness).round().clamp(0, 255).to(torch.uint8)
    if alteration.blur:
        pixels = blurred(pixels, alteration.blur)
    if alteration.mislabelled:
        labels = _mislabelled(labels, alteration.mislabelled, pool.classes, seed)
    return replace(sample, pixels=pixels, labels=labels)


def _long_tailed(pool: Images, imbalance: float, count: int, seed: int) -> Images:
    draws = generator(seed, "imbalance")
    ranks = torch.randperm(pool.classes, generator=draws).double()  # (K,)
    weights = imbalance ** (-ranks / max(1, pool.classes - 1))
    exact = count * weights / weights.sum()
    counts = exact.floor().long()
    # The images that rounding left over go to the largest remainders.
    counts[(exact - counts).argsort(descending=True, stable=True)[: count - int(counts.sum())]] += 1
    chosen = []
    for k, number in enumerate(counts.tolist()):
        rows = (pool.truth == k).nonzero().flatten()
        if len(rows) < number:
            raise InputError(
                f"the class {pool.class_names[k]!r} has too few images",
                expected=f"{number} of {count} images",
                got=len(rows),
                where=pool.name,
                remedy="Ask for fewer images, or for less imbalance",
            )
        chosen.append(rows[torch.randperm(len(rows), generator=draws)[:number]])
    return pool.subset(torch.cat(chosen).sort().values, name=f"{pool.name} (clean)")


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Return uint8 pixels (N, C, H, W) convolved with a Gaussian; the border is continued."""
    reach = max(1, math.ceil(3 * deviation))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(steps**2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    planes = pixels.double().flatten(0, 1).unsqueeze(1)  # (N C, 1, H, W)
    for turned in (kernel, kernel.transpose(2, 3)):
        border = [reach * (turned.shape[3] > 1)] * 2 + [reach * (turned.shape[2] > 1)] * 2
        planes = F.conv2d(F.pad(planes, border, mode="replicate"), turned)
    return planes.view(pixels.shape).round().clamp(0, 255).to(torch.uint8)


def _mislabelled(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    draws = generator(seed, "mislabelled")
    count = max(1, round(share * len(labels)))
    rows = torch.randperm(len(labels), generator=draws)[:count]
    shift = torch.randint(1, classes, (count,), generator=draws)  # never 0, so never the same class
    out = labels.clone()
    out[rows] = (labels[rows] + shift) % classes
    return out


def same_classes(foreign: Images, own: Images, classes: Mapping[str, str]) -> Images:
    """Return those foreign images whose classes a set of our own has, in its form and with its labels.

    Args:
        foreign: Labelled images of any size.
        own: What they are to be like.
        classes: Names of our classes by foreign ones, where they differ.

    Raises:
        InputError: If they have no class in common, or a name is given that is none.
    """
    strange = [name for pair in classes.items() for name, known in zip(pair, (foreign, own), strict=True)
               if name not in known.class_names]  # fmt: skip
    if strange:
        raise InputError("there are no such classes", got=", ".join(strange[:8]), where=foreign.name)
    names = [classes.get(name, name) for name in foreign.class_names]
    common = torch.tensor([name in own.class_names for name in names])
    if not common.any():
        raise InputError(
            "the foreign images are of none of the classes",
            expected=", ".join(own.class_names[:8]),
            got=", ".join(names[:8]),
            where=foreign.name,
        )
    rows = common[foreign.truth].nonzero().flatten()
    kept = foreign.subset(rows)
    # Only names that both have are left, so that they are matched by nothing else.
    place = common.long().cumsum(0) - 1
    left = tuple(name for name, held in zip(names, common.tolist(), strict=True) if held)
    if len(set(left)) < len(left):
        raise InputError("several foreign classes are one of ours", got=", ".join(left), where=foreign.name)
    kept = replace(kept, labels=place[kept.truth], class_names=left)
    return conform(kept, input_shape=own.shape, class_names=own.class_names)[0]


def foreign_images(name: str, root: Path | None, cache: Path | None) -> Images:
    """Load the training images of a foreign set.

    Args:
        name: Of a data set, or of a folder in the data root.
        root: Data root.
        cache: Cache folder; None is the usual one.

    Raises:
        InputError: If they are not there.
    """
    if name in dataset_names():
        return load_dataset(name, root=root, cache=cache).train
    if root is None or not (root / name).is_dir():
        raise InputError(
            f"there are no foreign images {name!r}",
            expected=f"a folder {name} in the data root, with a folder for each class",
            where=root or "no data root",
            remedy="Put them there, and name the data root with --data-root",
        )
    return load_own_set(root / name, whole=True).train


def altered_sample_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw and alter a defender's images, and write them as the ordinary step does.

    Raises:
        IntegrityError: If the foreign images are not those that were planned with.
    """
    spec, place, data = task["spec"], task["place"], data_of(task, "train")
    given = dict(spec["altered"])
    expected = given.pop("foreign_sha256", None)
    alteration = Alteration(**given)
    pool = reserve(data.train)[1]
    if alteration.foreign:
        root, cache = (Path(place[name]) if place.get(name) else None for name in ("data_root", "cache"))
        foreign = foreign_images(alteration.foreign, root, cache)
        if foreign.fingerprint() != expected:
            raise IntegrityError(
                f"the foreign images {alteration.foreign!r} are not those that were planned with",
                expected=expected,
                got=foreign.fingerprint(),
                where=root,
            )
        pool = same_classes(foreign, pool, alteration.classes)
    sample = altered(pool, alteration, count=spec["clean_images"], seed=spec["seed"])
    facts = {"class_names": json.dumps(sample.class_names), "augmentation": data.augmentation}
    with atomic_write(folder / SAMPLE) as draft:
        save_file({"pixels": sample.pixels, "labels": sample.truth}, draft, metadata=facts)
    return {"images": len(sample)}
