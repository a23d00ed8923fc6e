"""What torch makes of a file that this package reads: both must see the same weights, bit for bit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_load = torch.load  # some tests take it away
_DEPTH = 5


def torch_reads(content: bytes) -> object:
    """Return what ``torch.load(weights_only=True)`` makes of a file, or None where it refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001 - whatever it raises, it then gives no weights that could differ
            return None


def difference(content: bytes, state: Mapping[str, Tensor]) -> str | None:
    """Return how the weights that were read differ from those that torch reads, or None.

    Args:
        content: The file.
        state: The weights that this package read, with the names of the file.
    """
    loaded = torch_reads(content)
    if loaded is None:
        return None
    # Where the weights lie is this package's choice; what they are is not.
    candidates = [found for found in _mappings(loaded, _DEPTH) if set(found) == set(state)]
    if not candidates:
        return f"torch has no entry with the names {sorted(state)[:5]}"
    different = [[n for n in state if not same_bits(state[n], found[n])] for found in candidates]
    return None if [] in different else f"other values in {different[0][:5]}"


def same_bits(one: Tensor, other: Any) -> bool:
    """Tell whether two tensors are of one type and shape and equal bit for bit, NaN included."""
    if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
        return False
    if other.is_conj() or other.is_neg() or other.device.type != "cpu" or other.layout != torch.strided:
        return False
    if one.dtype == torch.bool:
        return torch.equal(one, other)
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def _mappings(value: object, depth: int) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        tensors = {name: entry for name, entry in value.items() if isinstance(entry, Tensor)}
        if all(isinstance(name, str) for name in tensors):
            yield tensors
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for entry in inner if depth else ():
        yield from _mappings(entry, depth - 1)
