"""What other loaders make of a file that this package reads: all must see the same weights, bit for bit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
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


def safetensors_reads(content: bytes) -> object:
    """Return what the library safetensors makes of a file, or None where it refuses it."""
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError):
        return None


def difference(
    content: bytes, state: Mapping[str, Tensor], reads: Callable[[bytes], object] = torch_reads
) -> str | None:
    """Return how the weights that were read differ from those that another loader reads, or None.

    Args:
        content: The file.
        state: The weights that this package read, with the names of the file.
        reads: The other loader.
    """
    loaded = reads(content)
    if loaded is None:
        return None
    # Where the weights lie is this package's choice; what they are is not.
    candidates = [found for found in _mappings(loaded, _DEPTH) if set(found) == set(state)]
    if not candidates:
        return f"the other loader has no entry with the names {sorted(state)[:5]}"
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


def floats_of(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state dict with what torch itself makes of its quantised tensors and packed pairs."""
    out: dict[Any, Any] = {}
    for name, entry in state.items():
        layer = name.removesuffix("_packed_params._packed_params") if isinstance(name, str) else name
        if layer != name and isinstance(entry, tuple):
            out[f"{layer}weight"] = entry[0].dequantize()
            out |= {f"{layer}bias": entry[1]} if entry[1] is not None else {}
        else:
            quantised = isinstance(entry, Tensor) and entry.is_quantized
            out[name] = entry.dequantize() if quantised else entry
    return out


def _mappings(value: object, depth: int) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        tensors = {name: entry for name, entry in floats_of(value).items() if isinstance(entry, Tensor)}
        if all(isinstance(name, str) for name in tensors):
            yield tensors
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for entry in inner if depth else ():
        yield from _mappings(entry, depth - 1)
