"""Operators of ONNX that compute with whole numbers of 8 or 16 bits, as what these numbers stand for.

A value that the network quantises is rounded as the file rounds it, and its gradient passes as if it were
not; so what is scanned is what runs, and searches by gradient work. Where the scale is that of the values
themselves (``DynamicQuantizeLinear``), it is that of each image, as where the file runs on one at a time: no
answer here depends on the other images of a batch.

Layers of whole numbers become layers with weights in floating point. The scale of a dynamically quantised
layer is multiplied in by the file behind it; here the weights hold it. Whatever else a file does with levels,
scales and zeros is refused.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbackdoor.weights.formats.onnx import initializers as onnx
from unbackdoor.weights.formats.onnx.node import (
    Call,
    DynamicScale,
    DynamicStep,
    DynamicZero,
    Place,
    QuantisedLayer,
    QuantisedStep,
    Sums,
    Value,
)
from unbackdoor.weights.formats.onnx.operators import conv, linear, same

_FLOATING = (1, 10, 11, 16)  # data types
_LEVELS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
_MOST_FROM_ZERO = 255  # of a level of 8 bits, which the inputs of these layers are
_ROUNDED = "the rounding of quantised values is kept; gradients pass as if there were none"
_BY_THEIR_RANGE = "values are quantised by the range that they have for one image, as where it runs alone"


# ---------------------------------------------------------------------------------------------------
# Values


def _quantize(call: Call) -> Value:
    value, step, bounds = call.operand(0), _step(call), _bounds(call)
    if isinstance(value, Tensor):
        call.builder.spend(value.numel(), 8)
        shaped = _along(call, step, value.dim())
        levels = (value / shaped.scale).round() + shaped.zero
        return levels.clamp(*bounds).to(_type_of_levels(call))
    made = _quantised(call, call.node(), step, bounds)
    call.builder.quantised[call.outputs[0]] = step
    return made


def _quantised(call: Call, node: fx.Node, step: QuantisedStep, bounds: tuple[int, int]) -> fx.Node:
    """Add the rounding of a computed value."""
    if not bool((step.scale > 0).all()) or not bool(step.scale.isfinite().all()):
        raise call.refused("with a scale that is not positive")
    call.builder.notes.append(_ROUNDED)
    numbers = []
    for name, tensor in (("scale", step.scale), ("zero", step.zero)):
        target = call.builder.place(f"{call.kind.lower()}_{call.number}_{name}", name)
        call.builder.root[target] = tensor.reshape(()) if tensor.numel() == 1 else tensor.clone()
        numbers.append(call.builder.get(target))
    return call.builder.call(_rounded, node, *numbers, *bounds, step.axis)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int) -> Tensor:
    if scale.dim():
        shape = [-1 if at == axis % x.dim() else 1 for at in range(x.dim())]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    levels = ((x / scale).round() + zero).clamp(low, high)
    kept = torch.minimum(torch.maximum(x, (low - zero) * scale), (high - zero) * scale)
    return kept + ((levels - zero) * scale - kept).detach()


def _dynamically_rounded(x: Tensor, pixels: Tensor) -> Tensor:
    if x.shape[0] % len(pixels):
        raise ValueError("values are quantised by their range where the images are not the first axis")
    with torch.no_grad():
        rows = x.reshape(len(pixels), -1)  # (B, numbers)
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = torch.where(high == low, torch.ones_like(high), high - low) / 255
        zero = (-low / scale).clamp(0, 255).round()
        levels = ((rows / scale).round() + zero).clamp(0, 255)
        change = ((levels - zero) * scale - rows).reshape(x.shape)
    return x + change


def _quantize_dynamically(call: Call) -> list[Value]:
    levels, scale, zero = (*call.outputs, "", "")[:3]
    if not isinstance(call.operand(0), fx.Node) or not scale or not zero:
        raise call.refused("of constants, or without its scale")
    call.builder.notes += [_ROUNDED, _BY_THEIR_RANGE]
    call.builder.quantised[levels] = DynamicStep((scale, zero))
    made = call.builder.call(_dynamically_rounded, call.node(), call.builder.pixels)
    return [made, DynamicScale((scale,), torch.ones(())), DynamicZero(zero)]


def _dequantize(call: Call) -> Value:
    value, made_by = call.operand(0), call.builder.quantised.get(call.names[0])
    if isinstance(value, Tensor):
        step = _step(call)
        call.builder.spend(value.numel())
        shaped = _along(call, step, value.dim())
        return (value.float() - shaped.zero) * shaped.scale
    scale, zero = call.operand(1), call.operand(2)
    if isinstance(scale, DynamicScale):
        one = len(scale.scales) == 1 and bool((scale.factor == 1).all())
        given = isinstance(zero, DynamicZero) and DynamicStep((scale.scales[0], zero.name))
        if not one or not given or not given.equals(made_by):
            raise call.refused("with another scale than the values were quantised with")
        return same(call)
    if made_by is None or not made_by.equals(_step(call)):
        raise call.refused("with another scale than the values were quantised with")
    return same(call)


# ---------------------------------------------------------------------------------------------------
# Layers


def _quantised_product(call: Call) -> Value:
    """Compute QLinearConv and QLinearMatMul of what the quantised values stand for."""
    inputs, made, step = _step(call, 1), _step(call, 6), _step(call, 4)
    known, levels = call.builder.quantised.get(call.names[0]), call.constant(3)
    if known is None or not known.equals(inputs) or levels is None or levels.is_floating_point():
        raise call.refused("with another scale than the values were quantised with, or of no constant")
    if made.scale.numel() > 1 or inputs.scale.numel() > 1:
        raise call.refused("with a scale for each channel of computed values")
    bias = call.constant(8)
    if bias is not None:
        bias = bias.float() * inputs.scale.reshape(()) * step.scale.flatten()
    bounds, product = _bounds(call, 7), call.kind == "QLinearMatMul"
    place = Place(call.number, 3, turned=product, quantised=QuantisedLayer(inputs.names, result=made.names))
    weight = _levels_from_zero(call, levels, step, rows=product)
    shaped = _along(call, replace(step, axis=1 if product else 0), levels.dim())
    out = _layer(
        call, 3, weight * shaped.scale, bias, place, None if bias is None else replace(place, position=8)
    )
    call.builder.quantised[call.outputs[0]] = made
    return _quantised(call, out, made, bounds)


def _integer_product(call: Call) -> Value:
    """Compute ConvInteger and MatMulInteger: sums that lack the scales of their operands."""
    product = call.kind == "MatMulInteger"
    steps = [_input_step(call, 0, 2)]
    levels = call.operand(1)
    if isinstance(levels, fx.Node):
        if not product:
            raise call.refused("with computed weights")
        steps.append(_input_step(call, 1, 3))
        out = call.builder.call(torch.matmul, call.node(0), call.node(1))
        layer, place = "", None
    else:
        zero = call.constant(3)
        if not isinstance(levels, torch.Tensor) or levels.is_floating_point():
            raise call.refused("without whole numbers as weights")
        zeros = torch.zeros(()) if zero is None else zero.float()
        step = QuantisedStep(torch.ones_like(zeros), zeros, 0)
        weight = _levels_from_zero(call, levels, step, rows=product)
        place = Place(call.number, 1, turned=product, quantised=QuantisedLayer(steps[0].names))
        if isinstance(steps[0], QuantisedStep):  # its scale is known, and no need to wait for it
            return _layer(call, 1, weight / steps[0].scale.reshape(()), None, place, None)
        out = _layer(call, 1, weight, None, None, None)
        layer = str(out.target)
    for one in steps:
        if isinstance(one, QuantisedStep):
            out = call.builder.call(operator.truediv, out, float(one.scale))
    scales = tuple(sorted(one.names[0] for one in steps if isinstance(one, DynamicStep)))
    if scales:
        call.builder.quantised[call.outputs[0]] = Sums(scales, layer, place)
    return out


def _input_step(call: Call, position: int, zero: int) -> QuantisedStep | DynamicStep:
    """Return how the levels of an operand were made, which are counted from the right zero."""
    known, stated = call.builder.quantised.get(call.names[position]), call.operand(zero)
    if isinstance(known, DynamicStep):
        if isinstance(stated, DynamicZero) and stated.name == known.names[1]:
            return known
        raise call.refused("of values that are counted from another zero")
    if isinstance(known, QuantisedStep) and known.scale.numel() == 1:
        given = call.constant(zero)
        if float(0 if given is None else given) == float(known.zero):
            return known
    raise call.refused("of values that are counted from another zero, or not quantised")


def _levels_from_zero(call: Call, levels: Tensor, step: QuantisedStep, *, rows: bool) -> Tensor:
    """Return weights counted from their zero, which may be one for each output."""
    call.builder.spend(levels.numel(), 8)
    if rows and levels.dim() != 2:
        raise call.refused("of other than two axes")
    shaped = _along(call, replace(step, axis=1 if rows else 0), levels.dim())
    weight = levels.float() - shaped.zero  # (O, I, kH, kW), or (I, O) of a product
    per_output = (weight.t() if rows else weight).flatten(1).abs().double().sum(1)  # (O,)
    if per_output.numel() and float(per_output.max()) * _MOST_FROM_ZERO >= 1 << 31:
        raise call.refused("with sums that are too large for its whole numbers")
    return weight


def _layer(
    call: Call, position: int, weight: Tensor, bias: Tensor | None, place: Place | None, of_bias: Place | None
) -> fx.Node:
    """Add the layer under the name that the weights had before they were quantised."""
    name = call.names[position].removesuffix("_quantized").removesuffix("_Transposed")
    around = (*place.quantised.step, *place.quantised.result) if place and place.quantised else ()
    if any(name in call.builder.types for name in around):
        place = of_bias = None  # the file computes in half precision around it
    places = {name: one for name, one in (("weight", place), ("bias", of_bias)) if one is not None}
    call.operands, call.names = [call.operand(0), weight, bias], [call.names[0], name]
    if weight.dim() == 2:
        return linear(call, weight.t(), bias, places)
    return conv(call, places)


# ---------------------------------------------------------------------------------------------------
# Scales of sums


def _rescaled(call: Call) -> Value:
    """Multiply sums with their scales, or scales with each other."""
    first, second = call.operand(0), call.operand(1)
    scales = [one for one in (first, second) if isinstance(one, DynamicScale)]
    others = [one for one in (first, second) if isinstance(one, Tensor)]
    if len(call.operands) == 2 and scales and len(scales) + len(others) == 2:
        call.builder.spend(sum(one.factor.numel() for one in scales) + sum(one.numel() for one in others))
        factor = scales[0].factor * (scales[1].factor if len(scales) == 2 else others[0])
        return DynamicScale(tuple(sorted(name for one in scales for name in one.scales)), factor)
    for at, other in ((0, second), (1, first)):
        sums = call.builder.quantised.get(call.names[at])
        if isinstance(sums, Sums) and isinstance(other, DynamicScale | Tensor):
            given = other.scales if isinstance(other, DynamicScale) else ()
            factor = other.factor if isinstance(other, DynamicScale) else other
            lacking = Counter(sums.scales)
            lacking.subtract(given)
            if not factor.is_floating_point() or min(lacking.values()) < 0:
                break
            return _with_factor(call, at, factor, replace(sums, scales=tuple(sorted(lacking.elements()))))
    raise call.refused("of quantised values with another scale than their own")


def _with_factor(call: Call, at: int, factor: Tensor, left: Sums) -> fx.Node:
    """Multiply sums with a constant: into the weights that they are of, where nothing else uses these."""
    builder, node = call.builder, call.node(at)
    layer = builder.root[str(node.target)] if node.op == "call_module" else None
    turned = None
    if isinstance(layer, nn.Conv2d | nn.Linear) and builder.uses[call.names[at]] == 1:
        turned = _per_output(factor, layer)
    place = left.place
    if layer is not None and turned is not None:
        builder.spend(layer.weight.numel())
        layer.weight = nn.Parameter(layer.weight.detach() * turned)
        if place is not None and place.quantised is not None:
            rescaled = (*place.quantised.rescaled, (call.number, at))
            place = replace(place, quantised=replace(place.quantised, rescaled=rescaled))
    else:
        place = None
        target = builder.place(f"{call.kind.lower()}_{call.number}_factor", "factor")
        builder.root[target] = factor.clone()
        node = builder.call(operator.mul, node, builder.get(target))
    if left.scales:
        builder.quantised[call.outputs[0]] = replace(left, place=place)
    elif place is not None:
        builder.places[f"{left.layer}.weight"] = place
    return node


def _per_output(factor: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    """Return a factor of the results of a layer as one of its weights, or None where it is none."""
    rank = layer.weight.dim()
    if factor.numel() == 1:
        return factor.reshape(()) if factor.dim() <= rank else None
    axis = factor.dim() - (3 if rank == 4 else 1)  # the axis of the outputs, counted from the last
    if factor.dim() > rank or axis < 0:
        return None
    one_each = factor.shape[axis] == factor.numel() == len(layer.weight)
    return factor.reshape(-1, *[1] * (rank - 1)) if one_each else None


def _number_of_sums(call: Call) -> Value:
    if call.integer("to", 0) not in _FLOATING:
        raise call.refused("of quantised values")
    return _renamed(call)


def _renamed(call: Call) -> Value:
    step = call.builder.quantised.get(call.names[0])
    if step is not None:
        call.builder.quantised[call.outputs[0]] = step
    return same(call)


# ---------------------------------------------------------------------------------------------------
# Scales and zeros


def _step(call: Call, position: int = 1) -> QuantisedStep:
    scale, zero = call.constant(position), call.constant(position + 1)
    if scale is None or scale.dim() > 1 or not scale.is_floating_point() or call.integer("block_size", 0):
        raise call.refused("with such a scale")
    if zero is None:
        zero = torch.zeros_like(scale)
    if zero.numel() != scale.numel():
        raise call.refused("with zeros that do not belong to the scales")
    first, second = (*call.names[position : position + 2], "")[:2]
    return QuantisedStep(scale, zero.float(), call.integer("axis", 1), (first, second))


def _along(call: Call, step: QuantisedStep, rank: int) -> QuantisedStep:
    # With one scale for each place along an axis.
    if step.scale.numel() == 1:
        return replace(step, scale=step.scale.reshape(()), zero=step.zero.reshape(()))
    if not -rank <= step.axis < rank:
        raise call.refused("along an axis that the values do not have")
    shape = [-1 if axis == step.axis % rank else 1 for axis in range(rank)]
    return replace(step, scale=step.scale.reshape(shape), zero=step.zero.reshape(shape))


def _type_of_levels(call: Call, position: int = 2) -> torch.dtype:
    zero = call.constant(position)
    stated = onnx.TYPES.get(call.integer("output_dtype", 0), (torch.uint8, "", ""))[0]
    dtype = zero.dtype if zero is not None else stated
    if dtype not in _LEVELS:
        raise call.refused("to such a type")
    return dtype


def _bounds(call: Call, position: int = 2) -> tuple[int, int]:
    info = torch.iinfo(_type_of_levels(call, position))
    return info.min, info.max


_QUANTISING: dict[str, Callable[[Call], Any]] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
QUANTISED_OPERATORS: dict[str, Callable[[Call], Any]] = {
    **_QUANTISING,
    # The same of onnxruntime, which had them for 16 bits before the standard did.
    **{f"com.microsoft.{kind}": make for kind, make in _QUANTISING.items()},
    "ConvInteger": _integer_product,
    "DynamicQuantizeLinear": _quantize_dynamically,
    "MatMulInteger": _integer_product,
    "QLinearConv": _quantised_product,
    "QLinearMatMul": _quantised_product,
}
# What takes levels and knows what they are.
TAKES_QUANTISED = {
    "ConvInteger", "DequantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "com.microsoft.DequantizeLinear",
}  # fmt: skip
# What moves values and does not compute with them: quantised ones stay what they are.
KEEPS_QUANTISED = {
    "Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
# What may be done with scales that are known when the network runs, and with sums that lack them.
RESCALES: dict[str, Callable[[Call], Value]] = {
    "Cast": _number_of_sums,
    "Identity": _renamed,
    "Mul": _rescaled,
}
