"""Recovered triggers as strips of pictures: the image, with the trigger, the difference amplified."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unbackdoor.metrics import Rate
from unbackdoor.report.pictures import data_png
from unbackdoor.report.words import percent
from unbackdoor.triggers import RecoveredTrigger

PICTURE_SIDE = 160  # pixels; twice the width of a picture on the page, and dozens stay under 2 MB
_WHOLE = 0.5  # share of the image from which a trigger is no spot that could be outlined
_HALF = 0.5  # of the largest change of a pixel, from which it belongs to the outlined spot


@dataclass(frozen=True)
class Example:
    """An image without and with a trigger.

    Attributes:
        clean: uint8 (C, H, W).
        triggered: The same with the trigger.
        truth: Its label, or None.
        answers: What the model says to the image, and with the trigger.
        repaired: What the repaired model says with the trigger; None without one.
    """

    clean: Tensor
    triggered: Tensor
    truth: int | None
    answers: tuple[int, int]
    repaired: int | None = None


@dataclass(frozen=True)
class Box:
    """Where a trigger lies, in percent of the image."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Strip:
    """An example as pictures and answers."""

    clean: str
    triggered: str
    difference: str
    before: str
    after: str
    works: bool
    repaired: str | None = None
    repaired_right: bool = False


@dataclass(frozen=True)
class TriggerView:
    """A recovered trigger as pictures."""

    title: str
    about: str
    pattern: str
    mask: str | None
    box: Box | None
    amplified: str
    strips: Sequence[Strip] = field(default=())


def trigger_view(
    trigger: RecoveredTrigger,
    examples: Sequence[Example],
    name: Callable[[int], str],
    success: Rate | None = None,
) -> TriggerView:
    """Return a trigger as pictures over examples.

    Args:
        trigger: The trigger.
        examples: The most convincing first.
        name: Of a class.
        success: Its success on the model as it is, where that was measured.
    """
    largest = max((float(_change(e).max()) for e in examples), default=0.0)
    factor = 255 / largest if largest else 1.0
    return TriggerView(
        f"Towards {name(trigger.label)}",
        _about(trigger, success),
        data_png(_pattern(trigger), largest=PICTURE_SIDE),
        None if trigger.mask is None else data_png(_bytes(trigger.mask[None]), largest=PICTURE_SIDE),
        spot(trigger, examples),
        f"{factor:.1f}".removesuffix(".0"),
        [_strip(e, trigger.label, factor, name) for e in examples],
    )


def spot(trigger: RecoveredTrigger, examples: Sequence[Example] = ()) -> Box | None:
    """Return the box around what a trigger changes; None where that is much of the image."""
    if trigger.mask is not None:
        weight = trigger.mask.float()  # (H, W)
    elif examples:
        weight = torch.stack([_change(e) for e in examples]).mean(0)
    else:
        weight = trigger.pattern.float().abs().mean(0)
    top = float(weight.max())
    if top <= 0:
        return None
    rows, columns = ((weight >= _HALF * top).any(d).nonzero().flatten() for d in (1, 0))
    height, width = weight.shape
    first, last = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    if (last - first) * (right - left) > _WHOLE * height * width:
        return None
    return Box(
        100 * left / width, 100 * first / height, 100 * (right - left) / width, 100 * (last - first) / height
    )


def _strip(example: Example, label: int, factor: float, name: Callable[[int], str]) -> Strip:
    difference = (_change(example) * factor).round().clamp(0, 255).to(torch.uint8)[None]
    before, after = example.answers
    repaired = example.repaired
    right = example.truth if example.truth is not None else before
    return Strip(
        data_png(_displayable(example.clean), largest=PICTURE_SIDE),
        data_png(_displayable(example.triggered), largest=PICTURE_SIDE),
        data_png(difference, largest=PICTURE_SIDE),
        name(before),
        name(after),
        after == label != before,
        None if repaired is None else name(repaired),
        repaired == right,
    )


def _change(example: Example) -> Tensor:
    """Return how much each pixel changes, (H, W) in steps of 255."""
    return (example.triggered.float() - example.clean.float()).abs().amax(0)


def _about(trigger: RecoveredTrigger, success: Rate | None) -> str:
    if trigger.mask is not None:
        size = float(trigger.mask.sum())
        share = size / trigger.mask.numel()
        text = f"Its mask covers as much as {size:.1f} whole pixels ({percent(share)} of the image)."
    else:
        mean = 255 * float(trigger.pattern.abs().mean())
        text = f"It is added to every pixel, on average {mean:.1f} of 255 steps."
    if success is not None and success.total:
        text += f" It turns {success.hits} of {success.total} images of other classes into the class."
    elif trigger.success is not None and math.isfinite(trigger.success):
        text += f" It turns {percent(trigger.success)} of images that it was not made from into the class."
    return text


def _pattern(trigger: RecoveredTrigger) -> Tensor:
    if trigger.mask is not None:
        return _bytes(_rgb(trigger.pattern * trigger.mask))
    # A faint pattern around grey, stretched so that it can be seen.
    largest = float(trigger.pattern.abs().max()) or 1.0
    return _bytes(_rgb(0.5 + trigger.pattern / (2 * largest)))


def _rgb(pattern: Tensor) -> Tensor:
    return pattern if len(pattern) in (1, 3) else pattern.mean(0, keepdim=True)


def _displayable(pixels: Tensor) -> Tensor:
    return pixels if len(pixels) in (1, 3) else pixels.float().mean(0, keepdim=True).to(torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    return (values.float() * 255).round().clamp(0, 255).to(torch.uint8)
