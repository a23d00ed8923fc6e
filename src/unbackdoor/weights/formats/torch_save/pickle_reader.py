"""A reader of pickles that calls nothing: every name becomes an inert stub, every call a record of itself.

A pickle is a program for a small stack machine. Two of its instructions reach outside, one imports a name and
one calls it. Here the first writes the name down and the second notes what would have been called with what;
only the handful of functions by which torch describes a tensor are understood, and they yield a description.
No class of the file, and none of the process, is ever looked up.

A tensor counts only as it was made. What would change one afterwards, or would change an imported name, is
refused, because this reader and torch's would then see other weights.

Each name is recorded when it is read, so that the names before a fault are reported too.
"""

from __future__ import annotations

import codecs
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import (
    DTYPES,
    MAX_AXES,
    QUANTISED_STORAGES,
    STORAGES,
    Affine,
    QuantisedStorageRef,
    StorageRef,
    TensorRef,
    natural,
    quantised,
    sizes,
)
from unbackdoor.weights.formats.torch_save.pickle_globals import Danger, Name, is_library_class, judge

MAX_STEPS = (
    1_000_000  # instructions of one pickle; the checkpoint of a ResNet-152 with its optimizer has 50,000
)
MAX_NAMES = 1000
_LONGEST = 500  # characters of a name; nothing that long can be imported
_COUNTED = 64  # instructions that are put on the account at a time; so many for every pickle
_WORD = 64  # bits of a key that is an integer
_LARGEST_SCALE = 3.0e38  # float32 holds no larger one
_NESTED = 3  # pickles within pickles that are opened

# Everything that a malformed pickle raises in pickletools and here.
BROKEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, RuntimeError)
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_MAPPINGS = {"collections.OrderedDict", "builtins.dict", "collections.defaultdict", "collections.Counter"}
_SETS = {"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}
CONTAINERS = _MAPPINGS | _SETS  # filled from their arguments
# How many arguments each function takes by which torch describes a plain tensor, and which of them are the
# hooks, the type of elements where that is not the storage's, and the bits that turn every value.
_REBUILDS: Mapping[str, tuple[int, int, int | None, int | None, int | None]] = {
    "_rebuild_tensor": (4, 4, None, None, None),
    "_rebuild_tensor_v2": (6, 7, 5, None, 6),
    "_rebuild_tensor_v3": (7, 8, 5, 6, 7),
}
_MAKERS = {"copyreg._reconstructor", "copy_reg._reconstructor"}
_CALLERS = "numpy.random._pickle.__"  # what begins so calls the classes that it is given, without arguments
_PARAMETERS = {"_rebuild_parameter": 3, "_rebuild_parameter_with_state": 4}
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
# An attribute of one of these names is no remark beside the object, it changes what the object does.
_TENSOR_ATTRIBUTES = frozenset(dir(torch.nn.Parameter))
_MAPPING_ATTRIBUTES = frozenset(dir(OrderedDict))


@dataclass
class Trail:
    """What was read of a file, also where the file cannot be read to its end.

    Attributes:
        names: Names beyond plain tensors that its pickles would import, and how dangerous each is.
        notes: Remarks for the reader, in words.
    """

    names: dict[Name, Danger] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, name: Name) -> None:
        """Record a name, unless it belongs to plain tensors."""
        danger = judge(name)
        if danger == "plain" or name in self.names:
            return
        if len(self.names) < MAX_NAMES or (danger == "dangerous" and not self.dangerous):
            self.names[name] = danger

    def note(self, text: str) -> None:
        """Write a remark down, once."""
        if text not in self.notes and len(self.notes) < MAX_NAMES:
            self.notes.append(text)

    @property
    def dangerous(self) -> list[str]:
        """The dangerous names, sorted."""
        return sorted(str(name) for name, danger in self.names.items() if danger == "dangerous")


class Stub:
    """An object of the file, which is described and never built.

    Attributes:
        made_by: The name that would have been called, or another stub.
        args: What it would have been called with.
        items: Keys and values that would have been set on it.
        entries: Values that would have been appended or added to it.
        state: What its attributes would have been set from.
        opaque: Whether it is a container whose first content is unknown.
    """

    __slots__ = ("args", "entries", "items", "made_by", "opaque", "state")

    def __init__(self, made_by: object, args: object = ()) -> None:
        self.made_by = made_by
        self.args = args
        self.items: dict[Any, Any] | None = None
        self.entries: list[Any] | None = None
        self.state: Any = None
        self.opaque = False

    @property
    def cls(self) -> str:
        """Full name of its class or function; empty where that was computed."""
        return str(self.made_by) if isinstance(self.made_by, Name) else ""

    def attributes(self) -> dict[Any, Any]:
        """The attributes that would have been set on it."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # plain attributes and slots
            spend("visits", sum(len(part) for part in state if isinstance(part, dict)))
            return {
                **(state[0] if isinstance(state[0], dict) else {}),
                **(state[1] if isinstance(state[1], dict) else {}),
            }
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class UnhashedKey:
    """Stands for a dictionary key that is not plain: hashing hostile nested tuples may not end."""

    number: int


@dataclass(frozen=True, eq=False)
class Faulty:
    """Stands for a tensor that cannot be built from its description in the pickle."""

    error: Exception


class _Mark:
    """The place on the stack where a group of values begins."""


_MARK = _Mark()
COMPUTED = Name("a name", "that is computed while loading")
_TOUCHED = "a tensor is changed after it was made, and readers differ in what it then is"
CHANGED = Name("an imported name", "that is changed while loading")
_FROM_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")
_OPENS = Name("torch.storage", "_load_from_bytes")
# An object of a class in C++ that its state names: these of torch's own hold packed weights, and run nothing.
PACKED = Name("torch", "ScriptObject")
_PACKED_CLASSES = re.compile(
    r"__torch__\.torch\.classes\.(quantized\.(Linear|Conv[23]d|Embedding)PackedParamsBase|rnn\.CellParamsBase)"
)
_PLAIN_VALUES = (int, float, bytes, tuple, type(None))
Persistent = Callable[[object], object]
Nested = Callable[[bytes, "Trail", int], object]


def as_mapping(value: object) -> dict[Any, Any] | None:
    """Return the items of a dictionary of any class, or None for everything else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Stub) or value.opaque:
        return None
    spend("visits", len(value.items or ()) + 1)
    if value.cls in _MAPPINGS:
        return value.items or {}
    return value.items or None


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str | int)


def read(
    stream: IO[bytes], trail: Trail, persistent: Persistent, *, nested: Nested, depth: int = 0
) -> object:
    """Read one pickle, calling nothing.

    Args:
        stream: Where it begins; left behind its last byte.
        trail: Records every name when it is read.
        persistent: Turns the file's references to things outside the pickle into what stands for them.
        nested: Reads a checkpoint that lies within the pickle, from its bytes, the trail and its depth.
        depth: How many pickles this one lies inside.

    Returns:
        Plain values, lists, tuples and dictionaries, with :class:`Name`, :class:`Stub` and
        :class:`~unbackdoor.weights.formats.tensors.TensorRef` among them. They may contain themselves.

    Raises:
        InputError: If it is cut short or scrambled.
        UnsafeFile: If it is longer than any pickle of weights.
    """
    machine = _Machine(trail, persistent, nested, depth)
    try:
        return machine.run(stream)
    except UnbackdoorError:
        raise
    except (*BROKEN, MemoryError) as error:
        raise InputError(
            "the pickle is damaged or cut short",
            got=short(str(error).strip().split("\n")[0] or type(error).__name__),
            remedy="Copy or download it again",
        ) from error


class _Machine:
    def __init__(self, trail: Trail, persistent: Persistent, nested: Nested, depth: int) -> None:
        self._trail = trail
        self._persistent = persistent
        self._nested = nested
        self._depth = depth
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._unhashed_keys = 0
        self._unopened = 0  # calls of the function that opens inner pickles whose content was not read
        self._unmade = 0  # uses of the class of packed weights that made none
        self._copied = 0  # entries of containers that were made from others
        self._deception: UnsafeFile | None = None  # the first; reading goes on, because names may follow

    def run(self, stream: IO[bytes]) -> object:
        try:
            described = self._steps(stream)
        except (*BROKEN, InputError) as error:
            if self._deception is not None:
                raise self._deception from error
            raise
        finally:
            if self._unopened:
                self._trail.names[_OPENS] = "dangerous"
            if self._unmade:
                self._trail.names[PACKED] = "dangerous"
        if self._deception is not None:
            raise self._deception
        return described

    def _steps(self, stream: IO[bytes]) -> object:
        frame = 0  # where the present one ends
        for step in range(MAX_STEPS):
            if not step % _COUNTED:
                spend("instructions", _COUNTED)
            begun = stream.tell() if frame else 0
            opcode = _OPCODES[stream.read(1).decode("latin-1")]
            try:
                argument = _argument_of(opcode, stream)
            except BROKEN as error:
                # What this reader cannot read whole, another may read in its two parts.
                if begun < frame < stream.tell():
                    raise _divided() from error
                raise
            if frame or opcode.name == "FRAME":
                now = stream.tell()
                if begun < frame and (now > frame or opcode.name == "FRAME"):
                    raise _divided()
                frame = now + int(argument) if opcode.name == "FRAME" else frame
            if opcode.name == "STOP":
                return self.pop()
            _ACTIONS[opcode.name](self, argument)
        raise UnsafeFile("the pickle is too long", expected=f"at most {MAX_STEPS} instructions")

    # Values

    def push(self, value: Any) -> None:
        self._unopened += isinstance(value, Name) and value == _OPENS
        self._unmade += isinstance(value, Name) and value == PACKED
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value belongs")
        return value

    def pop_group(self) -> list[Any]:
        # From the top, so that the search costs no more than the group has.
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a group without a beginning")
        group = self._stack[at + 1 :]
        del self._stack[at:]
        return group

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def pop_one(self, _: Any) -> None:
        self._stack.pop()

    def duplicate(self, _: Any) -> None:
        self.push(self.top())

    def top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value belongs")
        return self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.top()

    def put(self, key: Any) -> None:
        self._memo[int(key)] = self.top()

    def get(self, key: Any) -> None:
        self.push(self._memo[int(key)])

    # Containers

    def tuple_of(self, count: int) -> Callable[[Any], None]:
        def act(_: Any) -> None:
            self.push(tuple(reversed([self.pop() for _ in range(count)])))

        return act

    def dictionary(self, _: Any) -> None:
        group = self.pop_group()
        self.push({})
        self._set(self._stack[-1], group)

    def append(self, _: Any) -> None:
        value = self.pop()
        self._add(self.top(), [value])

    def appends(self, _: Any) -> None:
        group = self.pop_group()
        self._add(self.top(), group)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set(self.top(), [key, value])

    def set_items(self, _: Any) -> None:
        group = self.pop_group()
        self._set(self.top(), group)

    def _touch(self, target: Any) -> None:
        if isinstance(target, Name):
            self._trail.names[CHANGED] = "dangerous"
        if isinstance(target, TensorRef | StorageRef | Faulty):
            self._deceives(_TOUCHED)

    def _deceives(self, problem: str, got: object = None) -> None:
        self._deception = self._deception or UnsafeFile(
            problem, got=None if got is None else short(got), remedy="Ask its author for safetensors"
        )

    def _add(self, target: Any, values: list[Any]) -> None:
        if not values:
            return
        self._touch(target)
        if isinstance(target, Stub):
            target.entries = target.entries or []
            target.entries.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, _PLAIN_VALUES):
            raise TypeError("appending to what is no list")

    def _set(self, target: Any, group: list[Any]) -> None:
        if not group:
            return
        self._touch(target)
        if isinstance(target, Stub):
            if target.cls.startswith("torch.") and not target.cls.startswith("torch.nn.modules."):
                self._deceives(_TOUCHED, target.cls)  # it may share its storage with a tensor
            target.items = {} if target.items is None else target.items
            target = target.items
        if isinstance(target, _PLAIN_VALUES) or len(group) % 2:
            raise TypeError("setting an item of what is no dictionary")
        if not isinstance(target, dict):
            return
        for key, value in zip(group[::2], group[1::2], strict=True):
            # A long integer is hashed anew at every use, in time that grows with its length.
            if not isinstance(key, str | int | float | bytes | None) or (
                isinstance(key, int) and key.bit_length() > _WORD
            ):
                self._unhashed_keys += 1
                key = UnhashedKey(self._unhashed_keys)
            target[key] = value

    # Names and calls

    def name(self, argument: Any) -> None:
        module, name = argument
        self._named(module, name)

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if isinstance(name, _PLAIN_VALUES) or isinstance(module, _PLAIN_VALUES):
            raise TypeError("a name that is no text")
        if isinstance(name, str) and isinstance(module, str):
            self._named(module, name)
        else:
            # The text is the result of a call, so that it is unknown without making the call.
            self._trail.names[COMPUTED] = "dangerous"
            self.push(COMPUTED)

    def _named(self, module: str, name: str) -> None:
        global_name = Name(module[:_LONGEST], name[:_LONGEST])
        self._trail.record(global_name)
        self.push(global_name)

    def extension(self, code: Any) -> None:
        # What a number of the extension table means, the loading process decides.
        self._named("copyreg", f"extension_{int(code)}")

    def instance(self, argument: Any) -> None:
        self.name(argument)  # imported before it is seen whether there is a group
        made_by = self.pop()
        self.push(self._called(made_by, tuple(self.pop_group())))

    def object_of_group(self, _: Any) -> None:
        made_by, *args = self.pop_group()
        self.push(self._called(made_by, tuple(args)))

    def new_object(self, _: Any) -> None:
        args, made_by = self.pop(), self.pop()
        # Making is not initialising: a container is empty then, whatever the arguments are.
        empty = isinstance(made_by, Name) and str(made_by) in _MAPPINGS | _SETS
        self.push(Stub(made_by, () if empty else args))

    def new_object_with_keywords(self, _: Any) -> None:
        _, args, made_by = self.pop(), self.pop(), self.pop()
        self.push(made_by)
        self.push(args)
        self.new_object(None)

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.push(self._called(function, args))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        self._touch(target)
        if isinstance(target, Stub):
            if target.state is not None:
                self._deceives("the attributes of an object are set twice", target.cls)
            if target.cls in _MAPPINGS and not _is_remark(state, _MAPPING_ATTRIBUTES):
                self._deceives("a dictionary is changed so that readers differ in what it holds", target.cls)
            self._unmade -= _is_packed(target, state)
            target.state = state

    def persistent_text(self, argument: Any) -> None:
        try:
            self.push(self._persistent(argument))
        except UnsafeFile as error:
            self._deception = self._deception or error
            self.push(Faulty(error))
        except (*BROKEN, InputError) as error:
            self.push(Faulty(error))

    def persistent_value(self, _: Any) -> None:
        self.persistent_text(self.pop())

    def _called(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Name):
            # The result of a call is called; it is unknown without making the call.
            self._trail.names[COMPUTED] = "dangerous"
        if not isinstance(function, Name) or not isinstance(args, tuple):
            return Stub(function, args)
        if is_library_class(function) or (str(function) in _MAKERS and not _makes_only(args)):
            # Pickles make objects of classes and do not call them; what it does then, its arguments decide.
            self._trail.names[function] = "dangerous"
        if str(function).startswith(_CALLERS):
            for arg in args:
                if isinstance(arg, Name) and not str(arg).startswith("numpy.random."):
                    self._called(arg, ())
        if function.module == "torch._utils" and function.name.startswith("_rebuild_"):
            try:
                return self._rebuilt(function.name, args)
            except (*BROKEN, InputError, UnsupportedModel) as error:
                return Faulty(error)  # reading goes on: the names after it must be reported too
        if function == _FROM_TYPE:
            return self._of_type(args)
        if str(function) in _MAPPINGS | _SETS:
            return self._container(function, args)
        if function == Name("torch", "Size") and len(args) == 1 and isinstance(args[0], list | tuple):
            return tuple(args[0][: MAX_AXES + 1])
        if (
            function == Name("_codecs", "encode")
            and len(args) == 2
            and isinstance(args[0], str)
            and args[1] == "latin1"
        ):
            spend("unpacked", len(args[0]))  # the same text may be encoded again and again
            return args[0].encode("latin1")
        if function == _OPENS and len(args) == 1 and isinstance(args[0], bytes):
            return self._inner(args[0])
        return Stub(function, args)

    def _rebuilt(self, function: str, args: tuple[Any, ...]) -> object:
        if function in _REBUILDS:
            fewest, most, hooks, dtype, bits = _REBUILDS[function]
            if not fewest <= len(args) <= most:
                raise TypeError(f"{function} with {len(args)} arguments")
            if hooks is not None:
                _check_hooks(args[hooks - 1], args[hooks])
            if bits is not None and any(args[bits:]):
                raise InputError("the values of a tensor are negated or conjugated while it is loaded")
            return _tensor(args[:4], args[dtype] if dtype is not None else None)
        if function == "_rebuild_qtensor":
            if len(args) != 7:
                raise TypeError(f"{function} with {len(args)} arguments")
            _check_hooks(*args[5:])
            return _quantised_tensor(args[:4], args[4])
        if function in _PARAMETERS:
            if len(args) != _PARAMETERS[function]:
                raise TypeError(f"{function} with {len(args)} arguments")
            _check_hooks(*args[1:3])
            if not _is_remark(None if len(args) == 3 else args[3], _TENSOR_ATTRIBUTES):
                self._deceives(_TOUCHED)
            return (
                args[0] if isinstance(args[0], TensorRef | Faulty) else Stub(Name("torch._utils", function))
            )
        raise _not_read(function)

    def _of_type(self, args: tuple[Any, ...]) -> object:
        # The tensor is made by the first argument out of the third; the second is the class of the result,
        # the last what is set on it.
        function, cls, inner, state = args if len(args) == 4 else (None,) * 4
        if not _is_remark(state, _TENSOR_ATTRIBUTES):
            # Also where the result is not read: it may be a tensor that was made before.
            self._deceives(_TOUCHED)
        made: object = Stub(_FROM_TYPE, args)
        if function == _FROM_TYPE:
            self._trail.names[_FROM_TYPE] = "dangerous"  # within itself, as no writer has it
        elif len(args) == 4:
            called = self._called(function, inner)
            made = called if isinstance(called, TensorRef | Faulty) else made
        if isinstance(made, Faulty):
            return made
        if not isinstance(made, TensorRef) or str(cls) not in _TENSOR_CLASSES:
            return Faulty(TypeError(f"a tensor of the class {str(cls)[:_LONGEST]}"))
        return made

    def _container(self, function: Name, args: tuple[Any, ...]) -> Stub:
        # Filled now and not when it is asked for: what it is made from may be changed in the meantime.
        out = Stub(function, args)
        content = args[-1] if args else ()
        if str(function) == "collections.defaultdict" and len(args) == 1:
            content = ()
        if isinstance(content, Stub):
            content = as_mapping(content) if content.cls in _MAPPINGS else content.entries
        self._copied += len(content) if isinstance(content, list | tuple | dict) else 0
        if self._copied > MAX_STEPS:
            raise UnsafeFile("the pickle is too long", expected=f"at most {MAX_STEPS} entries of containers")
        if str(function) in _SETS and isinstance(content, list | tuple):
            out.entries = list(content)
        elif str(function) in _MAPPINGS and isinstance(content, dict):
            out.items = dict(content)
        elif (
            str(function) in ("collections.OrderedDict", "builtins.dict")
            and isinstance(content, list | tuple)
            and all(_is_pair(pair) for pair in content)
        ):
            out.items = {}
            self._set(out, [value for pair in content for value in pair])  # as Python 2 wrote it
        else:
            out.opaque = bool(args) and content != ()
        return out

    def _inner(self, content: bytes) -> object:
        # A plain pickle of a tensor holds its storage as a checkpoint within the checkpoint.
        self._unopened -= 1  # its names are recorded
        if self._depth >= _NESTED:
            raise UnsafeFile("pickles lie within pickles", expected=f"at most {_NESTED} deep")
        try:
            return self._nested(content, self._trail, self._depth + 1)
        except InputError as error:
            self._unopened += 1  # it is of another form than this reader's, and may hold anything
            return Faulty(error)


def _placed(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, shape, stride = args
    if isinstance(storage, Faulty):
        raise storage.error
    if not isinstance(storage, StorageRef) or not natural(offset):
        raise TypeError("a tensor without a storage")
    return TensorRef(storage, storage.dtype, offset, sizes(shape), sizes(stride))


def _tensor(args: tuple[Any, ...], dtype: Any) -> TensorRef:
    ref = _placed(args)
    if isinstance(ref.storage, QuantisedStorageRef):
        raise quantised()
    if dtype is None:
        return ref
    if not (isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in DTYPES):
        raise TypeError("a tensor of an unknown type")
    return replace(ref, dtype=DTYPES[dtype.name])


def _quantised_tensor(args: tuple[Any, ...], scheme: Any) -> TensorRef:
    ref = _placed(args)
    if not isinstance(ref.storage, QuantisedStorageRef):
        raise TypeError("a quantised tensor in a storage of another kind")
    if not isinstance(scheme, tuple) or not scheme or not isinstance(scheme[0], Name):
        raise TypeError("a quantised tensor without a scheme")
    kind, *numbers = scheme
    if str(kind) == "torch.per_tensor_affine":
        scale, zero_point = numbers
        if isinstance(scale, bool) or not isinstance(scale, int | float) or type(zero_point) is not int:
            raise TypeError("a scale that is no number")
        if abs(zero_point) >= 1 << 31 or not -_LARGEST_SCALE <= scale <= _LARGEST_SCALE:
            raise quantised("a scale or a zero point beyond all numbers")
        return replace(ref, affine=Affine(float(scale), zero_point))
    if str(kind) != "torch.per_channel_affine":
        raise quantised(f"the scheme {short(str(kind))}")
    scales, zero_points, axis = numbers
    if not natural(axis) or axis >= len(ref.shape):
        raise quantised("an axis of scales that the tensor does not have")
    return replace(ref, affine=Affine(_numbers(scales, float), _numbers(zero_points, int), axis))


def _numbers(values: Any, kind: type) -> Any:
    if isinstance(values, Faulty):
        raise values.error
    if isinstance(values, TensorRef):
        if values.affine is not None or values.dtype.is_complex:
            raise TypeError("scales that are quantised themselves")
        if values.dtype.is_floating_point != (kind is float) or values.dtype == torch.bool:
            raise TypeError("scales or zero points of another type")
        return values
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError("scales that are no list of numbers")
    if any(abs(value) > _LARGEST_SCALE for value in values if value == value):
        raise quantised("a scale or a zero point beyond all numbers")
    spend("visits", len(values))
    return tuple(values)


def _is_packed(made: Stub, state: object) -> bool:
    """Tell whether setting the state of a new object makes packed weights of it, and nothing else."""
    if made.made_by != PACKED or made.args != () or made.state is not None:
        return False
    if not isinstance(state, tuple) or len(state) != 2 or not isinstance(state[1], str):
        return False
    return _PACKED_CLASSES.fullmatch(state[1]) is not None


def _makes_only(args: tuple[Any, ...]) -> bool:
    # The form of the oldest protocols: a class, the plain class it is made as, and the value of that.
    return len(args) == 3 and isinstance(args[1], Name) and args[1].module in ("builtins", "__builtin__")


def _check_hooks(requires_grad: object, hooks: object) -> None:
    # Torch writes an empty dictionary. A function in it would be called with every gradient.
    if not isinstance(requires_grad, bool) or (hooks is not None and as_mapping(hooks) != {}):
        raise TypeError("a tensor with hooks")


def _is_remark(state: object, taken: frozenset[str]) -> bool:
    """Tell whether setting these attributes leaves an object as it is, because it has none of their names."""
    if state is None:
        return True
    if not isinstance(state, dict):
        return False
    return all(
        isinstance(name, str) and name not in taken and not isinstance(value, TensorRef | StorageRef | Faulty)
        for name, value in state.items()
    )


def _not_read(function: str) -> UnsupportedModel:
    return UnsupportedModel(
        "the weights hold a tensor of a kind that is not read",
        expected="plain dense tensors",
        got=short(function.removeprefix("_rebuild_")),
        remedy="Convert it to a dense tensor and save the state dict again",
    )


def storage_type(name: object) -> torch.dtype:
    """Return the type of elements of a storage class.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(name, Name) and name.module in ("torch", "torch.cuda", "torch.storage"):
        known = {**STORAGES, **QUANTISED_STORAGES}
        if name.name in known:
            return known[name.name]
    raise TypeError(f"no storage class: {short(str(name))}")


def _argument_of(opcode: pickletools.OpcodeInfo, stream: IO[bytes]) -> Any:
    if opcode.name in _READERS:
        return _READERS[opcode.name](stream)
    return opcode.arg.reader(stream) if opcode.arg is not None else None


def _divided() -> UnsafeFile:
    # One machine joins what a frame divides, another drops what stands before the division, and they read
    # different names. No writer divides an instruction.
    return UnsafeFile("the pickle is divided so that its readers see different things")


Action = Callable[[_Machine, Any], None]


def _literal(value: Callable[[], Any]) -> Action:
    return lambda machine, _: machine.push(value())


def _ignore(machine: _Machine, argument: Any) -> None:
    pass


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _bytearray(machine: _Machine, argument: Any) -> None:
    machine.push(bytearray(argument))


def _out_of_band(machine: _Machine, _: Any) -> None:
    raise ValueError("a buffer outside the pickle")


def _line(stream: IO[bytes]) -> bytes:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a line without an end")
    return line[:-1]


def _integer(stream: IO[bytes]) -> int:
    line = _line(stream)
    if line in (b"00", b"01"):
        return line == b"01"
    text = line.removesuffix(b"L").strip()
    # As the machine in C reads it; that in Python refuses the octal numbers of Python 2.
    octal = text.lstrip(b"+-").isdigit() and text.lstrip(b"+-")[:1] == b"0"
    return int(text, 8 if octal else 0)


def _quoted(stream: IO[bytes]) -> str:
    line = _line(stream).strip(b" \t\r").strip(b"'\"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of escapes that Python will refuse one day
        return _text(codecs.escape_decode(line)[0])


def _counted_text(width: int) -> Callable[[IO[bytes]], str]:
    read = pickletools.read_string1 if width == 1 else pickletools.read_string4
    return lambda stream: _text(read(stream).encode("latin-1"))


def _text(content: bytes) -> str:
    # A text of Python 2 is bytes. Torch takes them for UTF-8, and those who ask for it for Latin-1.
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


# Every reader stops at names that are not UTF-8, and at persistent names that are not ASCII: what stands
# behind them runs nowhere, and the weights of another container look like this by chance.
def _pair(stream: IO[bytes]) -> tuple[str, str]:
    return _line(stream).decode("utf-8"), _line(stream).decode("utf-8")


# The readers of pickletools refuse texts here that those of pickle accept, and a name behind them would go
# unseen.
_READERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "INT": _integer,
    "LONG": _integer,
    "STRING": _quoted,
    "BINSTRING": _counted_text(4),
    "SHORT_BINSTRING": _counted_text(1),
    "GLOBAL": _pair,
    "INST": _pair,
    "PERSID": lambda stream: _line(stream).decode("ascii"),
}
_ACTIONS: dict[str, Action] = {
    **dict.fromkeys(("PROTO", "FRAME", "READONLY_BUFFER"), _ignore),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
         "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE",
         "SHORT_BINUNICODE", "BINUNICODE8"),
        _argument,
    ),
    "BYTEARRAY8": _bytearray,
    "NEXT_BUFFER": _out_of_band,
    "NONE": _literal(lambda: None),
    "NEWTRUE": _literal(lambda: True),
    "NEWFALSE": _literal(lambda: False),
    "EMPTY_TUPLE": _literal(tuple),
    "EMPTY_LIST": _literal(list),
    "EMPTY_DICT": _literal(dict),
    "EMPTY_SET": _literal(list),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_group())),
    "TUPLE1": lambda machine, _: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine, _: machine.tuple_of(2)(None),
    "TUPLE3": lambda machine, _: machine.tuple_of(3)(None),
    "LIST": lambda machine, _: machine.push(machine.pop_group()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_group()),
    "DICT": _Machine.dictionary,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "MARK": _Machine.mark,
    "POP": _Machine.pop_one,
    "POP_MARK": lambda machine, _: (machine.pop_group(), None)[1],
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    "INST": _Machine.instance,
    "OBJ": _Machine.object_of_group,
    "NEWOBJ": _Machine.new_object,
    "NEWOBJ_EX": _Machine.new_object_with_keywords,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent_text,
    "BINPERSID": _Machine.persistent_value,
}  # fmt: skip
