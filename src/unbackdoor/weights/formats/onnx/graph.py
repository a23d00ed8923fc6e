"""From an ONNX graph to a network of ordinary torch layers, so that hooks, pruning and repair work on it.

Needs:   the extra ``onnx``.
Departs: a softmax or a choice of the largest at the very end is left out, because every method here works on
         logits; batch normalisation that was exported in training mode becomes an ordinary one, which in
         evaluation uses the running statistics; what is computed in half precision is computed in single;
         quantised values are rounded, and gradients pass as if they were not.

Convolutions, normalisations, linear layers and activations become modules under the names of their weights,
so that ``layer1.0.conv1`` has the same name here. All else becomes calls of functions. The usual operators
of classifiers are supported; any other is refused by its name.

The place of each tensor in the file is recorded (``Place``), so that ``write`` can put a repaired one back.
The memory that a file can demand by sharing and folding constants is bounded by its size; the cost of an
image is bounded by ``opening.cost_limits``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.attribute_paths import AttributePaths, attribute_path
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx import branches
from unbackdoor.weights.formats.onnx import initializers as onnx
from unbackdoor.weights.formats.onnx.canonical import MAX_NODES as MAX_NODES
from unbackdoor.weights.formats.onnx.canonical import STANDARD, Canonical, canonical
from unbackdoor.weights.formats.onnx.node import (
    LARGEST,
    Call,
    DynamicScale,
    DynamicZero,
    Place,
    Quantised,
    Sums,
    Value,
)
from unbackdoor.weights.formats.onnx.operators import OPERATORS as PLAIN_OPERATORS
from unbackdoor.weights.formats.onnx.operators import WEIGHTS, makes_sizes
from unbackdoor.weights.formats.onnx.quantised import (
    KEEPS_QUANTISED,
    QUANTISED_OPERATORS,
    RESCALES,
    TAKES_QUANTISED,
)
from unbackdoor.weights.formats.onnx.sizes import sizes_alone
from unbackdoor.weights.formats.tensors import MAX_TIED
from unbackdoor.weights.stored_file import StoredFile, stored

OPERATORS: Mapping[str, Callable[[Call], Any]] = {**PLAIN_OPERATORS, **QUANTISED_OPERATORS}
_SLACK = 64 << 20  # bytes that any file may fold and share, however small it is
_COLOURS = (1, 3, 4)
_BROKEN = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Graph:
    """What a graph shows without building the network.

    Attributes:
        operators: Number of operators.
        unknown: Kinds of operators that are not imported, sorted.
        input_shape: (C, H, W) as the file states it; None where it leaves it open.
        outputs: Names of its outputs.
        remarks: What watches the pixels outside the network's body, in words; see ``dataflow``.
    """

    operators: int
    unknown: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    outputs: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def describe_graph(file: Path | StoredFile, output: str | None = None) -> Graph:
    """Describe a graph.

    Args:
        file: The file, or what was read of it.
        output: The output that gives the logits; None describes all of them.

    Raises:
        UnbackdoorError: If the file cannot be parsed, see :func:`import_graph`.
    """
    file = stored(file)
    model, form = parsed(file)
    graph = model.graph
    inputs = [value for value in graph.input if value.name in form.inputs]
    shape = _input_shape(inputs[0]) if len(inputs) == 1 else None
    results = form.outputs.values() if output is None else [form.logits(output, file.path)]
    return Graph(len(form.nodes), _unknown(form), shape, tuple(form.outputs), form.remarks(results))


def import_graph(file: Path | StoredFile, output: str | None = None) -> fx.GraphModule:
    """Build a network from an ONNX file; nothing of the file is executed.

    Args:
        file: The file, or what was read of it. Weights in other files must lie in its folder.
        output: Name of the output that gives the logits; None where there is one.

    Returns:
        A module from (B, C, H, W) to logits (B, K), in evaluation mode. Its ``meta`` has ``input_shape``,
        which is None where the file leaves it open, ``channels``, likewise, ``notes``, a tuple of remarks,
        ``places``, by the names of its state dict, and ``remarks``, see :class:`Graph`.

    Raises:
        MissingExtra: If the package onnx is not installed.
        InputError: If the file is damaged.
        UnsafeFile: If it names data outside its folder, or is built to exhaust the memory.
        UnsupportedModel: If it has operators that are not imported; names them.
    """
    file = stored(file)
    model, form = parsed(file)
    builder = Builder(file)
    try:
        return builder.build(model.graph, form, output)
    except UnbackdoorError:
        raise
    except _BROKEN as error:
        raise _damaged(file.path, error) from error


def parsed(file: StoredFile) -> tuple[Any, Canonical]:
    """Return the message of a model and its graph in one form, with the branches taken that it decides.

    Raises:
        UnbackdoorError: See :func:`import_graph`.
    """
    model = onnx.parse(file)
    try:
        form = canonical(model, file.path, MAX_NODES)
        if not any(map(branches.is_branch, form.nodes)):
            return model, form
        branches.require_no_second_meaning(model, file.path)
        for _ in range(branches.ROUNDS):
            if not branches.take(model, _truths(file, model.graph, form), file.path):
                break
            form = canonical(model, file.path, MAX_NODES)
            note = "of branches whose condition the file decides, the one that is taken was imported"
            form = replace(form, notes=(*form.notes, note))
        return model, form
    except UnbackdoorError:
        raise
    except _BROKEN as error:
        raise _damaged(file.path, error) from error


def _truths(file: StoredFile, graph: Any, form: Canonical) -> dict[str, bool]:
    """Return the conditions of branches that constants and sizes of the image decide, by their names."""
    blocked: set[str] = set()  # values that are not imported, or depend on such
    conditions: dict[str, None] = {}
    for node in form.nodes:
        if branches.is_branch(node) and node.input and node.input[0] not in blocked:
            conditions.setdefault(node.input[0])
        if _kind(node) not in OPERATORS or blocked.intersection(node.input):
            blocked.update(name for name in node.output if name)
    if not conditions:
        return {}
    try:
        return Builder(file).truths(graph, form, list(conditions))
    except UnsafeFile:
        raise
    except (UnbackdoorError, *_BROKEN):
        return {}  # the import says what is in the way


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError("the graph of the model is damaged", got=short(str(error).split("\n")[0]), where=path)


class Builder:
    def __init__(self, file: StoredFile) -> None:
        self.path = file.path
        self.tensors = onnx.Tensors(file)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.values: dict[str, Value] = {}
        self.uses: dict[str, int] = Counter()
        self.notes: list[str] = []
        self.places: dict[str, Place] = {}
        self.size_nodes: set[fx.Node] = set()  # integers computed from sizes; may be sizes again
        self.quantised: dict[str, Quantised] = {}  # by the names of computed values
        self.opset = 0
        self.types: dict[str, torch.dtype] = {}  # of constants, as the file has them
        self.batch = 0  # images of the example that the exporter has fixed; 0 where it left them open
        self._paths = AttributePaths()
        self._spent = 0

    def build(self, graph: Any, form: Canonical, output: str | None) -> fx.GraphModule:
        image = self._require_one_image(graph, form)
        logits = form.logits(output, self.path)
        needed = form.behind([logits])
        unknown = {_kind(form.nodes[number]) for number in needed} - OPERATORS.keys()
        if unknown == {"If"}:
            raise UnsupportedModel(
                "the graph branches, and the file does not decide which way",
                expected="conditions that constants decide, or the sizes of one image",
                where=self.path,
                remedy="Export the model again with fixed sizes of its input, or give its state dict",
            )
        if unknown:
            raise UnsupportedModel(
                "the graph has operators that are not imported: " + ", ".join(_unknown(form)),
                expected="only " + ", ".join(sorted(OPERATORS)),
                where=self.path,
                remedy="Give the state dict of the model and its architecture instead",
            )
        shape = self._begin(graph, form, image)
        for name in [name for number in needed for name in form.nodes[number].input] + [logits]:
            self.uses[name] = self.uses.get(name, 0) + 1
        self._operators(form, needed)
        result = self.values.get(logits)
        if not isinstance(result, fx.Node):
            raise UnsupportedModel("the output of the model does not depend on its input", where=self.path)
        if isinstance(self.quantised.get(logits), Sums):
            raise UnsupportedModel(
                "the output of the model is whole numbers without a scale", where=self.path
            )
        self.graph.output(result)
        module = fx.GraphModule(self.root, self.graph, "ImportedNetwork")
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        state_names = module.state_dict().keys()
        module.meta.update(
            input_shape=shape,
            channels=_channels(image) if shape is None else shape[0],
            notes=tuple(dict.fromkeys(self.notes)),
            places={
                name: replace(place, dtype=self._stored_type(form.nodes[place.node].input[place.position]))
                for name, place in self.places.items()
                if name in state_names
            },
            remarks=form.remarks([logits]),
        )
        return module.eval()

    def truths(self, graph: Any, form: Canonical, conditions: list[str]) -> dict[str, bool]:
        """Return those conditions that are the same for every number of images, whatever their pixels are."""
        shape = self._begin(graph, form, self._require_one_image(graph, form))
        needed = form.behind(conditions)
        self.uses = Counter(name for number in needed for name in form.nodes[number].input)
        self._operators(form, needed)
        values = {name: self.value(name) for name in conditions}
        out = {
            name: bool(value)
            for name, value in values.items()
            if isinstance(value, Tensor) and value.numel() == 1
        }
        of_sizes = {
            name: value
            for name, value in values.items()
            if isinstance(value, fx.Node) and value in self.size_nodes
        }
        if shape is None or not of_sizes:
            return out
        self.graph.output(tuple(of_sizes.values()))
        module = fx.GraphModule(self.root, self.graph, "Conditions")
        module.graph.eliminate_dead_code()
        module.recompile()
        one, three = (sizes_alone(module, (count, *shape), self.path) for count in (1, 3))
        for name, first, second in zip(of_sizes, one, three, strict=True):
            if first.numel() == second.numel() == 1 and bool(first) == bool(second):
                out[name] = bool(first)
        return out

    def _require_one_image(self, graph: Any, form: Canonical) -> Any:
        inputs = [value for value in graph.input if value.name in form.inputs]
        if len(inputs) != 1:
            raise UnsupportedModel(
                "the model is no classifier of single images",
                expected="one input and one output",
                got=f"{len(inputs)} and {len(graph.output)}",
                where=self.path,
            )
        return inputs[0]

    def _begin(self, graph: Any, form: Canonical, image: Any) -> tuple[int, ...] | None:
        """Read the weights, add the input, and return its shape (C, H, W) where the file states it."""
        self.opset = form.opset
        self.notes += form.notes
        for tensor in graph.initializer:
            self._define(tensor.name, self.tensors.read(tensor))
        first = image.type.tensor_type.shape.dim[:1]
        self.batch = int(first[0].dim_value) if first else 0
        shape = _input_shape(image)
        pixels = self.pixels = self.graph.placeholder("pixels")
        if shape is not None and shape[0] not in _COLOURS and shape[2] in _COLOURS:
            self.notes.append("the graph takes images with the colours last; they are turned for it")
            shape = (shape[2], *shape[:2])
            pixels = self.call(torch.permute, pixels, (0, 2, 3, 1))
        self._define(image.name, pixels)
        return shape

    def _define(self, name: str, value: Value) -> None:
        if name in self.values:
            raise UnsafeFile(
                "two values of the graph have one name, of which readers choose differently",
                got=short(name),
                where=self.path,
            )
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            self.types[name] = value.dtype
            self.spend(value.numel())
            value = value.float()
        self.values[name] = value

    def _stored_type(self, name: str) -> torch.dtype:
        return self.types.get(name, torch.float32)

    def spend(self, count: int, width: int = 4) -> None:
        """Account for the bytes of a tensor that is made of those in the file, before it is made.

        Raises:
            UnsafeFile: If the file makes far more than it holds.
        """
        self._spent += count * width
        # In the width that they are computed in: quantised weights have a quarter of it in the file.
        held = max(self.tensors.bytes_read, 4 * self.tensors.numbers)
        if self._spent > MAX_TIED * held + _SLACK:
            raise UnsafeFile("the graph makes far more of its weights than it holds", where=self.path)

    def _operators(self, form: Canonical, needed: list[int]) -> None:
        for number in needed:
            message = form.nodes[number]
            kind = _kind(message)
            call = Call(self, message, number)
            if not call.outputs or not call.outputs[0]:
                raise call.refused("without an output")
            several = ("Split", "DynamicQuantizeLinear")
            if any(name and self.uses.get(name) for name in call.outputs[1:]) and kind not in several:
                raise call.refused("with its further outputs in use")
            steps = [self.quantised[value] for value in call.names if value in self.quantised]
            mixed = kind == "Concat" and len(steps) < len(call.operands)
            mixed = mixed or any(not step.equals(steps[0]) for step in steps[1:])
            scaled = any(isinstance(value, DynamicScale | DynamicZero) for value in call.operands)
            make = OPERATORS[kind]
            if kind in TAKES_QUANTISED:  # it compares the steps by itself
                steps = []
            elif kind in RESCALES and (scaled or any(isinstance(step, Sums) for step in steps)):
                make, steps = RESCALES[kind], []
            elif scaled or (steps and (mixed or kind not in KEEPS_QUANTISED)):
                raise call.refused("of quantised values")
            made = make(call)
            for name, value in zip(call.outputs, made if isinstance(made, list) else [made], strict=False):
                self._define(name, value)
                if isinstance(value, fx.Node) and makes_sizes(call):
                    self.size_nodes.add(value)
                if isinstance(value, fx.Node) and steps and kind in KEEPS_QUANTISED:
                    self.quantised[name] = steps[0]

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
        if not isinstance(value, Tensor):
            raise InputError("an operator lacks an operand", where=self.path)
        target = self.place(name, "constant")
        self.spend(value.numel(), value.element_size())
        self.places[target] = place
        weight = value.clone()
        self.root[target] = nn.Parameter(weight) if weight.is_floating_point() and weight.dim() else weight
        return self.graph.get_attr(target)

    def place(self, name: str, kind: str) -> str:
        """Return a free attribute path, if possible the one in the name that the exporter wrote."""
        return self._paths.take(name, kind)

    def module(
        self,
        call: Call,
        layer: nn.Module,
        *,
        inputs: fx.Node | None = None,
        places: dict[str, Place] | None = None,
    ) -> fx.Node:
        """Add a layer, named after its weights where it has any, and call it on the first operand."""
        # Several, because exporters keep one of equal tensors, under the name of one of its owners.
        names = [name.rpartition(".") for name in call.names[1:]]
        owners = [
            owner for owner, _, last in names
            if last in WEIGHTS and attribute_path(owner) and not self._paths.clashes(attribute_path(owner))
        ]  # fmt: skip
        target = self.place(owners[0] if owners else "", call.kind.lower())
        self.root[target] = layer.eval()
        self.places.update({f"{target}.{name}": place for name, place in (places or {}).items()})
        return self.graph.call_module(target, (inputs if inputs is not None else call.node(),))

    def get(self, target: str) -> fx.Node:
        return self.graph.get_attr(target)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)


def _input_shape(value: Any) -> tuple[int, ...] | None:
    sizes = [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
    return tuple(sizes[1:]) if len(sizes) == 4 and all(0 < size <= LARGEST for size in sizes[1:]) else None


def _channels(value: Any) -> int | None:
    sizes = [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
    return sizes[1] if len(sizes) == 4 and sizes[1] in _COLOURS else None


def _kind(node: Any) -> str:
    return str(node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}")


def _unknown(form: Canonical) -> tuple[str, ...]:
    ends = _ends(form)
    kinds = {_kind(node) for number, node in enumerate(form.nodes) if number not in ends}
    return tuple(sorted(short(kind)[1:-1] for kind in kinds - OPERATORS.keys()))


def _ends(form: Canonical) -> set[int]:
    """Return the operators that lie behind what the outputs are computed from."""
    return {*form.behind(form.outputs)} - {*form.behind(form.outputs.values())}
