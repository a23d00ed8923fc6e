"""From an ONNX graph to a network of ordinary torch layers, so that hooks, pruning and repair work on it.

Needs:   the extra ``onnx``.
Departs: a softmax at the very end is left out, because every method here works on logits; batch
         normalisation that was exported in training mode becomes an ordinary one, which in evaluation uses
         the running statistics.

Convolutions, normalisations, linear layers and activations become modules under the names of their weights,
so that ``layer1.0.conv1`` is found again. What lies between becomes calls of functions. The usual operators
of classifiers are known; any other is refused by its name.

Where each tensor of the network stands in the file is kept (``Place``), so that ``onnx_write`` can put a
repaired one back. What the file can make of a few bytes, by sharing and folding constants, is bounded by the
bytes it has; what the network does with an image, by ``models.effort``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.models.formats import onnx
from unbackdoor.models.formats.buffers import short
from unbackdoor.models.formats.tensors import MAX_AXES, MAX_TIED

MAX_NODES = 20_000
_SLACK = 64 << 20  # bytes that any file may fold and share, however small it is
_LONGEST = 1 << 20  # entries of what the network makes from nothing but sizes
_LARGEST = 4096  # of a kernel, a stride, a padding; nothing in an image classifier is longer
_SEGMENT = re.compile(r"[A-Za-z0-9_]{1,100}")
_WEIGHTS = ("weight", "bias", "running_mean", "running_var")
_DOMAINS = ("", "ai.onnx")

_COLOURS = (1, 3, 4)

Value = fx.Node | Tensor | None


@dataclass(frozen=True)
class Place:
    """Where a tensor of the network stands in the file: an operand of one of its operators.

    Attributes:
        node: Position of the operator in the graph.
        position: Position of the operand.
        turned: Whether the file holds it transposed.
        scale: Attribute of the operator that the tensor was multiplied with, or empty.
        repeat: Rows of the operand, where the file repeats the one row of the tensor; else 0.
    """

    node: int
    position: int
    turned: bool = False
    scale: str = ""
    repeat: int = 0


@dataclass(frozen=True)
class Graph:
    """What can be told of a graph without building the network.

    Attributes:
        operators: Number of operators.
        unknown: Kinds of operators that are not imported, sorted.
        input_shape: (C, H, W) as the file states it; None where it leaves it open.
    """

    operators: int
    unknown: tuple[str, ...]
    input_shape: tuple[int, ...] | None


def describe_graph(path: Path) -> Graph:
    """Tell what a graph holds.

    Raises:
        UnbackdoorError: If the file cannot be parsed, see :func:`import_graph`.
    """
    graph = onnx.parse(Path(path)).graph
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    shape = _input_shape(inputs[0]) if len(inputs) == 1 else None
    return Graph(len(graph.node), _unknown(graph), shape)


def import_graph(path: Path) -> fx.GraphModule:
    """Build a network from an ONNX file; nothing of the file is executed.

    Args:
        path: The file. Weights in other files must lie in its folder.

    Returns:
        A module from (B, C, H, W) to logits (B, K), in evaluation mode. Its ``meta`` has ``input_shape``,
        which is None where the file leaves it open, ``channels``, likewise, ``notes``, a tuple of remarks,
        and ``places``, by the names of its state dict.

    Raises:
        MissingExtra: If the package onnx is not installed.
        InputError: If the file is damaged.
        UnsafeFile: If it names data outside its folder, or is built to exhaust the memory.
        UnsupportedModel: If it has operators that are not imported; names them.
    """
    path = Path(path)
    model = onnx.parse(path)
    builder = _Builder(path)
    try:
        return builder.build(model.graph)
    except UnbackdoorError:
        raise
    except (
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise InputError(
            "the graph of the model is damaged", got=short(str(error).split("\n")[0]), where=path
        ) from error


class _Call:
    """One operator of the file with its operands looked up."""

    def __init__(self, builder: _Builder, message: Any, number: int) -> None:
        self.kind: str = message.op_type
        self.builder = builder
        self.number = number
        self.label = f"{self.kind} {short(message.name or number)}"
        self.names = list(message.input)
        self.outputs = list(message.output)
        self.operands: list[Value] = [builder.value(name) for name in self.names]
        self._attributes = {attribute.name: attribute for attribute in message.attribute}

    def integer(self, name: str, default: int) -> int:
        return int(self._attributes[name].i) if name in self._attributes else default

    def number_of(self, name: str, default: float) -> float:
        return float(self._attributes[name].f) if name in self._attributes else default

    def text(self, name: str, default: str) -> str:
        return self._attributes[name].s.decode("utf-8", "replace") if name in self._attributes else default

    def integers(self, name: str, default: list[int]) -> list[int]:
        return [int(i) for i in self._attributes[name].ints] if name in self._attributes else default

    def tensor(self, name: str) -> Tensor | None:
        found = self._attributes.get(name)
        return self.builder.tensors.read(found.t) if found is not None and found.HasField("t") else None

    def operand(self, position: int) -> Value:
        return self.operands[position] if position < len(self.operands) else None

    def constant(self, position: int) -> Tensor | None:
        """Return an operand that is known now; None where it is left out."""
        value = self.operand(position)
        if isinstance(value, fx.Node):
            raise self.refused(f"with a computed operand {position}")
        return value

    def weight(self, position: int) -> Tensor:
        value = self.constant(position)
        if value is None or not value.is_floating_point():
            raise self.refused(f"without weights as operand {position}")
        return value

    def sizes(self, position: int) -> list[int] | None:
        """Return a constant list of integers; None where it is left out."""
        value = self.constant(position)
        if value is None:
            return None
        if value.is_floating_point() or value.numel() > 2 * MAX_AXES:
            raise self.refused("with sizes that are none")
        return [int(i) for i in value.flatten().tolist()]

    def node(self, position: int = 0, repeat: int = 0) -> fx.Node:
        """Return an operand as a node of the graph, whatever it is."""
        if position >= len(self.names):
            raise self.refused(f"without operand {position}")
        place = Place(self.number, position, repeat=repeat)
        return self.builder.node(self.operand(position), self.names[position], place)

    def lengths(self, position: int) -> fx.Node | list[int] | None:
        """Return sizes, constant or computed from the sizes of other values; None where left out."""
        value = self.operand(position)
        if isinstance(value, fx.Node) and value in self.builder.whole:
            return value
        return self.sizes(position)

    def refused(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the ONNX operator {self.kind} is not imported {what}",
            where=f"{self.builder.path}, {self.label}",
            remedy="Export the model again in evaluation mode with a recent opset, or give its state dict",
        )

    def pair(self, name: str, default: int = 1) -> tuple[int, int]:
        """Return an attribute with one size for each axis of an image."""
        values = self.bounded(self.integers(name, [default] * 2), 1)
        if len(values) != 2:
            raise self.refused("other than over the two axes of an image")
        return values[0], values[1]

    def bounded(self, values: list[int], least: int = 0) -> list[int]:
        if any(not least <= value <= _LARGEST for value in values):
            raise self.refused(f"with sizes such as {short(values[:4])}")
        return values


class _Builder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = onnx.Tensors(path)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.values: dict[str, Value] = {}
        self.uses: dict[str, int] = {}
        self.notes: list[str] = []
        self.places: dict[str, Place] = {}
        self.whole: set[fx.Node] = set()  # integers computed from sizes, which other sizes may be made of
        self.batch = 0  # images of the example that the exporter has fixed; 0 where it left them open
        self._taken: set[str] = set()
        self._above: set[str] = set()
        self._spent = 0

    def build(self, graph: Any) -> fx.GraphModule:
        if len(graph.node) > MAX_NODES:
            raise UnsupportedModel(
                "the model has too many operators",
                expected=f"at most {MAX_NODES}",
                got=len(graph.node),
                where=self.path,
            )
        if unknown := _unknown(graph):
            raise UnsupportedModel(
                "the graph has operators that are not imported: " + ", ".join(unknown),
                expected="only " + ", ".join(sorted(_OPERATORS)),
                where=self.path,
                remedy="Give the state dict of the model and its architecture instead",
            )
        for tensor in graph.initializer:
            self._define(tensor.name, self.tensors.read(tensor))
        inputs = [value for value in graph.input if value.name not in self.values]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise UnsupportedModel(
                "the model is no classifier of single images",
                expected="one input and one output",
                got=f"{len(inputs)} and {len(graph.output)}",
                where=self.path,
            )
        first = inputs[0].type.tensor_type.shape.dim[:1]
        self.batch = int(first[0].dim_value) if first else 0
        shape = _input_shape(inputs[0])
        pixels = self.graph.placeholder("pixels")
        if shape is not None and shape[0] not in _COLOURS and shape[2] in _COLOURS:
            self.notes.append("the graph takes images with the colours last; they are turned for it")
            shape = (shape[2], *shape[:2])
            pixels = self.call(torch.permute, pixels, (0, 2, 3, 1))
        self._define(inputs[0].name, pixels)
        for name in [name for node in graph.node for name in node.input] + [graph.output[0].name]:
            self.uses[name] = self.uses.get(name, 0) + 1
        self._operators(graph)
        result = self.values.get(graph.output[0].name)
        if not isinstance(result, fx.Node):
            raise UnsupportedModel("the output of the model does not depend on its input", where=self.path)
        self.graph.output(result)
        module = fx.GraphModule(self.root, self.graph, "ImportedNetwork")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        kept = module.state_dict().keys()
        module.meta.update(
            input_shape=shape,
            channels=_channels(inputs[0]) if shape is None else shape[0],
            notes=tuple(self.notes),
            places={name: place for name, place in self.places.items() if name in kept},
        )
        return module.eval()

    def _define(self, name: str, value: Value) -> None:
        if name in self.values:
            raise UnsafeFile(
                "two values of the graph have one name, of which readers choose differently",
                got=short(name),
                where=self.path,
            )
        self.values[name] = value

    def spend(self, count: int, width: int = 4) -> None:
        """Account for the bytes of a tensor that is made of those in the file, before it is made.

        Raises:
            UnsafeFile: If the file makes far more than it holds.
        """
        self._spent += count * width
        if self._spent > MAX_TIED * self.tensors.held + _SLACK:
            raise UnsafeFile("the graph makes far more of its weights than it holds", where=self.path)

    def _operators(self, graph: Any) -> None:
        for number, message in enumerate(graph.node):
            kind = message.op_type
            call = _Call(self, message, number)
            if not call.outputs or not call.outputs[0]:
                raise call.refused("without an output")
            if any(name and self.uses.get(name) for name in call.outputs[1:]) and kind not in ("Split",):
                raise call.refused("with its further outputs in use")
            if kind in ("Softmax", "LogSoftmax") and self._is_end(call, graph):
                self.notes.append("the softmax at the end was left out: the network gives logits")
                self._define(call.outputs[0], call.operand(0))
                continue
            made = _OPERATORS[kind](call)
            for name, value in zip(call.outputs, made if isinstance(made, list) else [made], strict=False):
                self._define(name, value)
                if isinstance(value, fx.Node) and _is_whole(call):
                    self.whole.add(value)

    def _is_end(self, call: _Call, graph: Any) -> bool:
        return call.outputs[0] == graph.output[0].name and self.uses[call.outputs[0]] == 1

    def value(self, name: str) -> Value:
        """Return what a name stands for; None for an operand that is left out."""
        if not name:
            return None
        if name not in self.values:
            raise InputError(
                "an operator has an operand that nothing makes", got=short(name), where=self.path
            )
        return self.values[name]

    def node(self, value: Value, name: str, place: Place) -> fx.Node:
        """Return a value as a node; a tensor becomes a parameter or a buffer of the network."""
        if isinstance(value, fx.Node):
            return value
        if value is None:
            raise InputError("an operator lacks an operand", where=self.path)
        target = self.place(name, "constant")
        self.spend(value.numel(), value.element_size())
        self.places[target] = place
        held = value.clone()
        self.root[target] = nn.Parameter(held) if held.is_floating_point() and held.dim() else held
        return self.graph.get_attr(target)

    def place(self, name: str, kind: str) -> str:
        """Return a free attribute path, at best the one that the exporter kept in a name."""
        parts = name.split(".")
        whole = all(_SEGMENT.fullmatch(part) for part in parts) and len(parts) < 20
        # None may hide an attribute of a module, or lie within another layer.
        clear = whole and not hasattr(fx.GraphModule, parts[0]) and parts[0] not in vars(nn.Module())
        if not clear or self._clashes(name):
            name = f"{kind}_{len(self._taken)}"
        self._taken.add(name)
        above = name.rpartition(".")[0]
        while above:
            self._above.add(above)
            above = above.rpartition(".")[0]
        return name

    def _clashes(self, name: str) -> bool:
        above = name
        while above:
            if above in self._taken:
                return True
            above = above.rpartition(".")[0]
        return name in self._above

    def module(
        self,
        call: _Call,
        layer: nn.Module,
        *,
        inputs: fx.Node | None = None,
        places: dict[str, Place] | None = None,
    ) -> fx.Node:
        """Add a layer, named after its weights where it has any, and call it on the first operand."""
        # Several, because exporters keep one of equal tensors, under the name of one of its owners.
        names = [name.rpartition(".") for name in call.names[1:]]
        owners = [owner for owner, _, last in names if last in _WEIGHTS and not self._clashes(owner)]
        target = self.place(owners[0] if owners else "", call.kind.lower())
        self.root[target] = layer.eval()
        self.places.update({f"{target}.{name}": place for name, place in (places or {}).items()})
        return self.graph.call_module(target, (inputs if inputs is not None else call.node(),))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)


def _input_shape(value: Any) -> tuple[int, ...] | None:
    sizes = [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
    return tuple(sizes[1:]) if len(sizes) == 4 and all(0 < size <= _LARGEST for size in sizes[1:]) else None


def _channels(value: Any) -> int | None:
    sizes = [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
    return sizes[1] if len(sizes) == 4 and sizes[1] in _COLOURS else None


def _unknown(graph: Any) -> tuple[str, ...]:
    kinds = {
        node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}" for node in graph.node
    }
    return tuple(sorted(short(kind)[1:-1] for kind in kinds - _OPERATORS.keys()))


def _is_whole(call: _Call) -> bool:
    """Tell whether an operator makes integers of sizes, which may be sizes themselves."""
    if call.kind == "Shape":
        return True
    if call.kind == "Cast":
        return call.integer("to", 0) in (6, 7)
    known = (
        value in call.builder.whole if isinstance(value, fx.Node) else not value.is_floating_point()
        for value in call.operands
        if value is not None
    )
    return call.kind in _OF_SIZES and all(known)


# ---------------------------------------------------------------------------------------------------
# Layers


def _with(call: _Call, layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    # Layers are made without memory and filled, so that no generator is drawn from.
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        call.builder.spend(tensor.numel(), tensor.element_size())
        if name in layer._buffers:
            layer._buffers[name] = tensor.clone()
        else:
            setattr(layer, name, nn.Parameter(tensor.clone()))
    return layer


def _places(call: _Call, *names: str) -> dict[str, Place]:
    # Of operands from the second on that are there.
    there = ((name, position) for position, name in enumerate(names, 1) if call.operand(position) is not None)
    return {name: Place(call.number, position) for name, position in there}


def _pads(call: _Call, axes: int) -> list[int]:
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


def _conv(call: _Call) -> fx.Node:
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
    return call.builder.module(call, filled, inputs=inputs, places=_places(call, "weight", "bias"))


def _batch_norm(call: _Call) -> fx.Node:
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
    return call.builder.module(call, filled, places=_places(call, *_WEIGHTS))


def _layer_norm(call: _Call) -> fx.Node:
    weight, bias = call.weight(1), call.constant(2)
    if call.integer("axis", -1) not in (-1, -weight.dim()):
        raise call.refused("over other axes than those of its weights")
    layer = nn.LayerNorm(
        list(weight.shape), eps=call.number_of("epsilon", 1e-5), bias=bias is not None, device="meta"
    )
    filled = _with(call, layer, weight=weight, bias=bias)
    return call.builder.module(call, filled, places=_places(call, "weight", "bias"))


def _linear(call: _Call, weight: Tensor, bias: Tensor | None, places: dict[str, Place]) -> fx.Node:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    filled = _with(call, layer, weight=weight.contiguous(), bias=bias)
    return call.builder.module(call, filled, places=places)


def _gemm(call: _Call) -> fx.Node:
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
    return _linear(call, weight, bias, places)


def _matmul(call: _Call) -> fx.Node:
    weight = call.operand(1)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return _linear(call, weight.t(), None, {"weight": Place(call.number, 1, turned=True)})
    return call.builder.call(torch.matmul, call.node(0), call.node(1))


def _max_pool(call: _Call) -> fx.Node:
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


def _average_pool(call: _Call) -> fx.Node:
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


def _clip(call: _Call) -> fx.Node:
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


def _hard_sigmoid(call: _Call) -> fx.Node:
    alpha, beta = call.number_of("alpha", 0.2), call.number_of("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call.builder.module(call, nn.Hardsigmoid())
    return call.builder.call(_scaled_clamp, call.node(), alpha, beta)


def _leaky(call: _Call) -> fx.Node:
    return call.builder.module(call, nn.LeakyReLU(call.number_of("alpha", 0.01)))


def _gelu(call: _Call) -> fx.Node:
    mode = call.text("approximate", "none")
    if mode not in ("none", "tanh"):
        raise call.refused(f"with approximation {short(mode)}")
    return call.builder.module(call, nn.GELU(approximate=mode))


def _layer(make: Callable[[], nn.Module]) -> Callable[[_Call], Value]:
    return lambda call: call.builder.module(call, make())


# ---------------------------------------------------------------------------------------------------
# What lies between; the functions that the networks call at run time stand here too


def _scaled_clamp(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _reshaped(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    # A zero stands for the size that is there.
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])


def _flattened(x: Tensor, axis: int) -> Tensor:
    rows = 1
    for size in x.shape[: axis if axis >= 0 else x.dim() + axis]:
        rows *= size
    return x.reshape(rows, -1)


def _sliced(x: Tensor, begins: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    for begin, end, axis in zip(begins, ends, axes, strict=True):
        size = x.shape[axis]
        begin, end = (min(max(place + size if place < 0 else place, 0), size) for place in (begin, end))
        x = x.narrow(axis, begin, max(end - begin, 0))
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
    whole = not any(isinstance(v, float) or (isinstance(v, Tensor) and v.is_floating_point()) for v in (x, y))
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def _gathered(x: Tensor, places: Tensor, axis: int) -> Tensor:
    return x.index_select(axis, torch.where(places < 0, places + x.shape[axis], places).long())


def _squeezed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.squeeze(axes) if axes else x.squeeze()


def _unsqueezed(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _binary(function: Callable[..., Any]) -> Callable[[_Call], Value]:
    def make(call: _Call) -> Value:
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


def _scalar(value: Value, call: _Call, position: int) -> Any:
    if isinstance(value, Tensor) and not value.dim():
        return value.item()
    return call.node(position)


def _bias(call: _Call, first: Value, second: Value) -> fx.Node | None:
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


def _unary(function: Callable[..., Any]) -> Callable[[_Call], Value]:
    def make(call: _Call) -> Value:
        value = call.operand(0)
        if isinstance(value, Tensor):
            call.builder.spend(value.numel(), 8)
            return _checked(call, function(value))
        return call.builder.call(function, call.node())

    return make


def _checked(call: _Call, made: Any) -> Tensor:
    if not isinstance(made, Tensor):
        raise call.refused("with such constants")
    return made


def _constant(call: _Call) -> Value:
    made = call.tensor("value")
    if made is None and (numbers := call.integers("value_ints", [call.integer("value_int", 0)])) is not None:
        held = call._attributes
        if "value_float" in held:
            made = torch.tensor(call.number_of("value_float", 0.0))
        elif "value_int" in held:
            made = torch.tensor(numbers[0])
        elif "value_ints" in held:
            made = torch.tensor(numbers)
        elif "value_floats" in held:
            made = torch.tensor([float(f) for f in held["value_floats"].floats])
    if made is None:
        raise call.refused("of this kind")
    return made


def _same(call: _Call) -> Value:
    # It has two names from here on, so that a use of one is not all of its uses.
    call.builder.uses[call.outputs[0]] = call.builder.uses.get(call.outputs[0], 0) + 1
    return call.operand(0)


def _dropout(call: _Call) -> Value:
    ratio = call.constant(1)
    share = float(ratio) if ratio is not None else call.number_of("ratio", 0.5)
    if not 0 <= share <= 1:
        raise call.refused(f"with a share of {share}")
    return call.builder.module(call, nn.Dropout(share))


def _cast(call: _Call) -> Value:
    value, to = call.operand(0), call.integer("to", 0)
    if isinstance(value, Tensor) and to in onnx.TYPES:
        call.builder.spend(value.numel(), 8)
        return value.to(onnx.TYPES[to][0])
    if value in call.builder.whole and to in (6, 7, 9):
        return call.builder.call(_typed, call.node(), onnx.TYPES[to][0])
    if to != 1:
        raise call.refused("to another type than float32")
    return call.builder.call(_float, call.node()) if value in call.builder.whole else value


def _mean(call: _Call) -> Value:
    axes = call.sizes(1) if len(call.operands) > 1 else call.integers("axes", [])
    if not axes:
        raise call.refused("over all axes")
    return call.builder.call(
        torch.mean, call.node(), dim=tuple(axes), keepdim=bool(call.integer("keepdims", 1))
    )


def _reshape(call: _Call) -> Value:
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
        sizes[0] = -1 if -1 not in sizes[1:] else 0
    return call.builder.call(_reshaped, call.node(), tuple(sizes))


def _transpose(call: _Call) -> Value:
    order = call.integers("perm", [])
    value = call.operand(0)
    if not order:
        raise call.refused("without an order of its axes")
    return (
        value.permute(order)
        if isinstance(value, Tensor)
        else call.builder.call(torch.permute, call.node(), tuple(order))
    )


def _concat(call: _Call) -> Value:
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


def _softmax(call: _Call) -> Value:
    return call.builder.module(call, nn.Softmax(dim=call.integer("axis", -1)))


def _pad(call: _Call) -> Value:
    pads = call.sizes(1) if len(call.operands) > 1 else call.integers("pads", [])
    fill = call.constant(2)
    if not pads or call.text("mode", "constant") != "constant" or call.constant(3) is not None:
        raise call.refused("in this way")
    value = float(fill) if fill is not None else call.number_of("value", 0.0)
    return call.builder.call(F.pad, call.node(), _around(call.bounded(pads, -_LARGEST)), value=value)


def _slice(call: _Call) -> Value:
    begins, ends, axes, steps = (call.sizes(position) for position in (1, 2, 3, 4))
    if begins is None or ends is None or (steps is not None and any(step != 1 for step in steps)):
        raise call.refused("with steps or without places")
    axes = axes if axes is not None else list(range(len(begins)))
    value = call.operand(0)
    places = (tuple(begins), tuple(ends), tuple(axes))
    return (
        _sliced(value, *places)
        if isinstance(value, Tensor)
        else call.builder.call(_sliced, call.node(), *places)
    )


def _split(call: _Call) -> Value:
    axis, parts = call.integer("axis", 0), len(call.outputs)
    sizes = call.sizes(1)
    if sizes is None or len(sizes) != parts or parts > 64:
        raise call.refused("without sizes")
    whole = call.node()
    at, made = 0, []
    for size in sizes:
        made.append(call.builder.call(_sliced, whole, (at,), (at + size,), (axis,)))
        at += size
    return made  # type: ignore[return-value]


def _expand(call: _Call) -> Value:
    sizes = call.lengths(1)
    if isinstance(sizes, fx.Node):
        return call.builder.call(_expanded_by, call.node(), sizes)
    if sizes is None:
        raise call.refused("without sizes")
    return call.builder.call(_expanded, call.node(), tuple(call.bounded(sizes)))


def _shape(call: _Call) -> Value:
    value, begin, end = call.operand(0), call.integer("start", 0), call.integer("end", 1 << 31)
    if isinstance(value, Tensor):
        return torch.tensor(list(value.shape)[begin:end], dtype=torch.int64)
    return call.builder.call(_shape_of, call.node(), begin, end)


def _constant_of_shape(call: _Call) -> Value:
    sizes, given = call.lengths(0), call.tensor("value")
    fill = given if given is not None else torch.zeros(1)
    if sizes is None or fill.numel() != 1:
        raise call.refused("with such constants")
    if isinstance(sizes, fx.Node):
        return call.builder.call(_full, sizes, fill.item(), fill.dtype)
    count = torch.Size(call.bounded(sizes)).numel()
    call.builder.spend(count, fill.element_size())
    return torch.full(sizes, fill.item(), dtype=fill.dtype)


def _where(call: _Call) -> Value:
    values = [call.operand(position) for position in range(3)]
    constants = [value for value in values if isinstance(value, Tensor)]
    if len(constants) == 3:
        call.builder.spend(torch.broadcast_shapes(*(value.shape for value in constants)).numel(), 8)
        return torch.where(constants[0], constants[1], constants[2])
    return call.builder.call(torch.where, *(call.node(position) for position in range(3)))


def _axes(call: _Call) -> tuple[int, ...]:
    given = call.sizes(1) if len(call.operands) > 1 else call.integers("axes", [])
    return tuple(given or ())


def _squeeze(call: _Call) -> Value:
    value = call.operand(0)
    return (
        _squeezed(value, _axes(call))
        if isinstance(value, Tensor)
        else call.builder.call(_squeezed, call.node(), _axes(call))
    )


def _unsqueeze(call: _Call) -> Value:
    value = call.operand(0)
    if isinstance(value, Tensor):
        return _unsqueezed(value, _axes(call))
    return call.builder.call(_unsqueezed, call.node(), _axes(call))


def _gather(call: _Call) -> Value:
    index, value, axis = call.constant(1), call.operand(0), call.integer("axis", 0)
    if index is None or index.is_floating_point() or index.dim() > 1:
        raise call.refused("with several axes of places")
    if isinstance(value, Tensor):
        if not index.dim():
            return value.select(axis, int(index))
        call.builder.spend(value.numel() // max(value.shape[axis], 1) * len(index), value.element_size())
        return _gathered(value, index, axis)
    if index.dim():
        return call.builder.call(_gathered, call.node(), call.node(1), axis)
    return call.builder.call(torch.select, call.node(), axis, int(index))


_OPERATORS: dict[str, Callable[[_Call], Any]] = {
    "Add": _binary(operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": _binary(_quotient),
    "Dropout": _dropout,
    "Elu": lambda call: call.builder.module(call, nn.ELU(call.number_of("alpha", 1.0))),
    "Equal": _binary(operator.eq),
    "Erf": _unary(torch.erf),
    "Expand": _expand,
    "Flatten": lambda call: call.builder.call(_flattened, call.node(), call.integer("axis", 1)),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _layer(lambda: nn.AdaptiveAvgPool2d(1)),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _layer(nn.Hardswish),
    "Identity": _same,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _binary(operator.mul),
    "Pad": _pad,
    "Pow": _binary(operator.pow),
    "ReduceMean": _mean,
    "Relu": _layer(nn.ReLU),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _layer(nn.Sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(operator.sub),
    "Tanh": _layer(nn.Tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
# Of integers that are sizes these make integers that are sizes.
_OF_SIZES = {
    "Add", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Mul", "Reshape",
    "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
