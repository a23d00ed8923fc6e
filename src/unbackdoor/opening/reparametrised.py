"""Weights that a file holds as several tensors: weight norm and spectral norm, in both forms of torch.

    W = g v / ||v||              weight_g, weight_v; or parametrizations.weight.original0, original1
    W = W_orig / (u^T W_orig v)  weight_orig, weight_u, weight_v; or parametrizations.weight.original, ...0._u

Norms are taken over the extents that g leaves at 1; W_orig counts as a matrix. Networks here have plain
weights, so the product is taken when a file is opened; a repaired weight is written back as the same parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.errors import UnsupportedModel

_NEW = ".parametrizations."
_ITERATIONS = 50  # of the power method; only its scale must be exact, and that is computed last


@dataclass(frozen=True)
class Parts:
    """One weight in parts.

    Attributes:
        name: Name of the plain weight.
        kind: How it is computed.
        names: Of its tensors: g and v, or the weight, u and v.
    """

    name: str
    kind: Literal["weight norm", "spectral norm"]
    names: tuple[str, ...]


def find_parts(state: Mapping[str, Tensor], own: Collection[str] = ()) -> list[Parts]:
    """Return the weights that a state dict holds in parts.

    Args:
        state: Tensors by name.
        own: Names that the network itself has; such a weight is left in its parts.
    """
    found: list[Parts] = []
    groups: dict[str, list[str]] = {}
    for name in state:
        if _NEW in f".{name}":
            layer, _, rest = f".{name}".rpartition(_NEW)
            weight, _, part = rest.partition(".")
            groups.setdefault(f"{layer}.{weight}".removeprefix("."), []).append(part)
        elif name.endswith("_g") and f"{name[:-1]}v" in state:
            found.append(Parts(name[:-2], "weight norm", (name, f"{name[:-1]}v")))
        elif name.endswith("_orig") and {f"{name[:-4]}u", f"{name[:-4]}v"} <= state.keys():
            parts = (name, f"{name[:-4]}u", f"{name[:-4]}v")
            found.append(Parts(name.removesuffix("_orig"), "spectral norm", parts))
    for weight, inner in groups.items():
        layer, dot, leaf = weight.rpartition(".")
        before = f"{layer}{dot}parametrizations.{leaf}."
        if set(inner) == {"original0", "original1"}:
            found.append(Parts(weight, "weight norm", (f"{before}original0", f"{before}original1")))
        elif set(inner) == {"original", "0._u", "0._v"}:
            names = tuple(f"{before}{part}" for part in ("original", "0._u", "0._v"))
            found.append(Parts(weight, "spectral norm", names))
    return [
        one for one in found if one.name not in state and _fits(state, one) and not set(one.names) & set(own)
    ]


def merge(
    state: Mapping[str, Tensor], own: Collection[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors with weights in the place of their parts, and the names of those weights."""
    by_part = {name: parts for parts in find_parts(state, own) for name in parts.names}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = by_part.get(name)
        if parts is None:
            out[name] = tensor
        elif parts.name not in out:
            out[parts.name] = product(state, parts)
    return out, tuple(dict.fromkeys(parts.name for parts in by_part.values()))


def product(state: Mapping[str, Tensor], parts: Parts) -> Tensor:
    """Return the weight that its parts stand for, in the type of the first one."""
    tensors = [state[name].float() for name in parts.names]
    dtype = state[parts.names[0]].dtype
    if tensors[0].is_meta:
        return torch.empty(tensors[int(parts.kind == "weight norm")].shape, dtype=dtype, device="meta")
    if parts.kind == "weight norm":
        length, direction = tensors
        return (length * direction / _length(direction, length)).to(dtype)
    weight, left, right = tensors
    return (weight / torch.dot(left, _matrix(weight, left) @ right)).to(dtype)


def split(state: Mapping[str, Tensor], parts: Parts, weight: Tensor) -> dict[str, Tensor]:
    """Return parts that stand for another weight, so that the code that loads the original loads it too.

    Of weight norm, v is the weight itself. Of spectral norm, u is scaled so that u^T W v is 1: in evaluation
    the layer has exactly this weight; training would scale it again, as it does the original.

    Raises:
        UnsupportedModel: If the layer has spectral norm and all its weights are 0.
    """
    weight = weight.detach().float().cpu()
    old = {name: state[name] for name in parts.names}
    if parts.kind == "weight norm":
        length = _length(weight, old[parts.names[0]])
        # A direction of no length would be 0 / 0: it stays, with the length 0.
        direction = torch.where(length > 0, weight, old[parts.names[1]].float())
        new = [length, direction]
    else:
        left, right = (old[name].float() for name in parts.names[1:])
        matrix = _matrix(weight, left)
        for _ in range(_ITERATIONS):
            left = torch.nn.functional.normalize(matrix @ right, dim=0)
            right = torch.nn.functional.normalize(matrix.T @ left, dim=0)
        scale = torch.dot(left, matrix @ right)
        if not scale > 0:
            raise UnsupportedModel(
                "a layer with spectral norm cannot have weights that are all 0", where=parts.name
            )
        new = [weight, left / scale, right]
    return {
        name: part.reshape(old[name].shape).to(old[name].dtype)
        for name, part in zip(parts.names, new, strict=True)
    }


def _fits(state: Mapping[str, Tensor], parts: Parts) -> bool:
    tensors = [state[name] for name in parts.names]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return False
    if parts.kind == "weight norm":
        length, direction = (tuple(tensor.shape) for tensor in tensors)
        if not length:
            return bool(direction)
        return len(length) == len(direction) and all(
            a in (1, b) for a, b in zip(length, direction, strict=True)
        )
    weight, left, right = tensors
    return (
        weight.dim() > 1
        and left.dim() == right.dim() == 1
        and weight.numel() == left.numel() * right.numel() > 0
        and left.numel() in weight.shape
    )


def _length(direction: Tensor, like: Tensor) -> Tensor:
    """Return the norms over all extents that are 1 in another tensor; over all where it is one number."""
    over = [axis for axis in range(direction.dim()) if not like.dim() or like.shape[axis] == 1]
    if not over:
        return direction.abs()
    norms: Tensor = torch.linalg.vector_norm(direction, dim=over, keepdim=bool(like.dim()))
    return norms


def _matrix(weight: Tensor, left: Tensor) -> Tensor:
    # Transposed convolutions have their outputs along the second axis.
    axis = list(weight.shape).index(left.numel())
    return weight.movedim(axis, 0).flatten(1)
