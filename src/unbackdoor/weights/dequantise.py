"""Quantised state dicts as people write them: whole numbers beside their scale, turned into numbers.

    W = (levels - zero point) * scale

Torch's own quantised tensors carry their scale and are numbers already (``formats.tensors``). Other files
hold plain whole numbers, and scale and zero point under names of their own. These are taken where the name
says whose they are and the shape says how they are laid over the weight; where one of the two is open, the
file is refused with the reason. The scales of a layer's inputs and outputs, by which the quantised network
rounds, are left out by name: a network of numbers does not have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.tensors import dequantise, quantised

_LEVELS = (torch.int8, torch.uint8)
# What libraries call the scale and the zero point of a tensor, behind its name.
_SCALES = ("_scale", "_scales", ".scale", ".scales")
_ZEROS = ("_zero_point", "_zero_points", "_zp", ".zero_point", ".zero_points")
# Behind the name of the layer: those of its weight, or of its outputs.
_OF_LAYER, _ZEROS_OF_LAYER = ("scale", "scales"), ("zero_point", "zero_points")
# Of bitsandbytes: the largest absolute value of each row, which is the level 127; and how rows are laid out.
_LARGEST, _LAYOUT = "SCB", "weight_format"
_AROUND = ("input", "output", "act", "activation")  # and then one of the above


@dataclass(frozen=True)
class Dequantised:
    """A state dict of numbers.

    Attributes:
        tensors: Tensors by name.
        types: The types in the file of those that are quantised there.
        left_out: Names of the scales and zero points of inputs and outputs.
    """

    tensors: dict[str, Tensor]
    types: dict[str, str]
    left_out: tuple[str, ...]


def dequantised(state: Mapping[str, Tensor], types: Mapping[str, str]) -> Dequantised:
    """Return a state dict with numbers in the place of whole numbers and their scales.

    Args:
        state: Tensors by name; those of quantised types of torch are numbers already.
        types: The types that these have in the file, by name.

    Raises:
        UnsupportedModel: If it cannot be told how a scale belongs to a weight, or it is none.
    """
    tensors, used = dict(state), set[str]()
    found = {name: types[name] for name in state if name in types}
    left_out = _of_torchs_outputs(state) if types else []
    for name, levels in state.items():
        if levels.dtype not in _LEVELS or levels.dim() < 2:
            continue
        parts = _scale_and_zero(name, state)
        if parts is None:
            continue
        scale, zero = parts
        values = _over(name, levels, state[scale])
        if scale.rpartition(".")[2] == _LARGEST:
            values = values.float() / 127
        point = torch.tensor(0) if zero is None else _over(name, levels, state[zero])
        tensors[name] = dequantise(name, levels, values, point)
        found[name] = f"{str(levels.dtype).removeprefix('torch.')} with {scale}"
        layer = name.rpartition(".")[0]
        used |= {scale, zero or scale, _inside(layer, _LAYOUT)}
        around = [_inside(layer, word + end) for word in _AROUND for end in (*_SCALES, *_ZEROS)]
        left_out += [one for one in around if one in state]
    used |= set(left_out)
    return Dequantised({n: t for n, t in tensors.items() if n not in used}, found, tuple(left_out))


def _scale_and_zero(name: str, state: Mapping[str, Tensor]) -> tuple[str, str | None] | None:
    """Return the names of scale and zero point of a tensor of whole numbers; None where it has neither."""
    layer, _, leaf = name.rpartition(".")
    scale, zero = (_one(name, [name + end for end in ends], state) for ends in (_SCALES, _ZEROS))
    if leaf == "weight" and scale is None:
        of_layer, zero_of_layer = (
            _one(name, [_inside(layer, end) for end in ends], state)
            for ends in ((*_OF_LAYER, _LARGEST), _ZEROS_OF_LAYER)
        )
        # A layer of torch states the scale of its outputs so: two single numbers beside signed weights.
        single = of_layer is not None and state[of_layer].numel() == 1
        if single and zero_of_layer is not None and state[name].dtype == torch.int8:
            raise quantised(
                f"{of_layer} and {zero_of_layer}, which may be those of the weights or of the outputs"
            )
        scale, zero = of_layer, zero or zero_of_layer
        if scale == _inside(layer, _LARGEST) and state.get(_inside(layer, _LAYOUT), torch.zeros(1)).any():
            raise quantised(f"rows in an order of their own, tensor {short(name)}")
    if scale is None and zero is not None:
        raise quantised(f"a zero point and no scale, tensor {short(name)}")
    return None if scale is None else (scale, zero)


def _one(name: str, names: list[str], state: Mapping[str, Tensor]) -> str | None:
    there = [one for one in names if one in state]
    if len(there) > 1:
        raise quantised(f"{listed(there)}, of which either may belong to tensor {short(name)}")
    return there[0] if there else None


def _inside(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


def _over(name: str, levels: Tensor, values: Tensor) -> Tensor:
    """Return a scale or zero point in the form in which it is laid over the levels."""
    if values.numel() == 1:
        return values.reshape(())
    if values.dim() == 1 and len(values) == len(levels):
        return values.reshape(-1, *[1] * (levels.dim() - 1))
    if values.dim() == levels.dim() and all(
        own in (1, whole) for own, whole in zip(values.shape, levels.shape, strict=True)
    ):
        return values
    raise quantised(
        f"a scale or zero point of shape {list(values.shape)} for one of {list(levels.shape)}, "
        f"tensor {short(name)}"
    )


def _of_torchs_outputs(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of scales and zero points of outputs, one number each, as torch's layers have them."""
    names: list[str] = []
    for name, scale in state.items():
        zero = f"{name.removesuffix('scale')}zero_point"
        if name.rpartition(".")[2] != "scale" or zero not in state:
            continue
        if scale.numel() == state[zero].numel() == 1 and not state[zero].is_floating_point():
            names += [name, zero]
    return names
