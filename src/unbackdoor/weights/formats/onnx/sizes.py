"""What a graph computes from nothing but the sizes of its input, run on tensors without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbackdoor.errors import UnsafeFile

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
    with torch.no_grad(), _SizesOnly(where):
        out: tuple[Tensor, ...] = functional_call(network, bare, (torch.empty(shape, device="meta"),))
    return tuple(torch.empty(0) if one.is_meta else one for one in out)


class _SizesOnly(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer no: else the first call imports torch._dynamo, which takes as long as torch itself."""
        return False

    def __init__(self, where: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self._computed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat, tree = tree_flatten((args, kwargs or {}))
        if any(isinstance(t, Tensor) and t.is_meta for t in flat):
            flat = [t.to("meta") if isinstance(t, Tensor) else t for t in flat]
        args, kwargs = tree_unflatten(flat, tree)
        out = func(*args, **(kwargs or {}))
        every = out if isinstance(out, tuple | list) else (out,)
        self._computed += sum(t.numel() for t in every if isinstance(t, Tensor) and not t.is_meta)
        if self._computed > _MOST:
            raise UnsafeFile(
                "the graph computes absurdly much from sizes",
                expected=f"at most {_MOST} numbers",
                where=self._where,
            )
        return out
