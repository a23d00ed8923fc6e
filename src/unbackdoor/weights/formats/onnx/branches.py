"""Branches of a graph whose condition the file itself decides: the one that is taken stands in their place.

Exporters write ``If`` around what depends on the sizes of an image, and around what is of training alone. The
graphs in it may use the values around them and may give none of them a second meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbackdoor.errors import InputError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.limits import spend

ROUNDS = 20  # of branches whose conditions depend on what other branches give
_STANDARD = ("", "ai.onnx")


def is_branch(node: Any) -> bool:
    """Tell whether an operator takes one of two graphs."""
    return node.op_type == "If" and node.domain in _STANDARD


def require_no_second_meaning(model: Any, path: Path) -> None:
    """Refuse graphs within the operators of a model that give a name of a value around them to another one.

    Raises:
        UnsafeFile: If one does.
    """
    names = set(_defined(model.graph))
    for node in model.graph.node:
        _look_into(node, names, path)


def _look_into(node: Any, around: set[str], path: Path) -> None:
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own: list[str] = []
            for name in _defined(graph):
                spend("visits")
                if name in around:
                    raise UnsafeFile(
                        "a value in a branch of the graph has the name of one around it, of which readers "
                        "choose differently",
                        got=short(name),
                        where=path,
                    )
                around.add(name)
                own.append(name)
            for inner in graph.node:
                _look_into(inner, around, path)
            around.difference_update(own)


def _defined(graph: Any) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    given = {value.name for value in graph.input}
    yield from (tensor.name for tensor in graph.initializer if tensor.name not in given)
    yield from (name for node in graph.node for name in node.output if name)


def take(model: Any, truths: Mapping[str, bool], path: Path) -> int:
    """Put the branches that are taken in the place of their operators.

    Args:
        model: The message, which is changed.
        truths: What the conditions are, by their names.
        path: File, for messages.

    Returns:
        How many operators were replaced.

    Raises:
        InputError: If a branch is missing or damaged.
        UnsupportedModel: If a branch holds what is not imported.
    """
    graph = model.graph
    used = {*_defined(graph), *(name for node in graph.node for name in node.input)}
    nodes: list[Any] = []
    count = 0
    for node in graph.node:
        if not is_branch(node) or not node.input or node.input[0] not in truths:
            nodes.append(node)
            continue
        count += 1
        branch = _branch(node, truths[node.input[0]], path)
        names = {name: _unused(name, used) for name in _defined(branch)}
        for tensor in branch.initializer:
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = names[tensor.name]
        for inner in branch.node:
            copy = type(inner)()
            copy.CopyFrom(inner)
            _rename(copy, names)
            nodes.append(copy)
        for result, name in zip(branch.output, node.output, strict=False):
            if name:
                same = type(node)()
                same.op_type = "Identity"
                same.input.append(names.get(result.name, result.name))
                same.output.append(name)
                nodes.append(same)
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _branch(node: Any, truth: bool, path: Path) -> Any:
    where = f"{path}, If {short(node.name or (node.output[0] if node.output else ''))}"
    name = "then_branch" if truth else "else_branch"
    found = [one for one in node.attribute if one.name == name and one.HasField("g")]
    if len(found) != 1 or len(found[0].g.output) != len(node.output):
        raise InputError(
            "a branch of the graph is missing or has other results",
            expected=f"one graph {name} with {len(node.output)} results",
            got=f"{len(found)} graphs",
            where=where,
        )
    if found[0].g.input or found[0].g.sparse_initializer:
        raise UnsupportedModel("a branch of the graph has inputs, or sparse weights", where=where)
    return found[0].g


def _unused(name: str, used: set[str]) -> str:
    # Two branches may use a name for values of their own.
    fresh, number = name, 1
    while fresh in used:
        number += 1
        fresh = f"{name}.{number}"
    used.add(fresh)
    return fresh


def _rename(node: Any, names: Mapping[str, str]) -> None:
    for field in (node.input, node.output):
        field[:] = [names.get(name, name) for name in field]
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                _rename(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)
