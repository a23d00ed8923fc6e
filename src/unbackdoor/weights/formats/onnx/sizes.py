"""What a graph computes from nothing but the sizes of its input, run on tensors without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unbackdoor.errors import UnsafeFile
from unbackdoor.weights.sizes_only import SizesOnly

_MOST = 1 << 22  # numbers that are computed from sizes, all together


def sizes_alone(network: nn.Module, shape: tuple[int, ...], where: Path) -> tuple[Tensor, ...]:
    """Return the results of a network that depend on sizes alone.

    Args:
        network: From images to a tuple of tensors.
        shape: (B, C, H, W) of the images.
        where: File, for messages.

    Raises:
        UnsafeFile: If absurdly much is computed from sizes.
        RuntimeError: Or another of torch's errors, where it does not take images of this size.
    """
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    bare = {name: t.detach().to("meta") if t.is_floating_point() else t for name, t in state.items()}
    with torch.no_grad(), _Bounded(where):
        out: tuple[Tensor, ...] = functional_call(network, bare, (torch.empty(shape, device="meta"),))
    return tuple(torch.empty(0) if one.is_meta else one for one in out)


class _Bounded(SizesOnly):
    def __init__(self, where: Path) -> None:
        super().__init__()
        self._where = where
        self._computed = 0

    def made(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        self._computed += sum(t.numel() for t in tensors if not t.is_meta)
        if self._computed > _MOST:
            raise UnsafeFile(
                "the graph computes absurdly much from sizes",
                expected=f"at most {_MOST} numbers",
                where=self._where,
            )
