"""Reversible patches: the difference between two models, small where little changed.

A patch holds, for every changed tensor, the exclusive or of the bits before and after. Applied to the one it
gives the other, bit for bit, in both directions. Where less than half of a tensor's entries changed, only
those are stored, with their positions; what compresses is compressed, because a repair that moves weights
slightly leaves the high bits as they were.

A patch is checked against the hashes of both models: it applies to the model it was made for and no other.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.confinement import rehearsed
from unbackdoor.errors import InputError, IntegrityError, UnsafeFile
from unbackdoor.files import atomic_write, parse_json
from unbackdoor.types import state_sha256
from unbackdoor.weights.formats.limits import accounting
from unbackdoor.weights.formats.safetensors import header as safetensors
from unbackdoor.weights.formats.tensors import materialise
from unbackdoor.weights.stored_file import read_file

KIND = "unbackdoor-patch-1"
NAMES = "names"  # fact: the network's name by the file's, where they differ
MAX_PATCH = 2 << 30  # bytes; a bound against nonsense
Direction = Literal["apply", "revert"]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LEVEL = 6  # of zlib; higher ones take thrice the time for a hundredth


@dataclass(frozen=True)
class Patch:
    """What turns one state into another and back.

    Attributes:
        before: SHA-256 of the state it was made from.
        after: SHA-256 of the state it leads to.
        entries: By tensor: its shape and type, the number of changed entries, and the packed bits.
        facts: JSON-ready; who made it, and how.
    """

    before: str
    after: str
    entries: Mapping[str, Entry]
    facts: Mapping[str, Any]

    @property
    def changed(self) -> int:
        """Number of changed entries over all tensors."""
        return sum(entry.changed for entry in self.entries.values())


@dataclass(frozen=True)
class Entry:
    """The change of one tensor.

    Attributes:
        shape: Of the tensor.
        dtype: Its type, such as ``float32``.
        changed: Entries that differ.
        sparse: True where positions are stored; False where all entries are.
        packed: Compressed bytes: positions (int64, if sparse), then exclusive ors.
    """

    shape: tuple[int, ...]
    dtype: str
    changed: int
    sparse: bool
    packed: bytes


def make_patch(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> Patch:
    """Return the patch from one state to another of the same names, shapes and types.

    Raises:
        InputError: If the two differ in more than values.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[:3]
        raise InputError("the two models have different tensors, so that no patch can be made", got=odd)
    entries = {}
    for name in before:
        old, new = before[name], after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise InputError(
                "a tensor changed its form, so that no patch can be made",
                expected=f"{tuple(old.shape)} {old.dtype}",
                got=f"{tuple(new.shape)} {new.dtype}",
                where=name,
            )
        bits = _bits(old) ^ _bits(new)  # (E,)
        places = bits.nonzero().flatten()  # (C,)
        if not len(places):
            continue
        # A position costs 8 bytes and compresses well, because positions rise.
        sparse = 2 * len(places) < len(bits)
        parts = [_steps(places), bits[places]] if sparse else [bits]
        raw = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        kind = str(old.dtype).removeprefix("torch.")
        entries[name] = Entry(tuple(old.shape), kind, len(places), sparse, zlib.compress(raw, _LEVEL))
    return Patch(state_sha256(before), state_sha256(after), entries, dict(facts or {}))


def use_patch(patch: Patch, state: Mapping[str, Tensor], direction: Direction) -> dict[str, Tensor]:
    """Return the state after the patch was applied or reverted; the given one is not changed.

    Raises:
        IntegrityError: If the patch belongs to other weights, or does not lead where it says.
        UnsafeFile: If an entry unpacks to more than it may.
    """
    source, goal = (patch.before, patch.after) if direction == "apply" else (patch.after, patch.before)
    got = state_sha256(state)
    if got != source:
        done = got == goal
        raise IntegrityError(
            f"the patch was {'applied' if direction == 'apply' else 'reverted'} already"
            if done
            else "the patch belongs to other weights",
            expected=source[:12],
            got=got[:12],
        )
    out = {name: tensor.clone() for name, tensor in state.items()}
    for name, entry in patch.entries.items():
        out[name] = _changed(name, out, entry)
    if state_sha256(out) != goal:
        raise IntegrityError("the patch does not lead to the weights that it names", expected=goal[:12])
    return out


def in_file_names(patch: Patch, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state under the names of the file that a patch was made for, where it has the network's."""
    names = patch.facts.get(NAMES)
    if not isinstance(names, Mapping) or set(names.values()) != set(state):
        return dict(state)
    return {str(old): state[new] for old, new in names.items()}


def write_patch(path: Path, patch: Patch) -> None:
    """Write a patch as safetensors, whole or not at all."""
    tensors = {
        f"{i}": torch.frombuffer(bytearray(entry.packed), dtype=torch.uint8)
        for i, entry in enumerate(patch.entries.values())
    }
    head = {
        "kind": KIND,
        "before": patch.before,
        "after": patch.after,
        "facts": json.dumps(dict(patch.facts), sort_keys=True),
        "entries": json.dumps(
            [[name, list(e.shape), e.dtype, e.changed, e.sparse] for name, e in patch.entries.items()]
        ),
    }
    with atomic_write(path) as draft:
        save_file(tensors, draft, metadata=head)


def read_patch(path: Path) -> Patch:
    """Read a patch, in a process of its own first.

    Raises:
        InputError: If it cannot be read or is none.
        UnsafeFile: If it is too large, or built to exhaust its reader.
    """
    with rehearsed("unbackdoor.weights.patch:rehearse", Path(path)):
        return _read_patch(Path(path))


def rehearse(path: Path, options: Mapping[str, Any]) -> None:
    """Read a patch in a process of its own."""
    _read_patch(path)


def _read_patch(path: Path) -> Patch:
    file = read_file(path, limit=MAX_PATCH, what="the patch")
    try:
        with accounting():
            described, head = safetensors.read(file.content, path)
            if head.get("kind") != KIND:
                raise InputError("the file is not a patch", expected=KIND, got=head.get("kind"), where=path)
            packed = materialise(described, file.size)
            listed = parse_json(head["entries"], "the list of the patch", path)
            entries = {}
            for i, (name, shape, dtype, changed, sparse) in enumerate(listed):
                content = packed[str(i)].numpy().tobytes()
                form = tuple(int(side) for side in shape)
                entries[str(name)] = Entry(form, str(dtype), int(changed), bool(sparse), content)
            return Patch(
                head["before"],
                head["after"],
                entries,
                parse_json(head["facts"], "the record of the patch", path),
            )
    except (InputError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            "the file is no patch, or it is damaged",
            got=str(error)[:200],
            where=path,
            remedy="Give what purify --patch or patch make wrote",
        ) from error


def _changed(name: str, state: Mapping[str, Tensor], entry: Entry) -> Tensor:
    tensor = state.get(name)
    kind = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
    if tensor is None or tuple(tensor.shape) != entry.shape or kind != entry.dtype:
        raise IntegrityError(
            "the patch changes a tensor that the model does not have", where=repr(name)[:120]
        )
    bits = _bits(tensor).clone()  # (E,)
    size = bits.element_size()
    count = entry.changed if entry.sparse else len(bits)
    if not 0 <= entry.changed <= len(bits):
        raise IntegrityError("the patch changes more entries than there are", where=repr(name)[:120])
    expected_size = count * (size + (8 if entry.sparse else 0))
    try:
        unpacker = zlib.decompressobj()
        raw = bytearray(unpacker.decompress(entry.packed, expected_size + 1))
    except zlib.error as error:
        raise InputError("the patch is damaged", got=str(error), where=repr(name)[:120]) from error
    if len(raw) != expected_size:
        raise UnsafeFile(
            "an entry of the patch does not unpack to what it announces",
            expected=f"{expected_size} bytes",
            got=f"{len(raw)} or more",
            where=repr(name)[:120],
        )
    if not count:
        return tensor
    if not entry.sparse:
        bits ^= torch.frombuffer(raw, dtype=bits.dtype)
        return bits.view(tensor.dtype).reshape(tensor.shape)
    places = torch.frombuffer(raw[: 8 * count], dtype=torch.int64).cumsum(0)  # (C,)
    if int(places.min()) < 0 or int(places.max()) >= len(bits):
        raise IntegrityError(
            "the patch changes an entry that the tensor does not have", where=repr(name)[:120]
        )
    bits[places] ^= torch.frombuffer(raw[8 * count :], dtype=bits.dtype)
    return bits.view(tensor.dtype).reshape(tensor.shape)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(_BITS[flat.element_size()])  # (E,)


def _steps(places: Tensor) -> Tensor:
    """Return rising positions (C,) as steps from one to the next, which compress better."""
    return torch.diff(places, prepend=places.new_zeros(1))
