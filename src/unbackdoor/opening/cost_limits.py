"""What a network of unknown origin would compute for one image, counted before it is run.

A graph from a file can demand any amount of memory and time in a few bytes: a padding, a repetition, a
product. It is run once on tensors that have sizes but no values, and the cost of every operation is added up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbackdoor.errors import UnsafeFile, UnsupportedModel

# Bounds against nonsense, for one image: a ViT-H at 224 pixels needs 2e11 multiplications; of one layer of a
# VGG at 512 pixels come 2e7 numbers.
MAX_NUMBERS = 1 << 26  # of one operation
MAX_TOTAL = 1 << 31  # of all operations
MAX_WORK = 2e12  # multiplications
_MAX_SIZES = 256  # integers that sizes are computed from; a shape has no more axes than 64
# Numbers that are made of sizes, which are computed here as well: the places of a mask, say. All together; a
# Swin transformer at 224 pixels makes 2e6.
_MAX_MADE = 1 << 25


def outputs_of(network: nn.Module, shape: tuple[int, int, int], where: Path | str) -> int:
    """Return the number of outputs for an image, after counting what an image costs. Nothing is computed.

    Args:
        network: From images (B, C, H, W) to logits (B, K), in evaluation mode.
        shape: (C, H, W).
        where: File, for messages.

    Raises:
        UnsafeFile: If an image would take absurdly much memory or time.
        UnsupportedModel: If the network does not take images of this size, or returns no logits.
    """
    # Small integer tensors keep their values, because sizes may be computed from them.
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    bare = {
        name: t.detach().to("meta") if t.is_floating_point() or t.numel() > _MAX_SIZES else t
        for name, t in state.items()
    }
    try:
        with torch.no_grad(), _Count(where):
            out = functional_call(network, bare, (torch.empty(1, *shape, device="meta"),))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError) as error:
        raise UnsupportedModel(
            "the network does not take images of this size",
            expected=f"(C, H, W) = {shape}",
            got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}",
            where=where,
            remedy="Give the input size that the model was trained with",
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 1 or not out.is_floating_point():
        raise UnsupportedModel(
            "the network returns no logits",
            expected="a tensor of shape (images, classes)",
            got=f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__,
            where=where,
        )
    return int(out.shape[1])


class _Count(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer no: else the first call imports torch._dynamo, which takes as long as torch itself."""
        return False

    def __init__(self, where: Path | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self._numbers = 0
        self._work = 0.0
        self._computed = 0

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
        every = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        made = sum(t.numel() for t in every)
        self._numbers += made
        self._work += made * _times(func, args)
        self._computed += sum(t.numel() for t in every if not t.is_meta)
        if (
            self._computed > _MAX_MADE
            or made > MAX_NUMBERS
            or self._numbers > MAX_TOTAL
            or self._work > MAX_WORK
        ):
            raise UnsafeFile(
                "the network would take absurdly much memory or time for an image",
                expected=f"at most {MAX_NUMBERS} numbers an operation, {MAX_TOTAL} in all, and "
                f"{MAX_WORK:.0e} multiplications",
                got=f"{made}, {self._numbers} and {self._work:.0e}",
                where=self._where,
            )
        return out


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


def _times(func: Any, args: tuple[Any, ...]) -> int:
    # Multiplications for each number that an operation makes.
    name = func.overloadpacket.__name__
    if name == "convolution":
        return int(args[1][0].numel()) if len(args[1]) else 1
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        return int(args[-1].shape[-2])
    if "pool2d" in name and len(args) > 1 and isinstance(args[1], list | tuple):
        return int(torch.Size(args[1]).numel())
    return 1
