"""ONNX files of small networks, as exporters write them: batch normalisation folded into the convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from unbackdoor.types import Classifier


def node(kind: str, inputs: str = "x", output: str = "y", **attributes: Any) -> Any:
    """Return an operator; its operands are separated by spaces."""
    return helper.make_node(kind, inputs.split(" ") if inputs else [], [output], **attributes)


def write_onnx(
    path: Path,
    nodes: Sequence[Any],
    weights: dict[str, Tensor] | None = None,
    *,
    shape: Sequence[Any] = ("b", 1, 8, 8),
) -> Path:
    """Write a model from ``x`` to ``y``."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "k"])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (weights or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(made.SerializeToString())
    return path


def folded(model: Classifier) -> tuple[list[Any], dict[str, Tensor]]:
    """Return a ``small_cnn`` with its norms folded into its convolutions, under names that say nothing."""
    state = model.network.state_dict()
    nodes, weights, last = [], {}, "x"
    for k in range(1, 5):
        scale = state[f"bn{k}.weight"] / (state[f"bn{k}.running_var"] + 1e-5).sqrt()  # (O,)
        weights[f"onnx::Conv_{k}"] = state[f"conv{k}.weight"] * scale.view(-1, 1, 1, 1)
        weights[f"onnx::Bias_{k}"] = state[f"bn{k}.bias"] - state[f"bn{k}.running_mean"] * scale
        nodes.append(node("Conv", f"{last} onnx::Conv_{k} onnx::Bias_{k}", f"c{k}", pads=[1, 1, 1, 1]))
        nodes.append(node("Relu", f"c{k}", f"r{k}"))
        last = f"r{k}"
        if k == 2:
            nodes.append(node("MaxPool", last, "p", kernel_shape=[2, 2], strides=[2, 2]))
            last = "p"
    nodes += [node("GlobalAveragePool", last, "g"), node("Flatten", "g", "f")]
    nodes.append(node("Gemm", "f fc.weight fc.bias", transB=1))
    weights |= {"fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]}
    return nodes, weights


def answers(path: Path, pixels: Tensor) -> Tensor:
    """Return what the package onnx itself computes."""
    from onnx.reference import ReferenceEvaluator

    (out,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": pixels.numpy()})
    return torch.as_tensor(out)
