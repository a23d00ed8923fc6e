"""From the tensors of a plain chain of layers to the specs of ``sequential_cnn`` that have the same tensors.

Names and shapes show the layers with weights, and the numbers in names such as ``features.8.weight`` show how
many layers without weights stand between them. What they are is filled in as is usual (activation, pooling,
dropout, in this order), and the first linear layer's inputs say how far the image must have been pooled.
What the file does not show (max or average pooling, which activation) is left as a choice.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from unbackdoor.networks.sequential import ACTIVATIONS, after
from unbackdoor.networks.spec import MAX_SPEC

Kind = Literal["conv", "norm", "linear"]
# Pixels a side of the usual data sets, the more usual the earlier; held against what the weights imply.
USUAL_SIDES = (32, 28, 224, 64, 96, 48, 40, 128, 112, 256, 16, 84, 80, 160, 192, 299, 8)
# torchvision's VGG and AlexNet average to so many pixels a side, so that they take images of any size.
_AVERAGED, _AVERAGED_FROM = (7, 6), 224
_MAX_FREE_POOLS = 10  # convolutions behind which a pooling may or may not stand
_MAX_SPECS = 6
_MAX_LAYERS = 1000  # of a chain; a spec has no room for as many
_LONGEST_INDEX = 4  # digits of the number of a layer
_NUMBER = re.compile(r"([0-9]{1,18})")


@dataclass(frozen=True)
class Module:
    """One layer with weights, as a state dict shows it.

    Attributes:
        name: Its name, such as ``features.0``.
        kind: What its shapes say it is.
        shape: Shape of its weight.
        bias: Whether it has a bias.
        leaves: Names of its tensors below its own, such as ``weight``.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bias: bool
    leaves: tuple[str, ...]

    @property
    def position(self) -> tuple[str, int] | None:
        """The container and the number in it, or None where the name ends in no number of its own."""
        parent, _, last = self.name.rpartition(".")
        return (parent, int(last)) if is_index(last) else None


@dataclass(frozen=True)
class Chain:
    """One way to complete a chain.

    Attributes:
        spec: Spec of ``sequential_cnn``.
        side: Pixels a side of the images that it is for; None where any size does.
        choices: Options that nothing in the file shows, with what they may be, the more usual first.
    """

    spec: str
    side: int | None
    choices: Mapping[str, tuple[str, ...]]


def is_index(text: str) -> bool:
    """Tell whether a part of a name is the number of a layer; other digits and absurd numbers are none."""
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_INDEX


def modules(state: Mapping[str, Tensor]) -> list[Module] | None:
    """Return the layers of a plain chain in the order they are applied, or None where it is none."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        groups.setdefault(parent, {})[leaf] = tensor
    parsed = [_module(name, tensors) for name, tensors in groups.items()]
    layers = [module for module in parsed if module is not None]
    if len(layers) > _MAX_LAYERS:
        return None
    # Deeper names are blocks within blocks, whose skips cannot be seen: ``layer1.0.conv1``.
    if len(layers) < len(parsed) or any(module.name.count(".") > 1 for module in layers):
        return None
    # safetensors sorts its names, so that the order of a file is not always that of the network.
    for order in (list, _by_number, _by_layer):
        ordered = order(layers)
        if _widths_agree(ordered):
            return ordered
    return None


def chains(state: Mapping[str, Tensor], side: int | None = None) -> list[Chain]:
    """Return the ways to complete a plain chain, the most usual first; none where it is no chain.

    Args:
        state: Tensors by name.
        side: Pixels a side of the images that it is for, or None.
    """
    layers = modules(state)
    if layers is None or layers[-1].kind != "linear":
        return []
    convs = list(itertools.takewhile(lambda module: module.kind != "linear", layers))
    linears = layers[len(convs) :]
    if not convs or any(module.kind == "conv" for module in linears):
        return []
    channels = [module.shape[0] for module in convs if module.kind == "conv"][-1]
    pixels, rest = divmod(linears[0].shape[1], channels)
    end = math.isqrt(pixels)
    if rest or end * end != pixels or end < 1:
        return []
    head = _head(linears)
    by_spec: dict[str, Chain] = {}
    for tokens in itertools.islice(_token_lists(convs), 1 << _MAX_FREE_POOLS):
        features = "-".join(tokens)
        if (
            end in _AVERAGED
            and _remaining_side(tokens, _AVERAGED_FROM) == end
            and _remaining_side(tokens, side or _AVERAGED_FROM) >= 1
        ):
            spec = _spec(features, head, end)
            if len(spec) + 30 <= MAX_SPEC:
                by_spec[spec] = Chain(spec, None, _choices(tokens, head))
        for size in (side,) if side else USUAL_SIDES:
            left = _remaining_side(tokens, size)
            exact = left == end
            # One pixel may be an average of any size; a larger map is exactly what was flattened.
            if left < end or (not exact and end > 1):
                continue
            spec = _spec(features, head, 1 if end == 1 else 0)
            if len(spec) + 30 <= MAX_SPEC and spec not in by_spec:
                by_spec[spec] = Chain(spec, size if end > 1 else None, _choices(tokens, head))
        if len(by_spec) >= _MAX_SPECS:
            break
    usual = sorted(
        by_spec.values(), key=lambda chain: USUAL_SIDES.index(chain.side) if chain.side in USUAL_SIDES else 0
    )
    return usual[:_MAX_SPECS]


def _remaining_side(tokens: Sequence[str], side: int) -> int:
    """Return the pixels a side that the layers leave of ``side``; less than 1 where nothing is left."""
    for token in tokens:
        side = after(token, side)
        if side < 1:
            break
    return side


def _spec(features: str, head: str, side: int) -> str:
    options = [f"features={features}", f"classifier={head}"] + ([f"side={side}"] if side else [])
    return f"sequential_cnn[{','.join(options)}]"


def averaged(spec: str) -> str:
    """Return the same chain with average instead of max pooling."""
    before, features, rest = spec.partition("features=")
    tokens, comma, tail = rest.partition(",")
    swapped = "-".join("v" + token[1:] if token[0] == "m" else token for token in tokens.split("-"))
    return before + features + swapped + comma + tail


def _module(name: str, tensors: Mapping[str, Tensor]) -> Module | None:
    weight = tensors.get("weight")
    if weight is None or not set(tensors) <= {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }:  # fmt: skip
        return None
    shape = tuple(int(extent) for extent in weight.shape)
    if 0 in shape:
        return None
    kind: Kind
    if len(shape) == 4 and shape[2] == shape[3]:
        kind = "conv"
    elif len(shape) == 2:
        kind = "linear"
    elif len(shape) == 1 and "running_mean" in tensors and "bias" in tensors:
        kind = "norm"
    else:
        return None
    return Module(name, kind, shape, "bias" in tensors, tuple(tensors))


def _by_number(layers: Sequence[Module]) -> list[Module]:
    def key(module: Module) -> list[tuple[int, str]]:
        parts = _NUMBER.split(module.name)  # texts and numbers in turn
        return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)][1:]

    return sorted(layers, key=key)


def _by_layer(layers: Sequence[Module]) -> list[Module]:
    # conv1, bn1, conv2, bn2, fc1, fc2: all that is flat goes after all that is not, then by number.
    last_conv = {"conv": 0, "norm": 1, "linear": 2}

    def key(module: Module) -> tuple[int, list[int], int]:
        digits = [int(number) for number in _NUMBER.findall(module.name)]
        return (int(module.kind == "linear"), digits, last_conv[module.kind])

    return sorted(layers, key=key)


def _widths_agree(layers: Sequence[Module]) -> bool:
    """Tell whether every layer takes what the one before it gives."""
    width: int | None = None
    flat = False
    for module in layers:
        if module.kind == "conv":
            outputs, inputs = module.shape[:2]
            if flat or (width is not None and (width % inputs or outputs % (width // inputs))):
                return False
            width = outputs
        elif module.kind == "norm":
            if width != module.shape[0]:
                return False
        else:
            outputs, inputs = module.shape
            if width is not None and (inputs % width if not flat else inputs != width):
                return False
            width, flat = outputs, True
    return bool(layers) and layers[0].kind == "conv"


def _token_lists(convs: Sequence[Module]) -> Iterator[list[str]]:
    """Yield the token lists of the convolutional part, the most usual first."""
    positions = [module.position for module in convs]
    parents = {position[0] for position in positions if position}
    numbered = len(parents) == 1 and all(positions) and _is_increasing([p[1] for p in positions if p])
    kernels = {module.shape[2] for module in convs if module.kind == "conv"}
    paddings = (None, 0) if kernels != {1} else (None,)
    for padding in paddings:
        tokens = _with_weights(convs, padding)
        if numbered:
            yield from _fill_numbered(tokens, [p[1] for p in positions if p])
        else:
            yield from _fill_unnumbered(tokens)


def _is_increasing(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _with_weights(convs: Sequence[Module], padding: int | None) -> list[str]:
    tokens = []
    width: int | None = None
    for module in convs:
        if module.kind == "norm":
            tokens.append("b")
            continue
        outputs, inputs, kernel = module.shape[:3]
        token = f"c{outputs}" + (f"k{kernel}" if kernel != 3 else "")
        token += f"p{padding}" if padding is not None and kernel > 1 else ""
        token += f"g{width // inputs}" if width is not None and width != inputs else ""
        tokens.append(token + ("" if module.bias else "n"))
        width = outputs
    return tokens


def _fill_numbered(tokens: Sequence[str], places: Sequence[int]) -> Iterator[list[str]]:
    gaps = [b - a - 1 for a, b in itertools.pairwise(places)]
    lead = ["d"] * places[0]
    # A gap of two is an activation and a pooling, or an activation and a dropout; of three, all of them.
    for two_is_pool in (True, False):
        if not two_is_pool and 2 not in gaps:
            continue
        fills = [_fill(gap, two_is_pool) for gap in gaps]
        body = list(itertools.chain.from_iterable([t, *f] for t, f in zip(tokens, [*fills, []], strict=True)))
        # What follows the last weights leaves no trace in the names.
        for tail in (["a", "m"], ["a"]):
            yield [*lead, *body, *tail]


def _fill(gap: int, two_is_pool: bool) -> list[str]:
    if gap < 2:
        return ["a"] * gap
    if gap == 2:
        return ["a", "m" if two_is_pool else "d"]
    return ["a", "m", *["d"] * (gap - 2)]


def _fill_unnumbered(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Yield fillings where the names are no positions: an activation after each layer, poolings anywhere."""
    ends = [i for i, token in enumerate(tokens) if i + 1 == len(tokens) or tokens[i + 1] != "b"]
    ends = [i for i in ends if tokens[i][0] in "cb"]
    count = len(ends)
    if count > _MAX_FREE_POOLS:
        patterns: list[tuple[bool, ...]] = [tuple(False for _ in ends)]
    else:
        # All of them, then every second one, then the rest by how many there are.
        every_second = tuple(i % 2 == 1 for i in range(count))
        patterns = sorted(itertools.product((True, False), repeat=count), key=sum, reverse=True)
        patterns.sort(key=lambda p: (p != (True,) * count, p != every_second))
    for pattern in patterns:
        out = []
        pooled = dict(zip(ends, pattern, strict=True))
        for i, token in enumerate(tokens):
            out.append(token)
            if i in pooled:
                out += ["a", "m"] if pooled[i] else ["a"]
        yield out


def _head(linears: Sequence[Module]) -> str:
    if len(linears) == 1 and linears[0].position is None:
        return "l" if linears[0].bias else "ln"
    tokens: list[str] = []
    positions = [module.position for module in linears]
    numbered = all(positions) and len({p[0] for p in positions if p}) == 1
    for i, module in enumerate(linears):
        place = positions[i]
        last = i + 1 == len(linears)
        if numbered and i == 0 and place is not None:
            # A dropout, or the flattening itself; in one container with the convolutions it is unknown.
            tokens += ["d"] * (place[1] if place[1] <= 2 else 0)
        suffix = "" if module.bias else "n"
        if module.kind == "norm":
            tokens.append("b")
        else:
            tokens.append(f"l{'' if last else module.shape[0]}{suffix}")
        if last:
            break
        here, there = positions[i], positions[i + 1]
        if numbered and here is not None and there is not None:
            gap = there[1] - here[1] - 1
            tokens += ["a", *["d"] * (gap - 1)] if gap else []
        elif linears[i + 1].kind != "norm":
            tokens.append("a")
    if tokens in (["l"], ["ln"]):
        tokens.append("d")  # a container of one layer has another key than a bare layer
    return "-".join(tokens)


def _choices(tokens: Sequence[str], head: str) -> dict[str, tuple[str, ...]]:
    choices: dict[str, tuple[str, ...]] = {}
    if "a" in tokens or "a" in head.split("-"):
        choices["activation"] = tuple(ACTIVATIONS)
    if any(token[0] == "m" for token in tokens):
        choices["pooling"] = ("max", "average")
    return choices
