"""Heads of several layers: from their tensors to the option that builds them, and to the bare network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unbackdoor.opening.recognise_chain import is_index

# What libraries and their users call the end of a network; a number may follow (``classifier.1``).
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
        *("mlp", "mlp_head", "projection", "classification_head", "cls_head", "classif", "top"),
    }
)
_LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_MAX_LAYERS = 20


@dataclass(frozen=True)
class Head:
    """A head of several layers.

    Attributes:
        name: What stands before the names of all its tensors.
        layers: Names of its layers with weights, in order.
        tokens: The option ``head`` of a spec.
        inputs: Values that it takes.
        classes: Number of classes.
        activated: Whether an activation stands in it, which no tensor shows.
    """

    name: str
    layers: tuple[str, ...]
    tokens: str
    inputs: int
    classes: int
    activated: bool


def find_head(state: Mapping[str, Tensor]) -> Head | None:
    """Return the head of several layers that a network ends in, or None."""
    firsts: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        for depth in range(1, len(parts) - 1):
            part = parts[depth - 1]
            if part not in _NAMES and (depth == 1 or not is_index(part)):
                break  # ``blocks.0.mlp`` is no end of a network
            firsts.setdefault(".".join(parts[:depth]), []).append(name)
    # The outermost that holds nothing but a head.
    for before in sorted(firsts, key=len):
        head = _head(before, {name: state[name] for name in firsts[before]})
        if head is not None and len(firsts[before]) < len(state):
            return head
    return None


def _head(before: str, tensors: Mapping[str, Tensor]) -> Head | None:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = tensor
    if not 2 <= len(layers) <= _MAX_LAYERS or not all(
        "weight" in one and one["weight"].dim() in (1, 2) and one.keys() <= _LEAVES for one in layers.values()
    ):
        return None
    inner = [layer.removeprefix(before + ".") for layer in layers]
    numbered = all(is_index(part) for part in inner)
    named = sorted(layers, key=lambda layer: [int(n) for n in re.findall(r"\d{1,9}", layer[len(before) :])])
    for order in (
        sorted(layers, key=lambda x: int(x.rpartition(".")[2])) if numbered else list(layers),
        named,
    ):
        widths = _widths(order, layers)
        if widths is not None:
            tokens = _tokens(order, layers, numbered)
            return Head(before, tuple(order), "-".join(tokens), *widths, "a" in tokens)
    return None


def _widths(order: list[str], layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int] | None:
    """Return inputs and outputs where every layer takes what the one before it gives."""
    first = width = None
    for layer in order:
        weight = layers[layer]["weight"]
        inputs = int(weight.shape[-1])
        if (width is not None and inputs != width) or not weight.numel():
            return None
        first = inputs if first is None else first
        width = int(weight.shape[0])
    if first is None or width is None or layers[order[-1]]["weight"].dim() != 2:
        return None
    return first, width


def _tokens(order: list[str], layers: Mapping[str, Mapping[str, Tensor]], numbered: bool) -> list[str]:
    tokens: list[str] = []
    places = [int(layer.rpartition(".")[2]) if numbered else 0 for layer in order]
    if numbered:
        tokens += ["d"] * min(places[0], 4)
    for i, layer in enumerate(order):
        one = layers[layer]
        last = i + 1 == len(order)
        linear = one["weight"].dim() == 2
        if linear:
            tokens.append(f"l{'' if last else int(one['weight'].shape[0])}{'' if 'bias' in one else 'n'}")
        else:
            tokens.append("b" if "running_mean" in one else "y")
        if last:
            break
        if numbered:
            gap = min(places[i + 1] - places[i] - 1, 4)
            # Behind a norm that comes before all linear layers stands no activation, but a dropout.
            first = not any(layers[layer]["weight"].dim() == 2 for layer in order[: i + 1])
            tokens += (["d"] if first else ["a"]) * min(gap, 1) + ["d"] * (gap - 1)
        elif any(layers[x]["weight"].dim() == 2 for x in order[: i + 1]):
            following = layers[order[i + 1]]["weight"].dim() == 2
            tokens += ["a"] if following else []
    return tokens
