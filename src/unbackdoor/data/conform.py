"""Bringing images into the form that a model takes: channels, size, and the order of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.types import Images, Progress, silent

# ITU-R 601, as Pillow and most libraries turn colours into grey.
GREY = (0.299, 0.587, 0.114)


def conform(
    images: Images,
    *,
    input_shape: tuple[int, int, int],
    class_names: Sequence[str],
    progress: Progress = silent,
) -> tuple[Images, tuple[str, ...]]:
    """Return the images in a model's form, and what was changed, in words.

    Args:
        images: The defender's images.
        input_shape: (C, H, W) of the model.
        class_names: The model's classes, in logit order.
        progress: Shows how far resizing has come.

    Raises:
        UnsupportedModel: If there is no rule that turns the number of channels into the model's.
        InputError: If the labels cannot be brought to the model's classes.
    """
    changes: list[str] = []
    channels, height, width = input_shape
    pixels = images.pixels
    if pixels.shape[1] != channels:
        pixels = _with_channels(images, channels)
        changes.append(
            "colour images were turned grey, as the model takes one channel"
            if channels == 1
            else "grey images were repeated over three channels, as the model takes colours"
        )
    if tuple(pixels.shape[2:]) != (height, width):
        before = tuple(pixels.shape[2:])
        pixels = resized(pixels, (height, width), images.name, progress)
        changes.append(f"images were resized from {before[0]} x {before[1]} to {height} x {width}, bilinear")
    names = tuple(class_names)
    labels, relabelling = _relabelled(images, names)
    return replace(images, pixels=pixels, labels=labels, class_names=names), (*changes, *relabelling)


def resized(pixels: Tensor, size: tuple[int, int], name: str, progress: Progress = silent) -> Tensor:
    """Return uint8 pixels (N, C, *size), resized as the loaders resize: bilinear, with antialiasing."""
    out = torch.empty((*pixels.shape[:2], *size), dtype=torch.uint8)
    for row in progress(range(len(pixels)), f"resizing {name}"):
        for channel in range(pixels.shape[1]):
            plane = Image.fromarray(pixels[row, channel].cpu().numpy())
            small = plane.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            out[row, channel] = torch.from_numpy(np.array(small))
    return out


def _with_channels(images: Images, channels: int) -> Tensor:
    have = images.shape[0]
    if (have, channels) == (3, 1):
        weights = torch.tensor(GREY).view(1, 3, 1, 1)
        return (images.pixels.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)  # (N, 1, H, W)
    if (have, channels) == (1, 3):
        return images.pixels.expand(-1, 3, -1, -1).contiguous()
    raise UnsupportedModel(
        "the images do not fit the model",
        expected=f"images of {channels} channels",
        got=f"{have} channels",
        where=images.name,
    )


def _relabelled(images: Images, names: tuple[str, ...]) -> tuple[Tensor | None, list[str]]:
    """Return the labels in the model's order of classes."""
    if images.labels is None or images.class_names == names:
        return images.labels, []
    own = images.class_names
    places = {name: k for k, name in enumerate(names)}
    if all(name in places for name in own):
        table = [places[name] for name in own]
        word = f"{len(own)} of the model's {len(names)} classes, matched by their names"
    elif all(name.isdecimal() and int(name) < len(names) for name in own):
        table = [int(name) for name in own]
        word = "classes are numbered in the images, and were taken as the model's indices"
    elif len(own) == len(names):
        table = list(range(len(names)))
        word = "class names differ from the model's; the order of the classes was taken as the model's"
    else:
        unknown = [name for name in own if name not in places]
        raise InputError(
            "classes of the images are none of the model's",
            expected=f"names of the model's {len(names)} classes, or their indices",
            got=", ".join(repr(name[:40])[1:-1] for name in unknown[:5]),
            where=images.name,
            remedy="Give the model's class names in logit order, or call the folders by class index",
        )
    return torch.tensor(table, dtype=torch.int64)[images.labels], [word]
