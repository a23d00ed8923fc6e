"""Batches and augmentation as tensor operations on whole batches, where the pixels already lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from unbackdoor.errors import InputError
from unbackdoor.types import AUGMENTATIONS, Augmentation, Images


def to_float(pixels: Tensor, device: torch.device | str = "cpu", channels_last: bool = True) -> Tensor:
    """Return float32 pixels in [0, 1] on the device.

    Args:
        pixels: uint8 (B, C, H, W).
        device: Where the result lies; the bytes are moved, not the four times larger floats.
        channels_last: Store the channels innermost, as convolutions prefer; the shape stays (B, C, H, W).
    """
    moved = pixels.to(device, non_blocking=True)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return moved.to(torch.float32, memory_format=form).div_(255)


def resident(images: Images, device: torch.device | str) -> Images:
    """Return the set with pixels and labels on the device; the set itself where it lies there already."""
    pixels = images.pixels.to(device)
    labels = None if images.labels is None else images.labels.to(device)
    if pixels is images.pixels and labels is images.labels:
        return images
    return replace(images, pixels=pixels, labels=labels)


def batches(
    images: Images,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    augmentation: Augmentation = "none",
    drop_last: bool = False,
    min_batch: int = 1,
    channels_last: bool = True,
    reflect: int = 0,
    flips: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield one pass over the set as float pixels (B, C, H, W) in [0, 1] and labels (B,).

    Args:
        images: The set; its pixels are indexed where they lie (see :func:`resident`).
        batch_size: Images per batch, at least 1.
        generator: CPU generator that draws the order and the augmentation; None keeps the order of the set.
        device: Where the batches are wanted.
        augmentation: What is done to the images, drawn anew for every batch; needs a generator.
        drop_last: Leave out a trailing batch that is not full, unless it is the only one.
        min_batch: Leave out a trailing batch smaller than this, unless it is the only one. Batch
            normalisation in training needs 2.
        channels_last: See :func:`to_float`.
        reflect: See :func:`augment`.
        flips: (N,) bool, which images of the set are mirrored where the augmentation flips; None draws.

    Raises:
        InputError: If the set is empty, the batch size is below 1, or an augmentation has no generator.

    Example:
        >>> images = Images(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5) % 2, ("a", "b"))
        >>> [len(pixels) for pixels, _ in batches(images, 2)]
        [2, 2, 1]
    """
    _require(images, batch_size, augmentation, generator)
    # The checks run at the call, not at the first batch.
    change = (augmentation, reflect, flips)
    return _batches(images, batch_size, generator, device, change, drop_last, min_batch, channels_last)


def _batches(
    images: Images,
    batch_size: int,
    generator: torch.Generator | None,
    device: torch.device | str,
    change: tuple[Augmentation, int, Tensor | None],
    drop_last: bool,
    min_batch: int,
    channels_last: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    augmentation, reflect, flips = change
    smallest = batch_size if drop_last else min_batch
    home = images.pixels.device
    order = None if generator is None else torch.randperm(len(images), generator=generator).to(home)
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        if start and stop - start < smallest:
            return
        if order is None:
            pixels = images.pixels[start:stop]
            # Copied, so that no caller can write into the set; the pixels are copied by to_float.
            labels = None if images.labels is None else images.labels[start:stop].clone()
        else:
            rows = order[start:stop]
            pixels = images.pixels[rows]
            labels = None if images.labels is None else images.labels[rows]
        if generator is not None:
            mirrored = None if flips is None or order is None else flips[order[start:stop].to(flips.device)]
            pixels = augment(pixels, augmentation, generator, reflect=reflect, flips=mirrored)
        if labels is not None:
            labels = labels.to(device, non_blocking=True)
        yield to_float(pixels, device, channels_last), labels


def augment(
    pixels: Tensor,
    augmentation: Augmentation,
    generator: torch.Generator,
    *,
    reflect: int = 0,
    flips: Tensor | None = None,
) -> Tensor:
    """Return randomly shifted and, where asked for, mirrored images of the same shape.

    A crop pads with black by an eighth of each side, rounded (4 pixels at 32, 1 at 8), and cuts the original
    size out at a random place; a flip mirrors left and right with probability 1/2. Each image has draws of
    its own.

    Args:
        pixels: (B, C, H, W), any type; uint8 is cheapest.
        augmentation: ``none``, ``crop`` or ``crop+flip``.
        generator: CPU generator.
        reflect: Pad by so many pixels that mirror the image's border, in the place of an eighth in black.
        flips: (B,) bool, which images are mirrored where the augmentation flips; None draws.
    """
    if augmentation not in AUGMENTATIONS:
        raise InputError(
            "unknown augmentation", expected="one of " + ", ".join(AUGMENTATIONS), got=augmentation
        )
    if augmentation == "none":
        return pixels
    batch, _, height, width = pixels.shape
    pad_y, pad_x = (reflect, reflect) if reflect else (padding(height), padding(width))
    tops = torch.randint(2 * pad_y + 1, (batch,), generator=generator)
    lefts = torch.randint(2 * pad_x + 1, (batch,), generator=generator)
    if augmentation != "crop+flip":
        flips = None
    elif flips is None:
        flips = torch.rand(batch, generator=generator) < 0.5
    return shifted(pixels, tops, lefts, flips, reflect=reflect)


def padding(side: int) -> int:
    """Return by how many pixels a side is padded: an eighth, halves rounded up."""
    return (side + 4) // 8


def shifted(
    pixels: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor | None = None, *, reflect: int = 0
) -> Tensor:
    """Cut each image out of its padded self, and then mirror it where ``flips`` says so.

    Args:
        pixels: (B, C, H, W).
        tops: (B,) first row of each window in the padded image, 0 to twice the padding.
        lefts: (B,) first column likewise.
        flips: (B,) bool, or None for no image.
        reflect: Width of a border that mirrors the image, in pixels; 0 is a black one of :func:`padding`.
    """
    batch, channels, height, width = pixels.shape
    home = pixels.device
    if reflect:
        padded = _mirrored_border(pixels, reflect)
    else:
        pad_y, pad_x = padding(height), padding(width)
        padded = functional.pad(pixels, (pad_x, pad_x, pad_y, pad_y))  # (B, C, H + 2 pad_y, W + 2 pad_x)
    rows = tops.to(home)[:, None] + torch.arange(height, device=home)  # (B, H)
    columns = lefts.to(home)[:, None] + torch.arange(width, device=home)  # (B, W)
    if flips is not None:
        columns = torch.where(flips.to(home)[:, None], columns.flip(1), columns)
    # One flat index per pixel serves every channel: a single gather copies the windows.
    flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, -1)  # (B, 1, H * W)
    windows = padded.flatten(2).gather(2, flat.expand(-1, channels, -1))  # (B, C, H * W)
    return windows.view(batch, channels, height, width)


def _mirrored_border(pixels: Tensor, width: int) -> Tensor:
    """Return (B, C, H + 2 width, W + 2 width); torch pads no bytes by reflection."""

    def places(side: int) -> Tensor:
        inside = torch.arange(-width, side + width, device=pixels.device).abs()  # (side + 2 width,)
        return torch.where(inside >= side, 2 * (side - 1) - inside, inside)

    return pixels[:, :, places(pixels.shape[2])][:, :, :, places(pixels.shape[3])]


def _require(
    images: Images, batch_size: int, augmentation: Augmentation, generator: torch.Generator | None
) -> None:
    if not len(images):
        raise InputError("the set is empty", expected="at least 1 image", got=0, where=images.name)
    if batch_size < 1:
        raise InputError("the batch size does not fit", expected="at least 1", got=batch_size)
    if augmentation != "none" and generator is None:
        raise InputError(
            "augmentation needs a generator", remedy="Pass generator=torch.Generator().manual_seed(seed)"
        )
