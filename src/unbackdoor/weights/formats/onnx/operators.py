"""What the operators of ONNX are in torch: layers where they have weights or a name, functions elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx import initializers as onnx
from unbackdoor.weights.formats.onnx.node import LARGEST, Call, Place, Value
from unbackdoor.weights.formats.onnx.resizing import resize

WEIGHTS = ("weight", "bias", "running_mean", "running_var")
_LONGEST = 1 << 20  # entries of what the network makes from nothing but sizes


def makes_sizes(call: Call) -> bool:
    """Tell whether an operator computes integers from sizes, which may be sizes themselves."""
    if call.kind in ("Shape", "Size"):
        return True
    if call.kind == "Cast":
        return call.integer("to", 0) in (6, 7, 9) and call.operand(0) in call.builder.size_nodes
    from_sizes = (
        value in call.builder.size_nodes
        if isinstance(value, fx.Node)
        else isinstance(value, Tensor) and not value.is_floating_point()
        for value in call.operands
        if value is not None
    )
    return call.kind in _OF_SIZES and all(from_sizes)


# ---------------------------------------------------------------------------------------------------
# Layers


def _with(call: Call, layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    # Layers are built without memory and then filled, so that no random generator advances.
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        call.builder.spend(tensor.numel(), tensor.element_size())
        if name in layer._buffers:
            layer._buffers[name] = tensor.clone()
        else:
            setattr(layer, name, nn.Parameter(tensor.clone()))
    return layer


def _places(call: Call, *names: str) -> dict[str, Place]:
    # Of operands from the second on that are there.
    there = ((name, position) for position, name in enumerate(names, 1) if call.operand(position) is not None)
    return {name: Place(call.number, position) for name, position in there}


def _pads(call: Call, axes: int) -> list[int]:
    # As ONNX writes them: all beginnings, then all ends.
    mode = call.text("auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID"):
        raise call.refused(f"with auto_pad {short(mode)}")
    pads = call.bounded(call.integers("pads", [0] * 2 * axes))
    if len(pads) != 2 * axes:
        raise call.refused("with paddings of another number of axes")
    return pads


def _symmetric(pads: list[int]) -> bool:
    return pads[: len(pads) // 2] == pads[len(pads) // 2 :]


def _around(pads: list[int]) -> list[int]:
    # As torch wants them: begin and end of the last axis first.
    half = len(pads) // 2
    return [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[half + axis])]


def conv(call: Call, places: dict[str, Place] | None = None) -> fx.Node:
    """Add a convolution; its weights stand where the operands do, unless it is said where else."""
    weight, bias = call.weight(1), call.constant(2)  # (O, I / groups, kH, kW)
    groups = call.integer("group", 1)
    if weight.dim() != 4 or not 1 <= groups <= weight.shape[0] or weight.shape[0] % groups:
        raise call.refused("other than over the two axes of an image")
    pads = _pads(call, 2)
    inputs = call.node()
    if not _symmetric(pads):
        inputs, pads = call.builder.call(F.pad, inputs, _around(pads)), [0, 0, 0, 0]
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=call.pair("strides"),
        padding=(pads[0], pads[1]),
        dilation=call.pair("dilations"),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    filled = _with(call, layer, weight=weight, bias=bias)
    places = _places(call, "weight", "bias") if places is None else places
    return call.builder.module(call, filled, inputs=inputs, places=places)


def _conv_transpose(call: Call) -> fx.Node:
    weight, bias = call.weight(1), call.constant(2)  # (I, O / groups, kH, kW)
    groups, pads = call.integer("group", 1), _pads(call, 2)
    if weight.dim() != 4 or not 1 <= groups <= weight.shape[0] or weight.shape[0] % groups:
        raise call.refused("other than over the two axes of an image")
    if not _symmetric(pads) or call.integers("output_shape", []):
        raise call.refused("with such a border")
    more = call.bounded(call.integers("output_padding", [0, 0]))
    layer = nn.ConvTranspose2d(
        weight.shape[0],
        weight.shape[1] * groups,
        (weight.shape[2], weight.shape[3]),
        stride=call.pair("strides"),
        padding=(pads[0], pads[1]),
        output_padding=(more[0], more[-1]),
        dilation=call.pair("dilations"),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    filled = _with(call, layer, weight=weight, bias=bias)
    return call.builder.module(call, filled, places=_places(call, "weight", "bias"))


def _batch_norm(call: Call) -> fx.Node:
    scale, shift, mean, var = (call.weight(position) for position in (1, 2, 3, 4))
    if any(tensor.shape != scale.shape or tensor.dim() != 1 for tensor in (shift, mean, var)):
        raise call.refused("with statistics of different lengths")
    if call.integer("training_mode", 0):
        call.builder.notes.append(
            "batch normalisation was exported in training mode; running statistics are used"
        )
    layer = nn.BatchNorm2d(
        len(scale),
        eps=call.number_of("epsilon", 1e-5),
        momentum=1 - call.number_of("momentum", 0.9),
        device="meta",
    )
    tracked = torch.zeros((), dtype=torch.int64)
    filled = _with(
        call, layer, weight=scale, bias=shift, running_mean=mean, running_var=var, num_batches_tracked=tracked
    )
    return call.builder.module(call, filled, places=_places(call, *WEIGHTS))


def _layer_norm(call: Call) -> fx.Node:
    weight, bias = call.weight(1), call.constant(2)
    if call.integer("axis", -1) not in (-1, -weight.dim()):
        raise call.refused("over other axes than those of its weights")
    layer = nn.LayerNorm(
        list(weight.shape), eps=call.number_of("epsilon", 1e-5), bias=bias is not None, device="meta"
    )
    filled = _with(call, layer, weight=weight, bias=bias)
    return call.builder.module(call, filled, places=_places(call, "weight", "bias"))


def linear(call: Call, weight: Tensor, bias: Tensor | None, places: dict[str, Place]) -> fx.Node:
    """Add a linear layer with a weight (O, I) and a bias (O,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    filled = _with(call, layer, weight=weight.contiguous(), bias=bias)
    return call.builder.module(call, filled, places=places)


def _gemm(call: Call) -> fx.Node:
    weight, bias = call.weight(1), call.constant(2)
    alpha, beta = call.number_of("alpha", 1.0), call.number_of("beta", 1.0)
    if weight.dim() != 2 or call.integer("transA", 0):
        raise call.refused("with a turned first operand")
    turned = not call.integer("transB", 0)
    weight = weight.t() if turned else weight  # (O, I)
    if alpha != 1:
        call.builder.spend(weight.numel(), weight.element_size())
        weight = alpha * weight
    places = {"weight": Place(call.number, 1, turned, "" if alpha == 1 else "alpha")}
    if bias is not None:
        if bias.numel() not in (1, weight.shape[0]):
            raise call.refused("with a bias of another length")
        bias = (bias if beta == 1 else beta * bias).flatten().expand(weight.shape[0])
        places["bias"] = Place(call.number, 2, scale="" if beta == 1 else "beta")
    return linear(call, weight, bias, places)


def _matmul(call: Call) -> fx.Node:
    weight = call.operand(1)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return linear(call, weight.t(), None, {"weight": Place(call.number, 1, turned=True)})
    return call.builder.call(torch.matmul, call.node(0), call.node(1))


def _max_pool(call: Call) -> fx.Node:
    kernel = call.pair("kernel_shape")
    pads = _pads(call, 2)
    inputs = call.node()
    if not _symmetric(pads) or any(2 * pad > size for pad, size in zip(pads, kernel, strict=False)):
        inputs, pads = call.builder.call(F.pad, inputs, _around(pads), value=float("-inf")), [0, 0, 0, 0]
    layer = nn.MaxPool2d(
        kernel,
        stride=call.pair("strides"),
        padding=(pads[0], pads[1]),
        dilation=call.pair("dilations"),
        ceil_mode=bool(call.integer("ceil_mode", 0)),
    )
    return call.builder.module(call, layer, inputs=inputs)


def _average_pool(call: Call) -> fx.Node:
    kernel = call.pair("kernel_shape")
    pads = _pads(call, 2)
    if not _symmetric(pads) or call.pair("dilations") != (1, 1):
        raise call.refused("with such a window")
    layer = nn.AvgPool2d(
        kernel,
        stride=call.pair("strides"),
        padding=(pads[0], pads[1]),
        ceil_mode=bool(call.integer("ceil_mode", 0)),
        count_include_pad=bool(call.integer("count_include_pad", 0)),
    )
    return call.builder.module(call, layer)


def _clip(call: Call) -> fx.Node:
    # Bounds were attributes before opset 11.
    low, high = (
        float(value) if value is not None else call.number_of(name, default)
        for value, name, default in (
            (call.constant(1), "min", float("-inf")),
            (call.constant(2), "max", float("inf")),
        )
    )
    if (low, high) == (0.0, 6.0):
        return call.builder.module(call, nn.ReLU6())
    return call.builder.module(call, nn.Hardtanh(low, high))


def _hard_sigmoid(call: Call) -> fx.Node:
    alpha, beta = call.number_of("alpha", 0.2), call.number_of("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call.builder.module(call, nn.Hardsigmoid())
    return call.builder.call(_scaled_clamp, call.node(), alpha, beta)


def _leaky(call: Call) -> fx.Node:
    return call.builder.module(call, nn.LeakyReLU(call.number_of("alpha", 0.01)))


def _gelu(call: Call) -> fx.Node:
    mode = call.text("approximate", "none")
    if mode not in ("none", "tanh"):
        raise call.refused(f"with approximation {short(mode)}")
    return call.builder.module(call, nn.GELU(approximate=mode))


def _swish(call: Call) -> Value:
    if call.number_of("alpha", 1.0) != 1:
        raise call.refused("with a factor")
    return call.builder.module(call, nn.SiLU())


def _layer(make: Callable[[], nn.Module]) -> Callable[[Call], Value]:
    return lambda call: call.builder.module(call, make())


# ---------------------------------------------------------------------------------------------------
# What lies between; the functions that the networks call at run time stand here too


def _scaled_clamp(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _reshaped(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    # A zero stands for the size that is there.
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


def _reshaped_for(x: Tensor, sizes: tuple[int, ...], rows: int, pixels: Tensor) -> Tensor:
    return _reshaped(x, (rows * len(pixels), *sizes[1:]))


def _flattened(x: Tensor, axis: int) -> Tensor:
    rows = 1
    for size in x.shape[: axis if axis >= 0 else x.dim() + axis]:
        rows *= size
    return x.reshape(rows, -1)


def _sliced(
    x: Tensor, begins: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...]
) -> Tensor:
    for begin, end, axis, step in zip(begins, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0:  # from behind: positions stop before the first, where -1 cannot stand for it
            first = min(max(begin + size if begin < 0 else begin, -1), size - 1)
            last = max(end + size if end < 0 else end, -1) if end >= -size else -1
            x = x.index_select(axis, torch.arange(first, min(last, first), step, device=x.device))
            continue
        begin, end = (min(max(place + size if place < 0 else place, 0), size) for place in (begin, end))
        x = x.narrow(axis, begin, max(end - begin, 0))
        if step > 1:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]
    return x


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    # What has one row belongs to every image of the batch.
    rows = max(len(x) for x in tensors)
    return torch.cat([x.expand(rows, *x.shape[1:]) if axis and len(x) == 1 else x for x in tensors], axis)


def _expanded(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, sizes))


def _reshaped_by(x: Tensor, sizes: Tensor) -> Tensor:
    return _reshaped(x, tuple(sizes.tolist()))


def _expanded_by(x: Tensor, sizes: Tensor) -> Tensor:
    return _expanded(x, tuple(sizes.tolist()))


def _shape_of(x: Tensor, begin: int, end: int) -> Tensor:
    # Where there are no numbers at all, as in a trial of the sizes, there still are those of a shape.
    return torch.tensor(list(x.shape)[begin:end], device="cpu" if x.is_meta else x.device)


def _full(sizes: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    shape = torch.Size(sizes.tolist())
    if shape.numel() > _LONGEST:
        raise ValueError("a constant that is made of sizes is too large")
    return torch.full(shape, value, dtype=dtype, device=sizes.device)


def _typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _float(x: Tensor) -> Tensor:
    return x.float()


def _quotient(x: Any, y: Any) -> Any:
    # Integers are divided as in C.
    integers = not any(
        isinstance(v, float) or (isinstance(v, Tensor) and v.is_floating_point()) for v in (x, y)
    )
    return torch.div(x, y, rounding_mode="trunc" if integers else None)


def _gathered(x: Tensor, places: Tensor, axis: int) -> Tensor:
    axis %= x.dim()
    flat = torch.where(places < 0, places + x.shape[axis], places).long().flatten()
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _softmax_behind(x: Tensor, axis: int) -> Tensor:
    # Before operator set 13: over all axes from this one on.
    return x.flatten(axis).softmax(-1).reshape(x.shape)


def _instance_normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _reduced(x: Tensor, kind: str, axes: tuple[int, ...], keep: bool) -> Tensor:
    if kind == "ReduceSum":
        return torch.sum(x, dim=axes, keepdim=keep)
    if kind == "ReduceMax":
        return torch.amax(x, dim=axes, keepdim=keep)
    if kind == "ReduceMin":
        return torch.amin(x, dim=axes, keepdim=keep)
    if kind == "ReduceSumSquare":
        return torch.sum(x * x, dim=axes, keepdim=keep)
    if kind == "ReduceLogSumExp":
        return torch.logsumexp(x, dim=axes, keepdim=keep)
    if kind == "ReduceMean":
        return torch.mean(x, dim=axes, keepdim=keep)
    order = 1 if kind == "ReduceL1" else 2
    norm: Tensor = torch.linalg.vector_norm(x, ord=order, dim=axes, keepdim=keep)
    return norm


def _normed(x: Tensor, axis: int, order: int) -> Tensor:
    norm = torch.linalg.vector_norm(x, ord=order, dim=axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)  # what is zero stays zero


def _standardised(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    middle = x - x.mean(axes, keepdim=True)
    return middle / ((middle * middle).mean(axes, keepdim=True).sqrt() + 1e-9)


def _lp_norm(call: Call) -> Value:
    order = call.integer("p", 2)
    if order not in (1, 2):
        raise call.refused("of this order")
    return call.builder.call(_normed, call.node(), call.integer("axis", -1), order)


def _standardise(call: Call) -> Value:
    return call.builder.call(_standardised, call.node(), tuple(call.integers("axes", [0, 2, 3])))


def _local_response(call: Call) -> Value:
    (size,) = call.bounded([call.integer("size", 0)], 1)
    if size % 2 == 0:  # torch and ONNX place an even window differently
        raise call.refused("over an even number of channels")
    alpha, beta, bias = (call.number_of(n, v) for n, v in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return call.builder.module(call, nn.LocalResponseNorm(size, alpha, beta, bias))


def _thresholded(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _shrunk(x: Tensor, lambd: float, bias: float) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))


def _remainder(x: Any, y: Any) -> Any:
    return torch.remainder(x, y)


def _larger(x: Any, y: Any) -> Any:
    return torch.maximum(*_tensors(x, y))


def _smaller(x: Any, y: Any) -> Any:
    return torch.minimum(*_tensors(x, y))


def _tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    like = x if isinstance(x, Tensor) else y
    one, other = (v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (x, y))
    return one, other


def _blocks_to_space(x: Tensor, side: int, columns_first: bool) -> Tensor:
    count, channels, height, width = x.shape
    if columns_first:  # as torch does it
        return F.pixel_shuffle(x, side)
    x = x.reshape(count, side, side, channels // side**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(count, channels // side**2, height * side, width * side)


def _space_to_blocks(x: Tensor, side: int) -> Tensor:
    count, channels, height, width = x.shape
    x = x.reshape(count, channels, height // side, side, width // side, side).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(count, channels * side**2, height // side, width // side)


def _squeezed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.squeeze(axes) if axes else x.squeeze()


def _unsqueezed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _binary(function: Callable[..., Any]) -> Callable[[Call], Value]:
    def make(call: Call) -> Value:
        first, second = call.operand(0), call.operand(1)
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            call.builder.spend(torch.broadcast_shapes(first.shape, second.shape).numel(), 8)
            return _checked(call, function(first, second))
        if function is operator.add and (merged := _bias(call, first, second)) is not None:
            return merged
        # Numbers are written into the graph; they are no weights that anybody would tune.
        operands = [_scalar(value, call, position) for position, value in enumerate((first, second))]
        return call.builder.call(function, *operands)

    return make


def _scalar(value: Value, call: Call, position: int) -> Any:
    if isinstance(value, Tensor) and not value.dim():
        return value.item()
    return call.node(position)


def _bias(call: Call, first: Value, second: Value) -> fx.Node | None:
    # A product and a sum are one linear layer, whose bias the exporter has taken out.
    for at, (node, other) in enumerate(((first, second), (second, first))):
        if not isinstance(node, fx.Node) or not isinstance(other, Tensor) or node.op != "call_module":
            continue
        layer = call.builder.root[str(node.target)]
        alone = isinstance(layer, nn.Linear) and layer._parameters["bias"] is None
        once = call.builder.uses[call.names[at]] == 1
        if alone and once and tuple(other.shape) == (layer.out_features,):
            layer.bias = nn.Parameter(other.clone())
            call.builder.places[f"{node.target}.bias"] = Place(call.number, 1 - at)
            return node
    return None


def _unary(function: Callable[..., Any]) -> Callable[[Call], Value]:
    def make(call: Call) -> Value:
        value = call.operand(0)
        if isinstance(value, Tensor):
            call.builder.spend(value.numel(), 8)
            return _checked(call, function(value))
        return call.builder.call(function, call.node())

    return make


def _checked(call: Call, made: Any) -> Tensor:
    if not isinstance(made, Tensor):
        raise call.refused("with such constants")
    return made


def _constant(call: Call) -> Value:
    made = call.tensor("value")
    if made is None and (numbers := call.integers("value_ints", [call.integer("value_int", 0)])) is not None:
        attributes = call._attributes
        if "value_float" in attributes:
            made = torch.tensor(call.number_of("value_float", 0.0))
        elif "value_int" in attributes:
            made = torch.tensor(numbers[0])
        elif "value_ints" in attributes:
            made = torch.tensor(numbers)
        elif "value_floats" in attributes:
            made = torch.tensor([float(f) for f in attributes["value_floats"].floats])
    if made is None:
        raise call.refused("of this kind")
    return made


def same(call: Call) -> Value:
    """Give a value another name."""
    # What else uses it under the old one uses what the new one stands for.
    others = call.builder.uses.get(call.names[0], 1) - 1
    call.builder.uses[call.outputs[0]] = call.builder.uses.get(call.outputs[0], 0) + others
    return call.operand(0)


def _dropout(call: Call) -> Value:
    ratio = call.constant(1)
    share = float(ratio) if ratio is not None else call.number_of("ratio", 0.5)
    if not 0 <= share <= 1:
        raise call.refused(f"with a share of {share}")
    training = call.constant(2)
    if training is not None and bool(training.any()) and share:
        # A runtime then drops values when it classifies: what is scanned would not be what runs.
        raise call.refused("in training mode")
    return call.builder.module(call, nn.Dropout(share))


def _cast(call: Call) -> Value:
    value, to = call.operand(0), call.integer("to", 0)
    if isinstance(value, Tensor) and to in onnx.TYPES:
        call.builder.spend(value.numel(), 8)
        return value.to(onnx.TYPES[to][0])
    if to in (6, 7, 9):
        return call.builder.call(_typed, call.node(), onnx.TYPES[to][0])
    if to not in (1, 10, 11, 16):
        raise call.refused("to another type than floating point")
    if isinstance(value, fx.Node) and value.op in ("call_module", "placeholder"):
        return same(call)  # of another precision in the file; here all is in float32
    return call.builder.call(_float, call.node())


def _mean(call: Call) -> Value:
    axes = call.sizes(1) if len(call.operands) > 1 else call.integers("axes", [])
    if not axes:
        raise call.refused("over all axes")
    return call.builder.call(
        torch.mean, call.node(), dim=tuple(axes), keepdim=bool(call.integer("keepdims", 1))
    )


def _reduce(call: Call) -> Value:
    axes = call.sizes(1) if len(call.operands) > 1 else call.integers("axes", [])
    if not axes:
        raise call.refused("over all axes")  # the images of a batch among them
    value, keep = call.operand(0), bool(call.integer("keepdims", 1))
    if isinstance(value, Tensor):
        return _reduced(value, call.kind, tuple(axes), keep)
    return call.builder.call(_reduced, call.node(), call.kind, tuple(axes), keep)


def _reshape(call: Call) -> Value:
    sizes = call.lengths(1)
    value = call.operand(0)
    if isinstance(sizes, fx.Node):
        return call.builder.call(_reshaped_by, call.node(), sizes)
    if sizes is None or (call.integer("allowzero", 0) and 0 in sizes):
        raise call.refused("with such sizes")
    if isinstance(value, Tensor):
        call.builder.spend(value.numel(), 8)
        return _reshaped(value, tuple(sizes))
    batch = call.builder.batch
    if batch and sizes and sizes[0] > 0 and sizes[0] % batch == 0:
        # Exported with the batch of its example written into it: the first axis is what the others leave.
        if -1 in sizes[1:]:
            rows = sizes[0] // batch  # for each image
            return call.builder.call(_reshaped_for, call.node(), tuple(sizes), rows, call.builder.pixels)
        sizes[0] = -1
    return call.builder.call(_reshaped, call.node(), tuple(sizes))


def _transpose(call: Call) -> Value:
    order = call.integers("perm", [])
    value = call.operand(0)
    if not order:
        raise call.refused("without an order of its axes")
    return (
        value.permute(order)
        if isinstance(value, Tensor)
        else call.builder.call(torch.permute, call.node(), tuple(order))
    )


def _concat(call: Call) -> Value:
    axis = call.integer("axis", 0)
    constants = [value for value in call.operands if isinstance(value, Tensor)]
    if len(constants) == len(call.operands):
        call.builder.spend(sum(value.numel() for value in constants), 8)
        return torch.cat(constants, axis)
    batch = call.builder.batch
    nodes = []
    for position, value in enumerate(call.operands):
        repeat = 0
        if isinstance(value, Tensor) and axis and value.dim() and len(value) == batch > 1:
            # A class token, repeated for the batch of the example.
            if not bool((value == value[:1]).all()):
                raise call.refused("with a constant for each image of a batch")
            call.operands[position], repeat = value[:1], batch
        nodes.append(call.node(position, repeat))
    return call.builder.call(_joined, nodes, axis)


def _softmax(call: Call) -> Value:
    if call.builder.opset < 13:
        soft = call.builder.call(_softmax_behind, call.node(), call.integer("axis", 1))
        return soft if call.kind == "Softmax" else call.builder.call(torch.log, soft)
    kind = nn.Softmax if call.kind == "Softmax" else nn.LogSoftmax
    return call.builder.module(call, kind(dim=call.integer("axis", -1)))


def _einsum(call: Call) -> Value:
    equation = call.text("equation", "")
    if not equation.isascii() or len(equation) > 100 or len(call.names) != 2:
        raise call.refused("in this way")
    return call.builder.call(torch.einsum, equation, call.node(0), call.node(1))


def _instance_norm(call: Call) -> Value:
    weights = [call.node(position) for position in (1, 2)]
    return call.builder.call(_instance_normed, call.node(), *weights, call.number_of("epsilon", 1e-5))


def _group_norm(call: Call) -> Value:
    weight, bias, groups = call.weight(1), call.weight(2), call.integer("num_groups", 1)
    if call.builder.opset < 21 or weight.dim() != 1 or groups < 1 or len(weight) % groups:
        raise call.refused("with such weights")
    layer = nn.GroupNorm(groups, len(weight), eps=call.number_of("epsilon", 1e-5), device="meta")
    filled = _with(call, layer, weight=weight, bias=bias)
    return call.builder.module(call, filled, places=_places(call, "weight", "bias"))


def _several(function: Callable[..., Any]) -> Callable[[Call], Value]:
    pair = _binary(function)

    def make(call: Call) -> Value:
        if len(call.operands) == 2:
            return pair(call)
        made: Any = call.operand(0)
        for position in range(1, len(call.operands)):
            other = call.operand(position)
            if isinstance(made, Tensor) and isinstance(other, Tensor):
                made = function(made, other)
                call.builder.spend(made.numel(), 8)
            else:
                first = made if isinstance(made, fx.Node) else call.node(0)
                made = call.builder.call(function, first, call.node(position))
        return made  # type: ignore[no-any-return]

    return make


def _prelu(call: Call) -> Value:
    return call.builder.call(_leaking, call.node(), call.node(1))


def _leaking(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _tile(call: Call) -> Value:
    repeats = call.sizes(1)
    if repeats is None:
        raise call.refused("without a number of repeats")
    repeats = call.bounded(repeats, 1)
    value = call.operand(0)
    if isinstance(value, Tensor):
        call.builder.spend(value.numel() * torch.Size(repeats).numel(), 8)
        return value.repeat(*repeats)
    return call.builder.call(torch.tile, call.node(), tuple(repeats))


def _range(call: Call) -> Value:
    if any(isinstance(value, fx.Node) for value in call.operands):
        if any(isinstance(v, fx.Node) and v not in call.builder.size_nodes for v in call.operands):
            raise call.refused("with bounds that are no sizes")
        return call.builder.call(_range_by, *(call.node(position) for position in range(3)))
    first, last, step = (call.constant(position) for position in range(3))
    if first is None or last is None or step is None or not float(step):
        raise call.refused("without bounds")
    count = (float(last) - float(first)) / float(step)
    if not 0 <= count < _LONGEST:
        raise call.refused("with such bounds")
    return torch.arange(first.item(), last.item(), step.item(), dtype=first.dtype)


def _range_by(first: Tensor, last: Tensor, step: Tensor) -> Tensor:
    begin, end, by = (int(value) for value in (first, last, step))
    if not by or (end - begin) // by > _LONGEST:
        raise ValueError("a constant that is made of sizes is too large")
    return torch.arange(begin, end, by, device=first.device)


def _depth_to_space(call: Call) -> Value:
    (side,) = call.bounded([call.integer("blocksize", 0)], 1)
    columns_first = call.text("mode", "DCR") == "CRD"
    return call.builder.call(_blocks_to_space, call.node(), side, columns_first)


def _space_to_depth(call: Call) -> Value:
    (side,) = call.bounded([call.integer("blocksize", 0)], 1)
    return call.builder.call(_space_to_blocks, call.node(), side)


_BORDERS = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(call: Call) -> Value:
    pads = call.lengths(1) if len(call.operands) > 1 else call.integers("pads", [])
    fill = call.constant(2)
    mode = call.text("mode", "constant")
    if mode in _BORDERS and isinstance(pads, list) and len(pads) == 8 and call.operand(3) is None:
        bounded = call.bounded(pads)
        if any(bounded[axis] for axis in (0, 1, 4, 5)):
            raise call.refused("in this way")
        return call.builder.call(F.pad, call.node(), _around(bounded)[:4], mode=_BORDERS[mode])
    if isinstance(pads, fx.Node) and mode == "constant" and len(call.operands) < 4:
        value = float(fill) if fill is not None else 0.0
        return call.builder.call(_padded_by, call.node(), pads, value)
    if not isinstance(pads, list) or not pads or mode != "constant" or call.constant(3) is not None:
        raise call.refused("in this way")
    value = float(fill) if fill is not None else call.number_of("value", 0.0)
    return call.builder.call(F.pad, call.node(), _around(call.bounded(pads, -LARGEST)), value=value)


def _padded_by(x: Tensor, pads: Tensor, value: float) -> Tensor:
    return F.pad(x, _around(pads.flatten().tolist()), value=value)


def _slice(call: Call) -> Value:
    computed = [call.lengths(position) for position in (1, 2)]
    if any(isinstance(value, fx.Node) for value in computed):
        return _slice_by_sizes(call)
    begins, ends, axes, steps = (call.sizes(position) for position in (1, 2, 3, 4))
    if len(call.operands) == 1:  # before operator set 10
        begins, ends = (call.integers(name, []) for name in ("starts", "ends"))
        axes = call.integers("axes", list(range(len(begins))))
    if begins is None or ends is None or any(not step for step in steps or ()):
        raise call.refused("without places")
    axes = axes if axes is not None else list(range(len(begins)))
    steps = steps if steps is not None else [1] * len(begins)
    if any(step < -LARGEST for step in steps):
        raise call.refused("with such steps")
    value = call.operand(0)
    places = (tuple(begins), tuple(ends), tuple(axes), tuple(steps))
    return (
        _sliced(value, *places)
        if isinstance(value, Tensor)
        else call.builder.call(_sliced, call.node(), *places)
    )


def _slice_by_sizes(call: Call) -> Value:
    axes, steps = call.sizes(3), call.sizes(4)
    if axes is None or any(not -LARGEST <= step <= LARGEST or not step for step in steps or ()):
        raise call.refused("with such places")
    places = (call.node(1), call.node(2), tuple(axes), tuple(steps or [1] * len(axes)))
    return call.builder.call(_sliced_by, call.node(), *places)


def _sliced_by(
    x: Tensor, begins: Tensor, ends: Tensor, axes: tuple[int, ...], steps: tuple[int, ...]
) -> Tensor:
    return _sliced(x, tuple(begins.flatten().tolist()), tuple(ends.flatten().tolist()), axes, steps)


def _gather_nd(call: Call) -> Value:
    places, value = call.constant(1), call.operand(0)
    if places is None or places.is_floating_point() or call.integer("batch_dims", 0):
        raise call.refused("with such places")
    if isinstance(value, Tensor):
        share = value.numel() // max(torch.Size(value.shape[: places.shape[-1]]).numel(), 1)
        call.builder.spend(share * places.numel(), value.element_size())
        return _chosen(value, places)
    return call.builder.call(_chosen, call.node(), call.node(1))


def _chosen(x: Tensor, places: Tensor) -> Tensor:
    return x[tuple(places.long().unbind(-1))]


def _scatter(call: Call) -> Value:
    if call.text("reduction", "none") != "none":
        raise call.refused("with a reduction")
    values = [call.operand(position) for position in range(3)]
    if isinstance(values[1], Tensor) and values[1].is_floating_point():
        raise call.refused("with places that are no whole numbers")
    if all(isinstance(value, Tensor) for value in values):
        first, places, updates = values
        assert isinstance(first, Tensor) and isinstance(places, Tensor) and isinstance(updates, Tensor)
        call.builder.spend(first.numel(), 8)
        return _scattered(first, places, updates)
    return call.builder.call(_scattered, *(call.node(position) for position in range(3)))


def _scattered(x: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    return x.index_put(tuple(places.long().unbind(-1)), updates.to(x.dtype))


def _split(call: Call) -> Value:
    axis, parts = call.integer("axis", 0), len(call.outputs)
    sizes = call.sizes(1) if len(call.operands) > 1 else (call.integers("split", []) or None)
    if parts > 64 or (sizes is not None and len(sizes) != parts):
        raise call.refused("into so many parts")
    node = call.node()
    if sizes is None:
        made = [call.builder.call(_part, node, place, parts, axis) for place in range(parts)]
    else:
        at, made = 0, []
        for size in sizes:
            made.append(call.builder.call(_sliced, node, (at,), (at + size,), (axis,), (1,)))
            at += size
    return made  # type: ignore[return-value]


def _part(x: Tensor, place: int, parts: int, axis: int) -> Tensor:
    # Equal parts, of which the last may be smaller.
    size = -(-x.shape[axis] // parts)
    begin = min(place * size, x.shape[axis])
    return x.narrow(axis, begin, min(size, x.shape[axis] - begin))


def _expand(call: Call) -> Value:
    sizes = call.lengths(1)
    if isinstance(sizes, fx.Node):
        return call.builder.call(_expanded_by, call.node(), sizes)
    if sizes is None:
        raise call.refused("without sizes")
    value, batch = call.operand(0), call.builder.batch
    if isinstance(value, Tensor) and batch > 1 and len(sizes) == value.dim() and sizes[0] == batch:
        sizes[0] = 1  # a class token for each image of the example: one row belongs to every image
    return call.builder.call(_expanded, call.node(), tuple(call.bounded(sizes)))


def _shape(call: Call) -> Value:
    value, begin, end = call.operand(0), call.integer("start", 0), call.integer("end", 1 << 31)
    if isinstance(value, Tensor):
        return torch.tensor(list(value.shape)[begin:end], dtype=torch.int64)
    return call.builder.call(_shape_of, call.node(), begin, end)


def _constant_of_shape(call: Call) -> Value:
    sizes, stated = call.lengths(0), call.tensor("value")
    fill = stated if stated is not None else torch.zeros(1)
    if sizes is None or fill.numel() != 1:
        raise call.refused("with such constants")
    if isinstance(sizes, fx.Node):
        return call.builder.call(_full, sizes, fill.item(), fill.dtype)
    count = torch.Size(call.bounded(sizes)).numel()
    call.builder.spend(count, fill.element_size())
    return torch.full(sizes, fill.item(), dtype=fill.dtype)


def _where(call: Call) -> Value:
    values = [call.operand(position) for position in range(3)]
    constants = [value for value in values if isinstance(value, Tensor)]
    if len(constants) == 3:
        call.builder.spend(torch.broadcast_shapes(*(value.shape for value in constants)).numel(), 8)
        return torch.where(constants[0], constants[1], constants[2])
    return call.builder.call(torch.where, *(call.node(position) for position in range(3)))


def _axes(call: Call) -> tuple[int, ...]:
    axes = call.sizes(1) if len(call.operands) > 1 else call.integers("axes", [])
    return tuple(axes or ())


def _squeeze(call: Call) -> Value:
    value = call.operand(0)
    return (
        _squeezed(value, _axes(call))
        if isinstance(value, Tensor)
        else call.builder.call(_squeezed, call.node(), _axes(call))
    )


def _unsqueeze(call: Call) -> Value:
    value = call.operand(0)
    if isinstance(value, Tensor):
        return _unsqueezed(value, _axes(call))
    return call.builder.call(_unsqueezed, call.node(), _axes(call))


def _all_in_order(call: Call, index: Tensor) -> fx.Node | None:
    # A view that takes every number of the example's images in order, which some exporters write as a choice.
    batch, value = call.builder.batch, call.operand(0)
    flat = isinstance(value, fx.Node) and value.target is _reshaped and value.args[1] == (-1,)
    if not flat or not batch or index.dim() < 2 or len(index) != batch:
        return None
    if not torch.equal(index.flatten(), torch.arange(index.numel())):
        return None
    return call.builder.call(_reshaped, call.node(), (-1, *index.shape[1:]))


def _gather(call: Call) -> Value:
    value, axis = call.operand(0), call.integer("axis", 0)
    if call.operand(1) in call.builder.size_nodes:
        return call.builder.call(_gathered, call.node(), call.node(1), axis)
    index = call.constant(1)
    if index is None or index.is_floating_point():
        raise call.refused("with places that are no whole numbers")
    if isinstance(value, Tensor):
        if not index.dim():
            return value.select(axis, int(index))
        share = value.numel() // max(value.shape[axis], 1)
        call.builder.spend(share * index.numel(), value.element_size())
        return _gathered(value, index, axis)
    if (whole := _all_in_order(call, index)) is not None:
        return whole
    if index.dim():
        return call.builder.call(_gathered, call.node(), call.node(1), axis)
    return call.builder.call(torch.select, call.node(), axis, int(index))


OPERATORS: dict[str, Callable[[Call], Any]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(operator.add),
    "And": _binary(torch.logical_and),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Celu": lambda call: call.builder.module(call, nn.CELU(call.number_of("alpha", 1.0))),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _unary(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Div": _binary(_quotient),
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Elu": lambda call: call.builder.module(call, nn.ELU(call.number_of("alpha", 1.0))),
    "Equal": _binary(operator.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": lambda call: call.builder.call(_flattened, call.node(), call.integer("axis", 1)),
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _layer(lambda: nn.AdaptiveAvgPool2d(1)),
    "GlobalMaxPool": _layer(lambda: nn.AdaptiveMaxPool2d(1)),
    "Greater": _binary(operator.gt),
    "GreaterOrEqual": _binary(operator.ge),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _layer(nn.Hardswish),
    "Identity": same,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky,
    "Less": _binary(operator.lt),
    "LessOrEqual": _binary(operator.le),
    "LRN": _local_response,
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax,
    "LpNormalization": _lp_norm,
    "MatMul": _matmul,
    "Max": _several(_larger),
    "MaxPool": _max_pool,
    "MeanVarianceNormalization": _standardise,
    "Min": _several(_smaller),
    "Mish": _layer(nn.Mish),
    "Mod": _binary(_remainder),
    "Mul": _binary(operator.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _binary(operator.pow),
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce,
    "ReduceL2": _reduce,
    "ReduceLogSumExp": _reduce,
    "ReduceMax": _reduce,
    "ReduceMean": _mean,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "ReduceSumSquare": _reduce,
    "Relu": _layer(nn.ReLU),
    "Reshape": _reshape,
    "Resize": resize,
    "Round": _unary(torch.round),
    "ScatterND": _scatter,
    "Selu": _layer(nn.SELU),
    "Shape": _shape,
    "Shrink": lambda call: call.builder.call(
        _shrunk, call.node(), call.number_of("lambd", 0.5), call.number_of("bias", 0.0)
    ),
    "Sigmoid": _layer(nn.Sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _layer(nn.Softplus),
    "Softsign": _layer(nn.Softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(operator.sub),
    "Sum": _several(operator.add),
    "Swish": _swish,
    "Tanh": _layer(nn.Tanh),
    "ThresholdedRelu": lambda call: call.builder.call(
        _thresholded, call.node(), call.number_of("alpha", 1.0)
    ),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": resize,
    "Where": _where,
    "Xor": _binary(torch.logical_xor),
}
# Of integers that are sizes these make integers that are sizes.
_OF_SIZES = {
    "Add", "And", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
    "Range", "Reshape", "ScatterND", "Slice", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
    "Xor",
}  # fmt: skip
