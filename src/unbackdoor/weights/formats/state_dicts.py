"""From what a checkpoint describes to the state dict in it: where it lies, its names, what is beside it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.text import is_text
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.limits import limits, spend
from unbackdoor.weights.formats.tensors import TensorRef, quantised
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import (
    CONTAINERS,
    PACKED,
    Faulty,
    Stub,
    Trail,
    as_mapping,
)

NESTS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params",
    "classifier", "netC", "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "network.", "model.")
_LISTED = 16  # entries of a list that are searched
_DEEPEST_SET = 50  # dictionaries within each other
_DEPTH = 4  # levels of dictionaries that are searched for a state dict
_MODULES = 20_000  # modules, so that one that contains itself many times ends too
_MAX_SETS = 64  # sets of weights that are told apart; of an honest file there are three
# Entries that are searched for further sets. A pickle has fewer steps: more are there only by sharing.
_MAX_SEARCHED = 4_000_000
_MAX_OTHERS = 256  # further entries with tensors that are named
# As the linear layers of torch.ao.nn.quantized name what they hold.
_PACKED = "_packed_params._packed_params"
_PACKED_MODULE = "_packed_params."
_LINEAR = ".LinearPackedParamsBase"
_QUANTISED_CONV = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\.[\w.]*\.Conv\w*")
_CONV_STATE = 15  # entries of the state of such a layer; weight and bias are the eleventh and the twelfth
_NUMPY_FORMATS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "i2": "h", "u1": "B", "i1": "b", "b1": "?"}

Fact = str | int | float | bool


@dataclass
class LocatedStateDict:
    """A state dict in a checkpoint.

    Attributes:
        refs: Its tensors by name.
        beside: Plain values that stood beside it, such as the epoch and the accuracy.
        nest: The keys that lead to it; empty at the top, and for a module or an entry of a list.
        key: Keys and places in lists that lead to it, separated by dots; empty at the top.
        module: Class of the whole module that it was taken from; empty for a plain state dict.
        problem: Why it cannot be read, or None.
    """

    refs: dict[str, TensorRef]
    beside: dict[str, Fact] = field(default_factory=dict)
    nest: tuple[str, ...] = ()
    key: str = ""
    module: str = ""
    problem: UnbackdoorError | None = None


@dataclass(frozen=True)
class Inventory:
    """Everything in a checkpoint that holds tensors.

    Attributes:
        sets: State dicts and whole modules by their keys, in their order.
        others: Keys of further entries that hold tensors, such as the state of an optimizer.
    """

    sets: dict[str, LocatedStateDict]
    others: tuple[str, ...]


def find_all(described: object) -> Inventory:
    """Return every set of weights that a checkpoint holds, wherever a loader may look for it.

    Raises:
        UnsafeFile: If it holds so many entries that a set could hide among them.
    """
    sets: dict[str, LocatedStateDict] = {}
    others: dict[str, None] = {}
    seen: dict[int, LocatedStateDict | None] = {}  # one object may lie under several keys
    registered: set[int] = set()  # tensors of modules, which may have them in lists as well
    todo: list[tuple[object, tuple[str, ...], bool]] = [(described, (), True)]
    searched = 0
    while todo:
        value, keys, named = todo.pop()
        searched += _entries(value)
        if searched > _MAX_SEARCHED or len(sets) > _MAX_SETS or len(keys) > _DEEPEST_SET:
            raise UnsafeFile(
                "the file has too many entries to find all sets of weights",
                expected=f"at most {_MAX_SEARCHED} entries and {_MAX_SETS} sets, {_DEEPEST_SET} deep",
            )
        key = ".".join(keys)
        if isinstance(value, Faulty) or (isinstance(value, TensorRef) and id(value) not in registered):
            others.setdefault(key)
        if not isinstance(value, Stub | dict | list | tuple):
            continue
        if id(value) in seen:
            twin = seen[id(value)]
            if twin is not None:
                key = _unused(key, sets)
                sets[key] = replace(twin, nest=keys if named and not twin.module else (), key=key)
            continue
        seen[id(value)] = None
        try:
            refs = _tensors(value, Trail())
        except (InputError, UnsupportedModel) as error:
            if keys and keys[-1] in NESTS:  # a program may load it, and it cannot be compared
                key = _unused(key, sets)
                sets[key] = LocatedStateDict({}, key=key, problem=error)
            else:
                others.setdefault(key)
            continue
        if refs:
            key = _unused(key, sets)
            module = _class_of(value) if isinstance(value, Stub) and _is_module(value) else ""
            nest = keys if named and not module else ()
            sets[key] = seen[id(value)] = LocatedStateDict(refs, nest=nest, key=key, module=module)
            if isinstance(value, Stub) and module:
                beside, parts = _beside_module(value)
                registered.update(map(id, refs.values()))
                seen.update((id(part), None) for part in parts if id(part) not in seen)
            else:
                beside = [one for one in _entries_of(value) if not isinstance(one[1], TensorRef)]
            todo += reversed([(entry, (*keys, name), False) for name, entry in beside])
            continue
        inner = _entries_of(value)
        if keys and "optim" in keys[-1].lower():
            if inner:
                others.setdefault(key)
            continue
        named = named and not isinstance(value, list | tuple)
        todo += reversed([(entry, (*keys, name), named) for name, entry in inner])
    return Inventory(sets, tuple(others)[:_MAX_OTHERS])


def _entries_of(value: object) -> Sequence[tuple[str, object]]:
    if isinstance(value, list | tuple):
        return [(str(place), entry) for place, entry in enumerate(value) if isinstance(entry, _HOLDING)]
    entries: list[tuple[object, object]] = list((as_mapping(value) or {}).items())
    if isinstance(value, Stub):  # an object of another class may hold a module or a state dict anywhere
        entries += value.attributes().items()
        entries += enumerate(value.entries or ())
        if isinstance(value.args, tuple) and (value.opaque or value.cls not in CONTAINERS):
            entries += enumerate(value.args)
    texts = {key for key, _ in entries if isinstance(key, str)}
    used: dict[str, int] = {}
    out: list[tuple[str, object]] = []
    for key, entry in entries:
        if not isinstance(entry, _HOLDING):
            continue
        name = key[:200] if isinstance(key, str) else short(key)
        used[name] = used.get(name, 0) + 1
        if used[name] > 1 or (name in texts and not isinstance(key, str)):
            name += f"'{used[name]}"  # the key of another type, or an attribute beside an entry
        out.append((name, entry))
    return out


def _beside_module(top: Stub) -> tuple[list[tuple[str, object]], list[Stub]]:
    """Return what the modules of a module have as plain attributes, and these modules."""
    beside: list[tuple[str, object]] = []
    parts: dict[int, Stub] = {}
    todo = [("", top)]
    while todo:
        prefix, module = todo.pop()
        if id(module) in parts:
            continue
        parts[id(module)] = module
        attributes = module.attributes()
        spend("visits", len(attributes))
        beside += [
            (prefix + name, entry)
            for name, entry in attributes.items()
            if isinstance(name, str) and name not in _REGISTERS and isinstance(entry, _HOLDING)
        ]
        children = as_mapping(attributes.get("_modules")) or {}
        todo += [(f"{prefix}{name}.", child) for name, child in children.items() if isinstance(child, Stub)]
    return beside, list(parts.values())


def _unused(key: str, sets: Mapping[str, object]) -> str:
    # Keys with dots in them may lead elsewhere and read the same.
    while key in sets:
        key += "'"
    return key


def _entries(value: object) -> int:
    """Return how many entries looking into a value looks at, also where they are shared with others."""
    if isinstance(value, dict | list | tuple):
        return 1 + len(value)
    if not isinstance(value, Stub):
        return 1
    parts = [value.state, value.items, value.entries, value.args]
    parts += [part for whole in parts if isinstance(whole, tuple) for part in whole[:8]]
    return 1 + sum(len(part) for part in parts if isinstance(part, dict | list | tuple))


_HOLDING = (Stub, TensorRef, Faulty, dict, list, tuple)
_REGISTERS = ("_parameters", "_buffers", "_modules")


def _class_of(value: Stub) -> str:
    return value.cls or "a computed class"


def find_state_dict(described: object, trail: Trail) -> LocatedStateDict:
    """Return the state dict that a checkpoint holds at the top, under a usual key, or as a whole module.

    Raises:
        InputError: If it holds none.
    """
    located = _search(described, trail, "", 0)
    if located is not None:
        return located
    mapping = as_mapping(described)
    keys = listed([str(key) if isinstance(key, str | int) else "?" for key in list(mapping or {})[:6]])
    several = [short(key)[1:-1] for key in find_all(described).sets]
    if several:
        raise InputError(
            "the checkpoint holds several state dicts, and none is under a usual key",
            expected="one that can be told to be meant",
            got=listed(several),
            remedy="Name the one that is meant: --weights KEY, in Python weights=KEY",
        )
    raise InputError(
        "the checkpoint holds no state dict",
        expected="tensors by name, at the top or under " + ", ".join(NESTS[:6]),
        got=f"keys {keys}" if mapping else _kind(described),
    )


def _search(value: object, trail: Trail, path: str, depth: int) -> LocatedStateDict | None:
    refs = _tensors(value, trail)
    if refs:
        module = _class_of(value) if isinstance(value, Stub) and _is_module(value) else ""
        return LocatedStateDict(refs, key=path, module=module)
    listing = isinstance(value, list | tuple)
    if isinstance(value, list | tuple):  # (state dict, epoch), as some scripts save it
        value = {str(place): entry for place, entry in enumerate(value[:_LISTED])}
    mapping = as_mapping(value)
    if not mapping or depth >= _DEPTH:
        return None
    spend("visits", len(mapping))
    keys = [key for key in NESTS if key in mapping]
    # Where none of the usual keys is there, a single one that holds tensors is meant.
    others = [
        key for key in mapping if isinstance(key, str) and key not in NESTS and "optim" not in key.lower()
    ]
    candidates = [key for key in others if _holds(mapping, key)] if not keys else []
    if len(candidates) > 1:
        trail.note(
            "several entries hold tensors, and none was chosen: "
            + listed([short(key)[1:-1] for key in candidates])
        )
    for key in keys or candidates if len(candidates) <= 1 else []:
        located = _search(mapping[key], trail, f"{path}.{key}" if path else key, depth + 1)
        if located is not None:
            if not listing and (located.nest or as_mapping(mapping[key]) is not None):
                located.nest = (key, *located.nest)
            for name, beside in mapping.items():
                fact = _fact(beside)
                if isinstance(name, str) and name != key:
                    if fact is not None:
                        located.beside.setdefault(name[:200], fact)
                    elif "optim" in name.lower() and as_mapping(beside):
                        trail.note(f"the state of an optimizer lies beside the weights, under {short(name)}")
            return located
    return None


def _holds(mapping: dict[Any, Any] | None, key: str) -> bool:
    try:
        return bool(_tensors((mapping or {})[key], Trail()))
    except (InputError, UnsupportedModel):
        return True


def _tensors(value: object, trail: Trail) -> dict[str, TensorRef]:
    if isinstance(value, Stub) and _is_module(value):
        trail.note(
            f"a whole module was pickled ({short(value.cls or 'of a computed class')}): "
            "only its tensors were read"
        )
        return dict(_walk(value))
    mapping = as_mapping(value)
    if not mapping:
        return {}
    out: dict[str, TensorRef] = {}
    faulty: tuple[str, Exception] | None = None
    packed = False
    for name, entry in mapping.items():
        spend("visits")
        if not isinstance(name, str):
            return {}
        if name.endswith(_PACKED) and isinstance(entry, tuple):
            entries: list[tuple[str, object]] = list(_unpacked(name.removesuffix(_PACKED), entry))
        else:
            entries = [(name, entry)]
        packed = packed or not entries
        for inner, one in entries:
            if isinstance(one, Faulty):
                faulty = faulty or (inner, one.error)
            elif isinstance(one, TensorRef):
                if inner in out or (inner != name and inner in mapping):
                    raise InputError("a quantised state dict names a tensor twice", got=short(inner))
                out[inner] = one
            elif inner.endswith("_packed_params") or _is_packed(one):
                packed = True
            elif not (
                inner.endswith(("_extra_state", "_packed_params.dtype"))
                or inner == "_metadata"
                or (one is None and inner.endswith("bias"))  # as quantised layers say that they have none
            ):
                return {}
    # Only now, because what holds anything else is no state dict, and a faulty tensor lies beside one.
    if packed:
        raise quantised("packed parameters of another layer than a linear one")
    if faulty is not None:
        name, error = faulty
        if isinstance(error, UnsupportedModel):
            raise error
        raise InputError(
            "a tensor cannot be rebuilt", got=f"tensor {short(name)}: {short(str(error))}"
        ) from error
    return out


def _unpacked(layer: str, pair: object) -> Iterator[tuple[str, object]]:
    """Yield weight and bias that a quantised linear layer holds as a pair; nothing of what is none."""
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], TensorRef | Faulty):
        yield f"{layer}weight", pair[0]
        if isinstance(pair[1], TensorRef | Faulty):
            yield f"{layer}bias", pair[1]


def _is_packed(value: object) -> bool:
    return isinstance(value, Stub) and value.made_by == PACKED


def _is_module(value: Stub) -> bool:
    return any(
        isinstance(as_mapping(value.attributes().get(key)), dict) for key in ("_parameters", "_modules")
    )


def _walk(top: Stub) -> Iterator[tuple[str, TensorRef]]:
    # In the order of state_dict: own parameters, own buffers, then the modules within.
    todo: list[tuple[str, Stub, frozenset[int]]] = [("", top, frozenset())]
    count = 0
    while todo:
        prefix, module, above = todo.pop()
        count += 1
        if count > _MODULES or len(prefix) > 2000:
            raise InputError("the pickled module has too many parts", expected=f"at most {_MODULES} modules")
        if module.items or module.entries:
            raise UnsafeFile("a pickled module is changed while it is loaded", got=short(module.cls))
        attributes = module.attributes()
        held = list(_quantised_layer(prefix, module, attributes))
        if not held and any(_is_packed(value) for value in attributes.values()):
            raise quantised("packed parameters of another layer than a linear one")
        for name, ref in held:
            if isinstance(ref, Faulty):
                raise ref.error
            if isinstance(ref, TensorRef):
                yield name, ref
        passing = _texts(attributes.get("_non_persistent_buffers_set"))
        for kind, left_out in (("_parameters", set()), ("_buffers", passing)):
            for name, ref in (as_mapping(attributes.get(kind)) or {}).items():
                spend("visits")
                if isinstance(ref, TensorRef) and isinstance(name, str) and name not in left_out:
                    yield prefix + name, ref
        spend("visits", len(as_mapping(attributes.get("_modules")) or ()) + len(above))
        inner = [
            (f"{prefix}{name}.", child, above | {id(module)})
            for name, child in (as_mapping(attributes.get("_modules")) or {}).items()
            if isinstance(child, Stub) and isinstance(name, str) and id(child) not in above | {id(module)}
        ]
        todo += reversed(inner)


def _quantised_layer(
    prefix: str, module: Stub, attributes: Mapping[Any, Any]
) -> Iterator[tuple[str, object]]:
    """Yield weight and bias of a quantised layer of a pickled module; nothing of another module."""
    packed, state = attributes.get("_packed_params"), module.state
    if isinstance(packed, Stub) and _is_packed(packed) and prefix.endswith(_PACKED_MODULE):
        pair, cls = packed.state if isinstance(packed.state, tuple) and len(packed.state) == 2 else (None, "")
        if isinstance(cls, str) and cls.endswith(_LINEAR):
            yield from _unpacked(prefix.removesuffix(_PACKED_MODULE), pair)
    elif isinstance(state, tuple) and not attributes:
        if not _QUANTISED_CONV.fullmatch(module.cls) or len(state) != _CONV_STATE:
            raise UnsupportedModel(
                "a pickled module keeps its tensors in a way of its own", got=short(module.cls)
            )
        yield from _unpacked(prefix, state[10:12])


def _texts(value: object) -> set[str]:
    if isinstance(value, Stub):  # a set as protocol 2 writes it: a call of set with a list
        value = value.entries
    return {text for text in value if isinstance(text, str)} if isinstance(value, list) else set()


def _kind(value: object) -> str:
    if isinstance(value, Stub):
        return f"an object of {short(value.cls)}" if value.cls else "an object of a computed class"
    if isinstance(value, Name):
        return f"the name {short(str(value))}"
    return "one tensor without a name" if isinstance(value, TensorRef) else type(value).__name__


def _fact(value: object) -> Fact | None:
    """Return a plain number or a short text, also where numpy wrote the number; None for all else."""
    if isinstance(value, bool | int):
        return value if abs(value) < 1 << 63 else None
    if isinstance(value, str):
        return value[:200] if value else None
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, Stub) and value.made_by is not None and value.cls.endswith(".multiarray.scalar"):
        return _numpy_scalar(value.args)
    return None


def _numpy_scalar(args: object) -> Fact | None:
    if not (
        isinstance(args, tuple)
        and len(args) == 2
        and isinstance(args[0], Stub)
        and isinstance(args[1], bytes)
    ):
        return None
    code = args[0].args[0] if isinstance(args[0].args, tuple) and args[0].args else None
    form = _NUMPY_FORMATS.get(code) if isinstance(code, str) else None
    if form is None or len(args[1]) != struct.calcsize(form):
        return None
    value = struct.unpack(f"<{form}", args[1])[0]
    return _fact(value) if isinstance(value, int | float) else None


# ---------------------------------------------------------------------------------------------------
# Names


def require_names(names: Iterable[str]) -> None:
    """Refuse names of tensors that no network can have.

    Raises:
        InputError: If one of them is no text, or cannot be written: it holds half of a character.
        UnsafeFile: If one of them is longer than any name.
    """
    longest = limits().name
    for name in names:
        if not isinstance(name, str) or not is_text(name):
            raise InputError("the name of a tensor is no text", got=short(name))
        if len(name) > longest:
            raise UnsafeFile(
                "the name of a tensor is too long", expected=f"at most {longest} characters", got=short(name)
            )


def strip(names: list[str]) -> str:
    """Return the prefixes that wrappers put before all names, joined; empty for none."""
    cut = 0
    while names:
        for prefix in PREFIXES:
            if all(name.startswith(prefix, cut) and len(name) > cut + len(prefix) for name in names):
                cut += len(prefix)
                break
        else:
            break
    return names[0][:cut] if names else ""


def unpruned(state: Mapping[str, Tensor], trail: Trail) -> dict[str, Tensor]:
    """Multiply the masks of ``torch.nn.utils.prune`` into the weights they belong to.

    Other ways of writing one weight as several are remarked upon and left as they are.
    """
    masked: dict[str, str] = {}  # the weight's name by that of its original
    for name in state:
        plain = name.removesuffix("_orig")
        mask = state.get(f"{plain}_mask") if plain != name else None
        if mask is not None and plain not in state and mask.shape == state[name].shape:
            masked[name] = plain
    left_out = {f"{plain}_mask" for plain in masked.values()} - masked.keys()
    # In the place of the original, so that the order of the layers is kept.
    out = {
        masked.get(name, name): _masked(state, name, masked[name]) if name in masked else tensor
        for name, tensor in state.items()
        if name not in left_out
    }
    if masked:
        names = listed(list(masked.values()), 3)
        trail.note(f"{len(masked)} pruning masks were multiplied into their weights: {names}")
    if any(".parametrizations." in f".{name}" for name in state):
        trail.note(
            "some weights are parametrised (names with parametrizations): those of weight and spectral norm "
            "are merged when a network is made of them"
        )
    if any(name.endswith("weight_g") and name[:-1] + "v" in state for name in state):
        trail.note(
            "some weights are split into length and direction (weight_g, weight_v): "
            "they are merged when a network is made of them"
        )
    return out


def _masked(state: Mapping[str, Tensor], name: str, plain: str) -> Tensor:
    return state[name] * state[f"{plain}_mask"].to(state[name].dtype)
