"""ONNX: weights by name, and graphs that become networks of ordinary layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

import onnx
from onnx import TensorProto, helper, numpy_helper

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.weights.formats.onnx.graph import import_graph
from unbackdoor.weights.read import read_contents, read_state

GENERATOR = torch.Generator().manual_seed(2)
X = torch.rand(3, 4, 8, 8, generator=GENERATOR)  # (B, C, H, W)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR) - 0.5


def model(
    path: Path,
    nodes: Sequence[Any],
    weights: dict[str, Tensor] | None = None,
    *,
    shape: Sequence[Any] = ("b", 4, 8, 8),
    opset: int = 20,
) -> Path:
    """Write a model from ``x`` to ``y``."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (weights or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    path.write_bytes(made.SerializeToString())
    return path


def node(kind: str, inputs: str = "x", output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(" ") if inputs else [], [output], **attributes)


W, B = drawn(6, 4, 3, 3), drawn(6)
CASES: dict[str, tuple[list[Any], dict[str, Tensor], Callable[[Tensor], Tensor]]] = {
    "conv": (
        [node("Conv", "x c.weight c.bias", pads=[1, 1, 1, 1], strides=[2, 2])],
        {"c.weight": W, "c.bias": B},
        lambda x: F.conv2d(x, W, B, 2, 1),
    ),
    "conv, uneven padding": (
        [node("Conv", "x w", pads=[0, 1, 2, 1])],
        {"w": W},
        lambda x: F.conv2d(F.pad(x, (1, 1, 0, 2)), W),
    ),
    "conv, groups": (
        [node("Conv", "x w", group=4, dilations=[2, 2])],
        {"w": W[:4, :1]},
        lambda x: F.conv2d(x, W[:4, :1], groups=4, dilation=2),
    ),
    "batch norm": (
        [node("BatchNormalization", "x n.weight n.bias n.running_mean n.running_var", epsilon=1e-3)],
        {"n.weight": B[:4], "n.bias": B[1:5], "n.running_mean": B[2:6], "n.running_var": B[:4].abs() + 0.1},
        lambda x: F.batch_norm(x, B[2:6], B[:4].abs() + 0.1, B[:4], B[1:5], eps=1e-3),
    ),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", transB=1, alpha=2.0, beta=0.5)],
        {"w": drawn(5, 256), "b": B[:5]},
        lambda x: 2 * x.flatten(1) @ CASES["gemm"][1]["w"].t() + 0.5 * B[:5],
    ),
    "matmul and add": (
        [node("Flatten", "x", "f"), node("MatMul", "f w", "m"), node("Add", "b m")],
        {"w": drawn(256, 5), "b": B[:5]},
        lambda x: x.flatten(1) @ CASES["matmul and add"][1]["w"] + B[:5],
    ),
    "relu": ([node("Relu")], {}, F.relu),
    "leaky relu": ([node("LeakyRelu", alpha=0.3)], {}, lambda x: F.leaky_relu(x, 0.3)),
    "elu": ([node("Elu", alpha=0.7)], {}, lambda x: F.elu(x, 0.7)),
    "sigmoid": ([node("Sigmoid")], {}, torch.sigmoid),
    "tanh": ([node("Tanh")], {}, torch.tanh),
    "hard swish": ([node("HardSwish")], {}, F.hardswish),
    "hard sigmoid": ([node("HardSigmoid", alpha=1 / 6)], {}, F.hardsigmoid),
    "hard sigmoid, other slope": (
        [node("HardSigmoid", alpha=0.3, beta=0.4)],
        {},
        lambda x: (0.3 * x + 0.4).clamp(0, 1),
    ),
    "clip": (
        [node("Clip", "x low high")],
        {"low": torch.tensor(0.0), "high": torch.tensor(6.0)},
        lambda x: x.clamp(0, 6),
    ),
    "clip, one side": ([node("Clip", "x  high")], {"high": torch.tensor(0.2)}, lambda x: x.clamp(max=0.2)),
    "gelu": ([node("Gelu", approximate="tanh")], {}, lambda x: F.gelu(x, approximate="tanh")),
    "erf": ([node("Erf")], {}, torch.erf),
    "sums": (
        [node("Mul", "x x", "a"), node("Sub", "a s", "b"), node("Div", "b t", "c"), node("Add", "c x")],
        {"s": torch.tensor(0.5), "t": drawn(4, 1, 1) + 2},
        lambda x: (x * x - 0.5) / CASES["sums"][1]["t"] + x,
    ),
    "max pool": (
        [node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
        {},
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "max pool, uneven padding": (
        [node("MaxPool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1])],
        {},
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2),
    ),
    "average pool": (
        [node("AveragePool", kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1])],
        {},
        lambda x: F.avg_pool2d(x, 2, 2, 1, count_include_pad=False),
    ),
    "global pool": ([node("GlobalAveragePool")], {}, lambda x: x.mean((2, 3), keepdim=True)),
    "mean": (
        [node("ReduceMean", "x axes", keepdims=0)],
        {"axes": torch.tensor([2, 3])},
        lambda x: x.mean((2, 3)),
    ),
    "reshape": (
        [node("Reshape", "x sizes")],
        {"sizes": torch.tensor([0, -1, 16])},
        lambda x: x.reshape(len(x), -1, 16),
    ),
    "transpose": ([node("Transpose", perm=[0, 2, 3, 1])], {}, lambda x: x.permute(0, 2, 3, 1)),
    "concat": (
        [node("Relu", "x", "r"), node("Concat", "x r", axis=1)],
        {},
        lambda x: torch.cat([x, F.relu(x)], 1),
    ),
    "identity of weights": (
        [node("Identity", "w", "v"), node("Conv", "x v")],
        {"w": W},
        lambda x: F.conv2d(x, W),
    ),
    "constant": (
        [
            node("Constant", "", "c", value=numpy_helper.from_array(np.array([2.0], np.float32))),
            node("Mul", "x c"),
        ],
        {},
        lambda x: 2 * x,
    ),
    "dropout": ([node("Dropout")], {}, lambda x: x),
    "softmax at the end": ([node("Relu", "x", "r"), node("Softmax", "r")], {}, F.relu),
    "softmax inside": (
        [node("Softmax", "x", "s", axis=1), node("Relu", "s")],
        {},
        lambda x: F.softmax(x, 1),
    ),
    "pad": (
        [node("Pad", "x p")],
        {"p": torch.tensor([0, 0, 1, 2, 0, 0, 3, 4])},
        lambda x: F.pad(x, (2, 4, 1, 3)),
    ),
    "layer norm": (
        [node("LayerNormalization", "x w b", axis=-1, epsilon=1e-4)],
        {"w": drawn(8), "b": drawn(8)},
        lambda x: F.layer_norm(x, [8], CASES["layer norm"][1]["w"], CASES["layer norm"][1]["b"], 1e-4),
    ),
    "slice": (
        [node("Slice", "x a b c")],
        {"a": torch.tensor([1, -3]), "b": torch.tensor([3, 1 << 40]), "c": torch.tensor([1, 3])},
        lambda x: x[:, 1:3, :, -3:],
    ),
    "gather": ([node("Gather", "x i", axis=2)], {"i": torch.tensor(-1)}, lambda x: x[:, :, -1]),
    "squeeze and unsqueeze": (
        [node("Unsqueeze", "x a", "u"), node("Squeeze", "u a")],
        {"a": torch.tensor([1])},
        lambda x: x,
    ),
    "attention": (
        [node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t")],
        {},
        lambda x: x @ x.transpose(2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operators(tmp_path: Path, case: str) -> None:
    nodes, weights, expected = CASES[case]
    network = import_graph(model(tmp_path / "m.onnx", nodes, weights))
    assert not network.training
    with torch.no_grad():
        assert torch.allclose(network(X - 0.5), expected(X - 0.5), atol=1e-5), case
        assert torch.allclose(copy.deepcopy(network)(X[:1]), expected(X[:1]), atol=1e-5)


RESIDUAL = [
    node("Conv", "x conv1.weight", "a", pads=[1, 1, 1, 1]),
    node("BatchNormalization", "a bn1.weight bn1.bias bn1.running_mean bn1.running_var", "b"),
    node("Relu", "b", "c"),
    node("Conv", "c layer1.0.conv.weight layer1.0.conv.bias", "d", pads=[1, 1, 1, 1]),
    node("Add", "c d", "e"),
    node("GlobalAveragePool", "e", "f"),
    node("Flatten", "f", "g"),
    node("Gemm", "g fc.weight fc.bias", transB=1),
]
WEIGHTS = {
    "conv1.weight": drawn(6, 4, 3, 3), "bn1.weight": drawn(6), "bn1.bias": drawn(6),
    "bn1.running_mean": drawn(6), "bn1.running_var": drawn(6) + 1,
    "layer1.0.conv.weight": drawn(6, 6, 3, 3), "layer1.0.conv.bias": drawn(6),
    "fc.weight": drawn(3, 6), "fc.bias": drawn(3),
}  # fmt: skip


def test_layers_keep_their_names_so_that_hooks_and_repairs_work(tmp_path: Path) -> None:
    network = import_graph(model(tmp_path / "m.onnx", RESIDUAL, WEIGHTS))
    assert isinstance(network.get_submodule("layer1.0.conv"), nn.Conv2d)
    assert isinstance(network.get_submodule("fc"), nn.Linear)
    assert set(network.state_dict()) == {*WEIGHTS, "bn1.num_batches_tracked"}
    assert network.meta["input_shape"] == (4, 8, 8)
    seen: list[Tensor] = []
    network.get_submodule("bn1").register_forward_hook(lambda layer, x, y: seen.append(y))
    network(X).sum().backward()
    assert len(seen) == 1
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_weights_as_a_state_dict(tmp_path: Path) -> None:
    contents = read_contents(model(tmp_path / "m.onnx", RESIDUAL, WEIGHTS))
    assert contents.format == "onnx"
    state = contents.state()
    assert list(state) == list(WEIGHTS)
    assert all(torch.equal(state[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize(
    "kind", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL"]
)
def test_types_with_and_without_raw_bytes(tmp_path: Path, kind: str) -> None:
    number = getattr(TensorProto, kind)
    values = [1, 0, 1] if kind == "BOOL" else [1, 2, 3]
    file = onnx.load(model(tmp_path / "m.onnx", RESIDUAL, WEIGHTS))
    file.graph.initializer.append(helper.make_tensor("typed", number, [3], values))
    if kind not in ("BFLOAT16",):
        array = np.array(values, helper.tensor_dtype_to_np_dtype(number))
        file.graph.initializer.append(numpy_helper.from_array(array, "raw"))
    (tmp_path / "m.onnx").write_bytes(file.SerializeToString())
    state = read_state(tmp_path / "m.onnx")
    for name in ("typed", "raw") if kind != "BFLOAT16" else ("typed",):
        assert state[name].tolist() == values
    assert str(state["typed"].dtype).endswith(
        {"FLOAT": "32", "DOUBLE": "64", "BOOL": "bool"}.get(kind, kind.lower())
    )


def test_a_batch_that_the_exporter_has_fixed_is_opened_again(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x s", "r"), node("Concat", "t r", axis=1)]
    weights = {"s": torch.tensor([2, 4, 64]), "t": drawn(1, 1, 64).expand(2, 1, 64).contiguous()}
    network = import_graph(model(tmp_path / "m.onnx", nodes, weights, shape=(2, 4, 8, 8)))
    with torch.no_grad():
        assert torch.equal(network(X)[:, 1:], X.flatten(2))
        assert network(X).shape == (3, 5, 64)


@pytest.mark.parametrize(
    ("nodes", "word"),
    [
        ([node("LSTM")], "LSTM"),
        ([helper.make_node("Relu", ["x"], ["y"], domain="my.own")], "Relu"),
        ([node("NonZero")], "NonZero"),
        ([node("Relu", "x", "s"), node("Reshape", "x s")], "computed operand"),
        ([node("Conv", "x x")], "computed operand"),
        ([node("MaxPool", kernel_shape=[2, 2], auto_pad="SAME_UPPER")], "auto_pad"),
        ([node("MaxPool", kernel_shape=[1 << 40, 2])], "sizes"),
        ([node("MaxPool", kernel_shape=[2])], "two axes"),
        (
            [helper.make_node("MaxPool", ["x"], ["a", "b"], kernel_shape=[2, 2]), node("Add", "a b")],
            "further outputs",
        ),
    ],
)
def test_what_is_not_imported_is_named(tmp_path: Path, nodes: list[Any], word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        import_graph(model(tmp_path / "m.onnx", nodes))


def test_graphs_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing makes"):
        import_graph(model(tmp_path / "m.onnx", [node("Relu", "nowhere")]))
    with pytest.raises(UnsupportedModel, match="does not depend"):
        import_graph(model(tmp_path / "m.onnx", [node("Identity", "w")], {"w": W}))
    two = helper.make_graph(
        [node("Relu")],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "z")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    (tmp_path / "m.onnx").write_bytes(helper.make_model(two).SerializeToString())
    with pytest.raises(UnsupportedModel, match="single images"):
        import_graph(tmp_path / "m.onnx")


def test_importing_draws_nothing(tmp_path: Path) -> None:
    # The fixture that watches the global generators fails this test where it does.
    import_graph(model(tmp_path / "m.onnx", RESIDUAL, WEIGHTS))
