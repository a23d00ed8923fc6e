"""Each operator of ONNX that exporters write computes here what the package onnx itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

from graphs import answers, node, write_onnx
from unbackdoor.errors import UnsupportedModel
from unbackdoor.weights.formats.onnx.graph import import_graph

GENERATOR = torch.Generator().manual_seed(5)
PIXELS = torch.rand(3, 3, 7, 6, generator=GENERATOR) * 4 - 2  # (B, C, H, W), on both sides of zero
SHAPE = ("b", 3, 7, 6)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=GENERATOR) - 0.5


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def same(path: Path, nodes: list[Any], weights: dict[str, Tensor] | None = None, atol: float = 1e-5) -> None:
    write_onnx(path, nodes, weights, shape=SHAPE)
    with torch.no_grad():
        found = import_graph(path)(PIXELS)
    expected = answers(path, PIXELS)
    assert found.shape == expected.shape
    assert torch.allclose(found.float(), expected.float(), atol=atol)


UNARY: dict[str, Any] = {
    "Celu": {"alpha": 1.5},
    "HardSigmoid": {"alpha": 0.3},
    "HardSwish": {},
    "LRN": {"size": 3, "alpha": 0.3},
    "LpNormalization": {"axis": 1},
    "MeanVarianceNormalization": {},
    "Mish": {},
    "ReduceL1": {"axes_": (1,)},
    "ReduceL2": {"axes_": (2, 3)},
    "ReduceLogSumExp": {"axes_": (1,)},
    "ReduceMean": {"axes_": (2, 3), "keepdims": 0},
    "ReduceSumSquare": {"axes_": (1,), "keepdims": 0},
    "Round": {},
    "Shrink": {"lambd": 0.7, "bias": 0.2},
    "Sign": {},
    "Softsign": {},
    "ThresholdedRelu": {"alpha": 0.4},
}


@pytest.mark.parametrize("kind", UNARY)
def test_operators_of_one_operand(tmp_path: Path, kind: str) -> None:
    attributes = dict(UNARY[kind])
    axes = attributes.pop("axes_", None)
    weights = {} if axes is None else {"axes": whole(*axes)}
    same(tmp_path / "m.onnx", [node(kind, "x" if axes is None else "x axes", **attributes)], weights)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_borders(tmp_path: Path, mode: str) -> None:
    same(tmp_path / "m.onnx", [node("Pad", "x pads", mode=mode)], {"pads": whole(0, 0, 1, 2, 0, 0, 3, 1)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("places", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (0.5, 1.5), (1.3, 0.7)])
def test_resizing_by_factors(tmp_path: Path, mode: str, places: str, factors: tuple[float, float]) -> None:
    resize = node("Resize", "x  scales", mode=mode, coordinate_transformation_mode=places)
    weights = {"scales": torch.tensor([1.0, 1.0, *factors])}
    if places == "align_corners" and factors != (2.0, 2.0):  # onnx and onnxruntime differ
        write_onnx(tmp_path / "m.onnx", [resize], weights, shape=SHAPE)
        with pytest.raises(ValueError, match="runtimes differ"):
            import_graph(tmp_path / "m.onnx")(PIXELS)
        return
    same(tmp_path / "m.onnx", [resize], weights)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resizing_to_sizes(tmp_path: Path, rounding: str) -> None:
    resize = node("Resize", "x   sizes", mode="nearest", nearest_mode=rounding)
    same(tmp_path / "m.onnx", [resize], {"sizes": whole(3, 3, 14, 4)})


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolution(tmp_path: Path, groups: int) -> None:
    weights = {"w": drawn(3, 2, 3, 3), "c": drawn(2 * groups)}
    layer = node(
        "ConvTranspose", "x w c", group=groups, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0]
    )
    if groups == 1:
        same(tmp_path / "m.onnx", [layer], weights)
    write_onnx(tmp_path / "m.onnx", [layer], weights, shape=SHAPE)
    # The package onnx does not compute groups.
    expected = F.conv_transpose2d(PIXELS, weights["w"], weights["c"], 2, 1, (1, 0), groups)
    with torch.no_grad():
        assert torch.allclose(import_graph(tmp_path / "m.onnx")(PIXELS), expected, atol=1e-5)


def quantised(values: Tensor, bits: torch.dtype = torch.int8) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels, scale and zero of some weights."""
    info = torch.iinfo(bits)
    scale = values.abs().max() / info.max
    return (values / scale).round().clamp(info.min, info.max).to(bits), scale, torch.zeros((), dtype=bits)


def test_quantised_layers(tmp_path: Path) -> None:
    kernel, kernel_scale, kernel_zero = quantised(drawn(4, 3, 3, 3))
    product, product_scale, product_zero = quantised(drawn(4, 5))
    weights = {
        "xs": torch.tensor(4 / 255), "xz": torch.tensor(128, dtype=torch.uint8),
        "w": kernel, "ws": kernel_scale, "wz": kernel_zero,
        "cs": torch.tensor(0.03), "cz": torch.tensor(120, dtype=torch.uint8),
        "bias": torch.tensor([500, -300, 20, 0], dtype=torch.int32),
        "p": product, "ps": product_scale, "pz": product_zero,
        "ys": torch.tensor(0.02), "yz": torch.tensor(100, dtype=torch.uint8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("QLinearConv", "q xs xz w ws wz cs cz bias", "c", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("QLinearMatMul", "t cs cz p ps pz ys yz", "m"),
        node("DequantizeLinear", "m ys yz"),
    ]
    same(tmp_path / "m.onnx", nodes, weights, atol=0.06)  # some steps of rounding
    found = import_graph(tmp_path / "m.onnx")
    assert {"Conv2d", "Linear"} <= {type(module).__name__ for module in found.modules()}
    assert any("rounding" in note for note in found.meta["notes"])
    assert {name.partition("_")[0] for name in found.meta["places"]} == {"qlinearconv", "qlinearmatmul"}


def test_quantised_values_of_another_scale_are_refused(tmp_path: Path) -> None:
    kernel, scale, zero = quantised(drawn(4, 3, 3, 3))
    weights = {
        "xs": torch.tensor(0.02), "other": torch.tensor(0.5), "xz": torch.tensor(0, dtype=torch.uint8),
        "w": kernel, "ws": scale, "wz": zero,
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"),
        node("QLinearConv", "q other xz w ws wz xs xz", "c"),
        node("DequantizeLinear", "c xs xz"),
    ]
    write_onnx(tmp_path / "m.onnx", nodes, weights, shape=SHAPE)
    with pytest.raises(UnsupportedModel, match="another scale"):
        import_graph(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "refused",
    [
        node("Resize", "x  scales", mode="linear", antialias=1),
        node("Resize", "x  scales", mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
        node("Resize", "x  huge"),
        node("Resize", "x  colours"),
        node("LRN", "x", size=2),
        node("ConvTranspose", "x w", pads=[1, 0, 0, 0]),
        node("ConvTranspose", "x w", output_shape=[9, 9]),
        node("Pad", "x pads", mode="reflect"),
    ],
    ids=lambda one: f"{one.op_type} {[a.name for a in one.attribute]} {one.input[-1]}",
)
def test_other_forms_are_refused_by_name(tmp_path: Path, refused: Any) -> None:
    weights = {
        "scales": torch.tensor([1.0, 1, 2, 2]), "huge": torch.tensor([1.0, 1, 1e9, 2]),
        "colours": torch.tensor([1.0, 2, 1, 1]), "w": drawn(3, 2, 3, 3),
        "pads": whole(0, 1, 0, 0, 0, 1, 0, 0),
    }  # fmt: skip
    write_onnx(tmp_path / "m.onnx", [refused], weights, shape=SHAPE)
    with pytest.raises(UnsupportedModel, match=refused.op_type):
        import_graph(tmp_path / "m.onnx")
