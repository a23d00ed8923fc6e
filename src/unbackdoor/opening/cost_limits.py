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

from unbackdoor.errors import UnsafeFile, UnsupportedModel
from unbackdoor.weights.sizes_only import SizesOnly

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


class _Count(SizesOnly):
    def __init__(self, where: Path | str) -> None:
        super().__init__()
        self._where = where
        self._numbers = 0
        self._work = 0.0
        self._computed = 0

    def made(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        made = sum(t.numel() for t in tensors)
        self._numbers += made
        self._work += made * _times(func, args)
        self._computed += sum(t.numel() for t in tensors if not t.is_meta)
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
