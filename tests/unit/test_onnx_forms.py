"""ONNX in the forms in which it is found: functions, any order, half precision, several outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

import onnx
from onnx import TensorProto, helper, numpy_helper

import unbackdoor
from graphs import answers, folded, node, write_onnx
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import app
from unbackdoor.errors import ConfigError, InputError, UnsafeFile, UnsupportedModel
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.onnx.graph import describe_graph, import_graph
from unbackdoor.weights.formats.onnx.write import write_graph

GENERATOR = torch.Generator().manual_seed(5)
PIXELS = torch.rand(3, 1, 8, 8, generator=GENERATOR)  # (B, C, H, W)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR) - 0.5


def network_file(path: Path) -> Path:
    return write_onnx(path, *folded(tiny_classifier("conv-bn")))


def changed(path: Path, change: Callable[[Any], None], name: str = "changed.onnx") -> Path:
    """Write a file with its message changed."""
    model = onnx.load(path)
    change(model)
    out = path.with_name(name)
    out.write_bytes(model.SerializeToString())
    return out


def same_as_runtime(path: Path, pixels: Tensor = PIXELS, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(pixels), answers(path, pixels), atol=tolerance)


# ---------------------------------------------------------------------------------------------------
# Functions of the model


def function(
    name: str, inputs: Sequence[str], outputs: Sequence[str], nodes: Sequence[Any], domain: str = "own",
    attributes: Sequence[str] = (),
) -> Any:  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function(domain, name, inputs, outputs, nodes, opsets, attributes)


def with_functions(path: Path, functions: Sequence[Any]) -> Path:
    def change(model: Any) -> None:
        model.functions.extend(functions)
        model.opset_import.append(helper.make_opsetid("own", 1))

    return changed(path, change)


def test_functions_are_what_they_say(tmp_path: Path) -> None:
    slope = node("LeakyRelu", "a", "b")
    slope.attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    )
    inner = function("Inner", ["a"], ["b"], [slope], attributes=["slope"])
    outer = function(
        "Outer", ["x", "w"], ["y"],
        [node("Inner", "x", "t", domain="own", slope=0.25), node("Mul", "t w", "u"),
         node("Inner", "u", "y", domain="own", slope=0.5)],
    )  # fmt: skip
    nodes = [node("Outer", "x scale", "h", domain="own"), node("Flatten", "h", "f"), node("MatMul", "f v")]
    weights = {"scale": drawn(1, 8, 8) * 4, "v": drawn(64, 4)}
    path = with_functions(write_onnx(tmp_path / "m.onnx", nodes, weights), [inner, outer])
    held = torch.nn.functional.leaky_relu(PIXELS, 0.25) * weights["scale"]
    expected = torch.nn.functional.leaky_relu(held, 0.5).flatten(1) @ weights["v"]
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(PIXELS), expected, atol=1e-6)
    assert any("unfolded" in note for note in import_graph(path).meta["notes"])


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"])
def test_a_function_in_the_place_of_an_operator_is_two_things(tmp_path: Path, domain: str) -> None:
    # The standard prefers the function, and onnxruntime its own operator.
    path = network_file(tmp_path / "m.onnx")
    hidden = function(
        "Relu", ["X"], ["Y"], [node("Sigmoid", "X", "s"), node("Mul", "X s", "Y")], domain=domain
    )
    path = with_functions(path, [hidden])
    with pytest.raises(UnsafeFile, match="readers choose differently"):
        import_graph(path)
    assert inspect(path).loading == "deceptive"
    assert inspect(path).executes


def test_a_repair_of_a_graph_with_functions(tmp_path: Path) -> None:
    layer = function("Layer", ["x", "w"], ["y"], [node("MatMul", "x w", "y")])
    nodes = [node("Flatten", "x", "f"), node("Layer", "f v", "y", domain="own")]
    source = with_functions(write_onnx(tmp_path / "m.onnx", nodes, {"v": drawn(64, 4)}), [layer])
    network = import_graph(source)
    before = network.state_dict()
    after = {name: tensor + 0.125 for name, tensor in before.items()}
    write_graph(tmp_path / "out.onnx", source, network.meta["places"], before, after)
    same_as_runtime(tmp_path / "out.onnx")
    assert torch.equal(next(iter(import_graph(tmp_path / "out.onnx").state_dict().values())),
                       next(iter(after.values())))  # fmt: skip


def test_towers_of_functions_end(tmp_path: Path) -> None:
    for wide in (True, False):
        tower = [function("F0", ["x"], ["y"], [node("Relu", "x", "y")] if wide else [])]
        for k in range(1, 19):
            calls = [node(f"F{k - 1}", "x", "t", domain="own"), node(f"F{k - 1}", "t", "y", domain="own")]
            tower.append(function(f"F{k}", ["x"], ["y"], calls))
        nodes = [node("F18", "x", "h", domain="own"), node("Flatten", "h")]
        path = with_functions(write_onnx(tmp_path / "m.onnx", nodes), tower)
        with pytest.raises(UnsafeFile, match="too many operators"):
            import_graph(path)
        assert inspect(path).loading == "deceptive"
    itself = function("F", ["x"], ["y"], [node("F", "x", "y", domain="own")])
    nodes = [node("F", "x", "h", domain="own"), node("Flatten", "h")]
    path = with_functions(write_onnx(tmp_path / "m.onnx", nodes), [itself])
    with pytest.raises(UnsafeFile, match="too deeply"):
        import_graph(path)
    path = with_functions(write_onnx(tmp_path / "m.onnx", nodes), [itself, itself])
    with pytest.raises(UnsafeFile, match="one name"):
        import_graph(path)


def test_left_out_operands_and_outputs_of_functions(tmp_path: Path) -> None:
    clip = function("Limit", ["x", "low", "high"], ["y", "unused"],
                    [node("Clip", "x low high", "y"), node("Relu", "x", "unused")])  # fmt: skip
    nodes = [helper.make_node("Limit", ["x", "", "top"], ["h"], domain="own"), node("Flatten", "h")]
    path = with_functions(write_onnx(tmp_path / "m.onnx", nodes, {"top": torch.tensor(0.5)}), [clip])
    with torch.no_grad():
        assert torch.equal(import_graph(path)(PIXELS), PIXELS.clamp(max=0.5).flatten(1))


# ---------------------------------------------------------------------------------------------------
# What is not as it seems


@pytest.mark.parametrize("opset", [12, 20])
def test_dropout_in_training_mode_is_not_what_is_scanned(tmp_path: Path, opset: int) -> None:
    nodes, weights = folded(tiny_classifier("conv-bn"))
    nodes[-1].input[0] = "d"
    nodes.insert(-1, node("Dropout", "f ratio mode", "d"))
    for ratio, mode, refused in ((0.5, True, True), (0.0, True, False), (0.5, False, False)):
        constants = {"ratio": torch.tensor(ratio), "mode": torch.tensor(mode)}
        path = write_onnx(tmp_path / "m.onnx", nodes, {**weights, **constants})
        path = changed(path, lambda model: setattr(model.opset_import[0], "version", opset))
        if refused:
            with pytest.raises(UnsupportedModel, match="training mode"):
                import_graph(path)
        else:
            same_as_runtime(path)


def test_an_old_set_of_operators_is_refused(tmp_path: Path) -> None:
    path = network_file(tmp_path / "m.onnx")
    old = changed(path, lambda model: setattr(model.opset_import[0], "version", 6))
    with pytest.raises(UnsupportedModel, match="old version"):
        import_graph(old)


def test_operators_in_any_order(tmp_path: Path) -> None:
    path = network_file(tmp_path / "m.onnx")

    def turned(model: Any) -> None:
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    other = changed(path, turned)
    with torch.no_grad():
        assert torch.equal(import_graph(other)(PIXELS), import_graph(path)(PIXELS))
    network = import_graph(other)
    before = network.state_dict()
    after = {name: tensor * 1.5 for name, tensor in before.items()}
    write_graph(tmp_path / "out.onnx", other, network.meta["places"], before, after)
    same_as_runtime(tmp_path / "out.onnx", tolerance=1e-4)


# ---------------------------------------------------------------------------------------------------
# Half precision


def in_half(dtype: torch.dtype, *, casts: bool) -> Callable[[Any], None]:
    number = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if not values.is_floating_point():
                continue
            name, dims = tensor.name, list(tensor.dims)
            tensor.Clear()
            tensor.name, tensor.data_type = name, number
            tensor.dims.extend(dims)
            tensor.raw_data = values.to(dtype).view(torch.int16).numpy().tobytes()
        if casts:  # as converters do that keep the types of inputs and outputs; last, so out of order
            for n in model.graph.node:
                n.input[:] = ["x16" if name == "x" else name for name in n.input]
                n.output[:] = ["y16" if name == "y" else name for name in n.output]
            model.graph.node.append(node("Cast", "y16", "y", to=TensorProto.FLOAT))
            model.graph.node.append(node("Cast", "x", "x16", to=number))
        else:
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.elem_type = number

    return change


@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype, casts: bool) -> None:
    path = network_file(tmp_path / "m.onnx")
    half = changed(path, in_half(dtype, casts=casts))
    opened = unbackdoor.open_model(half)
    assert opened.provenance.in_file.examined
    state = opened.model.network.state_dict()
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    with torch.no_grad():
        assert torch.allclose(opened.model.network(PIXELS), answers(path, PIXELS), rtol=0.05, atol=0.05)
    # A repair goes back in the type of the file, and what is judged is what is written.
    done = unbackdoor.purify(half, tiny_data(60), "random_prune", mean=(0.35,), std=(0.25,))
    out = done.save(tmp_path / "out.onnx")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(half).graph.initializer}
    assert {tensor.name: tensor.data_type for tensor in onnx.load(out).graph.initializer} == stored
    again = unbackdoor.open_model(out, mean=(0.35,), std=(0.25,)).model
    assert again.sha256() == done.model.sha256()


# ---------------------------------------------------------------------------------------------------
# Ends and outputs


def with_end(path: Path, end: Sequence[Any], outputs: Sequence[str], **constants: Tensor) -> Path:
    nodes, weights = folded(tiny_classifier("conv-bn"))
    nodes[-1].output[0] = "logits"
    write_onnx(path, [*nodes, *end], {**weights, **constants})

    def change(model: Any) -> None:
        del model.graph.output[:]
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs
        )

    return changed(path, change)


ENDS: dict[str, tuple[list[Any], list[str]]] = {
    "softmax": ([node("Softmax", "logits", "y")], ["y"]),
    "logsoftmax": ([node("LogSoftmax", "logits", "y", axis=1)], ["y"]),
    "a cast behind it": ([node("Softmax", "logits", "s"), node("Cast", "s", "y", to=1)], ["y"]),
    "argmax": ([node("ArgMax", "logits", "y", axis=1, keepdims=0)], ["y"]),
    "argmax of a softmax": ([node("Softmax", "logits", "s"), node("ArgMax", "s", "y", axis=-1)], ["y"]),
    "topk": ([helper.make_node("TopK", ["logits", "k"], ["values", "y"])], ["values", "y"]),
    "all of them": (
        [
            node("LogSoftmax", "logits", "l"),
            node("Softmax", "logits", "soft"),
            node("ArgMax", "soft", "most", axis=1),
        ],
        ["logits", "l", "soft", "most"],
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends_are_cut(tmp_path: Path, case: str) -> None:
    end, outputs = ENDS[case]
    path = with_end(tmp_path / "m.onnx", end, outputs, k=torch.tensor([2]))
    plain = import_graph(network_file(tmp_path / "plain.onnx"))
    network = import_graph(path)
    with torch.no_grad():
        assert torch.equal(network(PIXELS), plain(PIXELS))
    assert describe_graph(path).unknown == ()
    assert unbackdoor.open_model(path).model.classes == 4
    assert any("left out" in note for note in network.meta["notes"])


def test_a_choice_of_the_largest_elsewhere_is_no_end(tmp_path: Path) -> None:
    end = [node("ArgMax", "logits", "a", axis=0, keepdims=0), node("Identity", "a", "y")]
    assert describe_graph(with_end(tmp_path / "m.onnx", end, ["y"])).unknown == ("ArgMax",)


def test_several_outputs(tmp_path: Path) -> None:
    path = with_end(tmp_path / "m.onnx", [node("Relu", "f", "features")], ["features", "logits"])
    with pytest.raises(UnsupportedModel, match="--output NAME") as caught:
        unbackdoor.open_model(path)
    assert "features, logits" in str(caught.value)
    opened = unbackdoor.open_model(path, output="logits")
    assert opened.model.classes == 4 and opened.provenance.in_file.output == "logits"
    assert unbackdoor.open_model(path, output="features").model.classes == 16
    with pytest.raises(InputError, match="no such output"):
        unbackdoor.open_model(path, output="nothing")
    assert inspect(path).graph.outputs == ("features", "logits")  # type: ignore[union-attr]
    options: dict[str, Any] = {"output": "logits", "mean": (0.35,), "std": (0.25,)}
    done = unbackdoor.purify(path, tiny_data(60), "random_prune", **options)
    again = unbackdoor.open_model(done.save(tmp_path / "out.onnx"), **options)
    assert again.model.sha256() == done.model.sha256()
    assert [value.name for value in onnx.load(tmp_path / "out.onnx").graph.output] == ["features", "logits"]
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ConfigError, match="outputs with names"):
        unbackdoor.open_model(tmp_path / "m.pth", output="logits", arch="small_cnn[width=8]")
    typed = ["scan", str(path), "--output", "logits", "--checks", "weight_statistics", "--json", "--quiet"]
    told = json.loads(CliRunner().invoke(app, typed).stdout)
    assert told["opened"]["in_file"]["output"] == "logits"


def test_what_no_output_needs_is_not_asked_for(tmp_path: Path) -> None:
    path = with_end(
        tmp_path / "m.onnx", [node("LSTM", "logits", "z"), node("Identity", "logits", "y")], ["y"]
    )
    same = import_graph(network_file(tmp_path / "plain.onnx"))
    with torch.no_grad():
        assert torch.equal(import_graph(path)(PIXELS), same(PIXELS))


# ---------------------------------------------------------------------------------------------------
# Quantised


def quantised(
    nodes: list[Any], weights: dict[str, Tensor], *, along: bool
) -> tuple[list[Any], dict[str, Any]]:
    """Put pairs of QuantizeLinear and DequantizeLinear around every layer, as quantisers do."""
    out, constants = [], dict(weights)
    for n in nodes:
        if n.op_type in ("Conv", "Gemm"):
            weight = weights[n.input[1]]
            axes = tuple(range(1, weight.dim()))
            scale = (weight.abs().amax(axes) if along else weight.abs().max()) / 127
            shaped = scale.reshape(-1, *[1] * len(axes)) if along else scale
            constants[f"{n.input[1]}_q"] = (weight / shaped).round().to(torch.int8)
            constants[f"{n.input[1]}_s"] = scale
            constants[f"{n.input[1]}_z"] = torch.zeros_like(scale).to(torch.int8)
            del constants[n.input[1]]
            name = n.input[1]
            out.append(node("DequantizeLinear", f"{name}_q {name}_s {name}_z", f"{name}_d", axis=0))
            first = f"{n.output[0]}_in"
            constants["step"], constants["zero"] = torch.tensor(0.02), torch.tensor(100, dtype=torch.uint8)
            out.append(node("QuantizeLinear", f"{n.input[0]} step zero", f"{first}_q"))
            out.append(node("DequantizeLinear", f"{first}_q step zero", first))
            n.input[0], n.input[1] = first, f"{name}_d"
        out.append(n)
    return out, constants


@pytest.mark.parametrize("along", [True, False])
def test_quantised_weights_are_dequantised(tmp_path: Path, along: bool) -> None:
    path = write_onnx(tmp_path / "m.onnx", *quantised(*folded(tiny_classifier("conv-bn")), along=along))
    network = import_graph(path)
    assert any("rounding" in note for note in network.meta["notes"])
    expected = answers(path, PIXELS)
    with torch.no_grad():
        assert torch.allclose(network(PIXELS), expected, atol=0.15 * float(expected.std()))
    pixels = PIXELS.clone().requires_grad_()
    network(pixels).sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.abs().sum() > 0)
    before = network.state_dict()
    after = {name: t * 1.25 if t.dim() > 1 else t for name, t in before.items()}
    write_graph(tmp_path / "out.onnx", path, network.meta["places"], before, after)
    again = import_graph(tmp_path / "out.onnx").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_quantised_values_are_not_taken_for_numbers(tmp_path: Path) -> None:
    constants = {"s": torch.tensor(0.1), "z": torch.tensor(3, dtype=torch.uint8), "t": torch.tensor(0.2)}
    first = node("QuantizeLinear", "x s z", "q")
    for last, words in (
        ([node("Cast", "q", "c", to=1), node("Flatten", "c")], "quantised values"),
        ([node("DequantizeLinear", "q t z", "c"), node("Flatten", "c")], "another scale"),
    ):
        path = write_onnx(tmp_path / "m.onnx", [first, *last], constants)
        with pytest.raises(UnsupportedModel, match=words):
            import_graph(path)
    moved = [first, node("MaxPool", "q", "m", kernel_shape=[2, 2]), node("Flatten", "m", "f"),
             node("DequantizeLinear", "f s z")]  # fmt: skip
    network = import_graph(write_onnx(tmp_path / "m.onnx", moved, constants))
    expected = torch.nn.functional.max_pool2d(((PIXELS / 0.1).round() * 0.1).clamp(-0.3, 25.2), 2, 1).flatten(
        1
    )
    assert torch.allclose(network(PIXELS), expected)


# ---------------------------------------------------------------------------------------------------
# Operators of exporters


OPERATORS: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "gather along several axes": (
        [node("Gather", "x places", "g", axis=2), node("Flatten", "g")],
        {"places": torch.tensor([[0, -1], [3, 2]])},
    ),
    "gather in a constant": (
        [node("Gather", "table places", "g"), node("Mul", "x g", "m"), node("Flatten", "m")],
        {"table": drawn(5), "places": torch.randint(0, 5, (8, 8), generator=GENERATOR)},
    ),
    "slices with steps": (
        [node("Slice", "x a b c d", "s"), node("Flatten", "s")],
        {
            "a": torch.tensor([1, 7]),
            "b": torch.tensor([8, -9]),
            "c": torch.tensor([2, 3]),
            "d": torch.tensor([2, -3]),
        },
    ),
    "equal parts": (
        [
            helper.make_node("Split", ["x"], ["p", "q", "r"], axis=3, num_outputs=3),
            node("Flatten", "r", "f"),
            node("Flatten", "q", "g"),
            node("Concat", "f g", axis=1),
        ],
        {},
    ),
    "scatter": (
        [node("ScatterND", "x i u", "s"), node("Flatten", "s")],
        {"i": torch.tensor([[0, 0, 1, 1], [1, 0, 2, 3]]), "u": drawn(2)},
    ),
    "range of sizes": (
        [
            node("Shape", "x", "shape", start=3),
            node("Squeeze", "shape zero", "n"),
            node("Range", "o n l", "r"),
            node("Cast", "r", "c", to=1),
            node("Mul", "x c", "m"),
            node("Flatten", "m"),
        ],
        {"zero": torch.tensor([0]), "o": torch.tensor(0), "l": torch.tensor(1)},
    ),
    "pads of sizes": (
        [
            node("Shape", "x", "s", start=3),
            node("Sub", "ten s", "d"),
            node("Concat", "six d zero", "p", axis=0),
            node("Pad", "x p", "q"),
            node("Flatten", "q"),
        ],
        {"ten": torch.tensor([10]), "six": torch.zeros(6, dtype=torch.int64), "zero": torch.tensor([0])},
    ),
    "reductions": (
        [
            node("ReduceMax", "x a", "m", keepdims=0),
            node("ReduceSum", "x a", "s", keepdims=0),
            node("ReduceL2", "x a", "l", keepdims=0),
            node("ReduceMin", "x a", "n", keepdims=0),
            node("Concat", "m s l n", axis=1),
        ],
        {"a": torch.tensor([2, 3])},
    ),
    "largest and smallest": (
        [node("Max", "x a b", "m"), node("Min", "m b", "n"), node("Flatten", "n")],
        {"a": drawn(8, 8), "b": torch.tensor(0.3)},
    ),
    "comparisons": (
        [
            node("Greater", "x t", "g"),
            node("Less", "x t", "l"),
            node("Or", "g l", "o"),
            node("Not", "o", "n"),
            node("Where", "g x t", "w"),
            node("Cast", "n", "c", to=1),
            node("Add", "w c", "s"),
            node("Flatten", "s"),
        ],
        {"t": torch.tensor(0.5)},
    ),
    "blocks to space": (
        [
            node("SpaceToDepth", "x", "d", blocksize=2),
            node("DepthToSpace", "d", "s", blocksize=2, mode="CRD"),
            node("Flatten", "s"),
        ],
        {},
    ),
    "blocks to space, rows first": (
        [
            node("SpaceToDepth", "x", "d", blocksize=4),
            node("DepthToSpace", "d", "s", blocksize=2),
            node("Flatten", "s"),
        ],
        {},
    ),
    "gather by places": (
        [node("GatherND", "table places", "g"), node("Mul", "x g", "m"), node("Flatten", "m")],
        {"table": drawn(5, 4), "places": torch.randint(0, 4, (8, 8, 2), generator=GENERATOR)},
    ),
    "einsum": ([node("Einsum", "x w", equation="bchw,wk->bk")], {"w": drawn(8, 4)}),
    "instance norm": (
        [node("InstanceNormalization", "x g h", "n"), node("Flatten", "n")],
        {"g": drawn(1) + 2, "h": drawn(1)},
    ),
    "prelu": ([node("PRelu", "x s", "p"), node("Flatten", "p")], {"s": drawn(1, 1, 1)}),
    "numbers one by one": (
        [
            node("Neg", "x", "n"),
            node("Abs", "n", "a"),
            node("Exp", "a", "e"),
            node("Log", "e", "l"),
            node("Reciprocal", "e", "r"),
            node("Sum", "l r x", "s"),
            node("Softplus", "s", "p"),
            node("Mish", "p", "m"),
            node("Flatten", "m"),
        ],
        {},
    ),
    "log softmax in the middle": ([node("LogSoftmax", "x", "l", axis=3), node("Flatten", "l")], {}),
    "tiles": ([node("Tile", "x n", "t"), node("Flatten", "t")], {"n": torch.tensor([1, 1, 2, 1])}),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_of_exporters(tmp_path: Path, case: str) -> None:
    same_as_runtime(write_onnx(tmp_path / "m.onnx", *OPERATORS[case]))


def test_a_softmax_of_an_old_set_of_operators_goes_over_all_that_follows(tmp_path: Path) -> None:
    nodes = [node("Softmax", "x", "s"), node("Flatten", "s", "f"), node("Identity", "f")]
    path = write_onnx(tmp_path / "m.onnx", nodes)
    path = changed(path, lambda model: setattr(model.opset_import[0], "version", 11))
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(PIXELS), PIXELS.flatten(1).softmax(1))


def test_a_view_written_as_a_choice_of_every_number(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x flat", "r"), node("Gather", "r places", "g"), node("Flatten", "g")]
    for batch in (1, 2):
        weights = {"flat": torch.tensor([-1]), "places": torch.arange(batch * 64).reshape(batch, 64, 1, 1)}
        path = write_onnx(tmp_path / "m.onnx", nodes, weights, shape=(batch, 1, 8, 8))
        with torch.no_grad():
            assert torch.equal(import_graph(path)(PIXELS), PIXELS.flatten(1))


# ---------------------------------------------------------------------------------------------------
# Names


FORBIDDEN = [
    "a.__class__.forward.weight",
    "a.forward.weight",
    "a._modules.weight",
    "a.__dict__.weight",
    "a.b.train.weight",
    "__init__.weight",
    "a.state_dict.weight",
    "a.requires_grad_.weight",
    "a.meta.weight",
    "a.__call__",
    "a.b.eval",
]
LEGITIMATE = [
    "in.weight",
    "class.weight",
    "a.lambda.b.weight",
    "None.weight",
    "import",
    "type.weight",
    "async.0.weight",
    "_conv_stem.weight",
    "layer1.0.conv1.weight",
    "print.weight",
    "match.weight",
]


@pytest.mark.parametrize("name", [*FORBIDDEN, *LEGITIMATE])
def test_names_of_a_file_reach_no_attribute_that_is_there(tmp_path: Path, name: str) -> None:
    before = {key: id(value) for key, value in vars(torch.nn.Module).items()}
    path = write_onnx(tmp_path / "m.onnx", [node("Flatten", "x", "f"), node("Gemm", f"f {name}", transB=1)],
                      {name: drawn(4, 64)})  # fmt: skip
    network = import_graph(path)
    with torch.no_grad():
        assert torch.allclose(network(PIXELS), answers(path, PIXELS), atol=1e-6)
    assert {key: id(value) for key, value in vars(torch.nn.Module).items()} == before
    for owner in network.modules():
        assert not {*vars(owner)} & {"forward", "__class__", "train", "eval", "state_dict", "__call__"}
    opened = unbackdoor.open_model(path)
    after = {key: value + 1 for key, value in opened.model.network.state_dict().items()}
    assert opened.places is not None
    write_graph(tmp_path / "o.onnx", path, opened.places, opened.model.network.state_dict(), after)
    same_as_runtime(tmp_path / "o.onnx", tolerance=1e-4)
    again = onnx.load(tmp_path / "o.onnx").graph.initializer
    assert [tensor.name for tensor in again] == [name]


def test_a_keyword_keeps_its_word(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f block.in.weight", transB=1)]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"block.in.weight": drawn(4, 64)})
    assert list(import_graph(path).state_dict()) == ["block.in_.weight"]


def test_keywords_in_every_other_format(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"in.weight": drawn(8, 64), "class.weight": drawn(4, 8)}
    torch.save(state, tmp_path / "m.pth")
    save_file(state, tmp_path / "m.safetensors")
    for name in ("m.pth", "m.safetensors"):
        found = inspect(tmp_path / name)
        assert [tensor.name for tensor in found.tensors] == sorted(state) or found.problem is None
    module = torch.nn.Module()
    module.add_module("in", torch.nn.BatchNorm2d(3))
    torch.save(module, tmp_path / "whole.pth")
    assert [tensor.name for tensor in inspect(tmp_path / "whole.pth").tensors] == [
        f"in.{name}" for name in torch.nn.BatchNorm2d(3).state_dict()
    ]


# ---------------------------------------------------------------------------------------------------
# Is my export the same model?


def test_an_export_is_told_from_another_model(tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    torch.save(model.network.state_dict(), tmp_path / "m.pth")
    write_onnx(tmp_path / "m.onnx", *folded(model))
    options: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,), "checks": "tac"}
    done = unbackdoor.verify(tmp_path / "m.pth", tmp_path / "m.onnx", tiny_data(60), **options)
    assert done.logits is not None and done.logits.same and not done.identical
    assert done.agreement.value == 1
    record = json.loads(json.dumps(done.to_dict()))["comparison"]["logits"]
    assert record["same"] and record["relative"] < 1e-4
    nodes, weights = folded(model)
    weights["fc.bias"] = weights["fc.bias"] + torch.tensor([0.0, 0.0, 0.0, 1.0])
    write_onnx(tmp_path / "n.onnx", nodes, weights)
    done = unbackdoor.verify(tmp_path / "m.pth", tmp_path / "n.onnx", tiny_data(60), **options)
    assert done.logits is not None and not done.logits.same
    page = done.save_report(tmp_path / "report").read_text()
    assert "do not compute the same logits" in page


def test_an_export_with_the_normalisation_inside(tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    torch.save(model.network.state_dict(), tmp_path / "m.pth")
    nodes, weights = folded(model)
    nodes[0].input[0] = "n"
    norm = [node("Sub", "x mean", "d"), node("Div", "d std", "n")]
    write_onnx(
        tmp_path / "m.onnx",
        [*norm, *nodes],
        {**weights, "mean": torch.tensor(0.35), "std": torch.tensor(0.25)},
    )
    write_onnx(tmp_path / "n.onnx", *folded(model))
    images = tiny_data(60)
    np.savez(tmp_path / "c.npz", images=images.pixels.numpy()[:, 0], labels=images.truth.numpy())
    typed = [
        "verify",
        tmp_path / "m.pth",
        tmp_path / "n.onnx",
        "--data",
        tmp_path / "c.npz",
        "--checks",
        "tac",
        "--arch",
        "small_cnn[width=8]",
        "--quiet",
    ]
    options: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,), "size": (8, 8)}
    first = unbackdoor.open_model(tmp_path / "m.pth", **options)
    done = unbackdoor.verify(first, tmp_path / "m.onnx", images, checks="tac")
    assert done.logits is not None and done.logits.same
    done = unbackdoor.verify(tmp_path / "m.pth", tmp_path / "n.onnx", images, checks="tac", **options)
    assert done.logits is not None and done.logits.same
    printed = CliRunner().invoke(app, [*map(str, typed), "--mean", "0.35", "--std", "0.25"])
    assert "compute the same logits" in printed.stdout


def test_random_changes_of_odd_forms_end_in_typed_errors(tmp_path: Path) -> None:
    slope = function("Inner", ["a"], ["b"], [node("Relu", "a", "b")])
    nodes = [node("Inner", "x", "r", domain="own"), node("QuantizeLinear", "r s z", "q"),
             node("DequantizeLinear", "q s z", "d"), node("Flatten", "d", "f"), node("MatMul", "f v", "m"),
             node("Softmax", "m")]  # fmt: skip
    weights = {"s": torch.tensor(0.01), "z": torch.tensor(0, dtype=torch.uint8), "v": drawn(64, 4)}
    content = with_functions(write_onnx(tmp_path / "m.onnx", nodes, weights), [slope]).read_bytes()
    generator = torch.Generator().manual_seed(1)
    opened = 0
    for _ in range(150):
        broken = bytearray(content)
        for place in torch.randint(0, len(broken), (2,), generator=generator).tolist():
            broken[place] = int(torch.randint(0, 256, (1,), generator=generator))
        (tmp_path / "b.onnx").write_bytes(broken)
        try:
            import_graph(tmp_path / "b.onnx")
            opened += 1
        except unbackdoor.UnbackdoorError:
            pass
        inspect(tmp_path / "b.onnx")
    assert opened
