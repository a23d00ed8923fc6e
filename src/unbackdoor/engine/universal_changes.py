"""Changes that are one for all images: what a trigger can be, in forms that a search can descend on.

A form turns free parameters and a size into a change. Sizes are given for the image at hand: a patch, a
window and a stamp have pixels that scale with the image's area, a warp has pixels that scale with its side,
all others are root mean squares in [0, 1].

Forms: ``patch`` (mask and pattern anywhere), ``window`` (a small square of any content at a fixed place),
``blend`` (added everywhere), ``frequency`` (added, of low frequencies alone), ``colour`` (gain and offset of
each channel), ``warp`` (a smooth displacement). ``stamp`` is a fixed square that needs no search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.triggers import RecoveredTrigger, added, mixed

Form = Literal["patch", "window", "blend", "frequency", "colour", "warp"]
Shape = tuple[int, int, int]
_COARSE = 6  # nodes of a warp along a side
_WAVES = 8  # frequencies of a pattern along a side


@dataclass(frozen=True, eq=False)
class UniversalChange:
    """A change with its final values.

    Attributes:
        form: Its form.
        label: Class that it leads to; -1 where it was made to leave the predicted class only.
        parameters: (...) free parameters, as the form takes them.
        size: Size that it acts with.
        place: (y, x) of a window's upper left corner.
    """

    form: Form
    label: int
    parameters: Tensor
    size: float
    place: tuple[int, int] = (0, 0)

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels (B, C, H, W) in [0, 1] with the change, in [0, 1]."""
        raw = self.parameters.to(pixels.device)[None]
        places = torch.tensor([self.place], device=pixels.device)
        return FORMS[self.form].apply(pixels[None], raw, self.size, places)[0]

    def trigger(self, shape: Shape, label: int | None = None) -> RecoveredTrigger | None:
        """Return it as mask and pattern, or as what is added; None for what is neither."""
        goal = self.label if label is None else label
        black, white = torch.zeros(1, *shape), torch.ones(1, *shape)
        if self.form in ("blend", "frequency"):
            return RecoveredTrigger(goal, self.apply(white / 2)[0] - 0.5, None)
        if self.form in ("patch", "window"):
            low, high = self.apply(black)[0], self.apply(white)[0]  # m p, and 1 - m + m p
            mask = (1 - (high - low)).clamp(0, 1)  # (C, H, W)
            pattern = (low / mask.clamp_min(1e-6)).clamp(0, 1)
            return RecoveredTrigger(goal, pattern, mask.amax(0))
        return None


@dataclass(frozen=True, eq=False)
class GivenChange:
    """A trigger that was recovered before, as a change among others.

    Attributes:
        given: The trigger.
        label: Class that it leads to.
        form: What it is called.
    """

    given: RecoveredTrigger
    label: int
    form: str = "given trigger"

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels (B, C, H, W) in [0, 1] with the trigger, in [0, 1]."""
        return self.given.apply(pixels)

    def trigger(self, shape: Shape, label: int | None = None) -> RecoveredTrigger:
        """Return the trigger itself."""
        return self.given


@dataclass(frozen=True)
class SearchForm:
    """How a form is searched.

    Attributes:
        start: Shape of an image and a generator -> first parameters (...).
        apply: Pixels (G or 1, B, C, H, W), parameters (G, ...), a size, places (G, 2) -> (G, B, C, H, W).
        sizes: Shape of an image -> first and last size of a search.
    """

    start: Callable[[Shape, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor, float, Tensor], Tensor]
    sizes: Callable[[Shape], tuple[float, float]]


def window_side(shape: Shape) -> int:
    """Return the side of a window, 5 pixels of 32."""
    return max(2, round(5 * min(shape[1:]) / 32))


def mask_of_size(raw: Tensor, size: float) -> Tensor:
    """Return masks (G, H, W) in [0, 1] whose sum is the size, from free heights (G, H, W)."""
    heights = raw.flatten(1).softmax(1)  # (G, H * W)
    full = torch.zeros_like(heights, dtype=torch.bool)
    mask = size * heights
    for _ in range(8):  # what is cut off at 1 goes to the others; each round settles some pixels
        over = mask.detach() > 1
        if not bool((over & ~full).any()):
            break
        full = full | over
        left = (size - full.sum(1, keepdim=True)).clamp_min(0)
        rest = heights * ~full
        mask = torch.where(full, 1.0, left * rest / rest.sum(1, keepdim=True).clamp_min(1e-20))
    return mask.clamp_max(1).view_as(raw)


def of_rms(raw: Tensor, size: float) -> Tensor:
    """Return each row of (G, ...) scaled to a root mean square."""
    rms = raw.flatten(1).square().mean(1).sqrt().clamp_min(1e-20)
    scaled: Tensor = raw * (size / rms).view(-1, *[1] * (raw.dim() - 1))
    return scaled


def patched(x: Tensor, raw: Tensor, size: float) -> Tensor:
    """Return images x (G, B, C, H, W) with the patches of parameters (G, 1 + C, H, W) of this size."""
    mask = mask_of_size(raw[:, 0], size)[:, None, None]  # (G, 1, 1, H, W)
    pattern = raw[:, None, 1:].sigmoid()  # (G, 1, C, H, W)
    return mixed(x, pattern, mask)  # (G, B, C, H, W)


def _window(x: Tensor, raw: Tensor, size: float, places: Tensor) -> Tensor:
    (height, width), side = x.shape[-2:], raw.shape[-1]
    steps = torch.arange(side, device=x.device)
    rows = places[:, :1] + steps  # (G, S)
    columns = places[:, 1:] + steps
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (G, S * S)
    index = index[:, None].expand(-1, raw.shape[1], -1)  # (G, C, S * S)
    groups, channels = len(raw), raw.shape[1]
    empty = torch.zeros(groups, channels, height * width, device=x.device)
    pattern = empty.scatter(2, index, raw.sigmoid().flatten(2)).view(groups, 1, channels, height, width)
    mask = empty.scatter(2, index, torch.ones_like(index, dtype=raw.dtype)).view_as(pattern)
    return mixed(x, pattern, mask)


def _blend(x: Tensor, raw: Tensor, size: float, places: Tensor) -> Tensor:
    return added(x, of_rms(raw, size)[:, None])


def _frequency(x: Tensor, raw: Tensor, size: float, places: Tensor) -> Tensor:
    rows, columns = (_cosines(side, x.device) for side in x.shape[-2:])  # (H, 8), (W, 8)
    pattern = torch.einsum("yi,gcij,xj->gcyx", rows, raw, columns)
    return added(x, of_rms(pattern, size)[:, None])


def _colour(x: Tensor, raw: Tensor, size: float, places: Tensor) -> Tensor:
    gain, offset = of_rms(raw, size).unbind(-1)  # (G, C)
    gain, offset = gain[:, None, :, None, None], offset[:, None, :, None, None]
    return (x + gain * (x - 0.5) + offset).clamp(0, 1)


def _warp(x: Tensor, raw: Tensor, size: float, places: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    flow = F.interpolate(raw, (height, width), mode="bicubic", align_corners=True)  # (G, 2, H, W)
    flow = of_rms(flow, size).movedim(1, -1)  # (G, H, W, 2), in pixels
    flow = flow * torch.tensor([2 / width, 2 / height], device=x.device)
    rows = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=x.device)
    columns = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=x.device)
    straight = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (H, W, 2)
    batch = x.shape[1]
    grid = (straight + flow).repeat_interleave(batch, 0)  # (G * B, H, W, 2)
    many = x.expand(len(raw), -1, -1, -1, -1).flatten(0, 1)
    moved = F.grid_sample(many, grid, padding_mode="border", align_corners=False)
    return moved.view(len(raw), batch, *moved.shape[1:])


def _cosines(side: int, device: torch.device) -> Tensor:
    place = (torch.arange(side, device=device) + 0.5) / side  # (side,)
    return torch.cos(math.pi * place[:, None] * torch.arange(_WAVES, device=device))  # (side, 8)


def _noise(*shape: int) -> Callable[[Shape, torch.Generator], Tensor]:
    return lambda image, draws: torch.randn(shape, generator=draws)


def _area(shape: Shape) -> float:
    return shape[1] * shape[2] / 1024


FORMS: Mapping[Form, SearchForm] = {
    "patch": SearchForm(
        lambda shape, draws: torch.randn(1 + shape[0], *shape[1:], generator=draws),
        lambda x, raw, size, places: patched(x, raw, size),
        lambda shape: (60 * _area(shape), max(1.0, 12 * _area(shape))),
    ),
    "window": SearchForm(
        lambda shape, draws: torch.randn(shape[0], window_side(shape), window_side(shape), generator=draws),
        _window,
        lambda shape: (0.0, 0.0),
    ),
    "blend": SearchForm(
        lambda shape, draws: torch.randn(shape, generator=draws), _blend, lambda shape: (0.04, 0.012)
    ),
    "frequency": SearchForm(
        lambda shape, draws: torch.randn(shape[0], _WAVES, _WAVES, generator=draws),
        _frequency,
        lambda shape: (0.06, 0.03),
    ),
    "colour": SearchForm(
        lambda shape, draws: torch.randn(shape[0], 2, generator=draws), _colour, lambda shape: (0.3, 0.1)
    ),
    "warp": SearchForm(
        _noise(2, _COARSE, _COARSE),
        _warp,
        lambda shape: (3 * min(shape[1:]) / 32, min(shape[1:]) / 32),
    ),
}
