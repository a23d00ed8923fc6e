"""ONNX files as networks to audit: opened as their own graph, repaired, and written back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

import onnx

from graphs import answers, folded, node, write_onnx
from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor import open_model, save_model
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, IntegrityError, MissingExtra, UnsupportedModel
from unbackdoor.opening.cost_limits import outputs_of
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import Opened
from unbackdoor.opening.write_back import require_kind, write_weights
from unbackdoor.weights.formats.onnx import write as onnx_write
from unbackdoor.weights.formats.onnx.graph import import_graph
from unbackdoor.weights.formats.onnx.write import write_graph
from unbackdoor.weights.read import read_state

GENERATOR = torch.Generator().manual_seed(7)
PIXELS = torch.rand(3, 1, 8, 8, generator=GENERATOR)  # (B, C, H, W)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR) - 0.5


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "model.onnx", *folded(tiny_classifier("conv-bn")))


def repaired(opened: Opened) -> dict[str, Tensor]:
    """Return the weights after something was done to every tensor."""
    state = opened.model.network.state_dict()
    return {name: tensor + 0.125 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def write(path: Path, source: Path, opened: Opened, after: dict[str, Tensor]) -> Path:
    assert opened.places is not None
    write_graph(path, source, opened.places, opened.model.network.state_dict(), after)
    return path


def test_folded_norms_are_no_obstacle(exported: Path) -> None:
    images = tiny_data(80, seed=1)
    opened = open_model(exported, images=images)
    assert opened.images is not None
    architecture = opened.provenance.to_dict()["architecture"]
    assert (architecture["spec"], architecture["source"]) == ("ONNX", "the file's own graph")
    assert opened.model.input_shape == (1, 8, 8)
    assert opened.provenance.to_dict()["size_source"] == "the file's own graph"
    assert opened.model.class_names == NAMES
    assert opened.provenance.to_dict()["normalisation"]["source"] == "inferred from clean accuracy"
    assert accuracy(opened.model, opened.images, Run.create(policy="fp32")) > 0.95
    assert not opened.warnings


def test_what_is_told_comes_before_what_is_guessed(exported: Path) -> None:
    opened = open_model(exported, mean=(0.35,), std=(0.25,), class_names=list("abcd"))
    assert opened.provenance.to_dict()["normalisation"]["source"] == "arguments"
    with torch.no_grad():
        assert torch.allclose(opened.model(PIXELS), answers(exported, (PIXELS - 0.35) / 0.25), atol=1e-4)
    with pytest.raises(UnsupportedModel, match="class names do not fit"):
        open_model(exported, class_names=list("abc"))


def test_open_sizes_are_the_users_the_images_or_assumed(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", *folded(tiny_classifier("conv-bn")), shape=("b", "c", "h", "w"))
    assert open_model(path, images=tiny_data(40)).provenance.to_dict()["size_source"] == "the images"
    assert open_model(path, size=(16, 12)).model.input_shape == (1, 16, 12)
    opened = open_model(path)
    assert opened.provenance.to_dict()["size_source"] == "assumed"
    assert any("input size is not known" in text for text in opened.warnings)


def test_colours_last(tmp_path: Path) -> None:
    nodes = [node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Conv", "t w", "c"), node("Flatten", "c")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": drawn(2, 3, 8, 8)}, shape=("b", 8, 8, 3))
    opened = open_model(path)
    assert opened.model.input_shape == (3, 8, 8)
    assert "colours last" in opened.provenance.to_dict()["architecture"]["note"]
    x = torch.rand(2, 3, 8, 8, generator=GENERATOR)
    with torch.no_grad():
        assert torch.allclose(opened.model(x), answers(path, x.permute(0, 2, 3, 1)), atol=1e-5)


def test_sizes_that_are_computed_from_sizes(tmp_path: Path) -> None:
    # x.view(x.size(0), -1) with an open batch, and a token that is repeated for every image.
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "b", axis=0),
        node("Unsqueeze", "b zeros", "bs"),
        node("Concat", "bs rest", "sizes", axis=0),
        node("Reshape", "x sizes", "r"),
        node("Concat", "bs ones", "repeat", axis=0),
        node("ConstantOfShape", "three", "fill", value=onnx.numpy_helper.from_array(drawn(1).long().numpy())),
        node("Equal", "repeat fill", "none"),
        node("Where", "none one repeat", "grown"),
        node("Expand", "token grown", "t"),
        node("Concat", "r t", "j", axis=1),
        node("ReduceMean", "j axis", "m", keepdims=0),
        node("Gather", "m order", axis=1),
    ]
    weights = {
        "zero": torch.tensor(0), "zeros": torch.tensor([0]), "rest": torch.tensor([-1, 16]),
        "ones": torch.tensor([1, 16]), "one": torch.tensor([1]), "three": torch.tensor([3]),
        "token": drawn(1, 1, 16), "axis": torch.tensor([1]), "order": torch.tensor([3, -1, 0]),
    }  # fmt: skip
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    opened = open_model(path)
    with torch.no_grad():
        assert torch.allclose(opened.model(PIXELS), answers(path, PIXELS), atol=1e-6)
        assert torch.equal(copy.deepcopy(opened.model)(PIXELS), opened.model(PIXELS))


def test_the_answers_of_a_batch_must_not_mix(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "f"), node("ReduceMean", "f rows", "m"), node("Sub", "f m")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"rows": torch.tensor([0])})
    with pytest.raises(UnsupportedModel, match="one image as well as two"):
        open_model(path)


def test_families_are_for_graphs_that_cannot_be_imported(tmp_path: Path) -> None:
    state = tiny_classifier("conv-bn").network.state_dict()
    plain = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    path = write_onnx(tmp_path / "m.onnx", [node("LSTM"), node("NonZero", output="z")], plain)
    opened = open_model(path, images=tiny_data(80))
    assert opened.model.architecture == "small_cnn[width=8]" and opened.places is None
    path = write_onnx(tmp_path / "n.onnx", [node("LSTM"), node("NonZero", output="z")], {"w": drawn(3)})
    with pytest.raises(UnsupportedModel, match="LSTM, NonZero"):
        open_model(path)


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    nodes, weights = folded(tiny_classifier("conv-bn"))
    weights["fc.bias"] = torch.full((4,), float("nan"))
    with pytest.raises(InputError, match="not a finite number"):
        open_model(write_onnx(tmp_path / "m.onnx", nodes, weights))


def test_without_the_extra(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match="onnx"):
        open_model(exported)


def test_a_card_cannot_hold_a_graph(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="names no architecture"):
        save_model(open_model(exported).model, tmp_path / "x")


# ---------------------------------------------------------------------------------------------------
# Writing


def test_a_repair_goes_back_under_the_names_of_the_file(exported: Path, tmp_path: Path) -> None:
    opened = open_model(exported)
    after = repaired(opened)
    out = write(tmp_path / "out.onnx", exported, opened, after)
    again = open_model(out)
    assert again.places == opened.places
    state = again.model.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())
    assert read_state(out).keys() == read_state(exported).keys()
    onnx.checker.check_model(onnx.load(out))
    with torch.no_grad():
        assert torch.allclose(again.model(PIXELS), answers(out, PIXELS), atol=1e-4)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_did_not_change_stays_byte_for_byte(exported: Path, tmp_path: Path) -> None:
    opened = open_model(exported)
    same = write(tmp_path / "out.onnx", exported, opened, dict(opened.model.network.state_dict()))
    assert onnx.load(same) == onnx.load(exported)


AWKWARD: dict[str, tuple[list[Any], dict[str, Tensor]]] = {
    "shared": (
        [node("Conv", "x w b", "c"), node("Conv", "c w b", "d"), node("Flatten", "d")],
        {"w": drawn(1, 1, 3, 3), "b": drawn(1)},
    ),
    "renamed": (
        [node("Identity", "w", "v"), node("Conv", "x v", "c"), node("Flatten", "c")],
        {"w": drawn(2, 1, 3, 3)},
    ),
    "computed": (
        [
            node("Constant", "", "k", value=onnx.numpy_helper.from_array(drawn(2, 1, 3, 3).numpy())),
            node("Mul", "k two", "w"),
            node("Conv", "x w", "c"),
            node("Flatten", "c"),
        ],
        {"two": torch.tensor(2.0)},
    ),
    "scaled": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", alpha=0.5, beta=3.0)],
        {"w": drawn(64, 5), "b": drawn(5)},
    ),
    "one bias for all": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", transB=1)],
        {"w": drawn(5, 64), "b": drawn(1)},
    ),
    "product and sum": (
        [node("Flatten", "x", "f"), node("MatMul", "f w", "m"), node("Add", "b m")],
        {"w": drawn(64, 5), "b": drawn(5)},
    ),
    "norm": (
        [node("BatchNormalization", "x s o m v", "n"), node("Flatten", "n")],
        {"s": drawn(1), "o": drawn(1), "m": drawn(1), "v": drawn(1) + 1},
    ),
    "table": (
        [node("Mul", "x t", "u"), node("Add", "t u", "a"), node("Flatten", "a")],
        {"t": drawn(1, 8, 8)},
    ),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_tensors_that_are_no_weight_of_the_file(tmp_path: Path, case: str) -> None:
    source = write_onnx(tmp_path / "m.onnx", *AWKWARD[case])
    opened = open_model(source)
    after = {
        n: t + drawn(*t.shape) / 8
        for n, t in opened.model.network.state_dict().items()
        if t.is_floating_point()
    }
    after = {**opened.model.network.state_dict(), **after}
    out = write(tmp_path / "out.onnx", source, opened, after)
    again = open_model(out)
    state = again.model.network.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())
    with torch.no_grad():
        assert torch.allclose(again.model(PIXELS), answers(out, PIXELS), atol=1e-5)
        assert not torch.allclose(again.model(PIXELS), opened.model(PIXELS), atol=1e-3)


def test_a_token_repeated_for_the_batch_of_the_example(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", "x s", "r"),
        node("Concat", "t r", "j", axis=1),
        node("ReduceMean", "j a", keepdims=0),
    ]
    weights = {
        "s": torch.tensor([2, 4, 16]), "a": torch.tensor([1]),
        "t": drawn(1, 1, 16).expand(2, 1, 16).contiguous(),
    }  # fmt: skip
    source = write_onnx(tmp_path / "m.onnx", nodes, weights, shape=(2, 1, 8, 8))
    opened = open_model(source)
    out = write(tmp_path / "out.onnx", source, opened, repaired(opened))
    with torch.no_grad():
        assert torch.allclose(open_model(out).model(PIXELS[:2]), answers(out, PIXELS[:2]), atol=1e-5)


def test_weights_in_other_files_are_taken_in(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    apart = tmp_path / "apart"
    apart.mkdir()
    onnx.save_model(model, apart / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    opened = open_model(apart / "m.onnx")
    out = write(tmp_path / "out.onnx", apart / "m.onnx", opened, repaired(opened))
    (apart / "m.bin").unlink()
    state = open_model(out).model.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in repaired(opened).items())


def test_what_is_written_is_read_again_first(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(exported)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    fill = onnx_write._fill
    monkeypatch.setattr(onnx_write, "_fill", lambda message, tensor: fill(message, tensor + 1))
    with pytest.raises(IntegrityError, match="does not hold"):
        write(out, exported, opened, repaired(opened))
    assert out.read_bytes() == b"old"
    with pytest.raises(InputError, match="other tensors"):
        write(out, exported, opened, {"x": drawn(1)})


def test_suffixes_are_held_against_the_network(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_kind(exported.with_name("out.onnx"), exported, graph=True)
    with pytest.raises(InputError, match=r"ends in \.onnx"):
        require_kind(exported.with_name("out.safetensors"), exported, graph=True)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        require_kind(exported.with_name("out.onnx"), exported, graph=False)
    monkeypatch.setattr("unbackdoor.weights.formats.onnx.initializers.MAX_BYTES", 10_000)
    with pytest.raises(Exception, match="too large"):
        require_kind(exported.with_name("out.onnx"), exported, graph=True)


def test_initialisers_alone(exported: Path, tmp_path: Path) -> None:
    state = {name: tensor * 2 for name, tensor in read_state(exported).items()}
    write_weights(tmp_path / "out.onnx", state, source=exported)
    reread = read_state(tmp_path / "out.onnx")
    assert all(torch.equal(reread[name], tensor) for name, tensor in state.items())
    with pytest.raises(InputError, match="not those of the file"):
        write_weights(tmp_path / "x.onnx", {"fc.bias": drawn(4)}, source=exported)
    with pytest.raises(InputError, match="only where"):
        write_weights(tmp_path / "x.onnx", state)


# ---------------------------------------------------------------------------------------------------
# Telling


def test_inspect_tells_whether_the_graph_opens(exported: Path, tmp_path: Path) -> None:
    found = inspect(exported).graph
    assert found is not None
    assert (found.operators, found.unknown, found.input_shape, found.problem) == (12, (), (1, 8, 8), None)
    path = write_onnx(tmp_path / "m.onnx", [node("LSTM"), node("NonZero", output="z")], {"w": drawn(3)})
    found = inspect(path).graph
    assert found is not None and found.problem is not None
    assert found.unknown == ("LSTM", "NonZero") and "LSTM, NonZero" in found.problem


def test_effort_counts_what_an_image_costs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = import_graph(exported)
    assert outputs_of(network, (1, 8, 8), exported) == 4
    with pytest.raises(UnsupportedModel, match="images of this size"):
        outputs_of(network, (3, 8, 8), exported)
