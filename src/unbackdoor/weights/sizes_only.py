"""Running a network on tensors that have sizes but no values, so that nothing of it is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


class SizesOnly(TorchDispatchMode):
    """Inside, an operation that any tensor without values enters makes others without values.

    What is made of sizes alone, such as the places of a mask, is computed. Subclasses count in ``made``.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer no: else the first call imports torch._dynamo, which takes as long as torch itself."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat, tree = tree_flatten((args, kwargs or {}))
        if any(isinstance(t, Tensor) and t.is_meta for t in flat):
            flat = [t.to("meta") if isinstance(t, Tensor) else t for t in flat]
        args, kwargs = tree_unflatten(flat, tree)
        out = _quickly(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        every = out if isinstance(out, tuple | list) else (out,)
        self.made(func, args, [t for t in every if isinstance(t, Tensor)])
        return out

    def made(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Hear of the tensors that an operation made; may raise to end the run."""


# What torch itself knows of the sizes of these is written in its own primitives, and the first that is called
# imports torch._dynamo, which takes as long as importing torch does.
_UNARY = {
    "_safe_softmax", "_softmax", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "relu",
    "sigmoid", "silu", "tanh",
}  # fmt: skip
_BINARY = {"add", "div", "mul", "sub"}


def _quickly(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what the usual operations of networks make of tensors without values, or None for all others."""
    x = args[0] if args else None
    if func.overloadpacket.__name__ == "cat":
        return _joined(*args)
    if not isinstance(x, Tensor) or not x.is_meta or not x.is_floating_point():
        return None
    name = func.overloadpacket.__name__
    plain, in_place = name.rstrip("_"), name.endswith("_")
    if plain in _UNARY:
        return x if in_place else torch.empty_like(x)
    if plain in _BINARY and len(args) > 1:
        return _of_two(x, args[1], in_place)
    if name == "addmm" and args[1].shape[1] == args[2].shape[0]:
        return x.new_empty(args[1].shape[0], args[2].shape[1])
    if name in ("mm", "bmm") and x.shape[:-2] == args[1].shape[:-2] and x.shape[-1] == args[1].shape[-2]:
        return x.new_empty(*x.shape[:-1], args[1].shape[-1])
    if name == "mean" and len(args) > 1 and isinstance(args[1], list | tuple):
        axes = {axis % x.dim() for axis in args[1] or range(x.dim())}
        kept = len(args) > 2 and args[2]
        return x.new_empty([1 if k in axes else n for k, n in enumerate(x.shape) if kept or k not in axes])
    if name == "native_batch_norm":  # whose sizes were checked before
        return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    if name == "native_layer_norm" and list(x.shape[-len(args[1]) :]) == list(args[1]):
        sizes = (*x.shape[: -len(args[1])], *(1 for _ in args[1]))
        return torch.empty_like(x), x.new_empty(sizes), x.new_empty(sizes)
    return None


def _joined(parts: list[Tensor], axis: int = 0) -> Tensor | None:
    first = parts[0]
    alike = all(t.is_meta and t.dtype == first.dtype and t.dim() == first.dim() for t in parts)
    if not alike or not -first.dim() <= axis < first.dim():
        return None
    sizes = list(first.shape)
    axis %= first.dim()
    if any([*t.shape[:axis], *t.shape[axis + 1 :]] != sizes[:axis] + sizes[axis + 1 :] for t in parts):
        return None
    sizes[axis] = sum(t.shape[axis] for t in parts)
    return first.new_empty(sizes)


def _of_two(x: Tensor, other: Any, in_place: bool) -> Tensor | None:
    if isinstance(other, Tensor) and other.dtype != x.dtype:
        return None
    if not isinstance(other, Tensor | int | float):
        return None
    shape = x.shape if not isinstance(other, Tensor) else torch.broadcast_shapes(x.shape, other.shape)
    if in_place:
        return x if shape == x.shape else None
    return torch.empty_like(x) if shape == x.shape else x.new_empty(shape)
