"""``If`` in an ONNX graph: the branch that the file itself decides for is imported, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

import onnx
from onnx import TensorProto, helper, numpy_helper

from graphs import answers, node, write_onnx
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.onnx.graph import describe_graph, import_graph
from unbackdoor.weights.formats.onnx.write import write_graph

GENERATOR = torch.Generator().manual_seed(5)
PIXELS = torch.rand(3, 1, 8, 8, generator=GENERATOR)  # (B, C, H, W)
HEAD = torch.rand(64, 4, generator=GENERATOR) - 0.5
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def graph(nodes: Sequence[Any], output: str = "r", weights: dict[str, Tensor] | None = None) -> Any:
    return helper.make_graph(
        list(nodes), "branch", [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (weights or {}).items()],
    )  # fmt: skip


def branch(condition: str, then: Any, other: Any, output: str = "h") -> Any:
    return node("If", condition, output, then_branch=then, else_branch=other)


RELU, NEGATIVE = graph([node("Relu", "x", "r")]), graph([node("Neg", "x", "r")])
LAST = [node("Flatten", "h", "f"), node("MatMul", "f v")]


def file(path: Path, nodes: Sequence[Any], weights: dict[str, Tensor] | None = None, **options: Any) -> Path:
    return write_onnx(path, [*nodes, *LAST], {"v": HEAD, **(weights or {})}, **options)


def same_as_runtime(path: Path) -> None:
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(PIXELS - 0.4), answers(path, PIXELS - 0.4), atol=1e-5)
    assert describe_graph(path).unknown == ()
    assert any("branches" in note for note in import_graph(path).meta["notes"])
    assert inspect(path).loading == "no code"


def sized(compare: str, size: int) -> list[Any]:
    """Return the operators that compare the height of a pooled image, as exporters write it."""
    return [
        node("MaxPool", "x", "p", kernel_shape=[2, 2], strides=[2, 2]), node("Shape", "p", "s"),
        node("Constant", "", "at", value_int=2), node("Gather", "s at", "n"),
        node("Constant", "", "size", value_int=size), node(compare, "n size", "c"),
    ]  # fmt: skip


DECIDED: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "an initializer": ([branch("c", RELU, NEGATIVE)], {"c": TRUE}),
    "the other one": ([branch("c", RELU, NEGATIVE)], {"c": FALSE}),
    "one number in a list": ([branch("c", RELU, NEGATIVE)], {"c": FALSE.reshape(1)}),
    "computed from constants": (
        [node("Not", "n", "m"), node("Identity", "m", "c"), branch("c", RELU, NEGATIVE)], {"n": TRUE}
    ),
    "a constant": (
        [node("Constant", "", "c", value=numpy_helper.from_array(TRUE.numpy())), branch("c", RELU, NEGATIVE)],
        {},
    ),
    "a size": ([*sized("Equal", 4), branch("c", RELU, NEGATIVE)], {}),
    "another size": ([*sized("Greater", 4), node("Not", "c", "d"), branch("d", RELU, NEGATIVE)], {}),
    "a size as a truth": (
        [*sized("Sub", 4), node("Cast", "c", "d", to=TensorProto.BOOL), branch("d", RELU, NEGATIVE)], {}
    ),
    "values around it, and weights of its own": (
        [node("Sigmoid", "x", "s"),
         branch("c", graph([node("Add", "s w", "a"), node("Mul", "a x", "r")],
                           weights={"w": torch.full((8, 8), 0.5)}), NEGATIVE)],
        {"c": TRUE},
    ),
    "a value around it as its result": ([branch("c", graph([], "x"), NEGATIVE)], {"c": TRUE}),
    "one within another": (
        [branch("c", graph([node("Relu", "x", "a"),
                            branch("d", graph([node("Neg", "a", "q")], "q"), graph([], "a"), "r")]),
                NEGATIVE)],
        {"c": TRUE, "d": TRUE},
    ),
    "one behind another, with the same names": (
        [branch("c", RELU, NEGATIVE, "a"),
         branch("c", graph([node("Add", "a a", "r")]), graph([node("Neg", "a", "r")]))],
        {"c": TRUE},
    ),
    "a size of what a branch gives": (
        [branch("c", graph([node("MaxPool", "x", "r", kernel_shape=[2, 2])]), RELU, "a"),
         node("Shape", "a", "s"), node("ReduceMax", "s", "m", keepdims=0, axes=[0]),
         node("Constant", "", "at", value_int=3), node("Gather", "s at", "n"), node("Less", "n seven", "d"),
         branch("d", RELU, NEGATIVE)],
        {"c": FALSE, "seven": torch.tensor(8)},
    ),
}  # fmt: skip
DECIDED["a size of what a branch gives"][0].pop(2)


@pytest.mark.parametrize("case", DECIDED)
def test_the_branch_that_the_file_decides_for(tmp_path: Path, case: str) -> None:
    same_as_runtime(file(tmp_path / "m.onnx", *DECIDED[case]))


def test_the_dead_branch_may_hold_anything(tmp_path: Path) -> None:
    dead = graph([node("NonMaxSuppression", "x x", "r")])
    same_as_runtime(file(tmp_path / "m.onnx", [branch("c", RELU, dead)], {"c": TRUE}))
    with pytest.raises(UnsupportedModel, match="NonMaxSuppression"):
        import_graph(file(tmp_path / "m.onnx", [branch("c", RELU, dead)], {"c": FALSE}))


def test_a_branch_within_a_function_and_a_function_within_a_branch(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    within = branch("c", graph([node("Add", "a w", "r")], weights={"w": torch.ones(1)}), graph([], "a"), "b")
    functions = [
        helper.make_function("own", "Outer", ["a", "c"], ["b"], [within], opsets),
        helper.make_function("own", "Inner", ["a"], ["b"], [node("Neg", "a", "b")], opsets),
    ]
    called = graph([node("Inner", "o", "r", domain="own")])
    path = file(
        tmp_path / "m.onnx",
        [node("Outer", "x c", "o", domain="own"), branch("c", called, graph([], "o"))], {"c": TRUE},
    )  # fmt: skip
    model = onnx.load(path)
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("own", 1))
    path.write_bytes(model.SerializeToString())
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(PIXELS), -(PIXELS + 1).flatten(1) @ HEAD, atol=1e-5)


def test_a_repair_behind_a_branch(tmp_path: Path) -> None:
    product = graph(
        [node("Flatten", "x", "g"), node("MatMul", "g w", "r")],
        weights={"w": torch.rand(64, 64, generator=GENERATOR)},
    )
    source = file(tmp_path / "m.onnx", [branch("c", product, NEGATIVE)], {"c": TRUE})
    network = import_graph(source)
    before = network.state_dict()
    after = {name: tensor * 1.25 for name, tensor in before.items()}
    write_graph(tmp_path / "out.onnx", source, network.meta["places"], before, after)
    with torch.no_grad():
        found = import_graph(tmp_path / "out.onnx")(PIXELS)
        assert torch.allclose(found, answers(tmp_path / "out.onnx", PIXELS), rtol=1e-4)
        assert torch.equal(found, torch.func.functional_call(network, after, (PIXELS,)))


UNDECIDED: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "the pixels": (
        [node("ReduceMax", "x axes", "m", keepdims=0), node("Greater", "m half", "c"),
         branch("c", RELU, NEGATIVE)],
        {"axes": torch.tensor([0, 1, 2, 3]), "half": torch.tensor(0.5)},
    ),
    "the number of images": (
        [node("Shape", "x", "s"), node("Constant", "", "at", value_int=0), node("Gather", "s at", "n"),
         node("Constant", "", "one", value_int=1), node("Equal", "n one", "c"), branch("c", RELU, NEGATIVE)],
        {},
    ),
    "several numbers": ([branch("c", RELU, NEGATIVE)], {"c": torch.tensor([True, False])}),
    "nothing": ([branch("nowhere", RELU, NEGATIVE)], {}),
    "what is not imported": ([node("Unique", "n", "c"), branch("c", RELU, NEGATIVE)], {"n": TRUE}),
    "itself": ([branch("h", RELU, NEGATIVE)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_the_file_does_not_decide_is_refused(tmp_path: Path, case: str) -> None:
    path = file(tmp_path / "m.onnx", *UNDECIDED[case])
    with pytest.raises((UnsupportedModel, InputError)):
        import_graph(path)
    shown = inspect(path)  # unusual, and no deception
    assert shown.loading == "no code" and shown.graph is not None and shown.graph.problem
    watched = any("branches on values" in remark for remark in shown.graph.remarks)
    assert watched == (case == "the pixels")


def test_sizes_that_the_file_leaves_open_decide_nothing(tmp_path: Path) -> None:
    path = file(tmp_path / "m.onnx", *DECIDED["a size"], shape=("b", 1, "h", "w"))
    with pytest.raises(UnsupportedModel, match="does not decide"):
        import_graph(path)


# ---------------------------------------------------------------------------------------------------
# Hostile ones


@pytest.mark.parametrize("truth", [TRUE, FALSE])
@pytest.mark.parametrize("name", ["x", "v", "s", "f"])
def test_names_with_a_second_meaning(tmp_path: Path, name: str, truth: Tensor) -> None:
    value = graph([node("Neg", "s", name), node("Relu", name, "r")])
    weight = graph([node("Relu", "s", "r")], weights={name: torch.ones(2)})
    within = graph([branch("c", value, NEGATIVE, "r2"), node("Relu", "r2", "r")])
    for hostile in (value, weight, within):
        path = file(
            tmp_path / "m.onnx", [node("Sigmoid", "x", "s"), branch("c", hostile, RELU)], {"c": truth}
        )
        with pytest.raises(UnsafeFile, match="choose differently"):
            import_graph(path)
        assert inspect(path).loading == "deceptive"


def test_a_name_of_the_branch_around_it(tmp_path: Path) -> None:
    within = graph([node("Neg", "x", "a"), node("Relu", "a", "q")], "q")
    around = graph([node("Relu", "x", "a"), branch("c", within, graph([], "a"), "r")])
    path = file(tmp_path / "m.onnx", [branch("c", around, NEGATIVE)], {"c": TRUE})
    with pytest.raises(UnsafeFile, match="choose differently"):
        import_graph(path)


def change(make: Callable[[Any], None]) -> Any:
    made = branch("c", RELU, NEGATIVE)
    make(made)
    return made


def _two_graphs(made: Any) -> None:
    made.attribute.add().CopyFrom(made.attribute[0])


BROKEN: dict[str, Any] = {
    "no branch": change(lambda made: made.attribute.pop()),
    "two of one name": change(_two_graphs),
    "more results": change(lambda made: made.output.append("more")),
    "fewer results": change(lambda made: [a.g.output.pop() for a in made.attribute]),
    "inputs": change(lambda made: [a.g.input.add(name="i") for a in made.attribute]),
    "a result that nothing makes": branch("c", graph([], "nowhere"), graph([], "nowhere")),
    "a number for a graph": node("If", "c", "h", then_branch=1, else_branch=2),
    "no condition": change(lambda made: made.input.pop()),
}


@pytest.mark.parametrize("case", BROKEN)
def test_branches_that_make_no_sense(tmp_path: Path, case: str) -> None:
    for truth in (TRUE, FALSE):
        path = file(tmp_path / "m.onnx", [BROKEN[case]], {"c": truth})
        try:
            import_graph(path)
        except UnbackdoorError:
            continue
        assert case in ("no branch", "two of one name")  # of the branch that is not taken


def test_deep_and_wide_branches_end(tmp_path: Path) -> None:
    deep = graph([node("Relu", "x", "r30")], "r30")
    for depth in range(30):
        deep = graph([branch("c", deep, graph([], "x"), f"r{29 - depth}")], f"r{29 - depth}")
    path = file(tmp_path / "m.onnx", [branch("c", deep, RELU)], {"c": TRUE})
    with pytest.raises((UnsafeFile, InputError)):
        import_graph(path)
    chain: list[Any] = []
    last = "x"
    for place in range(40):  # each condition is a size of what the branch before gives
        chain += [node("Shape", last, f"s{place}"), node("Gather", f"s{place} three", f"n{place}"),
                  node("Equal", f"n{place} eight", f"c{place}"),
                  branch(f"c{place}", graph([node("Relu", last, "r")]), graph([], last),
                         f"b{place}")]  # fmt: skip
        last = f"b{place}"
    constants = {"three": torch.tensor(3), "eight": torch.tensor(8)}
    path = file(tmp_path / "m.onnx", [*chain, node("Identity", last, "h")], constants)
    with pytest.raises(UnsupportedModel, match="does not decide"):
        import_graph(path)
    wide = [branch("c", graph([node("Relu", "x", "r")]), NEGATIVE, f"w{place}") for place in range(400)]
    path = file(tmp_path / "m.onnx", [*wide, node("Add", "w0 w399", "h")], {"c": TRUE})
    same_as_runtime(path)


def test_conditions_that_grow(tmp_path: Path) -> None:
    nodes = [node("Shape", "x", "s")]
    for step in range(6):
        nodes.append(node("Tile", f"{'s' if not step else f't{step - 1}'} often", f"t{step}"))
    nodes += [node("Equal", "t5 t5", "e"), node("Gather", "e zero", "c"), branch("c", RELU, NEGATIVE)]
    constants = {"often": torch.tensor([1000]), "zero": torch.tensor(0)}
    path = file(tmp_path / "m.onnx", nodes, constants)
    with pytest.raises(UnbackdoorError):
        import_graph(path)
