"""Several sets of weights in one file, such as a running average beside the weights themselves.

Which of them a program loads is for that program to say; so where they differ, the user says which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.dequantise import dequantised
from unbackdoor.weights.formats import state_dicts as states
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.state_dicts import LocatedStateDict
from unbackdoor.weights.formats.tensors import MAX_TIED, TensorRef, materialise
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail

_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|teacher)([._]|$)", re.IGNORECASE)
_ALIKE = 0.5  # share of names and shapes from which two sets are of one network


@dataclass(frozen=True)
class WeightSet:
    """One set of weights.

    Attributes:
        key: Keys that lead to it, separated by dots; empty at the top.
        tensors: The state dict, with wrappers' prefixes off; empty where it cannot be read.
        prefix: What stood before every name and was taken off.
        nest: The keys that lead to it in a checkpoint that is written again.
        module: Class of the whole module that it was taken from; empty for a plain state dict.
        notes: Remarks in words.
        problem: Why there are no tensors, or None.
        quantised: The types in the file of the tensors that are quantised there, and were dequantised.
    """

    key: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    prefix: str = ""
    nest: tuple[str, ...] = ()
    module: str = ""
    notes: tuple[str, ...] = ()
    problem: UnbackdoorError | None = None
    quantised: Mapping[str, str] = field(default_factory=dict)

    def equals(self, other: WeightSet) -> bool:
        """Tell whether another set has the same tensors, bit for bit."""
        if self.tensors is other.tensors:
            return True
        if self.tensors.keys() != other.tensors.keys() or not self.tensors:
            return False
        return all(_same(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    def may_be_meant_for(self, other: WeightSet) -> bool:
        """Tell whether a program may load this set where it is thought to load the other one."""
        if not self.key or any(part in states.NESTS for part in self.key.split(".")):
            return True
        alike = sum(
            name in other.tensors and other.tensors[name].shape == tensor.shape
            for name, tensor in self.tensors.items()
        )
        return self.problem is not None or alike >= _ALIKE * min(len(self.tensors), len(other.tensors))


def plain_set(
    state: Mapping[str, Tensor],
    key: str = "",
    *,
    types: Mapping[str, str] | None = None,
    **facts: object,
) -> WeightSet:
    """Return a set without the prefixes of wrappers and with masks of pruning multiplied in.

    Args:
        state: Tensors by name.
        key: Of the set.
        types: The types in the file of torch's quantised tensors; None leaves whole numbers as they are, as
            for a program, which says what they mean.
        facts: Further fields of the set.

    Raises:
        UnsupportedModel: If it is quantised in a way that is not read.
    """
    trail = Trail()
    prefix = states.strip(list(state))
    if prefix:
        trail.note(f"the prefix {short(prefix)} was taken off all names")
    tensors = states.unpruned({name[len(prefix) :]: tensor for name, tensor in state.items()}, trail)
    found: Mapping[str, str] = {}
    if types is not None:
        own = {name[len(prefix) :]: kind for name, kind in types.items()}
        read = dequantised(tensors, own)
        tensors, found = read.tensors, read.types
        if found:
            trail.note(f"{len(found)} tensors are quantised and were dequantised: {_kinds(found)}")
        if read.left_out:
            trail.note(
                f"{len(read.left_out)} scales and zero points of inputs and outputs were left out, and with "
                f"them the rounding that the quantised network does: {listed(read.left_out, 3)}"
            )
    if any(tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() > 1 for tensor in tensors.values()):
        trail.note(
            "some weights are whole numbers of 8 bits without a scale beside them: they are quantised, and "
            "cannot be read without it"
        )
    made = WeightSet(key, tensors, prefix, notes=tuple(trail.notes), quantised=found)
    return replace(made, **facts)  # type: ignore[arg-type]


def _kinds(found: Mapping[str, str]) -> str:
    return listed([f"{name} ({kind})" for name, kind in found.items()], 3)


def sets_of(
    state: Mapping[str, Tensor], key: str = "", types: Mapping[str, str] | None = None, **facts: object
) -> dict[str, WeightSet]:
    """Return the sets in one state dict: two where an average lies beside the weights under a prefix.

    Args:
        state: Tensors by name.
        key: Of the state dict.
        types: The types in the file of torch's quantised tensors, by name.
        facts: Further fields of every set.

    Returns:
        Sets by key. One that is quantised in a way that is not read says so in ``problem``.
    """
    types = types or {}
    averaged = [name for name in state if _AVERAGED.search(name.rpartition(".")[0])]
    rest = [name for name in state if name not in set(averaged)]
    heads = [_common(averaged), _common(rest)]
    shapes = [
        {name[len(head) :]: state[name].shape for name in names}
        for names, head in zip((averaged, rest), heads, strict=True)
    ]
    if not rest or not shapes[1].items() <= shapes[0].items():
        return {key: _read_set(state, key, types, facts)}
    out = {}
    for names, head in zip((rest, averaged), (heads[1], heads[0]), strict=True):
        path = ".".join(part for part in (key, head.rstrip(".")) if part)
        own = {name[len(head) :]: types[name] for name in names if name in types}
        part = _read_set({name[len(head) :]: state[name] for name in names}, path, own, facts)
        out[path] = replace(part, prefix=head + part.prefix)
    return out


def _read_set(
    state: Mapping[str, Tensor], key: str, types: Mapping[str, str], facts: Mapping[str, object]
) -> WeightSet:
    try:
        return plain_set(state, key, types=types, **facts)
    except UnsupportedModel as problem:
        return replace(WeightSet(key, problem=problem), **facts)  # type: ignore[arg-type]


def _common(names: list[str]) -> str:
    """Return the beginning of all names up to a dot."""
    parts = [name.split(".")[:-1] for name in names]
    same = 0
    while parts and all(len(p) > same for p in parts) and len({p[same] for p in parts}) == 1:
        same += 1
    return "".join(f"{part}." for part in parts[0][:same]) if parts else ""


def read_sets(located: Mapping[str, LocatedStateDict], file_size: int) -> dict[str, WeightSet]:
    """Return the sets of a checkpoint with their tensors in memory; equal descriptions share it.

    Raises:
        UnsafeFile: If all of them together describe far more than the file holds.
    """
    described = 0
    out: dict[str, WeightSet] = {}
    by_description: dict[frozenset[tuple[object, ...]], str] = {}
    for key, found in located.items():
        if found.problem is not None:
            out[key] = WeightSet(key, problem=found.problem)
            continue
        description = frozenset((name, *_description(ref)) for name, ref in found.refs.items())
        twin = by_description.setdefault(description, key)
        if twin != key and twin in out:
            out[key] = replace(out[twin], key=key, nest=found.nest, module=found.module)
            continue
        described += sum(ref.bytes for ref in found.refs.values())
        try:
            if described > MAX_TIED * file_size and out:
                raise UnsafeFile("all sets of weights together describe more than the file holds")
            states.require_names(found.refs)
            state = materialise(found.refs, file_size)
            types = {name: ref.type_in_file for name, ref in found.refs.items() if ref.affine is not None}
            out |= sets_of(state, key, types, nest=found.nest, module=found.module)
        except UnbackdoorError as error:
            out[key] = WeightSet(key, nest=found.nest, module=found.module, problem=error)
    return out


def named(sets: Mapping[str, WeightSet], key: str, where: object) -> WeightSet:
    """Return the set of a key.

    Raises:
        InputError: If there is none.
    """
    if key not in sets:
        raise InputError(
            "the file has no such set of weights",
            expected=", ".join(short(name)[1:-1] for name in sets if name) or "a file with one set, unnamed",
            got=short(key)[1:-1],
            where=where,
        )
    return sets[key]


def _description(ref: TensorRef) -> tuple[object, ...]:
    storage = ref.storage
    place = (id(storage.store), storage.key, storage.first, ref.dtype, ref.offset, ref.shape, ref.stride)
    if ref.affine is None:
        return place
    scales = (ref.affine.scale, ref.affine.zero_point)
    return (
        *place,
        ref.affine.axis,
        *(_description(one) if isinstance(one, TensorRef) else one for one in scales),
    )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]  # NaN is equal to itself
    return torch.equal(*bits)
