"""Which networks of timm and torchvision have exactly these tensors, looked up in a table of hashes.

``architectures.json`` beside this file is made by ``scripts/architecture_table.py`` from every classifier of
the two libraries. It holds, for each set of names and shapes, the hash of the names, the hash of names and
shapes with the number of classes and of image channels left open, and the networks that have them. Nothing is
built and neither library is imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

FILE = Path(__file__).with_name("architectures.json")
FORMAT = 1
# Old checkpoints lack these counters, and no result depends on them.
_COUNTERS = "num_batches_tracked"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """Networks whose tensors have the same names and shapes.

    Attributes:
        names: Hash of the names.
        shapes: Hash of names and shapes; the extents that are open count as 0.
        nameless: Hash of the shapes alone, without those of the last layer.
        classes: Extents that are the number of classes, as ``name:axis``.
        channels: Extents that are the number of image channels, likewise.
        networks: Specs; those of one inner tuple compute the same function. The most usual first.
    """

    names: str
    shapes: str
    nameless: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    networks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Match:
    """A state dict that is in the table.

    Attributes:
        networks: As of the row.
        classes: Number of classes.
        channels: Image channels, or None where the row leaves them fixed.
    """

    networks: tuple[tuple[str, ...], ...]
    classes: int
    channels: int | None


def lookup(state: Mapping[str, Tensor]) -> Match | None:
    """Return the networks of timm and torchvision that have the tensors of a state dict, or None.

    Args:
        state: Tensors by the library's names, without the prefix of a wrapper. Counters of batches may be
            missing.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for row in _tables()[0].get(names_hash(shapes), ()):
        classes, channels = (_extents(shapes, places) for places in (row.classes, row.channels))
        if len(classes) != 1 or len(channels) > 1:
            continue
        if shapes_hash(shapes, (*row.classes, *row.channels)) == row.shapes:
            return Match(row.networks, classes.pop(), channels.pop() if channels else None)
    return None


def same_shapes(body: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Return the networks whose tensors without the last layer have these shapes, whatever their names."""
    shapes = [tuple(tensor.shape) for name, tensor in body.items() if not name.endswith(_COUNTERS)]
    rows = _tables()[1].get(nameless_hash(shapes), ())
    return tuple(same for row in rows for same in row.networks)


@cache
def linear_heads() -> tuple[str, ...]:
    """Return what the libraries call their last layer, where that is one linear layer, in order."""
    heads = set()
    for rows in _tables()[0].values():
        for row in rows:
            layers = {place.rpartition(".")[0] for place in row.classes}
            if len(layers) == 1 and all(place.endswith(("weight:0", "bias:0")) for place in row.classes):
                heads |= layers
    return tuple(sorted(heads - {""}))


def names_hash(shapes: Shapes) -> str:
    """Return 16 hex digits over the names of tensors."""
    return _digest(sorted(name for name in shapes if not name.endswith(_COUNTERS)))


def shapes_hash(shapes: Shapes, open_places: Sequence[str]) -> str:
    """Return 16 hex digits over names and shapes, with the open extents taken as 0."""
    extents = {name: list(shape) for name, shape in shapes.items() if not name.endswith(_COUNTERS)}
    for name, axis in map(_place, open_places):
        extents[name][axis] = 0
    return _digest(sorted(extents.items()))


def nameless_hash(shapes: Iterable[tuple[int, ...]]) -> str:
    """Return 16 hex digits over shapes in any order."""
    return _digest(sorted(shapes))


def table_text(rows: Sequence[Row], libraries: Mapping[str, str]) -> str:
    """Return the content of the table's file: one row a line, sorted, the same for the same rows."""
    places = sorted({row.classes for row in rows} | {row.channels for row in rows})
    numbers = {place: number for number, place in enumerate(places)}
    head = {"format": FORMAT, "libraries": dict(sorted(libraries.items())), "places": places}
    lines = [
        json.dumps(
            [row.networks, row.names, row.shapes, row.nameless, numbers[row.classes], numbers[row.channels]],
            separators=(",", ":"),
        )
        for row in sorted(rows, key=lambda row: row.networks)
    ]
    return json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def parse_table(text: str) -> tuple[list[Row], dict[str, str]]:
    """Return the rows and the versions of the libraries; the inverse of :func:`table_text`."""
    content: dict[str, Any] = json.loads(text)
    assert content["format"] == FORMAT
    places = [tuple(place) for place in content["places"]]
    rows = [
        Row(names, shapes, nameless, places[classes], places[channels], tuple(map(tuple, networks)))
        for networks, names, shapes, nameless, classes, channels in content["rows"]
    ]
    return rows, content["libraries"]


@cache
def _tables() -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows by the hash of their names, and by that of their shapes alone."""
    by_names: dict[str, list[Row]] = {}
    nameless: dict[str, list[Row]] = {}
    for row in parse_table(FILE.read_text(encoding="utf-8"))[0]:
        by_names.setdefault(row.names, []).append(row)
        nameless.setdefault(row.nameless, []).append(row)
    return by_names, nameless


def forget_table() -> None:
    """Read the file again at the next look-up."""
    _tables.cache_clear()
    linear_heads.cache_clear()


def _extents(shapes: Shapes, places: Sequence[str]) -> set[int]:
    extents: set[int] = set()
    for name, axis in map(_place, places):
        if name not in shapes or len(shapes[name]) <= axis:
            return {-1, -2}  # another rank: no match
        extents.add(shapes[name][axis])
    return extents


def _place(text: str) -> tuple[str, int]:
    name, _, axis = text.rpartition(":")
    return name, int(axis)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]
