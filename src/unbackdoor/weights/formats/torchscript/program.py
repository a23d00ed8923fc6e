"""The program of a TorchScript archive, as the list of calls that a program of ``torch.export`` is.

Needs:   a program whose branches and loops do not depend on the pixels, as every traced network is.
Departs: a check that does nothing but raise an error is left out.

The text is read by Python's own parser and followed statement by statement; nothing of it is executed. What
the two languages could read differently (comments, semicolons, tabs, continued lines, letters beyond ASCII)
is refused, and so is every statement, expression and function that is not named here. What the calls compute
is decided by the allow-list of ``opening.import_program``, which gets the form that a ``.pt2`` file has.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unbackdoor.errors import UnsupportedModel
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import TensorRef, materialise
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Stub, Trail, as_mapping
from unbackdoor.weights.formats.zip_archive import Archive

_MAX_TEXT = 4 << 20  # bytes of program in all; that of a ViT-L has less than one
_MAX_STEPS = 200_000  # statements and expressions that are followed
_MAX_CALLS = 20_000
_VERSION = 10  # of the operators, the newest that is known here
_DEEPEST = 60  # modules within modules, and functions within functions
_ROUNDS = 1_000  # of one loop
_STRINGS = re.compile(r'"(?:[^"\\\n]|\\.)*+"')
_OTHERWISE_READ = re.compile(r"[^\n -~]|[#;`$?]|\\")
_RESERVED = {
    "CONSTANTS", "__torch__", "annotate", "bool", "float", "getattr", "inf", "int", "nan", "ops", "range",
    "torch", "unchecked_cast", "uninitialized",
}  # fmt: skip
# What a module of its own makes or runs when it is loaded or called, beside what it is called for.
_HIDDEN = re.compile(r"__(?!parameters__|buffers__|annotations__|len__)\w+__|forward_.*hook.*")
# Numbers of torch's element types -> those of the schema of torch.export.
_DTYPES = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 11: 12, 15: 13}
_WHERE_STORED = ("device", "layout", "memory_format", "pin_memory")
_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "remainder": operator.mod, "neg": operator.neg, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "floor_divide": operator.floordiv,
}  # fmt: skip
_OF_SIZES = {"floor_divide": "floordiv", "remainder": "mod"}
_KEEP_RANK = re.compile(
    r"conv2d|.*pool2d|batch_norm|(layer|group|instance)_norm|.*dropout_?|linear|.*relu6?_?|gelu|silu_?|hard\w+|sigmoid_?"
    r"|tanh_?|elu_?|mish_?|prelu|clamp\w*|softmax|contiguous|to|cat|clone|detach|.*pad\w*|upsample\w+|neg|exp|roll"
)


@dataclass(frozen=True)
class _Value:
    """A tensor of the program."""

    name: str
    rank: int | None = None


@dataclass(frozen=True)
class _Size:
    """A whole number that is computed from the size of a tensor."""

    name: str


@dataclass(frozen=True)
class _Sizes:
    """All sizes of a tensor."""

    of: _Value


@dataclass(frozen=True)
class _Module:
    stub: Stub
    prefix: str


@dataclass(frozen=True)
class _Function:
    path: str


class _Unknown:
    """Something that no tensor is computed from here: a message, a place of storage, an unknown rank."""


_UNKNOWN = _Unknown()


@dataclass
class _Text:
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A program in the form of ``torch.export``, and the tensors that it holds beside its weights.

    Attributes:
        graph_module: ``graph`` and ``signature``, as the JSON of a ``.pt2`` file has them.
        constants: Tensors by name.
    """

    graph_module: dict[str, Any]
    constants: dict[str, TensorRef]


def read(archive: Archive, data: Buffer, weights: Container[str], where: object) -> Program:
    """Return the calls of the method ``forward``.

    Args:
        archive: The archive.
        data: Its bytes.
        weights: Names of the parameters and buffers, as :func:`archive.read` gave them.
        where: File, for messages.

    Raises:
        UnsupportedModel: If it has a statement, an expression or a function that is not followed.
    """
    return _Reader(archive, data, weights, where).program()


class _Returned(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Reader:
    def __init__(self, archive: Archive, data: Buffer, weights: Container[str], where: object) -> None:
        self._archive = archive
        self._where = where
        self._weights = weights
        self._top = checkpoints.read_zip(archive, data, Trail(), where)
        self._constants = self._read_constants(data)
        self._texts: dict[str, _Text] = {}
        self._bytes = self._steps = self._depth = self._names = 0
        self._classes: dict[object, tuple[dict[str, ast.FunctionDef], dict[str, ast.expr]]] = {}
        self._open_lists: dict[str, list[dict[str, Any]]] = {}  # by the names of lists of tensors
        self._nodes: list[dict[str, Any]] = []
        self._held: dict[str, tuple[str, str]] = {}  # name in the program -> kind, name in the file
        self._ranks: dict[str, int | None] = {}
        self._example = self._sizes_of_example(data)

    def program(self) -> Program:
        if not isinstance(self._top, Stub):
            raise self._refused("no module")
        root = self._archive.root
        marks = [
            entry for at in ("version", ".data/version") if (entry := self._archive.find(f"{root}/{at}"))
        ]
        version = self._archive.content(marks[0], 64).strip() if len(marks) == 1 else b""
        if not re.fullmatch(rb"\d{1,2}", version) or int(version) > _VERSION:
            raise self._refused("operators of another version")
        pixels = _Value("pixels", 4)
        result = self._method(_Module(self._top, ""), "forward", [pixels], {})
        if not isinstance(result, _Value):
            raise self._refused("an answer that is no single tensor")
        specs: list[dict[str, Any]] = [{"user_input": {"arg": {"as_tensor": {"name": pixels.name}}}}]
        for name, (kind, old) in self._held.items():
            specs.append({kind: {"arg": {"name": name}, f"{kind}_name": old}})
        values = {name: {"sizes": [{"as_int": 0}] * (rank or 0)} for name, rank in self._ranks.items()}
        values[pixels.name] = {"sizes": [{"as_int": size} for size in self._example]}
        return Program(
            {
                "graph": {"nodes": self._nodes, "tensor_values": values},
                "signature": {
                    "input_specs": specs,
                    "output_specs": [{"user_output": {"arg": {"as_tensor": {"name": result.name}}}}],
                },
            },
            {name: ref for name, ref in self._constants.items() if name not in self._weights},
        )

    # -------------------------------------------------------------------------------------------
    # What the archive holds

    def _read_constants(self, data: Buffer) -> dict[str, TensorRef]:
        entry = self._archive.find(f"{self._archive.root}/constants.pkl")
        if entry is None:
            return {}
        folder = f"{self._archive.root}/constants/"
        values = checkpoints.read_entry(self._archive, data, entry, Trail(), folder=folder)
        found = values if isinstance(values, list | tuple) else ()
        return {f"constants.{i}": one for i, one in enumerate(found) if isinstance(one, TensorRef)}

    def _sizes_of_example(self, data: Buffer) -> tuple[int, ...]:
        """Return the sizes of the images that a network was traced with, or zeros."""
        entry = self._archive.find(f"{self._archive.root}/traced_inputs.pkl")
        if entry is not None:
            folder = f"{entry.name}/"  # of no entry: the pixels are not in the file, only their number is
            found: Any = checkpoints.read_entry(self._archive, data, entry, Trail(), folder=folder)
            for _ in range(4):  # a mapping of lists, each within a tag of its type
                if isinstance(found, Stub):
                    found = found.args[0] if isinstance(found.args, tuple) and found.args else None
                elif isinstance(found, dict):
                    found = found.get("forward")
                elif isinstance(found, list) and len(found) == 1 and isinstance(found[0], TensorRef):
                    shape = tuple(found[0].shape)
                    return shape if len(shape) == 4 and max(shape) <= 4096 else (0, 0, 0, 0)
        return (0, 0, 0, 0)

    def _text(self, module: str) -> _Text:
        if module in self._texts:
            return self._texts[module]
        entry = self._archive.find(f"{self._archive.root}/code/{module.replace('.', '/')}.py")
        if entry is None:
            raise self._refused(f"a part {short(module)} that is not there")
        self._bytes += entry.size
        if self._bytes > _MAX_TEXT:
            raise self._refused("so much text")
        text = self._archive.content(entry, _MAX_TEXT).decode("utf-8", "replace")
        if _OTHERWISE_READ.search(_STRINGS.sub('""', text)):
            raise self._refused("signs that its printer does not write")
        spend("visits", len(text) // 4)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refused("a text that does not parse") from error
        out = self._texts[module] = _Text()
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef):
                self._once(out.functions, statement.name, statement)
            elif isinstance(statement, ast.ClassDef):
                self._once(out.classes, statement.name, statement)
            else:
                raise self._unread(statement)
        if out.functions.keys() & out.classes.keys():
            raise self._refused("one name for two things")
        return out

    def _once(self, into: dict[str, Any], name: str, what: Any) -> None:
        if name in into or what.decorator_list:
            raise self._refused(f"two definitions or a decorator of {short(name)}")
        into[name] = what

    def _class(self, module: _Module) -> tuple[dict[str, ast.FunctionDef], dict[str, ast.expr]]:
        """Return the methods and the constants of a module's class."""
        made_by = module.stub.made_by
        if made_by in self._classes:
            return self._classes[made_by]
        if not isinstance(made_by, Name) or made_by.module.partition(".")[0] != "__torch__":
            raise self._refused("a module of another kind")
        found = self._text(made_by.module).classes.get(made_by.name)
        if found is None or found.keywords or [self._plain(base) for base in found.bases] != ["Module"]:
            raise self._refused(f"a class {short(made_by.name)} that is no module")
        methods: dict[str, ast.FunctionDef] = {}
        constants: dict[str, ast.expr] = {}
        for statement in found.body:
            self._step()
            if isinstance(statement, ast.FunctionDef):
                self._once(methods, statement.name, statement)
                names = [statement.name]
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names = [statement.target.id]
                if statement.value is not None:
                    constants[names[0]] = statement.value
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                names = [self._plain(target.value if isinstance(target, ast.Subscript) else target)]
                if names[0] not in ("__parameters__", "__buffers__", "__annotations__"):
                    raise self._unread(statement)
            else:
                raise self._unread(statement)
            if _HIDDEN.fullmatch(names[0]):
                raise self._refused(f"a class with {short(names[0])}, which runs beside its program")
        self._classes[made_by] = methods, constants
        return methods, constants

    # -------------------------------------------------------------------------------------------
    # Calls within the program

    def _method(self, module: _Module, name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        methods, _ = self._class(module)
        if name not in methods:
            raise self._refused(f"a method {short(name)} that is not there")
        return self._called(methods[name], [module, *args], named)

    def _called(self, function: ast.FunctionDef, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        formal = function.args
        if (
            formal.vararg
            or formal.kwarg
            or formal.kwonlyargs
            or formal.posonlyargs
            or len(args) > len(formal.args)
        ):
            raise self._refused("a function with such arguments")
        names = [argument.arg for argument in formal.args]
        scope: dict[str, Any] = dict(zip(names, args, strict=False))
        for name, value in named.items():
            if name in scope or name not in names:
                raise self._refused("a function with such arguments")
            scope[name] = value
        defaults = formal.defaults
        for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
            if name not in scope:
                scope[name] = self._value(default, {})
        if len(scope) != len(names) or _RESERVED.intersection(scope):
            raise self._refused("a function with such arguments")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._refused("functions so deep within each other")
        try:
            self._run(function.body, scope)
        except _Returned as returned:
            return returned.value
        finally:
            self._depth -= 1
        return None

    def _run(self, body: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in body:
            self._step()
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._assign(statement.targets[0], self._value(statement.value, scope), scope)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(statement.target, self._value(statement.value, scope), scope)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                self._value(statement.value, scope)
            elif isinstance(statement, ast.Return):
                raise _Returned(None if statement.value is None else self._value(statement.value, scope))
            elif isinstance(statement, ast.If):
                self._run(self._branch(statement, self._value(statement.test, scope)), scope)
            elif isinstance(statement, ast.For) and not statement.orelse:
                self._loop(statement, scope)
            elif not isinstance(statement, ast.Pass):
                raise self._unread(statement)

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name) and target.id not in _RESERVED:
            scope[target.id] = value
        elif (
            isinstance(target, ast.Tuple)
            and isinstance(value, list | tuple)
            and len(target.elts) == len(value)
        ):
            for one, part in zip(target.elts, value, strict=True):
                self._assign(one, part, scope)
        elif isinstance(target, ast.Tuple) and isinstance(value, _Value) and value.name in self._open_lists:
            for one, part in zip(target.elts, self._parts(value, len(target.elts)), strict=True):
                self._assign(one, part, scope)
        else:
            raise self._unread(target)

    def _branch(self, statement: ast.If, condition: Any) -> Sequence[ast.stmt]:
        if isinstance(condition, bool):
            return statement.body if condition else statement.orelse
        if isinstance(condition, _Size | _Unknown):  # of sizes: it may only refuse an image, and not choose
            for one, other in ((statement.body, statement.orelse), (statement.orelse, statement.body)):
                if self._only_raises(one):
                    return other
        raise self._refused("a branch that depends on its input")

    def _only_raises(self, body: Sequence[ast.stmt]) -> bool:
        calls = [one.value for one in body if isinstance(one, ast.Expr)]
        plain = all(isinstance(one, ast.Expr | ast.Assign) for one in body)
        raises = [call for call in calls if isinstance(call, ast.Call) and self._plain(call.func) == _RAISE]
        return plain and len(raises) == len(calls) == 1

    def _loop(self, statement: ast.For, scope: dict[str, Any]) -> None:
        rounds = statement.iter
        if not isinstance(rounds, ast.Call) or self._plain(rounds.func) != "range" or len(rounds.args) != 1:
            raise self._unread(statement)
        count = self._value(rounds.args[0], scope)
        if type(count) is not int or not 0 <= count <= _ROUNDS:
            raise self._refused("a loop that depends on its input")
        for number in range(count):
            self._assign(statement.target, number, scope)
            self._run(statement.body, scope)

    # -------------------------------------------------------------------------------------------
    # Expressions

    def _value(self, expression: ast.expr, scope: Mapping[str, Any]) -> Any:
        self._step()
        if isinstance(expression, ast.Constant):
            if expression.value is None or isinstance(expression.value, bool | int | float | str):
                return expression.value
        elif isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
            value = self._value(expression.operand, scope)
            if type(value) in (int, float):
                return -value
        elif isinstance(expression, ast.List | ast.Tuple):
            return [self._value(one, scope) for one in expression.elts]
        elif isinstance(expression, ast.Name):
            if expression.id in scope:
                return scope[expression.id]
            if expression.id in ("inf", "nan"):
                return float(expression.id)
        elif isinstance(expression, ast.Attribute):
            return self._attribute(expression, scope)
        elif isinstance(expression, ast.Subscript):
            return self._item(self._value(expression.value, scope), self._value(expression.slice, scope))
        elif isinstance(expression, ast.Call):
            return self._call(expression, scope)
        raise self._unread(expression)

    def _attribute(self, expression: ast.Attribute, scope: Mapping[str, Any]) -> Any:
        path = self._plain(expression)
        first, _, rest = path.partition(".")
        if first == "CONSTANTS" and re.fullmatch(r"c\d{1,6}", rest):
            name = f"constants.{int(rest[1:])}"
            if name not in self._constants:
                raise self._refused("a constant that is no tensor")
            return self._tensor(name, len(self._constants[name].shape))
        if first == "__torch__":
            return _Function(path)
        return self._of_module(self._value(expression.value, scope), expression.attr)

    def _of_module(self, module: Any, name: str) -> Any:
        if not isinstance(module, _Module):
            raise self._refused(f"an attribute {short(name)} of what is no module")
        state = as_mapping(module.stub.state) or {}
        _, constants = self._class(module)
        if name in constants:
            if name in state:
                raise self._refused(f"two values of {short(name)}")
            return self._value(constants[name], {})
        if name not in state:
            raise self._refused(f"an attribute {short(name)} that is not there")
        value = state[name]
        full = module.prefix + name
        if isinstance(value, TensorRef):
            if full not in self._weights:
                raise self._refused(f"the tensor {short(full)}, which is neither parameter nor buffer")
            return self._tensor(full, len(value.shape))
        if isinstance(value, Stub):
            return _Module(value, f"{full}.")
        if name == "training" and value is not False:
            raise self._refused("modules in training mode")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self._refused(f"an attribute {short(name)} of this kind")

    def _tensor(self, old: str, rank: int) -> _Value:
        kind = "parameter" if old in self._weights else "tensor_constant"
        name = f"held:{old}"
        self._held[name] = kind, old
        return _Value(name, rank)

    def _item(self, value: Any, place: Any) -> Any:
        if isinstance(value, _Sizes) and type(place) is int:
            return self._size(value.of, place)
        if isinstance(value, list) and type(place) is int and -len(value) <= place < len(value):
            return value[place]
        if isinstance(value, _Value) and value.name in self._open_lists and type(place) is int and place >= 0:
            return self._parts(value, place + 1)[place]
        raise self._refused("such a choice of a part")

    def _call(self, call: ast.Call, scope: Mapping[str, Any]) -> Any:
        path = self._plain(call.func)
        first = path.partition(".")[0]
        if path in ("annotate", "unchecked_cast") and len(call.args) == 2:
            return self._value(call.args[1], scope)
        if path == "uninitialized":
            return _UNKNOWN
        if path == _RAISE:
            raise self._refused("an error that it always raises")
        if any(keyword.arg is None for keyword in call.keywords):
            raise self._unread(call)
        args = [self._value(one, scope) for one in call.args]
        named = {str(keyword.arg): self._value(keyword.value, scope) for keyword in call.keywords}
        if path == "getattr" and len(args) == 2 and isinstance(args[1], str) and not named:
            return self._of_module(args[0], args[1])
        if path in ("int", "float", "bool", "ops.prim.NumToTensor") and len(args) == 1:
            return self._cast(path, args[0])
        if first == "torch" and first not in scope:
            return self._torch(path.removeprefix("torch."), args, named)
        if isinstance(call.func, ast.Attribute) and first not in ("__torch__", "ops"):
            owner = self._value(call.func.value, scope)
            if isinstance(owner, _Module):
                return self._method(owner, call.func.attr, args, named)
        function = scope.get(path) if path in scope else _Function(path) if first == "__torch__" else None
        if not isinstance(function, _Function):
            raise self._unread(call)
        module, _, name = function.path.rpartition(".")
        found = self._text(module).functions.get(name)
        if found is None:
            raise self._refused(f"a function {short(name)} that is not there")
        return self._called(found, args, named)

    def _cast(self, path: str, value: Any) -> Any:
        if isinstance(value, _Size) and path in ("int", "ops.prim.NumToTensor"):
            return value
        if type(value) is int and path in ("int", "ops.prim.NumToTensor"):
            return value
        if type(value) in (int, float) and path == "float":
            return float(value)
        if type(value) is bool and path == "bool":
            return value
        raise self._refused(f"{short(path)} of a computed value")

    def _torch(self, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if name == "format":
            return _UNKNOWN
        if name == "device":
            return _UNKNOWN
        if name in ("__is__", "__isnot__") and len(args) == 2 and args[1] is None and first is not _UNKNOWN:
            return (first is None) == (name == "__is__")
        if name == "__not__" and isinstance(first, bool | _Unknown):
            return not first if isinstance(first, bool) else _UNKNOWN
        if name == "len" and isinstance(first, list):
            return len(first)
        if name in ("dim", "len") and isinstance(first, _Value | _Sizes):
            value = first.of if isinstance(first, _Sizes) else first
            if name == "dim" or isinstance(first, _Sizes):
                return _UNKNOWN if value.rank is None else value.rank
        if name == "size" and isinstance(first, _Value) and not named:
            if len(args) == 1:
                return _Sizes(first)
            if len(args) == 2 and type(args[1]) is int:
                return self._size(first, args[1])
        if name == "slice" and isinstance(first, list | _Sizes) and not named:
            return self._slice(first, args[1:])
        if name == "list" and len(args) == 1 and isinstance(first, list):
            return list(first)
        if name == "add" and len(args) == 2 and all(isinstance(one, list) for one in args):
            return [*args[0], *args[1]]
        if name in _NUMBERS and args and not named and (made := self._number(name, args)) is not None:
            return made
        return self._operator(name, args, named)

    def _slice(self, value: list[Any] | _Sizes, places: list[Any]) -> list[Any]:
        if not all(one is None or type(one) is int for one in places) or len(places) > 3 or 0 in places[2:]:
            raise self._refused("such a choice of a part")
        if isinstance(value, list):
            begin, end, step = [*places, None, None, None][:3]
            return value[begin:end:step]
        if value.of.rank is None:
            raise self._refused("sizes of which it is not known how many there are")
        return self._slice([self._size(value.of, axis) for axis in range(value.of.rank)], places)

    def _number(self, name: str, args: list[Any]) -> Any:
        """Return what is computed of numbers alone, or None where a tensor is among them."""
        if any(isinstance(value, _Size) for value in args):
            args = [self._constant_number(value) for value in args]
        if any(isinstance(value, _Unknown) for value in args):
            return _UNKNOWN
        equal = name in ("eq", "ne") and all(type(value) is str for value in args)
        if equal or all(type(value) in (int, float, bool) for value in args):
            try:
                made = _NUMBERS[name](*args)
            except (ArithmeticError, TypeError, ValueError) as error:
                raise self._refused(f"such numbers for {short(name)}") from error
            if abs(made) > 1 << 62:
                raise self._refused(f"such numbers for {short(name)}")
            return made
        if not all(type(value) is int or isinstance(value, _Size) for value in args):
            return None
        inputs = [{"name": "", "arg": {"as_sym_int": self._whole(value)}, "kind": 1} for value in args]
        return self._add_sizes(f"_operator.{_OF_SIZES.get(name, name)}", inputs)

    def _constant_number(self, value: Any) -> Any:
        # Traces write the numbers that sizes are divided by as tensors.
        ref = self._constants.get(value.name.removeprefix("held:")) if isinstance(value, _Value) else None
        if ref is None or ref.shape or ref.dtype != torch.int64:
            return value
        return int(materialise({"number": ref}, 1 << 20)["number"])

    def _size(self, value: _Value, axis: int) -> _Size:
        tensor = {"name": "self", "arg": {"as_tensor": {"name": value.name}}, "kind": 1}
        place = {"name": "dim", "arg": {"as_int": axis}, "kind": 1}
        return self._add_sizes("torch.ops.aten.sym_size.int", [tensor, place])

    def _add_sizes(self, target: str, inputs: list[dict[str, Any]]) -> _Size:
        name = self._fresh()
        self._add(target, inputs, [{"as_sym_int": {"as_name": name}}])
        return _Size(name)

    # -------------------------------------------------------------------------------------------
    # Operators

    def _operator(self, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        if not re.fullmatch(r"[A-Za-z_]\w{0,80}", name) or not hasattr(torch.ops.aten, name):
            raise self._refused(f"the function {short(name)}")
        if name == "_convolution" and len(args) >= 9 and args[6] is False and not any(args[7] or [1]):
            name, args = "conv2d", [*args[:6], args[8]]
        elif name == "_convolution_mode":
            name = "conv2d"
        elif name == "to":
            args, named = _without_device(args, named)
        packet = getattr(torch.ops.aten, name)
        for strict in (True, False):  # as the language does it: first without conversions
            for overload in packet.overloads():
                schema = getattr(packet, overload)._schema
                inputs = None if overload.startswith("prim_") else self._fitted(schema, args, named, strict)
                if inputs is not None:
                    return self._made(f"torch.ops.aten.{name}.{overload}", schema, inputs, args)
        raise self._refused(f"such arguments of {short(name)}")

    def _fitted(
        self, schema: Any, args: list[Any], named: dict[str, Any], strict: bool
    ) -> list[dict[str, Any]] | None:
        formal = list(schema.arguments)
        kinds = {str(one.type) for one in schema.returns}
        if not formal or not kinds or not kinds <= {"Tensor", "List[Tensor]"}:
            return None
        places = [one for one in formal if not one.kwarg_only]
        if len(args) > len(places) or not named.keys() <= {one.name for one in formal[len(args) :]}:
            return None
        given = {one.name: value for one, value in zip(places, args, strict=False)} | named
        out = []
        skipped = False
        for one in formal:
            if one.name not in given:
                if not one.has_default_value():
                    return None
                skipped = True
                continue
            if one.name in _WHERE_STORED:
                skipped = True
                continue
            arg = self._argument(one.name, str(one.type), given[one.name], strict)
            if arg is None:
                return None
            out.append({"name": one.name, "arg": arg, "kind": 2 if one.kwarg_only or skipped else 1})
        return out

    def _argument(self, name: str, kind: str, value: Any, strict: bool) -> dict[str, Any] | None:
        optional = re.fullmatch(r"Optional\[(.*)\]", kind)
        if optional:
            if value is None:
                return {"as_none": True}
            kind = optional[1]
        if isinstance(value, _Value) and kind == "Tensor" and value.name not in self._open_lists:
            return {"as_tensor": {"name": value.name}}
        if isinstance(value, _Value) and kind == "List[Tensor]" and value.name in self._open_lists:
            return None  # a list of which it is not known how long it is
        if name == "dtype" and kind == "int":
            return {"as_scalar_type": _DTYPES[value]} if type(value) is int and value in _DTYPES else None
        if type(value) is bool:
            return {"as_bool": value} if kind in ("bool",) or (kind == "number" and not strict) else None
        if isinstance(value, _Size) and kind in ("int", "number"):
            return {"as_sym_int": self._whole(value)}
        if type(value) is int and kind in ("int", "number"):
            return {"as_int": value}
        if type(value) is float and kind in ("float", "number"):
            return {"as_float": value}
        if type(value) is int and kind == "float" and not strict:
            return {"as_float": float(value)}
        if type(value) is str and kind == "str":
            return {"as_string": value}
        if kind == "List[int]" and isinstance(value, list):
            if all(type(one) is int or isinstance(one, _Size) for one in value):
                return (
                    {"as_sym_ints": [self._whole(one) for one in value]}
                    if _open(value)
                    else {"as_ints": value}
                )
            return None
        if kind == "List[int]" and type(value) is int and not strict:
            return {"as_ints": [value]}
        if kind == "List[float]" and isinstance(value, list) and all(type(one) is float for one in value):
            return {"as_floats": value}
        if (
            kind == "List[Tensor]"
            and isinstance(value, list)
            and all(isinstance(one, _Value) for one in value)
        ):
            return {"as_tensors": [{"name": one.name} for one in value]}
        if kind != "List[Optional[Tensor]]" or not isinstance(value, list):
            return None
        if all(one is None or isinstance(one, _Value) for one in value):
            parts = [self._argument(name, "Optional[Tensor]", one, strict) for one in value]
            return None if None in parts else {"as_optional_tensors": parts}
        return None

    def _made(self, target: str, schema: Any, inputs: list[dict[str, Any]], args: list[Any]) -> Any:
        kinds = [str(one.type) for one in schema.returns]
        if kinds == ["List[Tensor]"]:
            # How many there are is seen where they are taken apart; the entry is filled there.
            name = self._fresh()
            outputs: list[dict[str, Any]] = [{"as_tensors": []}]
            self._add(target, inputs, outputs)
            self._open_lists[name] = outputs[0]["as_tensors"]
            return _Value(name)
        values = [_Value(self._fresh(), self._rank(target, args)) for _ in kinds]
        self._ranks.update({one.name: one.rank for one in values})
        self._add(target, inputs, [{"as_tensor": {"name": one.name}} for one in values])
        return values[0] if len(values) == 1 else list(values)

    def _parts(self, value: _Value, count: int) -> list[_Value]:
        entries = self._open_lists[value.name]
        while len(entries) < count:
            entries.append({"name": self._fresh()})
            self._step()
        return [_Value(entry["name"]) for entry in entries]

    def _rank(self, target: str, args: list[Any]) -> int | None:
        name = target.split(".")[3]
        flat = args[0] if name == "cat" and args and isinstance(args[0], list) else args
        ranks = [one.rank for one in flat if isinstance(one, _Value)]
        if name in ("view", "reshape", "permute") and len(args) == 2 and isinstance(args[1], list):
            return len(args[1])
        if name == "flatten" and ranks and ranks[0] is not None and args[1:] in ([1], [1, -1]):
            return 2
        if name in ("add", "add_", "sub", "mul", "mul_", "div") and ranks and None not in ranks:
            return max(rank for rank in ranks if rank is not None)
        return ranks[0] if ranks and _KEEP_RANK.fullmatch(name) else None

    def _add(self, target: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        if len(self._nodes) >= _MAX_CALLS:
            raise self._refused("so many operators")
        self._nodes.append({"target": target, "inputs": inputs, "outputs": outputs, "name": ""})

    def _fresh(self) -> str:
        self._names += 1
        return f"value_{self._names}"

    def _whole(self, value: int | _Size) -> dict[str, Any]:
        return {"as_name": value.name} if isinstance(value, _Size) else {"as_int": value}

    # -------------------------------------------------------------------------------------------
    # Messages and limits

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise self._refused("so many steps")

    def _plain(self, expression: ast.expr) -> str:
        """Return the text of names joined by points; empty for all else."""
        parts: list[str] = []
        while isinstance(expression, ast.Attribute) and len(parts) < 64:
            parts.append(expression.attr)
            expression = expression.value
        return ".".join([expression.id, *reversed(parts)]) if isinstance(expression, ast.Name) else ""

    def _unread(self, node: ast.AST) -> UnsupportedModel:
        return self._refused(f"what is written in line {getattr(node, 'lineno', 0)} of a part of it")

    def _refused(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the TorchScript program of the model is not imported with {what}",
            where=self._where,
            remedy="Export it again with torch.export or as ONNX in evaluation mode, or give its state dict",
        )


_RAISE = "ops.prim.RaiseException"


def _open(values: Sequence[Any]) -> bool:
    return any(isinstance(one, _Size) for one in values)


def _without_device(args: list[Any], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [one for one in args if not isinstance(one, _Unknown)], named
