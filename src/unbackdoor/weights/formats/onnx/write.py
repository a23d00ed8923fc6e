"""Repaired weights back into the ONNX file that they came from; its graph stays as it is.

A weight that one operator uses is replaced under its name. One that several use, or that the file computes
from others, becomes a weight of its own for the operator whose tensor changed. A layer of whole numbers whose
weights changed computes in floating point from then on, between the same roundings of its inputs and results.
Weights that lay in other files are included, so that the new file is complete. The written file is opened
again and must hold exactly these tensors. Needs the extra ``onnx``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor.errors import InputError, IntegrityError, UnsupportedModel
from unbackdoor.files import atomic_write
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx import initializers as onnx
from unbackdoor.weights.formats.onnx.graph import import_graph, parsed
from unbackdoor.weights.formats.onnx.node import Place, QuantisedLayer
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.stored_file import StoredFile, stored

_NUMBERS = {dtype: number for number, (dtype, _, _) in onnx.TYPES.items()}
_COUNTER = "num_batches_tracked"  # of torch alone; no result depends on it


def require_room(file: Path | StoredFile) -> None:
    """Raise UnsupportedModel where the file and its weights are too large for one ONNX file."""
    file = stored(file)
    tensors = onnx.Tensors(file)
    for message in _tensors(onnx.parse(file)):
        if message.data_location == onnx.EXTERNAL:
            tensors.read(message)
    if tensors.bytes_read > onnx.MAX_BYTES:
        raise _too_large(file.path, tensors.bytes_read)


def _too_large(path: Path, size: int) -> UnsupportedModel:
    return UnsupportedModel(
        "the model is too large to be written as one ONNX file",
        expected=f"at most {onnx.MAX_BYTES} bytes",
        got=size,
        where=path,
        remedy="Give the state dict of the model and its architecture instead",
    )


def write_graph(
    path: Path,
    source: Path | StoredFile,
    places: Mapping[str, Place],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    output: str | None = None,
) -> None:
    """Write the graph of a file with other weights, whole or not at all.

    Args:
        path: The file to write.
        source: The file that the network was imported from, or what was read of it.
        places: Of its tensors, as the import gives them.
        before: Its state dict as imported.
        after: The state dict to write, of the same names and shapes.
        output: Name of the output that gives the logits, as for the import.

    Raises:
        InputError: If the tensors do not fit, or the disk refuses.
        IntegrityError: If what was written does not open to these tensors.
    """
    source = stored(source)
    repaired = {name: _stored(t.detach().cpu(), places.get(name)) for name, t in after.items()}
    if repaired.keys() != before.keys() or any(repaired[n].shape != t.shape for n, t in before.items()):
        odd = sorted(n for n in repaired.keys() | before.keys() if n not in repaired or n not in before)[:3]
        raise InputError("the repaired model has other tensors than the file", got=odd, where=source.path)
    changed = [
        name
        for name, tensor in repaired.items()
        if not name.endswith(_COUNTER) and not torch.equal(tensor, before[name].cpu())
    ]
    if odd := [name for name in changed if name not in places]:
        raise UnsupportedModel(
            "a changed tensor has no place in the file, which computes it from others or shares it",
            where=f"{source.path}, {short(odd[0])}",
            remedy="Repair the model that it was made from, before quantisation, or give its state dict",
        )
    model, _ = parsed(source)
    operands = _Operands(model.graph, places)
    # Tensors under the name of a shared weight come last: by then the other users have weights of their own.
    for name in sorted(changed, key=lambda name: operands.of(name) == name):
        operands.put(name, repaired)
    moved = operands.finish()
    expected = {
        (moved[place.node], operands.position(name)): repaired[name] for name, place in places.items()
    }

    def check(draft: Path) -> None:
        network = import_graph(draft, output)
        state, new_places = network.state_dict(), network.meta["places"]
        reread = {(place.node, place.position): state[name] for name, place in new_places.items()}
        same_places = reread.keys() == expected.keys()
        if not same_places or not all(torch.equal(reread[at], expected[at]) for at in expected):
            raise IntegrityError("the file that was written does not hold the repaired weights", where=path)

    _store(path, source, model, check)


def write_initializers(path: Path, source: Path | StoredFile, state: Mapping[str, Tensor]) -> None:
    """Write a file with other weights under the names that it has, whole or not at all.

    Raises:
        InputError: If it has not exactly these, or the disk refuses.
    """
    source = stored(source)
    model = onnx.parse(source)
    messages = {message.name: message for message in model.graph.initializer}
    other_names = messages.keys() != state.keys()
    if other_names or any(tuple(messages[n].dims) != tuple(t.shape) for n, t in state.items()):
        odd = sorted(short(name) for name in messages.keys() ^ state.keys())[:3]
        raise InputError("the weights are not those of the file", got=odd, where=source.path)
    for name, tensor in state.items():
        _fill(messages[name], tensor.detach().cpu())

    def check(draft: Path) -> None:
        reread = onnx.read(stored(draft), Trail())
        if not all(torch.equal(reread[name], tensor.cpu()) for name, tensor in state.items()):
            raise IntegrityError("the file that was written does not hold the weights", where=path)

    _store(path, source, model, check)


def _stored(tensor: Tensor, place: Place | None) -> Tensor:
    # As the file can hold it: what is compared afterwards is what was written.
    if place is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(place.dtype).to(tensor.dtype)


class _Operands:
    """The operands of a graph that are weights of the network."""

    def __init__(self, graph: Any, places: Mapping[str, Place]) -> None:
        self._graph = graph
        self._places = places
        self._initializers = {message.name: message for message in graph.initializer}
        self._uses: dict[str, int] = {}
        for name in [name for node in graph.node for name in node.input] + [v.name for v in graph.output]:
            self._uses[name] = self._uses.get(name, 0) + 1
        outputs = {name for node in graph.node for name in node.output}
        self._used_names = {*self._initializers, *self._uses, *outputs}
        self._positions = {name: place.position for name, place in places.items()}
        self._around: dict[int, tuple[list[Any], list[Any]]] = {}  # operators before and behind one

    def position(self, name: str) -> int:
        """Return the position of a tensor among the operands of its operator."""
        return self._positions[name]

    def of(self, name: str) -> str:
        """Return the name of the value that stands where a tensor of the network does."""
        return str(self._graph.node[self._places[name].node].input[self._positions[name]])

    def finish(self) -> list[int]:
        """Add the operators that are new, and return where each of the old ones is now."""
        nodes: list[Any] = []
        moved: list[int] = []
        for number, node in enumerate(list(self._graph.node)):
            before, behind = self._around.get(number, ((), ()))
            moved.append(len(nodes) + len(before))
            nodes += [*before, node, *behind]
        if self._around:
            del self._graph.node[:]
            self._graph.node.extend(nodes)
        return moved

    def put(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Let the operator of a tensor have its value, and no other operator."""
        place = self._places[name]
        if place.quantised is not None:
            if place.node not in self._around:
                self._put_in_floating_point(place.node, place.quantised, state)
            return
        operand = self.of(name)
        if operand == name and self._uses[name] > 1:
            for other in self._places:
                if other != name and self.of(other) == operand:
                    self.put(other, state)
        node, message = self._graph.node[place.node], self._initializers.get(operand)
        shape = None if message is None else tuple(message.dims)
        value = _as_in_file(state[name], place, shape)
        _unscale(node, place)
        if message is None or self._uses[operand] > 1 or tuple(value.shape) != shape:
            fresh = self._unused(name)
            self._uses[operand] -= 1
            message = self._initializers[fresh] = self._graph.initializer.add(name=fresh)
            node.input[place.position] = fresh
        _fill(message, value.to(place.dtype) if value.is_floating_point() else value)

    def _unused(self, name: str) -> str:
        while name in self._used_names:
            name += "_"
        self._used_names.add(name)
        self._uses[name] = 1
        return name

    def _put_in_floating_point(
        self, number: int, around: QuantisedLayer, state: Mapping[str, Tensor]
    ) -> None:
        """Let a layer of whole numbers compute with numbers, from dequantised inputs."""
        node = self._graph.node[number]
        old, result = list(node.input), node.output[0]
        inputs = self._unused(f"{result}_inputs")
        before = [_operator(node, "DequantizeLinear", [old[0], *around.step], inputs)]
        behind = []
        if around.result:
            node.output[0] = self._unused(f"{result}_numbers")
            behind = [_operator(node, "QuantizeLinear", [node.output[0], *around.result], result)]
        node.op_type = _IN_FLOATING_POINT[node.op_type]
        tensors = sorted(
            (place.position, name) for name, place in self._places.items() if place.node == number
        )
        node.input[:] = [inputs]
        for position, (_, name) in enumerate(tensors, 1):
            fresh, self._positions[name] = self._unused(name), position
            message = self._initializers[fresh] = self._graph.initializer.add(name=fresh)
            _fill(message, _as_in_file(state[name], self._places[name], None).contiguous())
            node.input.append(fresh)
        for at, kept in around.rescaled:
            scaling = self._graph.node[at]
            scaling.op_type = "Identity"
            self._drop(scaling.input[1 - kept])
            scaling.input[:] = [scaling.input[kept]]
        for name in (*around.step, *around.result):
            self._uses[name] = self._uses.get(name, 0) + 1
        for name in old[1:]:
            self._drop(name)
        self._around[number] = before, behind
        # What the file says of the type of its results does not hold any more.
        for value in [value for value in self._graph.value_info if value.name == result]:
            self._graph.value_info.remove(value)

    def _drop(self, name: str) -> None:
        """Remove an operand from an operator, and a weight that nothing uses any more from the file."""
        self._uses[name] = self._uses.get(name, 0) - 1
        if not self._uses[name] and name in self._initializers:
            self._graph.initializer.remove(self._initializers.pop(name))


_IN_FLOATING_POINT = {
    "ConvInteger": "Conv", "MatMulInteger": "MatMul", "QLinearConv": "Conv", "QLinearMatMul": "MatMul",
}  # fmt: skip


def _operator(like: Any, kind: str, inputs: list[str], output: str) -> Any:
    made = type(like)()
    made.op_type = kind
    made.input.extend(inputs)
    made.output.append(output)
    return made


def _as_in_file(tensor: Tensor, place: Place, shape: tuple[int, ...] | None) -> Tensor:
    if place.turned:
        tensor = tensor.t()
    if place.repeat:
        tensor = tensor.expand(place.repeat, *tensor.shape[1:])
    if shape is not None and torch.Size(shape).numel() == tensor.numel():
        tensor = tensor.reshape(shape)
    return tensor


def _unscale(node: Any, place: Place) -> None:
    # The tensor that is written holds the factor already.
    remaining = [attribute for attribute in node.attribute if attribute.name != place.scale]
    if len(remaining) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(remaining)


def _fill(message: Any, tensor: Tensor) -> None:
    name, shape = message.name, list(tensor.shape)
    message.Clear()
    message.name = name
    message.dims.extend(shape)
    message.data_type = _NUMBERS[tensor.dtype]
    message.raw_data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _store(path: Path, source: StoredFile, model: Any, check: Callable[[Path], None]) -> None:
    tensors = onnx.Tensors(source)
    for message in _tensors(model):
        if message.data_location == onnx.EXTERNAL:
            _fill(message, tensors.read(message))
    if model.ByteSize() > onnx.MAX_BYTES:
        raise _too_large(source.path, model.ByteSize())
    with atomic_write(path) as draft:
        draft.write_bytes(model.SerializeToString(deterministic=True))
        check(draft)


def _tensors(model: Any) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
