"""Quantised ONNX graphs, as quantisers write them: what is scanned is what runs, rounding included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

import onnx
from onnx import TensorProto, helper

import unbackdoor
from graphs import answers, node, write_onnx
from tiny import tiny_data
from unbackdoor.errors import UnbackdoorError, UnsupportedModel
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.onnx.graph import describe_graph, import_graph
from unbackdoor.weights.formats.onnx.write import write_graph

GENERATOR = torch.Generator().manual_seed(5)
PIXELS = torch.rand(3, 1, 8, 8, generator=GENERATOR)  # (B, C, H, W)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR) - 0.5


def levels(values: Tensor, bits: torch.dtype, axis: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels, scale and zero of some weights."""
    axes = [at for at in range(values.dim()) if at != axis]
    low, high = values.amin(axes).clamp(max=0), values.amax(axes).clamp(min=0)
    if axis is None:
        low, high = low.min(), high.max()
    info = torch.iinfo(bits)
    scale = (high - low) / (info.max - info.min)
    zero = (info.min - low / scale).round()
    shape = [-1 if at == axis else 1 for at in range(values.dim())]
    made = (values / scale.reshape(shape) + zero.reshape(shape)).round().clamp(info.min, info.max)
    return made.to(bits), scale, zero.to(bits)


def dynamic_layer(
    kind: str, value: str, weight: Tensor, bits: torch.dtype, axis: int | None = None, **options: Any
) -> tuple[list[Any], dict[str, Tensor]]:
    """Return a layer as ``quantize_dynamic`` of onnxruntime writes it; its result has the name ``layer``."""
    layer = options.pop("layer")
    held, scale, zero = levels(weight, bits, axis)
    quantised = [f"{layer}_x_quantized", f"{layer}_x_scale", f"{layer}_x_zero_point"]
    named = {
        f"{layer}.weight_quantized": held,
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_zero_point": zero,
    }
    product = [quantised[0], f"{layer}.weight_quantized", quantised[2], f"{layer}.weight_zero_point"]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [value], quantised),
        node("Mul", f"{quantised[1]} {layer}.weight_scale", f"{layer}_scales"),
        node(kind, " ".join(product), f"{layer}_sums", **options),
        node("Cast", f"{layer}_sums", f"{layer}_cast", to=TensorProto.FLOAT),
        node("Mul", f"{layer}_cast {layer}_scales", layer),
    ]
    return nodes, named


def dynamic(path: Path, bits: torch.dtype = torch.int8, axis: int | None = None) -> Path:
    """Write a network of two convolutions and two linear layers, quantised dynamically."""
    weights = {"bias": drawn(1, 4, 1, 1), "fc.bias": drawn(8)}
    nodes: list[Any] = []
    last = "x"
    for layer, shape in (("conv1", (4, 1, 3, 3)), ("conv2", (6, 4, 3, 3))):
        made, held = dynamic_layer("ConvInteger", last, drawn(*shape), bits, layer=layer, pads=[1, 1, 0, 1])
        last = f"{layer}_relu"
        nodes += made
        if layer == "conv1":
            nodes.append(node("Add", "conv1 bias", "conv1_biased"))
        nodes.append(node("Relu", "conv1_biased" if layer == "conv1" else layer, last))
        weights |= held
    nodes += [node("GlobalAveragePool", last, "g"), node("Flatten", "g", "f")]
    made, held = dynamic_layer("MatMulInteger", "f", drawn(6, 8), bits, axis, layer="fc")
    nodes += [*made, node("Add", "fc fc.bias", "h")]
    last_made, last_held = dynamic_layer("MatMulInteger", "h", drawn(8, 4), bits, axis, layer="head")
    last_made[-1].output[0] = "y"
    return write_onnx(path, [*nodes, *last_made], {**weights, **held, **last_held})


def same_as_runtime(path: Path, pixels: Tensor = PIXELS, atol: float = 1e-5) -> None:
    # One image at a time, because values may be quantised by the range that they have in a batch.
    expected = torch.cat([answers(path, image) for image in pixels.split(1)])
    with torch.no_grad():
        assert torch.allclose(import_graph(path)(pixels), expected, atol=atol)


# ---------------------------------------------------------------------------------------------------
# By the range of the values


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bits", [torch.int8, torch.uint8])
def test_a_dynamically_quantised_network_opens(tmp_path: Path, bits: torch.dtype, axis: int | None) -> None:
    path = dynamic(tmp_path / "m.onnx", bits, axis)
    network = import_graph(path)
    same_as_runtime(path)
    state = network.state_dict()
    # The names and the sizes of the layers that it was made of; the bias of a product is in its layer.
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == {
        "conv1.weight": (4, 1, 3, 3), "conv2.weight": (6, 4, 3, 3), "fc.weight": (8, 6), "head.weight": (4, 8)
    }  # fmt: skip
    assert state["fc.bias"].shape == (8,)
    assert set(network.meta["places"]) == {name for name, _ in network.named_parameters()}
    assert network.meta["remarks"] == () and describe_graph(path).unknown == ()
    pixels = PIXELS.clone().requires_grad_()
    network(pixels).sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.abs().sum() > 0)
    with torch.no_grad():  # where all values are zero there is no range
        assert bool(network(torch.zeros(2, 1, 8, 8)).isfinite().all())
    shown = inspect(path)
    assert shown.loading == "no code" and shown.graph is not None and shown.graph.problem is None


def test_a_repair_of_a_dynamically_quantised_network(tmp_path: Path) -> None:
    source = dynamic(tmp_path / "m.onnx", axis=1)
    network = import_graph(source)
    before = network.state_dict()
    after = {name: t * 1.25 if name in ("conv2.weight", "fc.bias") else t for name, t in before.items()}
    out = tmp_path / "out.onnx"
    write_graph(out, source, network.meta["places"], before, after)
    again = import_graph(out)
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {
        name: t.tolist() for name, t in after.items()
    }
    same_as_runtime(out)
    onnx.checker.check_model(onnx.load(out))
    kinds = [one.op_type for one in onnx.load(out).graph.node]
    assert kinds.count("ConvInteger") == 1 and kinds.count("Conv") == 1  # the other layer stays as it was
    held = {tensor.name for tensor in onnx.load(out).graph.initializer}
    assert "conv1.weight_quantized" in held and "conv2.weight_quantized" not in held
    # Again, and now all of them.
    after = {name: t * 0.5 for name, t in again.state_dict().items()}
    write_graph(tmp_path / "all.onnx", out, again.meta["places"], again.state_dict(), after)
    same_as_runtime(tmp_path / "all.onnx")
    left = {one.op_type for one in onnx.load(tmp_path / "all.onnx").graph.node}
    assert not left & {"ConvInteger", "MatMulInteger"}


def test_a_repair_on_the_whole_way(tmp_path: Path) -> None:
    source = dynamic(tmp_path / "m.onnx")
    done = unbackdoor.purify(source, tiny_data(60), "random_prune", mean=(0.0,), std=(1.0,))
    out = done.save(tmp_path / "out.onnx")
    again = unbackdoor.open_model(out, mean=(0.0,), std=(1.0,)).model
    assert again.sha256() == done.model.sha256()


def test_types_that_the_file_states_are_not_kept_where_they_are_wrong(tmp_path: Path) -> None:
    source = dynamic(tmp_path / "m.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    assert any(value.name == "conv1_sums" for value in model.graph.value_info)
    source.write_bytes(model.SerializeToString())
    network = import_graph(source)
    before = network.state_dict()
    after = {name: t + 0.5 for name, t in before.items()}
    write_graph(tmp_path / "out.onnx", source, network.meta["places"], before, after)
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out.onnx"), strict_mode=True, check_type=True)


PARTS = {
    # name: operators behind the quantisation of x, whether they can be written back
    "one scale after the other": (
        [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1), node("Mul", "c ws", "d"),
         node("Mul", "d scale", "n")],
        True,
    ),
    "the scale of the values first": (
        [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1), node("Mul", "scale c", "d"),
         node("Mul", "ws d", "n")],
        True,
    ),
    "scales under other names": (
        [node("Identity", "scale", "other"), node("Mul", "ws other", "both"), node("Identity", "z", "zero"),
         node("ConvInteger", "q w zero", "s"), node("Cast", "s", "c", to=1), node("Identity", "c", "i"),
         node("Mul", "both i", "n")],
        True,
    ),
    "sums in two places": (
        [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1), node("Mul", "c scale", "d"),
         node("Mul", "c scale", "e"), node("Add", "d e", "n")],
        False,
    ),
    "levels moved and dequantised": (
        [node("Transpose", "q", "m", perm=[0, 1, 3, 2]), node("DequantizeLinear", "m scale z", "n")],
        True,
    ),
    "two products of values": (
        [node("DequantizeLinear", "q scale z", "d"), node("Relu", "d", "r"),
         helper.make_node("DynamicQuantizeLinear", ["r"], ["q2", "scale2", "z2"]),
         node("MatMulInteger", "q q2 z z2", "s"), node("Mul", "scale2 scale", "both"),
         node("Cast", "s", "c", to=1), node("Mul", "c both", "n")],
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_forms_of_dynamic_quantisation(tmp_path: Path, case: str) -> None:
    nodes, writes = PARTS[case]
    weights = {"w": levels(drawn(4, 1, 3, 3), torch.int8)[0], "ws": torch.tensor(0.01)}
    first = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "z"])
    path = write_onnx(tmp_path / "m.onnx", [first, *nodes, node("Flatten", "n", "y")], weights)
    same_as_runtime(path, PIXELS - 0.4)
    network = import_graph(path)
    before = network.state_dict()
    after = {name: t * 1.5 if t.dim() == 4 else t for name, t in before.items()}
    changed = any(t.dim() == 4 for t in before.values())
    if not writes:
        with pytest.raises(UnsupportedModel, match="no place") as caught:
            write_graph(tmp_path / "out.onnx", path, network.meta["places"], before, after)
        assert caught.value.remedy
        assert not (tmp_path / "out.onnx").exists()
        return
    write_graph(tmp_path / "out.onnx", path, network.meta["places"], before, after)
    same_as_runtime(tmp_path / "out.onnx", PIXELS - 0.4)
    assert changed == ("w" in {name for one in nodes for name in one.input})


REFUSED = {
    "another zero": [node("ConvInteger", "q w other", "s"), node("Cast", "s", "c", to=1),
                     node("Mul", "c scale", "n")],
    "no zero": [node("ConvInteger", "q w", "s"), node("Cast", "s", "c", to=1), node("Mul", "c scale", "n")],
    "the scale of other values": [
        helper.make_node("DynamicQuantizeLinear", ["r"], ["q2", "scale2", "z2"]),
        node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1), node("Mul", "c scale2", "n")],
    "the scale twice": [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1),
                        node("Mul", "scale scale", "b"), node("Mul", "c b", "n")],
    "no scale": [node("ConvInteger", "q w z", "s"), node("Cast", "s", "n", to=1)],
    "a scale as a number": [node("Mul", "x scale", "n")],
    "a scale that is compared": [node("Greater", "scale ws", "g"), node("Cast", "g", "h", to=1),
                                 node("Mul", "x h", "n")],
    "a zero as a number": [node("Cast", "z", "g", to=1), node("Mul", "x g", "n")],
    "levels as numbers": [node("Cast", "q", "n", to=1)],
    "sums as whole numbers": [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=7),
                              node("Cast", "c", "n", to=1)],
    "sums that are bent": [node("ConvInteger", "q w z", "s"), node("Cast", "s", "c", to=1),
                           node("Relu", "c", "d"), node("Mul", "d scale", "n")],
    "dequantised with a multiple": [node("Mul", "scale ws", "b"), node("DequantizeLinear", "q b z", "n")],
    "dequantised without the zero": [node("DequantizeLinear", "q scale", "n")],
    "sums that overflow": [node("Flatten", "q", "f"), node("MatMulInteger", "f large z", "s"),
                           node("Cast", "s", "c", to=1), node("Mul", "c scale", "n")],
    "one zero for each row": [node("ConvInteger", "q w z wz", "s"), node("Cast", "s", "c", to=1),
                              node("Mul", "c scale", "n")],
    "numbers that were not quantised": [node("Cast", "x", "k", to=6), node("ConvInteger", "k w", "n")],
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_of_levels_and_scales_are_refused(tmp_path: Path, case: str) -> None:
    weights = {
        "w": levels(drawn(4, 1, 3, 3), torch.int8)[0], "ws": torch.tensor(0.01),
        "other": torch.tensor(9, dtype=torch.uint8), "wz": torch.zeros(3, dtype=torch.int8),
        "large": torch.full((64, 2), 1 << 20, dtype=torch.int32),
    }  # fmt: skip
    first = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "z"]), node("Relu", "x", "r")]
    path = write_onnx(tmp_path / "m.onnx", [*first, *REFUSED[case], node("Flatten", "n", "y")], weights)
    with pytest.raises(UnbackdoorError):
        import_graph(path)
    shown = inspect(path)  # it is odd, and no deception
    assert shown.loading == "no code" and shown.graph is not None and shown.graph.problem


# ---------------------------------------------------------------------------------------------------
# By a scale in the file


@pytest.mark.parametrize("bits", [torch.uint8, torch.int8, torch.uint16, torch.int16])
def test_values_are_rounded_as_the_file_rounds_them(tmp_path: Path, bits: torch.dtype) -> None:
    info = torch.iinfo(bits)
    for scale, name in ((torch.tensor(0.3), "coarse"), (torch.full((1,), 0.05), "a list of one")):
        zero = torch.full(scale.shape, (info.max + info.min) // 2 + 1).to(bits)
        nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
                 node("Flatten", "d")]  # fmt: skip
        path = write_onnx(tmp_path / f"{name}.onnx", nodes, {"s": scale, "z": zero})
        model = onnx.load(path)
        model.opset_import[0].version = 21  # of 16 bits from there on
        path.write_bytes(model.SerializeToString())
        same_as_runtime(path, PIXELS * 8 - 4, atol=1e-6)
        for kind in model.graph.node[:2]:
            kind.domain = "com.microsoft"
        path.write_bytes(model.SerializeToString())
        with torch.no_grad():
            shaped = scale.reshape(())
            expected = ((PIXELS / shaped).round() * shaped).flatten(1)
            assert torch.allclose(import_graph(path)(PIXELS), expected, atol=1e-6)


def test_a_scale_that_rounds_everything_away(tmp_path: Path) -> None:
    # What is scanned must not be the network that it would be without its roundings.
    weights = {
        "s": torch.tensor(100.0),
        "z": torch.tensor(0, dtype=torch.uint8),
        "v": drawn(64, 4),
        "b": drawn(4),
    }
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
             node("Flatten", "d", "f"), node("Gemm", "f v b")]  # fmt: skip
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    same_as_runtime(path)
    with torch.no_grad():
        assert torch.equal(import_graph(path)(PIXELS), weights["b"].expand(3, 4))


def test_a_scale_for_each_channel_of_computed_values(tmp_path: Path) -> None:
    weights = {
        "w": drawn(3, 1, 1, 1), "s": torch.tensor([0.1, 0.02, 0.3]),
        "z": torch.tensor([3, 100, 200], dtype=torch.uint8),
    }  # fmt: skip
    for axis in (1, -3):
        nodes = [node("Conv", "x w", "c"), node("QuantizeLinear", "c s z", "q", axis=axis),
                 node("DequantizeLinear", "q s z", "d", axis=axis), node("Flatten", "d")]  # fmt: skip
        same_as_runtime(write_onnx(tmp_path / "m.onnx", nodes, weights))


def test_images_that_are_not_the_first_axis(tmp_path: Path) -> None:
    # Their ranges could not be told apart.
    first = [node("Transpose", "x", "t", perm=[2, 0, 1, 3]),
             helper.make_node("DynamicQuantizeLinear", ["t"], ["q", "scale", "z"]),
             node("DequantizeLinear", "q scale z", "d"),
             node("Transpose", "d", "n", perm=[1, 2, 0, 3])]  # fmt: skip
    path = write_onnx(tmp_path / "m.onnx", [*first, node("Flatten", "n", "y")])
    with pytest.raises(UnsupportedModel):
        unbackdoor.open_model(path, mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("scale", [-0.1, 0.0, float("inf"), float("nan")])
def test_scales_that_are_none(tmp_path: Path, scale: float) -> None:
    weights = {"s": torch.tensor(scale), "z": torch.tensor(3, dtype=torch.uint8)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("MaxPool", "q", "m", kernel_shape=[2, 2]),
             node("DequantizeLinear", "m s z", "d"), node("Flatten", "d")]  # fmt: skip
    with pytest.raises(UnsupportedModel, match="QuantizeLinear"):
        import_graph(write_onnx(tmp_path / "m.onnx", nodes, weights))


def static(path: Path) -> Path:
    """Write a network with the operators of static quantisation."""
    kernel, kernel_scale, kernel_zero = levels(drawn(4, 1, 3, 3), torch.int8, axis=0)
    head, head_scale, head_zero = levels(drawn(4, 5), torch.int8)
    weights = {
        "xs": torch.tensor(1 / 255), "xz": torch.tensor(0, dtype=torch.uint8),
        "w": kernel, "ws": kernel_scale, "wz": torch.zeros_like(kernel_zero),
        "cs": torch.tensor(0.03), "cz": torch.tensor(120, dtype=torch.uint8),
        "bias": torch.tensor([500, -300, 20, 0], dtype=torch.int32),
        "p": head, "ps": head_scale, "pz": head_zero,
        "ys": torch.tensor(0.02), "yz": torch.tensor(100, dtype=torch.uint8), "axes": torch.tensor([1, 2]),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("QLinearConv", "q xs xz w ws wz cs cz bias", "c", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("QLinearMatMul", "t cs cz p ps pz ys yz", "m"),
        node("DequantizeLinear", "m ys yz", "d"),
        node("ReduceMean", "d axes", "y", keepdims=0),
    ]
    return write_onnx(path, nodes, weights)


def test_a_repair_of_a_statically_quantised_network(tmp_path: Path) -> None:
    source = static(tmp_path / "m.onnx")
    same_as_runtime(source)
    network = import_graph(source)
    before = network.state_dict()
    for names in (
        ["qlinearconv_1.bias"],
        ["qlinearmatmul_3.weight"],
        [n for n, t in before.items() if t.dim()],
    ):
        after = {name: t * 1.25 if name in names else t for name, t in before.items()}
        write_graph(tmp_path / "out.onnx", source, network.meta["places"], before, after)
        same_as_runtime(tmp_path / "out.onnx")
        onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
        changed = import_graph(tmp_path / "out.onnx")
        with torch.no_grad():
            assert torch.equal(changed(PIXELS), torch.func.functional_call(network, after, (PIXELS,)))


def test_a_layer_of_whole_numbers_behind_a_scale_in_the_file(tmp_path: Path) -> None:
    weights = {
        "xs": torch.tensor(1 / 255), "xz": torch.tensor(7, dtype=torch.uint8),
        "both": torch.tensor(0.01 / 255), "w": levels(drawn(4, 1, 3, 3), torch.int8)[0],
        "wz": torch.tensor([1, -2, 3, 0], dtype=torch.int8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"), node("ConvInteger", "q w xz wz", "s"),
        node("Cast", "s", "c", to=1), node("Mul", "c both", "n"), node("Flatten", "n"),
    ]  # fmt: skip
    source = write_onnx(tmp_path / "m.onnx", nodes, weights)
    network = import_graph(source)
    with torch.no_grad():
        held = (weights["w"].float() - weights["wz"].float().reshape(-1, 1, 1, 1)) * 0.01
        rounded = (PIXELS * 255).round().clamp(0, 248) / 255
        expected = torch.nn.functional.conv2d(rounded, held).flatten(1)
        assert torch.allclose(network(PIXELS), expected, atol=1e-4)
    before = network.state_dict()
    after = {name: t * 1.25 if t.dim() == 4 else t for name, t in before.items()}
    write_graph(tmp_path / "out.onnx", source, network.meta["places"], before, after)
    same_as_runtime(tmp_path / "out.onnx", atol=1e-4)
