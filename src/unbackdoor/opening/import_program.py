"""From a program of ``torch.export`` or TorchScript to a network of ordinary layers; nothing is executed.

The program is a list of calls of torch's own operators, written as JSON; that of a TorchScript archive is
brought into the same form by ``weights.formats.torchscript.program``. Each is looked up in a table of
operators that compute and do nothing else; any other is refused by its name. Convolutions, linear layers and
normalisations become modules under the names of their weights, all else becomes calls of functions.

Departs: sizes that hold the batch of the example are opened, so that the network takes any number of images.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.weights.formats.attribute_paths import AttributePaths, attribute_path
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.formats.dataflow import Step, remarks
from unbackdoor.weights.formats.exported_program.archive import DTYPES, read_constants
from unbackdoor.weights.formats.tensors import materialise
from unbackdoor.weights.formats.torchscript import archive as torchscript
from unbackdoor.weights.formats.torchscript import program as torchscript_program
from unbackdoor.weights.formats.zip_archive import Archive
from unbackdoor.weights.stored_file import StoredFile

PROGRAMS = ("torch.export", "torchscript")  # formats whose programs are imported
MAX_NODES = 20_000
_MAX_PROGRAM = 64 << 20  # bytes of the JSON; that of a ViT-L has 3 MB
_LARGEST = 4096  # of a side of an image
_COLOURS = (1, 3, 4)
_ATEN = "torch.ops.aten."
_BROKEN = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)

_DROPOUT = ("dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout")
# Operators that compute and do nothing else, and what they are in the words of ``dataflow``.
_LAYERS = {"conv2d": "Conv", "convolution": "Conv", "linear": "MatMul", "addmm": "MatMul"}
_PRODUCTS = {"bmm": "MatMul", "baddbmm": "MatMul", "einsum": "MatMul", "matmul": "MatMul", "mm": "MatMul"}
_COMPARING = dict.fromkeys(
    (
        "argmax", "bitwise_and", "bitwise_not", "bitwise_or", "eq", "ge", "gt", "isinf", "isnan", "le",
        "logical_and", "logical_not", "logical_or", "lt", "ne", "sign",
    ),
    "Greater",
)  # fmt: skip
_CHOOSING = {"where": "Where", "masked_fill": "Where", "masked_fill_": "Where"}
_PLAIN = dict.fromkeys(
    (
        "_log_softmax", "_native_batch_norm_legit_no_training", "_softmax", "_to_copy", "_unsafe_view",
        "abs", "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "add_", "alias", "amax", "amin",
        "arange", "avg_pool2d", "batch_norm", "cat", "ceil", "celu", "channel_shuffle", "chunk",
        "clamp", "clamp_", "clamp_max", "clamp_min", "clone", "constant_pad_nd", "contiguous", "copy_",
        "cos", "cumsum", "detach", "detach_", "div", "div_", "elu", "elu_", "erf", "exp", "expand",
        "expand_as", "fill_", "flatten", "flip", "floor", "full", "full_like", "gather", "gelu",
        "group_norm", "hardsigmoid", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "index",
        "index_put", "index_put_", "index_select", "instance_norm", "layer_norm", "leaky_relu",
        "leaky_relu_", "lift_fresh_copy", "log", "log_softmax", "max_pool2d", "maximum", "mean",
        "minimum", "mish", "mish_", "movedim", "mul", "mul_", "narrow", "native_group_norm",
        "native_layer_norm", "neg", "new_full", "new_ones", "new_zeros", "norm", "ones", "ones_like",
        "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "pow", "prelu", "reciprocal",
        "reflection_pad2d", "relu", "relu6", "relu_", "remainder", "repeat", "replication_pad2d",
        "reshape", "roll", "round", "rsqrt", "rsub", "scalar_tensor", "scaled_dot_product_attention",
        "select", "selu", "sigmoid", "sigmoid_", "silu", "silu_", "sin", "slice", "softmax", "softplus",
        "softsign", "split", "split_with_sizes", "sqrt", "sqrt_", "squeeze", "stack", "sub", "sub_",
        "sum", "t", "tanh", "tanh_", "threshold", "to", "transpose", "type_as", "unbind", "unflatten",
        "unsqueeze", "upsample_bilinear2d", "upsample_nearest2d", "var", "view", "zeros", "zeros_like",
        *_DROPOUT,
    ),
    "",
)  # fmt: skip
_ALLOWED: Mapping[str, str] = {**_PLAIN, **_LAYERS, **_PRODUCTS, **_COMPARING, **_CHOOSING}
_ASSERTIONS = ("_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size")
_SIZED = ("view", "reshape", "_unsafe_view", "expand")
_MADE = ("arange", "full", "ones", "scalar_tensor", "zeros")
_VIEWS = (
    "alias", "chunk", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip
_OF_SIZES: Mapping[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_")
}


def import_program(file: StoredFile, tensors: Mapping[str, Tensor], prefix: str = "") -> fx.GraphModule:
    """Build the network of a program.

    Args:
        file: What was read of the file.
        tensors: Its state dict.
        prefix: What was taken off the names of the state dict.

    Returns:
        A module from (B, C, H, W) to logits (B, K), in evaluation mode. Its ``meta`` has ``input_shape``,
        ``channels``, ``notes`` and ``remarks`` as that of an ONNX graph, and ``names``: the name in the state
        dict of each of its tensors.

    Raises:
        InputError: If the program is damaged.
        UnsafeFile: If it is built to exhaust the memory.
        UnsupportedModel: If it has operators that are not imported; names them.
    """
    try:
        archive = Archive(file.content, file.path)
        if torchscript.is_torchscript(archive):
            names = {prefix + name for name in tensors}
            read = torchscript_program.read(archive, file.content, names, file.path)
            program, held = read.graph_module, read.constants
        else:
            program, held = _program(archive, file), read_constants(archive, file.content, file.path)
        constants = materialise(held, file.size)
        return _Builder(file, program, tensors, constants, prefix).build()
    except UnbackdoorError:
        raise
    except (*_BROKEN, RecursionError) as error:
        raise InputError(
            "the program of the model is damaged", got=short(str(error).split("\n")[0]), where=file.path
        ) from error


def _program(archive: Archive, file: StoredFile) -> dict[str, Any]:
    names = [name for name in archive.entries if "/models/" in name and name.endswith(".json")]
    if len(names) != 1:
        raise UnsupportedModel(
            "the archive holds no single program", expected="one", got=len(names), where=file.path
        )
    program = json.loads(archive.content(archive.entries[names[0]], _MAX_PROGRAM))["graph_module"]
    if not isinstance(program, dict):
        raise ValueError("a program that is none")
    return program


@dataclass(frozen=True)
class _Call:
    target: str  # such as conv2d
    overload: str
    node: Mapping[str, Any]


class _Builder:
    def __init__(
        self,
        file: StoredFile,
        program: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        prefix: str,
    ) -> None:
        self._constants = constants
        self._path = file.path
        self._graph = program["graph"]
        self._signature = program["signature"]
        self._tensors = tensors
        self._prefix = prefix
        self._fx = fx.Graph()
        self._root: dict[str, Any] = {}
        self._paths = AttributePaths()
        self._values: dict[str, Any] = {}
        self._weights: dict[str, str] = {}  # name in the program -> name in the state dict
        self._names: dict[str, str] = {}  # name in the network -> name in the state dict
        self._made: dict[str, fx.Node] = {}
        self._uses: Counter[str] = Counter()
        self._steps: list[Step] = []
        self._batch = 0
        self._in_place = False
        self._constant_names: set[str] = set()
        self._of_pixels: set[str] = set()  # values that depend on the pixels

    def build(self) -> fx.GraphModule:
        pixels, result = self._ends()
        shape = self._input(pixels)
        calls = self._calls()
        for call in calls:
            self._uses.update(_tensor_names(call.node["inputs"]))
        for number, call in enumerate(calls):
            self._add(call, number)
        out = self._values.get(result)
        if not isinstance(out, fx.Node):
            raise UnsupportedModel("the output of the model does not depend on its input", where=self._path)
        self._fx.output(out)
        module = fx.GraphModule(self._root, self._fx, "ImportedNetwork")
        if not self._in_place:
            module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        state = module.state_dict().keys()
        module.meta.update(
            input_shape=shape,
            channels=shape[0] if shape is not None else None,
            notes=(),
            names={name: old for name, old in self._names.items() if name in state},
            remarks=remarks(self._steps, [pixels], [result]),
        )
        return module.eval()

    def _ends(self) -> tuple[str, str]:
        pixels = []
        for spec in self._signature["input_specs"]:
            (kind, fact), *more = spec.items()
            if more or kind not in ("parameter", "buffer", "tensor_constant", "user_input"):
                raise self._refused(f"an input of the kind {short(kind)}")
            if kind == "user_input":
                pixels.append(fact["arg"]["as_tensor"]["name"])
                continue
            name = fact[f"{kind}_name"]
            constant = kind == "tensor_constant" or fact.get("persistent") is False
            old = name if constant else name.removeprefix(self._prefix)
            if old not in (self._constants if constant else self._tensors):
                raise self._refused(f"a tensor that is not among its weights, {short(name)}")
            self._weights[fact["arg"]["name"]] = old
            if constant:
                self._constant_names.add(old)
        results = []
        for spec in self._signature["output_specs"]:
            ((kind, fact),) = spec.items()
            if kind != "user_output":
                raise self._refused(f"an output of the kind {short(kind)}")
            results.append(fact["arg"]["as_tensor"]["name"])
        if len(pixels) != 1 or len(results) != 1:
            raise UnsupportedModel(
                "the model is no classifier of single images",
                expected="one input and one output",
                got=f"{len(pixels)} and {len(results)}",
                where=self._path,
            )
        return pixels[0], results[0]

    def _input(self, pixels: str) -> tuple[int, int, int] | None:
        sizes = [size.get("as_int", 0) for size in self._graph["tensor_values"][pixels]["sizes"]]
        self._of_pixels.add(pixels)
        self._values[pixels] = self._pixels = self._fx.placeholder("pixels")
        if len(sizes) != 4 or not all(type(size) is int and 0 <= size <= _LARGEST for size in sizes):
            raise self._refused("an input that is no image")
        self._batch = sizes[0]
        whole = all(sizes[1:]) and sizes[1] in _COLOURS
        return (sizes[1], sizes[2], sizes[3]) if whole else None

    def _calls(self) -> list[_Call]:
        nodes = self._graph["nodes"]
        if len(nodes) > MAX_NODES:
            raise UnsupportedModel(
                "the model has too many operators",
                expected=f"at most {MAX_NODES}",
                got=len(nodes),
                where=self._path,
            )
        out: list[_Call] = []
        unknown: dict[str, None] = {}
        for node in nodes:
            target, _, overload = str(node["target"]).removeprefix(_ATEN).partition(".")
            aten = str(node["target"]).startswith(_ATEN)
            if aten and target in _ASSERTIONS:
                continue
            known = aten and (target in _ALLOWED or target == "sym_size")
            if known:  # what the file names must be one of the operator's forms, and no other attribute of it
                known = overload in getattr(torch.ops.aten, target).overloads()
            if not known and node["target"] not in _OF_SIZES:
                unknown[str(node["target"])[:80]] = None
            out.append(_Call(target if aten else node["target"], overload if aten else "", node))
        if unknown:
            raise self._refused(f"the operators {listed(sorted(unknown))}")
        return out

    def _refused(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the program of the model is not imported with {what}",
            where=self._path,
            remedy="Export it again in evaluation mode, or give its state dict",
        )

    # -------------------------------------------------------------------------------------------
    # Values

    def _value(self, arg: Mapping[str, Any]) -> Any:
        (kind, value), *more = arg.items()
        if more:
            raise ValueError("an operand of two kinds")
        if kind == "as_tensor":
            return self._tensor(value["name"])
        if kind in ("as_tensors", "as_optional_tensors"):
            return [self._optional(one) for one in value]
        if kind in ("as_int", "as_float", "as_bool"):
            if not isinstance(value, bool | int | float):
                raise ValueError("a number that is none")
            return value
        if kind in ("as_ints", "as_floats", "as_bools"):
            return [self._value({"as_float": one}) for one in value]
        if kind == "as_none":
            return None
        if kind == "as_string":
            return str(value)[:100]
        if kind == "as_scalar_type":
            return DTYPES[value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._sym(value)
        if kind == "as_sym_ints":
            return [self._sym(one) for one in value]
        if kind in ("as_device", "as_layout", "as_memory_format"):
            return _UNSET
        raise self._refused(f"an operand of the kind {short(kind)}")

    def _optional(self, one: Mapping[str, Any]) -> Any:
        if "as_none" in one:
            return None
        return self._tensor(one["as_tensor"]["name"] if "as_tensor" in one else one["name"])

    def _sym(self, value: Mapping[str, Any]) -> Any:
        if "as_name" in value:
            return self._values[value["as_name"]]
        (number,) = value.values()
        if not isinstance(number, bool | int | float):
            raise ValueError("a number that is none")
        return number

    def _tensor(self, name: str) -> fx.Node:
        if name in self._values:
            found = self._values[name]
            assert isinstance(found, fx.Node)
            return found
        old = self._weights[name]
        constant = old in self._constant_names
        tensor = (self._constants if constant else self._tensors)[old]
        target = self._paths.take(old, "weight")
        floating = tensor.is_floating_point() and tensor.dim() and not constant
        self._root[target] = nn.Parameter(tensor.clone()) if floating else tensor.clone()
        if not constant:
            self._names[target] = old
        self._values[name] = self._fx.get_attr(target)
        return self._fx_node(name)

    def _fx_node(self, name: str) -> fx.Node:
        found = self._values[name]
        assert isinstance(found, fx.Node)
        return found

    # -------------------------------------------------------------------------------------------
    # Operators

    def _add(self, call: _Call, number: int) -> None:
        node = call.node
        operands = [name for name in _tensor_names(node["inputs"]) if name not in self._weights]
        weighted = len(operands) < len(list(_tensor_names(node["inputs"])))
        outputs = list(_outputs(node["outputs"]))
        self._step(call, outputs)
        if not _of_sizes(call.target) and self._of_pixels.intersection(operands):
            self._of_pixels.update(outputs)
        made = self._layer(call) if weighted and len(operands) == 1 else None
        if made is None:
            made = self._function(call)
        if len(outputs) == 1 and not _is_list(node["outputs"]):
            self._define(outputs[0], made)
            return
        for place, name in enumerate(outputs):
            if name:
                self._define(name, self._fx.call_function(operator.getitem, (made, place)))

    def _define(self, name: str, value: Any) -> None:
        if name in self._values or name in self._weights:
            raise UnsafeFile("two values of the program have one name", got=short(name), where=self._path)
        self._values[name] = value

    def _function(self, call: _Call) -> fx.Node:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for one in call.node["inputs"]:
            value = self._value(one["arg"])
            if value is _UNSET:
                continue
            if one.get("kind", 1) == 2 or named or len(positional) < len(named):
                named[str(one["name"])] = value
            else:
                positional.append(value)
        if call.target in _OF_SIZES:
            return self._fx.call_function(_OF_SIZES[call.target], tuple(positional))
        if call.target == "sym_size":
            return self._fx.call_function(_size, tuple(positional))
        function = getattr(getattr(torch.ops.aten, call.target), call.overload)
        if function._schema.is_mutable:
            if not call.target.endswith("_"):
                raise self._refused(f"the operators {call.target}.{call.overload}")
            self._in_place = True
            self._require_own(positional[0])
        if call.target in _DROPOUT:
            if any(value is True for value in (*positional[2:], named.get("train"))):
                raise self._refused("dropout that is left on")
            kept: fx.Node = positional[0]
            return kept
        if (
            call.target in ("batch_norm", "instance_norm")
            and True in positional[5:6]
            and call.target[0] == "b"
        ):
            raise self._refused("batch normalisation in training mode")
        if call.target in _SIZED and self._batch:
            positional, named = self._open_batch(call, positional, named)
        if call.target in _MADE:
            return self._fx.call_function(_on, (self._pixels, function, *positional), named)
        return self._fx.call_function(function, tuple(positional), named)

    def _require_own(self, value: Any) -> None:
        """Refuse to change weights or the images of the caller in place."""
        while isinstance(value, fx.Node) and value.op == "call_function":
            name = getattr(value.target, "__name__", "").partition(".")[0]
            if not (name in _VIEWS or name == "getitem" or name in ("contiguous", "to")):
                return
            value = value.args[0]
        if isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr"):
            raise self._refused("a change of its input or its weights in place")

    def _open_batch(
        self, call: _Call, positional: list[Any], named: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        sizes: Any = positional[1] if len(positional) > 1 else None
        first = sizes[0] if isinstance(sizes, list) and sizes else None
        if type(first) is not int or first <= 0 or first % self._batch:
            return positional, named
        # What does not depend on the pixels has a batch only where it is repeated for it.
        repeats = call.target == "expand" and first == self._batch
        if not repeats and not self._of_pixels.intersection(_tensor_names(call.node["inputs"])):
            return positional, named
        # Exported with the batch of its example written into it.
        rows = self._fx.call_function(_rows, (self._pixels, first // self._batch))
        return [positional[0], [rows, *sizes[1:]], *positional[2:]], named

    def _layer(self, call: _Call) -> fx.Node | None:
        """Return the call of a module, where the weights are those of one and of nothing else."""
        make = _MODULES.get(call.target)
        if make is None or call.overload != "default":
            return None
        arguments = {one["name"]: one["arg"] for one in call.node["inputs"]}
        held: dict[str, str] = {}  # leaf of the module -> name in the state dict
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if "as_tensor" in arguments.get(leaf, {}):
                name = arguments[leaf]["as_tensor"]["name"]
                alone = name in self._weights and self._uses[name] == 1
                if not alone or self._weights[name] in self._constant_names:
                    return None
                held[leaf] = self._weights[name]
        owners = {old.rpartition(".")[0] for old in held.values()}
        leaves = all(old.rpartition(".")[2] == leaf for leaf, old in held.items())
        numbered = owners == {"constants"}  # a frozen program has lost the names of its modules
        if "weight" not in held or not (numbered or (leaves and len(owners) == 1)):
            return None
        owner = "" if numbered else owners.pop()
        path = attribute_path(owner)
        if not numbered and (not path or self._paths.clashes(path)):
            return None
        rank = len(self._graph["tensor_values"][arguments["input"]["as_tensor"]["name"]]["sizes"])
        if call.target == "batch_norm" and rank != 4:
            return None
        given = [name for name in arguments if name not in held and name != "input"]
        others = {name: self._value(arguments[name]) for name in given}
        tensors = {leaf: self._tensors[old] for leaf, old in held.items()}
        layer = make(tensors, others)
        if layer is None:
            return None
        if isinstance(layer, nn.BatchNorm2d):
            counter = f"{owner}.num_batches_tracked"
            tensors["num_batches_tracked"] = self._tensors.get(counter, torch.zeros((), dtype=torch.int64))
        for leaf, tensor in tensors.items():
            if leaf in layer._buffers:
                layer._buffers[leaf] = tensor.clone()
            else:
                setattr(layer, leaf, nn.Parameter(tensor.clone()))
        target = self._paths.take(owner, "layer")
        self._root[target] = layer.eval()
        self._names.update(
            {
                f"{target}.{leaf}": held.get(leaf, f"{owner}.{leaf}")
                for leaf in tensors
                if leaf in held or owner
            }
        )
        return self._fx.call_module(target, (self._value(arguments["input"]),))

    def _step(self, call: _Call, outputs: list[str]) -> None:
        names = tuple(_tensor_names(call.node["inputs"]))
        kind = "Shape" if _of_sizes(call.target) else _ALLOWED[call.target] or call.target
        if call.target.startswith("masked_fill"):
            names = (names[1], names[0], *names[2:])
        cast = call.target in ("to", "_to_copy") and any(
            one["arg"].get("as_scalar_type") in _WHOLE for one in call.node["inputs"]
        )
        label = f"{call.target} {short(str(call.node.get('name', '')))}"
        self._steps.append(Step(label, "Cast to a whole number" if cast else kind, names, tuple(outputs)))


class _Unset:
    """Stands for an operand that says where and how a tensor is stored."""


_UNSET = _Unset()
_WHOLE = {1, 2, 3, 4, 5, 12}


def _size(x: Tensor, axis: int) -> int:
    return int(x.shape[axis])


def _of_sizes(target: str) -> bool:
    """Tell whether an operator uses the form of its operands and none of their numbers."""
    return target in ("sym_size", *_OF_SIZES) or target.startswith("new_") or target.endswith("_like")


def _on(pixels: Tensor, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return function(*args, **options, device=pixels.device)


def _rows(pixels: Tensor, of_each: int) -> int:
    return len(pixels) * of_each


def _tensor_names(inputs: list[Mapping[str, Any]]) -> list[str]:
    out = []
    for one in inputs:
        for kind, value in one["arg"].items():
            if kind == "as_tensor":
                out.append(value["name"])
            elif kind == "as_tensors":
                out += [entry["name"] for entry in value]
            elif kind == "as_optional_tensors":
                out += [entry["as_tensor"]["name"] for entry in value if "as_tensor" in entry]
    return out


def _is_list(outputs: list[Mapping[str, Any]]) -> bool:
    return len(outputs) != 1 or "as_tensors" in outputs[0]


def _outputs(outputs: list[Mapping[str, Any]]) -> list[str]:
    out = []
    for one in outputs:
        ((kind, value),) = one.items()
        if kind == "as_tensor":
            out.append(value["name"])
        elif kind == "as_tensors":
            out += [entry["name"] for entry in value]
        elif kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            out.append(value["as_name"])
        elif kind == "as_none":
            out.append("")
        else:
            raise ValueError("an output of another kind")
    return out


def _conv(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> nn.Module | None:
    weight, groups = tensors["weight"], others.get("groups", 1)
    if weight.dim() != 4 or isinstance(others.get("padding"), str) or not 1 <= groups <= len(weight):
        return None
    stride, padding, dilation = (
        _pair(others.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    return nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        (weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias="bias" in tensors,
        device="meta",
    )


def _pair(value: Any) -> tuple[int, int]:
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2) or any(type(v) is not int or not 0 <= v <= _LARGEST for v in values):
        raise ValueError("a window that is none")
    return values[0], values[-1]


def _linear(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> nn.Module | None:
    weight = tensors["weight"]
    if weight.dim() != 2:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")


def _batch_norm(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> nn.Module | None:
    if len(tensors) != 4 or others.get("training") or tensors["weight"].dim() != 1:
        return None
    momentum, eps = float(others.get("momentum", 0.1)), float(others.get("eps", 1e-5))
    return nn.BatchNorm2d(len(tensors["weight"]), eps=eps, momentum=momentum, device="meta")


def _layer_norm(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> nn.Module | None:
    shape = others.get("normalized_shape")
    if list(tensors["weight"].shape) != shape:
        return None
    return nn.LayerNorm(shape, eps=float(others.get("eps", 1e-5)), bias="bias" in tensors, device="meta")


_MODULES: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module | None]] = {
    "conv2d": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
}
