"""Weights in the format that was asked for: safetensors, or a plain checkpoint of ``torch.save``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write

SAFETENSORS = ".safetensors"
CHECKPOINTS = (".pt", ".pth", ".th", ".tar")


def require_format(path: Path) -> None:
    """Raise InputError unless the suffix names a format that can be written."""
    if path.suffix not in (SAFETENSORS, *CHECKPOINTS):
        raise InputError(
            "the format of the output is not known",
            expected="a name that ends in " + ", ".join((SAFETENSORS, *CHECKPOINTS)),
            got=path.name,
            where="--out",
        )


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict, whole or not at all.

    Args:
        path: Its suffix decides: ``.safetensors``; or ``.pt``, ``.pth``, ``.th``, ``.tar`` for a checkpoint
            that ``torch.load(weights_only=True)`` reads.
        state: Tensors by name.

    Raises:
        InputError: If the suffix is another one, or the disk refuses.
    """
    require_format(path)
    # Copies, because safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_write(path) as draft:
        if path.suffix == SAFETENSORS:
            save_file(plain, draft)
        else:
            # Through a file of Python's: torch's own tells of a full disk in no words that can be recognised.
            with draft.open("wb") as file:
                torch.save(plain, file)
