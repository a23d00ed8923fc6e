"""Heads of several layers: from their tensors to the option that builds them, and to the bare network.

A head is a chain of linear layers and norms, each of which takes what the one before it gives. What stands
between them leaves no tensor. Numbers in names show how much stands there: behind a linear layer first the
activation, then dropouts. Where names are no positions, an activation stands between two linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from unbackdoor.opening.recognise_chain import is_index

# What libraries and their users call the end of a network; a number may follow (``classifier.1``, ``fc1``).
_NAMES = frozenset(
    {
        *(
            "fc",
            "linear",
            "classifier",
            "head",
            "heads",
            "last_linear",
            "logits",
            "output",
            "out",
            "final_layer",
        ),
        *("mlp", "mlp_head", "projection", "projector", "classification_head", "cls_head", "classif", "top"),
        *("dense", "proj", "proj_head", "projection_head", "cls", "clf", "final", "lin", "predictor", "fcs"),
    }
)
_LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_MAX_LAYERS = 20
_DEEPEST = 6  # lists within each other
_MAX_GAP = 4  # layers without weights in a row


@dataclass(frozen=True)
class Head:
    """A head of several layers.

    Attributes:
        names: Names of all its tensors.
        layers: Names of its layers with weights, in order.
        tokens: The option ``head`` of a spec.
        inputs: Values that it takes.
        classes: Number of classes.
    """

    names: frozenset[str]
    layers: tuple[str, ...]
    tokens: str
    inputs: int
    classes: int

    @property
    def activated(self) -> bool:
        """Whether an activation stands in it, which no tensor shows."""
        return "a" in self.tokens.split("-")

    @property
    def note(self) -> str:
        """What no tensor shows of it, in words; empty for nothing."""
        unseen = []
        if self.activated:
            unseen.append("which activation stands in the head, and where, cannot be seen")
        if "y" in self.tokens.split("-"):
            unseen.append("a norm without statistics in the head is taken for a layer norm")
        return "; ".join(unseen)


def find_head(state: Mapping[str, Tensor]) -> Head | None:
    """Return the outermost head of at least two layers that a network ends in, or None."""
    return next((head for head in find_heads(state) if len(head.layers) > 1), None)


def find_heads(state: Mapping[str, Tensor]) -> Iterator[Head]:
    """Yield what may be a head in the place of a network's one linear layer, the outermost first.

    One of a single layer is among them where that layer lies in a list (``classifier.1.1``).
    """
    for names in _groups(state):
        head = _head({name: state[name] for name in names}) if len(names) < len(state) else None
        if head is not None:
            yield head


def _groups(state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of tensors that together may be a head."""
    firsts: dict[str, list[str]] = {}
    tops: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        tops.setdefault(parts[0], []).append(name)
        for depth in range(1, min(len(parts) - 1, _DEEPEST)):
            part = parts[depth - 1]
            if part not in _NAMES and (depth == 1 or not is_index(part)):
                break  # ``blocks.0.mlp`` is no end of a network
            firsts.setdefault(".".join(parts[:depth]), []).append(name)
    for before in sorted(firsts, key=lambda path: path.count(".")):
        yield firsts[before]
    # Layers beside the body: ``fc1``, ``fc2``; where it is one part (``backbone``), whatever they are called.
    single = {top: names for top, names in tops.items() if all(name.count(".") == 1 for name in names)}
    numbered = [top for top in single if top.rstrip("0123456789").rstrip("_") in _NAMES]
    for chosen in (list(single) if len(tops) == len(single) + 1 else [], numbered):
        if len(chosen) > 1:
            yield [name for top in chosen for name in single[top]]


def _head(tensors: Mapping[str, Tensor]) -> Head | None:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = tensor
    if not 1 <= len(layers) <= _MAX_LAYERS or not all(
        "weight" in one and one["weight"].dim() in (1, 2) and one.keys() <= _LEAVES for one in layers.values()
    ):
        return None
    if len(layers) == 1 and _place(next(iter(layers)))[1] is None:
        return None  # ``fc``
    for order in _orders(layers):
        widths = _widths(order, layers)
        if widths is not None:
            return Head(frozenset(tensors), tuple(order), "-".join(_tokens(order, layers)), *widths)
    return None


def _orders(layers: Mapping[str, Mapping[str, Tensor]]) -> list[list[str]]:
    """Return orders in which the layers may be applied: safetensors sorts its names, other files do not."""

    def numbers(layer: str) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d{1,9}", layer)]

    by_number = sorted(layers, key=numbers)
    if all(is_index(layer.rpartition(".")[2]) for layer in layers):
        return [by_number, list(layers)]
    by_width = [layer for layer in by_number if _is_linear(layers[layer])]
    for norm in (layer for layer in by_number if not _is_linear(layers[layer])):
        rows = [len(layers[layer]["weight"]) for layer in by_width]
        width = len(layers[norm]["weight"])
        by_width.insert(rows.index(width) + 1 if width in rows else 0, norm)
    return [list(layers), by_number, by_width]


def _is_linear(layer: Mapping[str, Tensor]) -> bool:
    return layer["weight"].dim() == 2


def _is_prelu(layer: Mapping[str, Tensor]) -> bool:
    return layer.keys() == {"weight"} and tuple(layer["weight"].shape) == (1,)


def _widths(order: list[str], layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int] | None:
    """Return inputs and outputs where every layer takes what the one before it gives."""
    first = width = None
    for layer in order:
        weight = layers[layer]["weight"]
        if _is_prelu(layers[layer]) and width is not None:
            continue
        inputs = int(weight.shape[-1])
        if (width is not None and inputs != width) or not weight.numel():
            return None
        first = inputs if first is None else first
        width = int(weight.shape[0])
    if first is None or width is None or not _is_linear(layers[order[-1]]):
        return None
    return first, width


def _tokens(order: list[str], layers: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    places = [_place(layer) for layer in order]
    tokens = ["d"] * min(places[0][1] or 0, _MAX_GAP)
    linear = active = False  # whether there was one, and an activation behind it
    for i, layer in enumerate(order):
        one, last = layers[layer], i + 1 == len(order)
        if _is_linear(one):
            tokens.append(f"l{'' if last else int(one['weight'].shape[0])}{'' if 'bias' in one else 'n'}")
            linear, active = True, False
        elif _is_prelu(one) and linear:
            tokens.append("p")
            active = True
        else:
            tokens.append("b" if "running_mean" in one else "y")
        if last:
            break
        (here, place), (there, following) = places[i], places[i + 1]
        needed = linear and not active
        if here == there and place is not None and following is not None:
            gap = min(following - place - 1, _MAX_GAP)
            fill = ["a" if needed else "d"] * min(gap, 1) + ["d"] * (gap - 1)
        else:
            fill = ["a"] if needed and _is_linear(layers[order[i + 1]]) else []
        active = active or "a" in fill
        tokens += fill
    return tokens


def _place(layer: str) -> tuple[str, int | None]:
    """Return the list that a layer lies in, and its place there, or None where its name is no place."""
    parent, _, last = layer.rpartition(".")
    return parent, int(last) if is_index(last) else None
