"""A labelled set of the user, from a path, as a data set to train and to measure on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from unbackdoor.data.conform import conform
from unbackdoor.data.datasets import DataSet, dataset_names
from unbackdoor.data.loaders import load_images
from unbackdoor.errors import InputError
from unbackdoor.hub import data_file, is_hub
from unbackdoor.types import CleanData, Images, Progress, silent

TEST_SHARE = 0.2  # of every class, where the set has no test part of its own
_TRAIN, _TEST = ("train", "training"), ("test", "val", "validation")
_SUFFIXES = ("", ".parquet", ".npz")


def is_own_set(name: str) -> bool:
    """Tell whether a text is the path of a set of the user, and not the name of a data set."""
    return name not in dataset_names() and (Path(name).exists() or "/" in name or "." in name)


def load_own_set(path: Path, *, whole: bool = False, progress: Progress = silent) -> DataSet:
    """Load a labelled set of the user.

    Args:
        path: A folder with the parts ``train`` and ``test`` (or ``val``), each a folder, a .parquet or an
            .npz file; or any labelled set, of which a fifth of every class is held out as the test part,
            always the same.
        whole: Whether a set without parts is its own test part, to measure a model of somebody else.
        progress: Shows how far decoding has come.

    Returns:
        The data set. Mean and deviation are those of its training images; nothing is said to be allowed to
        be done to an image.

    Raises:
        InputError: If there is no such set, it has no labels, or its parts do not fit each other.
        UnsafeFile: See :func:`unbackdoor.load_images`.
    """
    path = data_file(path) if is_hub(path) else path
    parts = [_part(path, names) for names in (_TRAIN, _TEST)]
    if parts[0] is not None and parts[1] is not None:
        train = _labelled(load_images(parts[0], progress=progress), path)
        test = _labelled(
            load_images(parts[1], class_names=train.class_names, size=train.shape[1:], progress=progress),
            path,
        )
        test = conform(test, input_shape=train.shape, class_names=train.class_names)[0]
    else:
        images = _labelled(load_images(path, progress=progress), path)
        split = CleanData.split(images, select_fraction=TEST_SHARE)
        train, test = split.fit, split.select
        if whole:
            train, test = images, images
        elif split.select_is_fit:
            raise InputError(
                "there are too few images to hold some out", expected="several of each class", where=path
            )
    values = train.pixels.flatten(2).double().transpose(0, 1).flatten(1) / 255  # (C, N * H * W)
    mean, std = values.mean(1), values.std(1)
    std = torch.where(std > 0, std, torch.ones_like(std))  # of one colour alone
    return DataSet(
        path.resolve().name or "images",
        replace(train, name=f"{path.name}, training part"),
        replace(test, name=f"{path.name}, test part"),
        "none",
        tuple(mean.tolist()),
        tuple(std.tolist()),
    )


def _part(path: Path, names: tuple[str, ...]) -> Path | None:
    files = (path / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return next((file for file in files if file.exists()), None) if path.is_dir() else None


def _labelled(images: Images, path: Path) -> Images:
    if images.labels is None:
        raise InputError(
            "the images have no labels",
            expected="a folder for each class, or a file with labels",
            where=path,
        )
    return images
