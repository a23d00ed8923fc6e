"""Weights in the format that was asked for: safetensors, a checkpoint, or the ONNX that they came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write
from unbackdoor.weights.source import Source, open_source
from unbackdoor.weights.stored_file import StoredFile

SAFETENSORS = ".safetensors"
ONNX = ".onnx"
CHECKPOINTS = (".pt", ".pth", ".th", ".tar")
SUFFIXES = (SAFETENSORS, *CHECKPOINTS, ONNX)


def require_format(path: Path) -> None:
    """Raise InputError unless the suffix names a format that can be written."""
    if path.suffix not in SUFFIXES:
        raise InputError(
            "the format of the output is not known",
            expected="a name that ends in " + ", ".join(SUFFIXES),
            got=path.name,
            where="--out",
        )


def require_kind(path: Path, source: Path | StoredFile, *, graph: bool) -> None:
    """Check before the work that a repaired network can be written as the suffix asks.

    Args:
        path: The output.
        source: File of the original.
        graph: Whether the network is the graph of that file.

    Raises:
        InputError: If it cannot; the remedy names a suffix.
        UnsupportedModel: If it is too large for an ONNX file.
    """
    if graph and path.suffix != ONNX:
        raise InputError(
            "the network is the graph of the ONNX file, and no other file can hold it",
            expected=f"a name that ends in {ONNX}",
            got=path.name,
            where="--out",
            remedy=f"Choose such a name, or name the architecture to write {SAFETENSORS}",
        )
    if not graph and path.suffix == ONNX:
        raise InputError(
            "ONNX is written only where the network is the graph of an ONNX file",
            expected="a name that ends in " + ", ".join((SAFETENSORS, *CHECKPOINTS)),
            got=path.name,
            where="--out",
            remedy=f"Choose a name that ends in {SAFETENSORS}",
        )
    if graph:
        from unbackdoor.weights.formats.onnx.write import require_room

        require_room(source)


def write_weights(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    nest: Sequence[str] = (),
    prefix: str = "",
    source: Path | Source | None = None,
) -> None:
    """Write a state dict, whole or not at all.

    Args:
        path: Its suffix decides: ``.safetensors``; or ``.pt``, ``.pth``, ``.th``, ``.tar`` for a checkpoint
            that ``torch.load(weights_only=True)`` reads; or ``.onnx`` for the graph of another such file.
        state: Tensors by name.
        nest: Keys that a checkpoint holds them under, as the original did.
        prefix: What stands before all names in a checkpoint, likewise.
        source: For ``.onnx``: the file whose graph is taken, at best as it was opened; it has the same names
            and shapes.

    Raises:
        InputError: If the suffix is another one, or the disk refuses.
    """
    require_format(path)
    if path.suffix == ONNX:
        _write_into(path, state, source)
        return
    # Copies, because safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_write(path) as draft:
        if path.suffix == SAFETENSORS:
            save_file(plain, draft)
        else:
            content: dict[str, Any] = {prefix + name: tensor for name, tensor in plain.items()}
            for key in reversed(nest):
                content = {key: content}
            # Through a file of Python's: torch's own tells of a full disk in no words that can be recognised.
            with draft.open("wb") as file:
                torch.save(content, file)


def _write_into(path: Path, state: Mapping[str, Tensor], source: Path | Source | None) -> None:
    from unbackdoor.weights.formats.onnx.write import write_initializers

    held = open_source(source) if isinstance(source, Path) else source
    if held is None or held.graph is None:
        raise InputError(
            "ONNX is written only where the weights are those of an ONNX file",
            got=path.name,
            where="--out",
            remedy=f"Choose a name that ends in {SAFETENSORS}",
        )
    prefix = held.contents.prefix
    write_initializers(path, held.graph, {prefix + name: tensor for name, tensor in state.items()})
