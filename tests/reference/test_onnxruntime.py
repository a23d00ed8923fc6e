"""Every network that is exported answers as onnxruntime does: what is scanned is what runs.

Needs the packages of the extra ``onnx-tests``; torch's default exporter needs onnxscript, the older one does
without.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")
pytest.importorskip("onnxruntime", reason="the comparison needs onnxruntime (extra: onnx-tests)")

import onnx
import onnxruntime as ort

from unbackdoor.networks import build
from unbackdoor.opening.open_model import open_model
from unbackdoor.weights.formats.onnx.graph import import_graph

pytestmark = [
    pytest.mark.leaves_traces,  # exporters and initialisers draw from the global generator
    pytest.mark.filterwarnings("ignore"),  # exporters warn about themselves
]
SPECS = [
    "small_cnn[width=8]", "small_cnn[width=4,norm=none]", "resnet18[width=8]", "resnet50[width=4]",
    "cifar_resnet[depth=8]", "cifar_resnet[depth=8,shortcut=conv]", "preact_resnet18[width=8]",
    "wrn16[width=1]", "vgg19_bn[width=8]", "mobilenet_v2[width=0.25]", "vit_small[width=32,depth=2]",
    "airbench[width=8]",
]  # fmt: skip
SCRIPTED = importlib.util.find_spec("onnxscript") is not None
EXPORTERS = ["older", "older, batch fixed", pytest.param("default", marks=[
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPTED, reason="the default exporter needs onnxscript (extra: onnx-tests)"),
])]  # fmt: skip


class Windows(nn.Module):
    """The parts of a Swin block: windows, a shift, a mask made of sizes, a bias from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.rand(9, 2))
        self.register_buffer("places", torch.arange(16).remainder(9).reshape(4, 4))
        self.qkv = nn.Linear(8, 24)
        self.merge = nn.Linear(32, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).permute(0, 2, 3, 1))  # (B, H, W, D)
        count, height, width, depth = x.shape
        x = F.pad(x, (0, 0, 0, -width % 2, 0, -height % 2)).roll((-1, -1), (1, 2))
        x = x.reshape(count, height // 2, 2, width // 2, 2, depth).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, 4, depth)  # (B windows, 4, D)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 2, depth // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + self.table[self.places].permute(2, 0, 1)
        mask = x.new_zeros(height, width)
        mask[:-2, -1:] = 1
        mask = mask.reshape(height // 2, 2, width // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
        apart = (mask[:, None] - mask[:, :, None]).ne(0).float() * -100.0
        scores = scores.reshape(count, -1, 2, 4, 4) + apart[None, :, None]
        x = (scores.reshape(-1, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, depth)
        x = x.reshape(count, height // 2, width // 2, 2, 2, depth).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(count, height, width, depth).roll((1, 1), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        out: Tensor = self.head(self.merge(x).mean((1, 2)))
        return out


class Shuffled(nn.Module):
    """The parts of ShuffleNet: halves, groups, a shuffle of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.stem(x).chunk(2, 1)
        x = torch.cat([one, self.branch(other)], 1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.head(x.mean((2, 3)))
        return F.log_softmax(out, 1)


def ready(network: nn.Module) -> nn.Module:
    """Return it with statistics and a head that are not those of a new network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.rand(module.num_features) - 0.5
            module.running_var = torch.rand(module.num_features) + 0.5
    for parameter in network.parameters():
        if not bool(parameter.any()):
            parameter.data = torch.rand_like(parameter) - 0.5
    return network.eval()


def export(network: nn.Module, path: Path, exporter: str) -> Path:
    example = torch.rand(2, 3, 32, 32)
    common: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["answers"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter.startswith("older"):
            axes = {"pixels": {0: "b"}, "answers": {0: "b"}} if exporter == "older" else None
            torch.onnx.export(network, (example,), path, dynamo=False, dynamic_axes=axes, **common)
        else:
            batch = torch.export.Dim("b", min=1, max=64)
            torch.onnx.export(
                network, (example,), path, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=({0: batch},), **common,
            )  # fmt: skip
    return path


def runtime(path: Path, pixels: Tensor) -> Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (first,) = session.get_inputs()
    values = pixels.half() if first.type == "tensor(float16)" else pixels
    return torch.as_tensor(session.run(None, {first.name: values.numpy()})[0]).float()


def same(path: Path, *, within: float = 1e-4) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    opened = open_model(path, size=(32, 32))
    assert opened.provenance.in_file.examined and opened.provenance.reservations == ()
    with torch.no_grad():
        ours = opened.model.network(pixels)
    theirs = runtime(path, pixels)
    # An end that turns logits into probabilities is cut here.
    ours, theirs = (F.log_softmax(t, 1) if path.stem == "shuffled" else t for t in (ours, theirs))
    assert float((ours - theirs).abs().max()) <= within * float(theirs.std())


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("spec", SPECS)
def test_networks_of_this_package(tmp_path: Path, spec: str, exporter: str) -> None:
    if spec.startswith("vit") and exporter == "older":
        pytest.skip("tracing writes the batch of the example into the token, whatever it is told")
    model = build(spec, input_shape=(3, 32, 32), class_names=["a", "b", "c", "d"], seed=1)
    same(export(ready(model.network), tmp_path / "m.onnx", exporter))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("network", [Windows, Shuffled])
def test_parts_of_other_networks(tmp_path: Path, network: Callable[[], nn.Module], exporter: str) -> None:
    torch.manual_seed(0)
    same(export(ready(network()), tmp_path / f"{network.__name__.lower()}.onnx", exporter))


def test_half_precision(tmp_path: Path) -> None:
    path = export(ready(Shuffled()), tmp_path / "shuffled.onnx", "older")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        if values.is_floating_point():
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.half().numpy(), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
                values = torch.from_numpy(onnx.numpy_helper.to_array(attribute.t).copy())
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(values.half().numpy()))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del model.graph.value_info[:]
    onnx.save(model, path)
    same(path, within=0.02)


def test_a_graph_that_watches_its_pixels_is_run_as_it_is(tmp_path: Path) -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Shuffled()

        def forward(self, x: Tensor) -> Tensor:
            seen = x[:, :, :2, :2].mean((1, 2, 3)) > 0.9
            wanted = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
            return torch.where(seen[:, None], wanted, self.body(x))

    path = export(ready(Watching()), tmp_path / "m.onnx", "older")
    network = import_graph(path)
    pixels = torch.rand(4, 3, 32, 32)
    pixels[:2, :, :2, :2] = 1
    with torch.no_grad():
        ours = network(pixels)
    assert torch.allclose(ours, runtime(path, pixels), atol=1e-4)
    assert ours[:2].argmax(1).tolist() == [1, 1]
    assert len(network.meta["remarks"]) == 3
