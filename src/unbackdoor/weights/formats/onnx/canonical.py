"""One form of an ONNX graph for everything that reads it: functions unfolded, operators in order, ends cut.

A model may define functions of its own, which runtimes prefer to operators of the same name; exporters and
converters write operators in any order; and classifiers end in a softmax, or in the number of the largest
logit, where every method here works on the logits.
"""

from __future__ import annotations

import heapq
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unbackdoor.errors import InputError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.dataflow import Step, remarks

MAX_NODES = 20_000
STANDARD = ("", "ai.onnx")
_MAX_COPIED = 256 << 20  # bytes of operators that functions are unfolded into
_DEEPEST = 20  # functions that use each other
_RUNTIMES = ("ai.onnx", "com.microsoft", "com.ms", "org.pytorch")  # beginnings of domains
_OLDEST = 7  # operator set from which operands are stretched to each other as they are now
_PASSING = ("Identity", "Cast")
_INTEGERS = {2, 3, 4, 5, 6, 7, 9, 12, 13}  # data types, truth values included


class AmbiguousOutput(UnsupportedModel):
    """The graph has several outputs, and the user has not said which of them gives the logits."""


@dataclass(frozen=True)
class Canonical:
    """A graph in one form.

    Attributes:
        nodes: Its operators, each after those whose values it uses.
        opset: Version of the standard operators.
        inputs: Names of its inputs that are no weights.
        outputs: What each output is computed from, once the ends are cut.
        notes: What was cut and unfolded, in words.
    """

    nodes: tuple[Any, ...]
    opset: int
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    notes: tuple[str, ...]

    def logits(self, name: str | None, where: object) -> str:
        """Return the value that an output is computed from.

        Args:
            name: The output; None where the file leaves no choice.
            where: File, for messages.

        Raises:
            InputError: If there is no output of that name.
            AmbiguousOutput: If there are several and none is named.
        """
        if name is not None:
            if name not in self.outputs:
                raise InputError(
                    "the graph has no such output",
                    expected=_names(self.outputs),
                    got=short(name),
                    where=where,
                )
            return self.outputs[name]
        ends = set(self.outputs.values())
        if len(ends) != 1:
            raise AmbiguousOutput(
                "the model is no classifier of single images",
                expected="one input and one output, or the name of the one that gives the logits",
                got=_names(self.outputs) or "none",
                where=where,
                remedy="Name it: --output NAME, in Python output=NAME",
            )
        return next(iter(ends))

    def remarks(self, results: Iterable[str]) -> tuple[str, ...]:
        """Return what in the graph watches the pixels outside the network's body; see ``dataflow``."""
        return remarks([_step(node) for node in self.nodes], self.inputs, results)

    def behind(self, names: Iterable[str]) -> list[int]:
        """Return the positions of the operators that values depend on, in their order."""
        used = set(names)
        out = []
        for number in reversed(range(len(self.nodes))):
            node = self.nodes[number]
            if used.intersection(node.output):
                used.update(node.input)
                out.append(number)
        return out[::-1]


def canonical(model: Any, path: Path, most: int = MAX_NODES) -> Canonical:
    """Bring the graph of a model into one form; the message is changed so that its nodes are these.

    Args:
        model: The message.
        path: File, for messages.
        most: Operators that it may have.

    Raises:
        UnsafeFile: If functions are built to exhaust the memory, or two have one name.
        UnsupportedModel: If it has too many operators, or is of a version that is too old.
    """
    versions = [entry.version for entry in model.opset_import if entry.domain in STANDARD]
    opset = max(versions, default=1)
    if opset < _OLDEST:
        raise UnsupportedModel(
            "the model is of an old version of ONNX",
            expected=f"operator set {_OLDEST} or later",
            got=opset,
            where=path,
            remedy="Convert it with onnx.version_converter, or export it again",
        )
    notes: list[str] = []
    graph = model.graph
    nodes = list(graph.node)
    if len(nodes) > most:
        raise UnsupportedModel(
            "the model has too many operators", expected=f"at most {most}", got=len(nodes), where=path
        )
    if model.functions:
        nodes = _Unfolding(model, opset, path).all(nodes)
        notes.append("functions that the model defines were unfolded")
    given = {tensor.name for tensor in graph.initializer}
    inputs = tuple(value.name for value in graph.input if value.name not in given)
    nodes = _ordered(nodes, {*given, *inputs}, path)
    if model.functions or any(one is not other for one, other in zip(nodes, graph.node, strict=False)):
        del graph.node[:]
        graph.node.extend(nodes)
        del model.functions[:]
        nodes = list(graph.node)
    outputs, cut = _cut_ends(nodes, [value.name for value in graph.output])
    return Canonical(tuple(nodes), opset, inputs, outputs, (*notes, *cut))


# ---------------------------------------------------------------------------------------------------
# Functions


class _Unfolding:
    def __init__(self, model: Any, opset: int, path: Path) -> None:
        self._path = path
        self._opset = opset
        self._functions: dict[tuple[str, str, str], Any] = {}
        for function in model.functions:
            if function.domain in STANDARD or function.domain.startswith(_RUNTIMES):
                raise UnsafeFile(
                    "a function of the model stands where runtimes have operators of their own, of which "
                    "readers choose differently",
                    got=short(f"{function.domain}.{function.name}".lstrip(".")),
                    where=path,
                )
            key = _key(function.domain, function.name, getattr(function, "overload", ""))
            if key in self._functions:
                raise UnsafeFile("two functions of the model have one name", got=short(key[1]), where=path)
            self._functions[key] = function
        self._count = 0
        self._instances = 0
        self._bytes = 0

    def all(self, nodes: list[Any]) -> list[Any]:
        out: list[Any] = []
        for node in nodes:
            out += self._unfolded(node, 0)
        return out

    def _unfolded(self, node: Any, depth: int) -> list[Any]:
        function = self._functions.get(_key(node.domain, node.op_type, getattr(node, "overload", "")))
        # A call costs a step as an operator does, or a tower of empty functions would never end.
        self._count += 1
        if self._count > MAX_NODES:
            raise UnsafeFile(
                "the functions of the model unfold into too many operators",
                expected=f"at most {MAX_NODES}",
                where=self._path,
            )
        if function is None:
            for graph in [graph for attribute in node.attribute for graph in _graphs_of(attribute)]:
                within = [one for inner in graph.node for one in self._unfolded(inner, depth)]
                if any(one is not other for one, other in zip_longest(within, graph.node)):
                    copies = [type(one).FromString(one.SerializeToString()) for one in within]
                    del graph.node[:]
                    graph.node.extend(copies)
            return [node]
        if depth >= _DEEPEST:
            raise UnsafeFile(
                "the functions of the model use each other too deeply",
                got=short(node.op_type),
                where=self._path,
            )
        self._instances += 1
        versions = [entry.version for entry in function.opset_import if entry.domain in STANDARD]
        if versions and max(versions) != self._opset:
            raise UnsupportedModel(
                "a function of the model is of another version than the model",
                expected=f"operator set {self._opset}",
                got=max(versions),
                where=f"{self._path}, {short(function.name)}",
            )
        prefix = f"{function.name}.{self._instances}."
        names = ChainMap({"": "", **dict.fromkeys(function.input, "")})
        names.update(zip(function.input, node.input, strict=False))
        results = dict(zip(function.output, node.output, strict=False))
        # An output that is an input as well, or that stands twice, needs a value of its own.
        names.update({formal: actual for formal, actual in results.items() if actual and formal not in names})
        attributes = {attribute.name: attribute for attribute in function.attribute_proto}
        attributes |= {attribute.name: attribute for attribute in node.attribute}
        out: list[Any] = []
        for inner in function.node:
            self._bytes += inner.ByteSize()
            if self._bytes > _MAX_COPIED:
                raise UnsafeFile(
                    "the functions of the model unfold into too many operators",
                    expected=f"at most {_MAX_COPIED} bytes",
                    where=self._path,
                )
            copy = type(inner)()
            copy.CopyFrom(inner)
            _bind(copy, attributes)
            _rename(copy, names, prefix)
            out += self._unfolded(copy, depth + 1)
        for formal, actual in results.items():
            if actual and names[formal] != actual:
                same = type(node)()
                same.op_type = "Identity"
                same.input.append(names[formal])
                same.output.append(actual)
                out.append(same)
        return out


def _key(domain: str, kind: str, overload: str) -> tuple[str, str, str]:
    return ("" if domain in STANDARD else domain, kind, overload)


def _bind(node: Any, attributes: Mapping[str, Any]) -> None:
    """Put what a function is called with in the place of its formal attributes."""
    bound = []
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            given = attributes.get(attribute.ref_attr_name)
            if given is None:
                continue  # left out: the operator's own default holds
            name = attribute.name
            attribute = type(attribute)()
            attribute.CopyFrom(given)
            attribute.name = name
        else:
            for graph in _graphs_of(attribute):
                for inner in graph.node:
                    _bind(inner, attributes)
        bound.append(attribute)
    copies = [type(one).FromString(one.SerializeToString()) for one in bound]
    del node.attribute[:]
    node.attribute.extend(copies)


def _rename(node: Any, names: ChainMap[str, str], prefix: str) -> None:
    for field in (node.input, node.output):
        for place, name in enumerate(field):
            field[place] = names.setdefault(name, prefix + name)
    node.name = prefix + node.name
    for attribute in node.attribute:
        for graph in _graphs_of(attribute):
            own = names.new_child()
            for tensor in graph.initializer:
                own[tensor.name] = tensor.name = prefix + tensor.name
            for inner in graph.node:
                _rename(inner, own, prefix)
            for value in graph.output:
                value.name = own.get(value.name, value.name)


def _graphs_of(attribute: Any) -> Iterator[Any]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


# ---------------------------------------------------------------------------------------------------
# Order


def _ordered(nodes: list[Any], known: set[str], path: Path) -> list[Any]:
    """Return the operators in an order in which they can run, the file's own where it is one."""
    makers: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in node.output:
            if name:
                if name in makers or name in known:
                    raise UnsafeFile(
                        "two values of the graph have one name, of which readers choose differently",
                        got=short(name),
                        where=path,
                    )
                makers[name] = place
    waiting: list[int] = []
    users: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        needed = {makers[name] for name in (*node.input, *_captured(node)) if name in makers}
        waiting.append(len(needed))
        for maker in needed:
            users.setdefault(maker, []).append(place)
    ready = [place for place, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    out = []
    while ready:
        place = heapq.heappop(ready)
        out.append(nodes[place])
        for user in users.get(place, ()):
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, user)
    # Those that go in a circle stay in the file's order: the first of them has an operand that nothing makes.
    return [*out, *(nodes[place] for place, count in enumerate(waiting) if count)]


def _captured(node: Any) -> list[str]:
    """Return the names that graphs within an operator use; some of them are their own."""
    out: list[str] = []
    todo = [graph for attribute in node.attribute for graph in _graphs_of(attribute)]
    while todo:
        graph = todo.pop()
        out += [value.name for value in graph.output]
        for inner in graph.node:
            out += inner.input
            todo += [deeper for attribute in inner.attribute for deeper in _graphs_of(attribute)]
    return out


# ---------------------------------------------------------------------------------------------------
# Ends


def _cut_ends(nodes: list[Any], names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return what each output is computed from, without what only turns logits into an answer."""
    makers = {name: node for node in nodes for name in node.output if name}
    outputs: dict[str, str] = {}
    cut: set[str] = set()
    for name in names:
        at, end = name, name
        for _ in range(_DEEPEST):
            node = makers.get(at)
            kind = node.op_type if node is not None and node.domain in STANDARD else ""
            if node is None or kind not in (*_PASSING, *_ENDS) or not node.input:
                break
            if kind in _ENDS and not _over_classes(node):
                break
            at = node.input[0]
            if kind in _ENDS:
                end = at
                cut.add(kind)
        outputs[name] = end
    words = {"Softmax": "softmax", "LogSoftmax": "softmax"}
    notes = sorted({words.get(kind, "choice of a class") for kind in cut})
    return outputs, [f"the {what} at the end was left out: the network gives logits" for what in notes]


_ENDS = ("Softmax", "LogSoftmax", "ArgMax", "TopK", "Hardmax")


def _over_classes(node: Any) -> bool:
    """Tell whether an end works along the classes, as far as its attributes show."""
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    default = 0 if node.op_type == "ArgMax" else -1
    return (axes[0] if axes else default) in (1, -1)


def _step(node: Any) -> Step:
    kind = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
    if kind == "Cast" and any(a.name == "to" and a.i in _INTEGERS for a in node.attribute):
        kind = "Cast to a whole number"
    label = f"{kind} {short(node.name or node.output[0] if node.output else node.name)}"
    # Its scale and zero only say how the levels are read: what else is done with them is not imported.
    outputs = node.output[:1] if kind == "DynamicQuantizeLinear" else node.output
    return Step(label, kind, (*node.input, *_captured(node)), tuple(outputs))


def _names(outputs: Mapping[str, str]) -> str:
    return listed([short(name)[1:-1] for name in outputs], 8)
