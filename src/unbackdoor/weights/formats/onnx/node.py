"""One operator of an ONNX graph, with its operands looked up and its attributes read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from unbackdoor.errors import UnsupportedModel
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx.initializers import Tensors
from unbackdoor.weights.formats.tensors import MAX_AXES

LARGEST = 4096  # of a kernel, a stride, a padding; nothing in an image classifier is longer


@dataclass(frozen=True)
class QuantisedLayer:
    """What stands around a layer of whole numbers; once its weights change it is written in floating point.

    Attributes:
        step: Names of the scale and the zero that its inputs were quantised with.
        result: Those that its results are quantised with; empty where they are not.
        rescaled: Operators that multiply its results with scales that its weights hold here, and the operand
            of each that is the result.
    """

    step: tuple[str, str]
    result: tuple[str, ...] = ()
    rescaled: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a tensor of the network stands in the file: an operand of one of its operators.

    Attributes:
        node: Position of the operator in the graph.
        position: Position of the operand.
        turned: Whether the file holds it transposed.
        scale: Attribute of the operator that the tensor was multiplied with, or empty.
        repeat: Rows of the operand, where the file repeats the one row of the tensor; else 0.
        dtype: Type of the operand; networks compute in float32, whatever the file stores.
        quantised: What stands around the operator where it computes with whole numbers.
    """

    node: int
    position: int
    turned: bool = False
    scale: str = ""
    repeat: int = 0
    dtype: torch.dtype = torch.float32
    quantised: QuantisedLayer | None = None


@dataclass(frozen=True)
class QuantisedStep:
    """How the values of a node were quantised: they were divided by ``scale`` and moved by ``zero``.

    Attributes:
        scale: One number, or one for each place along an axis.
        zero: Likewise.
        axis: That axis.
        names: Of scale and zero in the file.
    """

    scale: Tensor
    zero: Tensor
    axis: int
    names: tuple[str, str] = ("", "")

    def equals(self, other: object) -> bool:
        """Tell whether another one has the same numbers."""
        if not isinstance(other, QuantisedStep):
            return False
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)


@dataclass(frozen=True)
class DynamicStep:
    """How the values of a node were quantised, where their own range is what gives scale and zero.

    Attributes:
        names: Of scale and zero in the file.
    """

    names: tuple[str, str]

    def equals(self, other: object) -> bool:
        """Tell whether another one has the same numbers."""
        return self == other


@dataclass(frozen=True)
class Sums:
    """Sums of products of levels: what the node has, divided by scales that are known when the network runs.

    Attributes:
        scales: Names of the scales, sorted.
        layer: The module whose results they are; empty where it is none.
        place: Where the weights of that module stand, as far as they were scaled.
    """

    scales: tuple[str, ...]
    layer: str = ""
    place: Place | None = None

    def equals(self, other: object) -> bool:
        """Tell whether they lack the same scales."""
        return isinstance(other, Sums) and self.scales == other.scales


Quantised = QuantisedStep | DynamicStep | Sums


@dataclass(frozen=True)
class DynamicScale:
    """The product of scales that are known when the network runs, and of constants."""

    scales: tuple[str, ...]
    factor: Tensor


@dataclass(frozen=True)
class DynamicZero:
    """The zero of values that are quantised by their own range."""

    name: str


Value = fx.Node | Tensor | DynamicScale | DynamicZero | None


class Builder(Protocol):
    """What an operator uses of the graph that it is built into; see ``graph.py``."""

    path: Path
    tensors: Tensors
    root: dict[str, Any]
    uses: dict[str, int]
    notes: list[str]
    places: dict[str, Place]
    size_nodes: set[fx.Node]
    batch: int
    opset: int
    pixels: fx.Node
    quantised: dict[str, Quantised]
    types: dict[str, torch.dtype]

    def value(self, name: str) -> Value:
        """Return what a name stands for; None for an operand that is left out."""
        ...

    def node(self, value: Value, name: str, place: Place) -> fx.Node:
        """Return a value as a node of the graph."""
        ...

    def spend(self, count: int, width: int = 4) -> None:
        """Account for a tensor before it is made."""
        ...

    def place(self, name: str, kind: str) -> str:
        """Return a free attribute path."""
        ...

    def get(self, target: str) -> fx.Node:
        """Return a tensor of the network as a node."""
        ...

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add the call of a function."""
        ...

    def module(
        self,
        call: Call,
        layer: nn.Module,
        *,
        inputs: fx.Node | None = None,
        places: dict[str, Place] | None = None,
    ) -> fx.Node:
        """Add a layer and call it on the first operand."""
        ...


class Call:
    """One operator of the file with its operands looked up."""

    def __init__(self, builder: Builder, message: Any, number: int) -> None:
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

    def floats(self, name: str) -> list[float]:
        return [float(f) for f in self._attributes[name].floats] if name in self._attributes else []

    def tensor(self, name: str) -> Tensor | None:
        attribute = self._attributes.get(name)
        if attribute is None or not attribute.HasField("t"):
            return None
        return self.builder.tensors.read(attribute.t)

    def operand(self, position: int) -> Value:
        return self.operands[position] if position < len(self.operands) else None

    def constant(self, position: int) -> Tensor | None:
        """Return a constant operand; None where it is left out."""
        value = self.operand(position)
        if value is not None and not isinstance(value, Tensor):
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
        if isinstance(value, fx.Node) and value in self.builder.size_nodes:
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
        if any(not least <= value <= LARGEST for value in values):
            raise self.refused(f"with sizes such as {short(values[:4])}")
        return values
