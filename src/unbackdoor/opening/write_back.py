"""Weights in the requested format: safetensors, a checkpoint, or the ONNX that they came in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.files import atomic_write, sha256_file, write_json
from unbackdoor.opening.binary import one_output
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.opening.open_model import Opened
from unbackdoor.opening.rename_tensors import CHANNEL_MASK, TRACKED
from unbackdoor.opening.reparametrised import find_parts, split
from unbackdoor.types import Classifier
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.onnx.write import require_room, write_graph, write_initializers
from unbackdoor.weights.patch import NAMES, Patch, make_patch
from unbackdoor.weights.read import read_state
from unbackdoor.weights.source import Source, open_source
from unbackdoor.weights.stored_file import StoredFile

SAFETENSORS = ".safetensors"
ONNX = ".onnx"
CHECKPOINTS = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin")
_LIGHTNING = ("epoch", "global_step", "pytorch-lightning_version")
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
        require_room(source)


def output_name(path: Path, opened: Opened | None) -> Path:
    """Return the path of a repaired model with a suffix: the original's kind where it has none.

    Raises:
        InputError: If the network cannot be written as the suffix asks.
    """
    graph = opened is not None and opened.places is not None
    # No text builds the network of a program again, so that a card could not say what the weights are of.
    program = opened is not None and not graph and not opened.model.architecture
    if path.suffix not in SUFFIXES:
        path = path.with_name(path.name + (ONNX if graph else CHECKPOINTS[1] if program else SAFETENSORS))
    if program and path.suffix == SAFETENSORS:
        raise InputError(
            "the network is the program of the file, and a card cannot name it",
            expected="a name that ends in " + ", ".join(CHECKPOINTS),
            got=path.name,
            where="--out",
            remedy=f"Choose such a name, or name the architecture to write {SAFETENSORS}",
        )
    source = opened.source if opened is not None else None
    if source is None and path.suffix != SAFETENSORS:
        raise InputError(
            "a model that is of no file is written as safetensors",
            expected=f"a name that ends in {SAFETENSORS}",
            got=path.name,
            where="--out",
        )
    if source is not None:
        require_kind(path, source.main, graph=graph)
    return path


def stored_types(opened: Opened) -> dict[str, torch.dtype]:
    """Return the types that the file of the original stores the network's tensors in."""
    if opened.places is not None:
        return {name: place.dtype for name, place in opened.places.items()}
    stored = opened.source.contents.tensors if opened.source is not None else {}
    # What stands in the file in parts has the type of the first one.
    stored = {**{one.name: stored[one.names[0]] for one in find_parts(stored)}, **stored}
    pairs = ((name, opened.names.get(name, name)) for name in opened.model.network.state_dict())
    return {name: stored[old].dtype for name, old in pairs if old in stored}


def repaired_state(opened: Opened, model: Classifier) -> dict[str, Tensor]:
    """Return what the file of the original would hold if it were the repaired model.

    What is not part of the network, such as a layer that normalises pixels, and what did not change stays as
    it was, so that the code that loads the original also loads this.
    """
    assert opened.source is not None
    stored = opened.source.contents.tensors
    out = dict(stored)
    in_parts = {one.name: one for one in find_parts(stored, opened.names.values())}
    before = opened.model.network.state_dict()
    for name, tensor in model.network.state_dict().items():
        old = opened.names.get(name, name)
        if old in stored and not torch.equal(tensor, before[name]):
            halved = tensor.dim() and tensor.shape[0] == 2 and stored[old].shape[:1] == (1,)
            out[old] = (one_output(tensor) if halved else tensor).to(stored[old].dtype)
            # A mask beside it was multiplied in, and would count twice.
            mask = f"{old.rpartition('.')[0]}.{CHANNEL_MASK}"
            if mask in stored and old.endswith(".weight"):
                out[mask] = torch.ones_like(stored[mask])
        elif old in in_parts and not torch.equal(tensor, before[name]):
            out |= split(stored, in_parts[old], tensor)
        elif old not in stored and not name.endswith(TRACKED) and not torch.equal(tensor, before[name]):
            raise _without_place(opened, name)
    return out


def require_places(path: Path, opened: Opened | None) -> None:
    """Check before the work that every weight a repair may change has a place in the file it is written as.

    Args:
        path: The output; a card of this package holds the whole network.
        opened: The original; None where it is of no file.

    Raises:
        UnsupportedModel: If one has none; names it.
    """
    if opened is None or opened.source is None or path.suffix == SAFETENSORS:
        return
    if opened.places is not None:
        known = set(opened.places)
    else:
        stored = opened.source.contents.tensors
        held = {*stored, *(one.name for one in find_parts(stored, opened.names.values()))}
        known = {name for name in opened.model.network.state_dict() if opened.names.get(name, name) in held}
    for name, _ in opened.model.network.named_parameters():
        if name not in known:
            raise _without_place(opened, name)


def _without_place(opened: Opened, name: str) -> UnsupportedModel:
    assert opened.source is not None
    return UnsupportedModel(
        "a weight that a repair may change has no place in the file, which computes it from others",
        got=short(name),
        where=opened.source.path,
        remedy=f"Name the architecture and write {SAFETENSORS}, or repair what the file was made from",
    )


def write_repaired(
    path: Path,
    model: Classifier,
    opened: Opened | None,
    *,
    step: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Write a repaired model as its suffix asks, and then its card or its record beside it.

    Args:
        path: See :func:`output_name`.
        model: The repaired model.
        opened: The original; None where it is of no file.
        step: The repair, as one entry of the card's history.
        record: The repair, for the JSON file beside formats that have no card.

    Raises:
        IntegrityError: If the file of the original is not the one any more that was opened.
        InputError: If the disk refuses.
    """
    source = opened.source if opened is not None else None
    if source is not None:
        source.require_unchanged()
    if path.suffix == SAFETENSORS:
        save_model(model, path, history=[*(source.history() if source is not None else ()), step])
        return
    assert opened is not None and source is not None
    if opened.places is not None:
        assert source.graph is not None
        before, after = opened.model.network.state_dict(), model.network.state_dict()
        write_graph(path, source.graph, opened.places, before, after, opened.output)
    else:
        contents = source.contents
        # Lightning does not load what does not say by which release it was written.
        beside = {key: contents.beside[key] for key in _LIGHTNING if key in contents.beside}
        write_weights(
            path,
            repaired_state(opened, model),
            nest=contents.nest,
            prefix=contents.prefix,
            beside=beside if contents.nest == ("state_dict",) else {},
        )
    # The last file written, so that it never speaks of weights that are not there.
    write_json(path.with_suffix(".json"), {**record, "file_sha256": sha256_file(path)})


def repair_patch(model: Classifier, opened: Opened, facts: Mapping[str, Any]) -> Patch:
    """Return the patch from the file of the original to the repaired model, under the file's names.

    Raises:
        InputError: If the repaired model has tensors of other names, shapes or types than the file.
    """
    source = opened.source
    assert source is not None
    if opened.places is None:
        # The card's own format calls the tensors by the network's names.
        names = {old: new for new, old in opened.names.items()}
        named = {NAMES: names} if names else {}
        return make_patch(source.contents.tensors, repaired_state(opened, model), {**facts, **named})
    assert source.graph is not None
    with tempfile.TemporaryDirectory() as folder:  # several tensors of the network may be one of the file
        draft = Path(folder) / "repaired.onnx"
        before, after = opened.model.network.state_dict(), model.network.state_dict()
        write_graph(draft, source.graph, opened.places, before, after, opened.output)
        return make_patch(source.contents.tensors, read_state(draft), facts)


def write_weights(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    nest: Sequence[str] = (),
    prefix: str = "",
    source: Path | Source | None = None,
    beside: Mapping[str, str | int | float | bool] = MappingProxyType({}),
) -> None:
    """Write a state dict, whole or not at all.

    Args:
        path: Its suffix decides: ``.safetensors``; or ``.pt``, ``.pth``, ``.th``, ``.tar``, ``.ckpt``,
            ``.bin`` for a checkpoint that ``torch.load(weights_only=True)`` reads; or ``.onnx`` for the graph
            of another such file.
        state: Tensors by name.
        nest: Keys that a checkpoint holds them under, as the original did.
        prefix: What stands before all names in a checkpoint, likewise.
        source: For ``.onnx``: the file whose graph is taken, at best as it was opened; it has the same names
            and shapes.
        beside: Plain values that a checkpoint holds beside the outermost key.

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
            content |= dict(beside) if nest else {}
            # Through a file of Python's: torch's own error for a full disk cannot be recognised.
            with draft.open("wb") as file:
                torch.save(content, file)


def _write_into(path: Path, state: Mapping[str, Tensor], source: Path | Source | None) -> None:
    original = open_source(source) if isinstance(source, Path) else source
    if original is None or original.graph is None:
        raise InputError(
            "ONNX is written only where the weights are those of an ONNX file",
            got=path.name,
            where="--out",
            remedy=f"Choose a name that ends in {SAFETENSORS}",
        )
    prefix = original.contents.prefix
    write_initializers(path, original.graph, {prefix + name: tensor for name, tensor in state.items()})
