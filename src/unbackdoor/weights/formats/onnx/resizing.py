"""Resize and Upsample of ONNX, by its own formulas: torch places the pixels in two of its many ways only."""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx.node import LARGEST, Call, Value

_PLACES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric")
_ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_MODES = ("nearest", "linear", "cubic")


def resize(call: Call) -> Value:
    """Return the enlarged or reduced value of an operator.

    Raises:
        UnsupportedModel: If it works in a way that is not imported.
    """
    mode, places = call.text("mode", "nearest"), call.text("coordinate_transformation_mode", "half_pixel")
    rounding = call.text("nearest_mode", "round_prefer_floor")
    old = call.kind == "Upsample" or call.builder.opset < 11
    if old:  # they had no choice
        places, rounding = "asymmetric", "floor"
    for value, known in ((mode, _MODES), (places, _PLACES), (rounding, _ROUNDINGS)):
        if value not in known:
            raise call.refused(f"in the way {short(value)}")
    others = ("antialias", "exclude_outside")
    if any(call.integer(name, 0) for name in others) or call.integers("axes", []):
        raise call.refused("with smoothing, or over some of the axes")
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refused("with its proportions kept")
    sizes = call.lengths(3) if not old else None
    factors = _factors(call, 1 if old else 2) if sizes is None else ()
    if isinstance(sizes, list):
        sizes = call.bounded(sizes)
    coefficient = call.number_of("cubic_coeff_a", -0.75)
    return call.builder.call(resized, call.node(), sizes, factors, mode, places, rounding, coefficient)


def _factors(call: Call, position: int) -> tuple[float, ...]:
    scales = call.constant(position)
    stated = [float(v) for v in scales.flatten()[:9].tolist()] if scales is not None else []
    stated = stated or call.floats("scales")
    if (
        len(stated) != 4
        or any(not 1 / LARGEST <= value <= LARGEST for value in stated)
        or stated[:2] != [1, 1]
    ):
        raise call.refused("with such factors")
    return tuple(stated)


def resized(
    x: Tensor,
    sizes: Tensor | list[int] | None,
    factors: tuple[float, ...],
    mode: str,
    places: str,
    rounding: str,
    coefficient: float,
) -> Tensor:
    """Resize the last two axes of images (B, C, H, W); ``sizes`` or ``factors`` hold four numbers."""
    wanted = [int(size) for size in sizes] if sizes is not None else []
    for axis in (2, 3):
        before = x.shape[axis]
        after = wanted[axis] if wanted else int(before * factors[axis])
        if not 0 < after <= LARGEST:
            raise ValueError("a size that no image has")
        factor = factors[axis] if factors else after / before
        if places == "align_corners" and after != before * factor:
            raise ValueError("corners are aligned to a size that is no whole number: runtimes differ")
        at = _origin(torch.arange(after, dtype=torch.float64, device=x.device), before, after, factor, places)
        if after != before or factor != 1:
            x = _interpolated(x, axis, at, mode, rounding, coefficient)
    return x


def _origin(at: Tensor, before: int, after: int, factor: float, places: str) -> Tensor:
    """Return where each of the new pixels lies among the old ones."""
    if places == "asymmetric":
        return at / factor
    if places == "align_corners":
        return at * (before - 1) / max(after - 1, 1)
    if places == "pytorch_half_pixel" and after == 1:
        return torch.zeros_like(at)
    middle = (at + 0.5) / factor - 0.5
    if places == "half_pixel_symmetric":
        middle = middle + before / 2 * (1 - after / (factor * before))
    return middle


def _interpolated(x: Tensor, axis: int, at: Tensor, mode: str, rounding: str, coefficient: float) -> Tensor:
    last = x.shape[axis] - 1
    if mode == "nearest":
        whole = {
            "round_prefer_floor": (at - 0.5).ceil,
            "round_prefer_ceil": (at + 0.5).floor,
            "floor": at.floor,
            "ceil": at.ceil,
        }[rounding]()
        return x.index_select(axis, whole.clamp(0, last).long())
    first = at.floor()
    share = at - first  # (new size,)
    made = torch.zeros_like(x.index_select(axis, torch.zeros_like(first).long()))
    shape = [-1 if place == axis else 1 for place in range(x.dim())]
    for step in (0, 1) if mode == "linear" else (-1, 0, 1, 2):
        weight = _cubic(share - step, coefficient) if mode == "cubic" else 1 - (share - step).abs()
        taken = x.index_select(axis, (first + step).clamp(0, last).long())
        made = made + taken * weight.to(x.dtype).reshape(shape)
    return made


def _cubic(distance: Tensor, a: float) -> Tensor:
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, far)
