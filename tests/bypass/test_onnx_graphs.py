"""Hostile ONNX graphs: what a few bytes may ask of memory and time is counted before it is done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

from onnx import TensorProto, helper

from graphs import node, write_onnx
from unbackdoor import open_model
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.onnx import graph as onnx_graph
from unbackdoor.weights.formats.onnx.graph import import_graph

ROW = torch.linspace(0, 1, 30_000)


def refused(path: Path, kind: type[UnbackdoorError], words: str) -> None:
    begun = time.process_time()
    with pytest.raises(kind, match=words):
        open_model(path)
    assert time.process_time() - begun < 8


def doubling(count: int) -> list[Any]:
    return [node("Concat", f"c{k} c{k}", f"c{k + 1}", axis=0) for k in range(count)]


def chain(kind: str, operands: str, count: int, **attributes: Any) -> list[Any]:
    """Return one operator after the other, each of the last one's result, and an end."""
    names = ["x", *(f"y{k}" for k in range(count))]
    made = [node(kind, operands.replace("?", names[k]), names[k + 1], **attributes) for k in range(count)]
    return [*made, node("Relu", names[-1])]


FOLDED: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "sums of a row and a column": (
        [node("Add", "r c", "w"), node("Mul", "x w")],
        {"r": ROW, "c": ROW[:, None]},
    ),
    "doubled forty times": ([*doubling(40), node("Mul", "x c40")], {"c0": ROW}),
    "one row many times": (
        [node("Gather", "r i", "w", axis=0), node("Mul", "x w")],
        {"r": ROW.expand(2, -1).contiguous(), "i": torch.zeros(30_000, dtype=torch.int64)},
    ),
    "made of a size": (
        [node("ConstantOfShape", "s", "w"), node("Mul", "x w")],
        {"s": torch.tensor([4096] * 4)},
    ),
    "chosen": (
        [node("Equal", "r c", "t"), node("Where", "t r c", "w"), node("Mul", "x w")],
        {"r": ROW, "c": ROW[:, None]},
    ),
    "one weight a thousand times": (chain("Mul", "? w", 1000), {"w": ROW.repeat(30)}),
    "one convolution a thousand times": (
        chain("Conv", "? w", 1000),
        {"w": ROW.repeat(30).reshape(-1, 1, 1, 1)},
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_constants_that_grow(tmp_path: Path, case: str) -> None:
    refused(write_onnx(tmp_path / "m.onnx", *FOLDED[case]), UnsafeFile, "more of its weights than it holds")


RUN: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "expanded": (
        [node("GlobalAveragePool", "x", "g"), node("Expand", "g s")],
        {"s": torch.tensor([1, 4096, 4096, 4096])},
    ),
    "padded": ([node("Pad", "x p")], {"p": torch.tensor([0, 0, 4096, 4096, 0, 4096, 4096, 4096])}),
    "joined": (chain("Concat", "? ?", 40, axis=1), {}),
    "sizes grown": (
        [
            node("GlobalAveragePool", "x", "g"),
            node("Shape", "g", "s"),
            node("Mul", "s k", "t"),
            node("Expand", "g t"),
        ],
        {"k": torch.tensor([1, 4096, 4096, 4096])},
    ),
    "sizes that are many": (
        [
            node("Shape", "x", "s"),
            node("Expand", "s e", "t"),
            node("Add", "t t", "u"),
            node("Reshape", "x u"),
        ],
        {"e": torch.tensor([4096, 4096, 4096, 4])},
    ),
    "made of sizes": (
        [
            node("Shape", "x", "s"),
            node("Mul", "s k", "t"),
            node("ConstantOfShape", "t", "w"),
            node("Mul", "x w"),
        ],
        {"k": torch.tensor([4096] * 4)},
    ),
    "pooled": (
        [node("Pad", "x p", "q"), node("MaxPool", "q", kernel_shape=[2000, 2000], strides=[1, 1])],
        {"p": torch.tensor([0, 0, 2000, 2000, 0, 0, 2000, 2000])},
    ),
}


@pytest.mark.parametrize("case", RUN)
def test_images_that_grow(tmp_path: Path, case: str) -> None:
    nodes, weights = RUN[case]
    refused(
        write_onnx(tmp_path / "m.onnx", nodes, weights), (UnsafeFile, UnsupportedModel), "absurdly|too large"
    )


def test_cycles_and_names_that_two_values_have(tmp_path: Path) -> None:
    nodes = [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b")]
    refused(write_onnx(tmp_path / "m.onnx", nodes), InputError, "nothing makes")
    nodes = [node("Relu", "x", "a"), node("Tanh", "x", "a"), node("Flatten", "a")]
    refused(write_onnx(tmp_path / "m.onnx", nodes), UnsafeFile, "one name")
    nodes = [node("Relu", "x", "w"), node("Mul", "x w", "a"), node("Flatten", "a")]
    refused(write_onnx(tmp_path / "m.onnx", nodes, {"w": torch.ones(8)}), UnsafeFile, "one name")


def test_too_many_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_NODES", 3)
    path = write_onnx(tmp_path / "m.onnx", chain("Relu", "?", 4))
    refused(path, UnsupportedModel, "too many operators")


def test_many_names_take_no_more_than_their_number(tmp_path: Path) -> None:
    names = ["x", *(f"y{k}" for k in range(1000))]
    nodes = [node("Mul", f"{names[k]} a.b{k}.c", names[k + 1]) for k in range(1000)]
    weights = {f"a.b{k}.c": torch.ones(1) for k in range(1000)}
    path = write_onnx(tmp_path / "m.onnx", [*nodes, node("Flatten", names[-1])], weights)
    begun = time.process_time()
    import_graph(path)
    assert time.process_time() - begun < 8


@pytest.mark.parametrize(
    ("words", "inputs", "outputs"),
    [("one input and one output", ["x", "z"], ["y"]), ("one input and one output", ["x"], ["y", "a"])],
)
def test_what_is_no_classifier(tmp_path: Path, words: str, inputs: list[str], outputs: list[str]) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node("Relu", "x", "a"), node("Flatten", "a")],
        "graph",
        [value(name, TensorProto.FLOAT, ["b", 1, 8, 8]) for name in inputs],
        [value(name, TensorProto.FLOAT, ["b", "k"]) for name in outputs],
        [helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])],
    )
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    refused(tmp_path / "m.onnx", UnsupportedModel, words)


def test_mutated_models_open_or_give_a_typed_error(tmp_path: Path) -> None:
    weights = {"w": torch.ones(2, 1, 3, 3), "v": torch.ones(72, 4), "s": torch.tensor([0, 72])}
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("Reshape", "r s", "f"),
        node("MatMul", "f v"),
    ]
    content = write_onnx(tmp_path / "m.onnx", nodes, weights).read_bytes()
    generator = torch.Generator().manual_seed(3)
    opened = 0
    for _ in range(60):
        broken = bytearray(content)
        for _ in range(2):
            place, bits = torch.randint(0, 1 << 20, (2,), generator=generator).tolist()
            broken[place % len(broken)] = bits % 256
        (tmp_path / "m.onnx").write_bytes(broken)
        try:
            open_model(tmp_path / "m.onnx", size=(8, 8))
            opened += 1
        except UnbackdoorError:
            pass
        inspect(tmp_path / "m.onnx")
    assert opened
