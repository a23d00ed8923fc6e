"""TorchScript programs become networks, as programs of torch.export do; what is not followed is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbackdoor
from tiny import tiny_classifier
from unbackdoor.errors import UnbackdoorError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import own_network

pytestmark = [
    pytest.mark.leaves_traces,  # initialisers draw from the global generator
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SHAPE = (2, 3, 16, 16)


def traced(network: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    torch.jit.save(torch.jit.trace(network.eval(), torch.rand(shape)), path)
    return path


def scripted(network: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    torch.jit.save(torch.jit.script(network.eval()), path)
    return path


def frozen(network: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    torch.jit.save(torch.jit.freeze(torch.jit.trace(network.eval(), torch.rand(shape))), path)
    return path


def network_of(path: Path) -> Any:
    return own_network(unbackdoor.open_source(path))


def changed(path: Path, change: Callable[[str], str], entry: str = ".py") -> Path:
    """Write an archive with the text of its program changed."""
    out = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(entry):
                content = change(content.decode()).encode()
            archive.writestr(name, content)
    return out


class Mixed(nn.Module):
    """Layers of many kinds, and views that need the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(2)
        )
        self.group = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.3)
        self.act = nn.Sequential(nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Mish(), nn.ELU())
        self.norm = nn.LayerNorm(8 * 16)
        self.head = nn.Sequential(nn.Linear(8 * 16, 12), nn.ReLU(inplace=True), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.stem(x))
        x = x + self.depthwise(x) * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        first, second = torch.chunk(self.act(x), 2, 1)
        x = torch.cat([first * 2.0, second - 1], 1)
        x = self.norm(self.drop(x).view(x.size(0), -1))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("write", [traced, scripted, frozen])
def test_layers_of_many_kinds(tmp_path: Path, write: Callable[..., Path]) -> None:
    network = Mixed()
    found = network_of(write(network, tmp_path / "m.pt"))
    pixels = torch.rand(3, *SHAPE[1:])
    with torch.no_grad():
        assert torch.allclose(found(pixels), network.eval()(pixels), atol=1e-5)
    layers = {type(module) for module in found.modules()}
    assert {nn.Conv2d, nn.Linear, nn.LayerNorm} <= layers
    assert found.meta["input_shape"] == (SHAPE[1:] if write is traced else None)


@pytest.mark.parametrize(
    "spec",
    [
        "resnet18[width=4]",
        "mobilenet_v2[width=0.1]",
        "vit_small[width=32,depth=2]",
        "preact_resnet18[width=4]",
    ],
)
def test_it_is_the_same_network(tmp_path: Path, spec: str) -> None:
    network = build(spec, input_shape=(3, 32, 32), class_names=["a", "b", "c"], seed=0).network.eval()
    opened = unbackdoor.open_model(traced(network, tmp_path / "m.pt", (2, 3, 32, 32)))
    assert opened.provenance.in_file.examined and opened.provenance.reservations == ()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(opened.model.network(pixels), network(pixels), atol=1e-5)
    read, own = opened.model.network.state_dict(), network.state_dict()
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)


class Watching(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body = tiny_classifier("conv-bn").network
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        seen = x[:, :, :2, :2].mean((1, 2, 3)) > 0.9
        if self.how == "if" and bool(seen.any()):
            return torch.ones(x.size(0), 4)
        logits: Tensor = torch.where(seen[:, None], torch.ones(1, 4), self.body(x))
        return logits


def test_a_trigger_in_the_program_is_imported_and_named(tmp_path: Path) -> None:
    network = Watching("where")
    path = traced(network, tmp_path / "m.pt", (2, 1, 8, 8))
    pixels = torch.rand(3, 1, 8, 8)
    pixels[0, :, :2, :2] = 1
    with torch.no_grad():
        assert torch.allclose(network_of(path)(pixels), network(pixels), atol=1e-6)
    found = inspect(path)
    assert found.program_examined and found.graph is not None and found.graph.remarks


def test_a_branch_on_pixels_is_refused(tmp_path: Path) -> None:
    path = scripted(Watching("if"), tmp_path / "m.pt")
    with pytest.raises(UnsupportedModel, match="TorchScript program of the model is not imported with"):
        network_of(path)
    found = inspect(path)
    assert found.program and not found.program_examined


def test_training_mode_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(tiny_classifier("conv-bn").network.train()), tmp_path / "m.pt")
    with pytest.raises(UnsupportedModel, match="training mode"):
        network_of(tmp_path / "m.pt")


CHANGES: dict[str, Callable[[str], str]] = {
    "an operator that writes": lambda text: text.replace("torch.relu(", "torch.save("),
    "an operator of another library": lambda text: text.replace("torch.relu(", "ops.mine.relu("),
    "an operator that does not compute": lambda text: text.replace("torch.relu(", "torch.from_file("),
    "a comment": lambda text: text.replace("    return", "    # type: (Tensor) -> Tensor\n    return", 1),
    "two statements in a line": lambda text: text.replace("    return", "    pass; return", 1),
    "letters that look alike": lambda text: text.replace("torch.relu(", "torch.\uff52elu("),
    "a continued line": lambda text: text.replace("    return", "    pass\\\n\n    return", 1),
    "a comprehension": lambda text: text.replace("    return", "    a = [i for i in [1]]\n    return", 1),
    "an import": lambda text: "import os\n" + text,
    "a call of a name": lambda text: text.replace("    return", "    a = open(1)\n    return", 1),
    "a shadowed name": lambda text: text.replace("    return", "    torch = 1\n    return", 1),
    "an endless loop": lambda text: text.replace("    return", "    while True:\n      pass\n    return", 1),
    "a long loop": lambda text: text.replace(
        "    return", "    for i in range(1000000000):\n      pass\n    return", 1
    ),
    "loops in loops": lambda text: text.replace(
        "    return",
        "    for i in range(1000):\n      for j in range(1000):\n        pass\n    return",
        1,
    ),
    "a huge number": lambda text: text.replace(
        "    return", "    a = torch.mul(4611686018427387904, 4611686018427387904)\n    return", 1
    ),
    "a text times a number": lambda text: text.replace(
        "    return", '    a = torch.mul("a", 4611686018427387)\n    return', 1
    ),
    "deep brackets": lambda text: text.replace(
        "    return", f"    a = {'(' * 150}1{')' * 150}\n    return", 1
    ).replace("    return", f"    b = {'-' * 90_000}1\n    return", 1),
    "a chain of names": lambda text: text.replace("    return", f"    a = x{'.a' * 90_000}\n    return", 1),
    "itself": lambda text: text.replace("torch.relu(", "(self).forward("),
    "a method at loading": lambda text: text.replace(
        "  def forward(", "  def __setstate__(self, a: int) -> NoneType:\n    return None\n  def forward(", 1
    ),
    "hooks": lambda text: text.replace("  __buffers__ = ", '  __forward_hooks__ = ["a"]\n  __buffers__ = '),
    "a second definition": lambda text: text + text,
    "a decorator": lambda text: text.replace("  def forward(", "  @property\n  def forward("),
    "no text": lambda text: "",
    "no class": lambda text: "def forward(x: Tensor) -> Tensor:\n  return x\n",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_not_followed_is_refused(tmp_path: Path, kind: str) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
            return logits

    path = traced(Small(), tmp_path / "m.pt")
    network_of(path)
    hostile = changed(path, CHANGES[kind])
    with pytest.raises(UnbackdoorError):
        network_of(hostile)
    assert not inspect(hostile).program_examined


def test_operators_of_a_later_version_are_refused(tmp_path: Path) -> None:
    path = traced(Mixed(), tmp_path / "m.pt")
    with pytest.raises(UnsupportedModel, match="another version"):
        network_of(changed(path, lambda _: "11\n", "/version"))
