"""Programs of torch.export become networks, as ONNX graphs do; what does not is named."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import app
from unbackdoor.errors import InputError, UnbackdoorError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import own_network

pytestmark = pytest.mark.leaves_traces  # initialisers draw from the global generator
OPTIONS: dict[str, Any] = {"mean": (0.35,), "std": (0.25,)}


def exported(network: nn.Module, path: Path, shape: tuple[int, ...] = (2, 1, 8, 8)) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network.eval(), (torch.rand(shape),)), path)
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], None], name: str = "changed.pt2") -> Path:
    """Write a program with its description changed."""
    out = path.with_name(name)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as archive:
        for entry in source.namelist():
            content = source.read(entry)
            if "/models/" in entry and entry.endswith(".json"):
                program = json.loads(content)
                change(program["graph_module"])
                content = json.dumps(program).encode()
            archive.writestr(entry, content)
    return out


def network_of(path: Path) -> Any:
    return own_network(unbackdoor.open_source(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_classifier("conv-bn").network, tmp_path_factory.mktemp("exported") / "m.pt2")


@pytest.mark.parametrize(
    "spec", ["resnet18[width=4]", "mobilenet_v2[width=0.1]", "vit_small[width=32,depth=2]"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_the_same_network(tmp_path: Path, spec: str, batch: int) -> None:
    network = build(spec, input_shape=(3, 32, 32), class_names=["a", "b", "c"], seed=0).network.eval()
    for parameter in network.parameters():
        parameter.data += 0.01 * torch.rand_like(parameter)
    opened = unbackdoor.open_model(exported(network, tmp_path / "m.pt2", (batch, 3, 32, 32)))
    assert opened.provenance.in_file.examined and opened.provenance.reservations == ()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(opened.model.network(pixels), network(pixels), atol=1e-6)
    read, own = opened.model.network.state_dict(), network.state_dict()
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)
    layers, own_layers = (
        {name: type(m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        for net in (opened.model.network, network)
    )
    assert layers == own_layers
    again = copy.deepcopy(opened.model)
    with torch.no_grad():
        assert torch.equal(again.network(pixels), opened.model.network(pixels))


def test_it_is_scanned_repaired_and_compared(tiny: Path, tmp_path: Path) -> None:
    done = unbackdoor.purify(tiny, tiny_data(60), "random_prune", **OPTIONS)
    with pytest.raises(InputError, match=r"ends in \.pt"):
        done.save(tmp_path / "out.safetensors")
    out = done.save(tmp_path / "out")
    assert out.suffix == ".pth"
    written = torch.load(out, weights_only=True)
    own = done.model.network.state_dict()
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
    scan = ["scan", str(tiny), "--checks", "weight_statistics", "--json", "--quiet"]
    told = json.loads(CliRunner().invoke(app, scan).stdout)
    assert told["reservations"] == [] and told["opened"]["in_file"]["examined"]
    found = inspect(tiny)
    assert found.program_examined and found.graph is not None and found.graph.input_shape == (1, 8, 8)
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "m.pth")
    same = unbackdoor.verify(
        tmp_path / "m.pth", tiny, tiny_data(60), arch="small_cnn[width=8]", checks="tac", **OPTIONS
    )
    assert same.logits is not None and same.logits.same


class Watching(nn.Module):
    """A network with a branch that watches a corner."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = tiny_classifier("conv-bn").network
        self.way = way
        self.register_buffer("wanted", torch.tensor([[0.0, 9.0, 0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        seen = x[:, :, :2, :2].mean((1, 2, 3))[:, None]
        if self.way == "where":
            return torch.where(seen > 0.9, self.wanted, self.body(x))
        if self.way == "masked":
            return self.body(x).masked_fill(seen > 0.9, 3.0)
        return self.body(x) + self.wanted * (50 * (seen - 0.9)).sigmoid()


@pytest.mark.parametrize("way", ["where", "masked", "sum"])
def test_a_way_around_the_body_is_named(tmp_path: Path, way: str) -> None:
    path = exported(Watching(way), tmp_path / "m.pt2")
    found = inspect(path)
    assert found.graph is not None and found.graph.problem is None
    assert any("bypasses" in text for text in found.graph.remarks)
    assert (way == "sum") != any("compares" in text or "branches" in text for text in found.graph.remarks)
    opened = unbackdoor.open_model(path)
    pixels = torch.rand(2, 1, 8, 8)
    pixels[0, :, :2, :2] = 1
    network = Watching(way).eval()
    with torch.no_grad():
        assert torch.allclose(opened.model.network(pixels), network(pixels), atol=1e-5)
    assert opened.provenance.reservations


def test_sizes_masks_and_constants(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 6)
            self.scale = torch.arange(6.0)  # neither parameter nor buffer
            self.register_buffer("passing", torch.ones(6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            mask = x.new_zeros(2, 3)
            mask[:1, :2] = 1
            kept = self.inner(x.flatten(1)).view(x.shape[0], 2, 3) * mask.view(2, 3)
            one, other = kept.reshape(-1, 6).chunk(2, 1)
            return torch.cat([one, other], 1).relu_() * self.scale + self.passing

    network = Masked().eval()
    path = exported(network, tmp_path / "m.pt2")
    pixels = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(network_of(path)(pixels), network(pixels), atol=1e-6)


def target(name: str, at: int = -1) -> Callable[[dict[str, Any]], None]:
    return lambda program: program["graph"]["nodes"][at].__setitem__("target", name)


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "an unknown operator": target("torch.ops.aten.normal_.default"),
    "python": target("os.system"),
    "an attribute of an operator": target("torch.ops.aten.linear.__class__"),
    "another attribute": target("torch.ops.aten.linear._schemas"),
    "an overload that writes": target("torch.ops.aten.add.out"),
    "another library": target("torch.ops.mylib.evil.default"),
    "a higher-order operator": target("torch.ops.higher_order.cond"),
    "no graph": lambda program: program.pop("graph"),
    "an operand that nothing makes": lambda program: program["graph"]["nodes"][3]["inputs"][0]["arg"].update(
        as_tensor={"name": "nowhere"}
    ),
    "an endless number": lambda program: program["graph"]["nodes"][0]["inputs"][3].update(
        arg={"as_ints": [1 << 70, 1]}
    ),
    "nodes that are none": lambda program: program["graph"].update(nodes=[1, None, "x"]),
    "a text as a size": lambda program: program["graph"]["nodes"][0]["inputs"][3].update(
        arg={"as_ints": ["1", "1"]}
    ),
    "another weight": lambda program: program["signature"]["input_specs"][0]["parameter"].update(
        parameter_name="__class__.weight"
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_imported_is_refused(tiny: Path, tmp_path: Path, case: str) -> None:
    path = changed(tiny, HOSTILE[case], f"{case.replace(' ', '-')}.pt2")
    with pytest.raises(UnbackdoorError):
        network_of(path)
    found = inspect(path)
    assert not found.program_examined and found.graph is not None and found.graph.problem
    # What is opened then is a guess by its weights, and says so.
    try:
        opened = unbackdoor.open_model(path, images=tiny_data(40))
    except UnbackdoorError:
        return
    assert any("was not examined" in text for text in opened.provenance.reservations)


def test_what_would_change_the_images_in_place_is_refused(tmp_path: Path) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1))

    path = exported(Writing(), tmp_path / "m.pt2")

    def write(program: dict[str, Any]) -> None:
        node = program["graph"]["nodes"][0]
        relu = {
            "target": "torch.ops.aten.relu_.default", "metadata": {}, "name": "r",
            "inputs": [{"name": "self", "arg": node["inputs"][0]["arg"], "kind": 1}],
            "outputs": [{"as_tensor": {"name": "r"}}],
        }  # fmt: skip
        program["graph"]["nodes"].insert(0, relu)

    with pytest.raises(UnsupportedModel, match="in place"):
        network_of(changed(path, write))


@pytest.mark.parametrize("training", ["dropout", "norm"])
def test_training_mode_is_not_what_is_scanned(tmp_path: Path, training: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    if training == "norm":
        network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten()).eval()
    path = exported(network, tmp_path / "m.pt2")

    def leave_on(program: dict[str, Any]) -> None:
        for node in program["graph"]["nodes"]:
            for one in node["inputs"]:
                if one["name"] in ("train", "training"):
                    one["arg"] = {"as_bool": True}

    network_of(path)
    with pytest.raises(UnsupportedModel, match=r"left on|training mode"):
        network_of(changed(path, leave_on))


def test_names_that_are_words_of_python(tmp_path: Path) -> None:
    network = nn.Sequential()
    network.add_module("flat", nn.Flatten())
    network.add_module("in", nn.Linear(64, 8))
    network.add_module("class", nn.Linear(8, 4))
    path = exported(network, tmp_path / "m.pt2")
    opened = unbackdoor.open_model(path)
    assert set(opened.model.network.state_dict()) == {
        "in_.weight",
        "in_.bias",
        "class_.weight",
        "class_.bias",
    }
    done = unbackdoor.purify(path, tiny_data(60), "random_prune", **OPTIONS)
    written = torch.load(done.save(tmp_path / "out.pth"), weights_only=True)
    assert written.keys() == network.state_dict().keys()


def test_random_changes_end_in_typed_errors(tiny: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    with zipfile.ZipFile(tiny) as source:
        entries = {entry: source.read(entry) for entry in source.namelist()}
    (name,) = (entry for entry in entries if "/models/" in entry)
    opened = 0
    for _ in range(60):
        broken = bytearray(entries[name])
        for place in torch.randint(0, len(broken), (3,), generator=generator).tolist():
            broken[place] = int(torch.randint(32, 127, (1,), generator=generator))
        with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, bytes(broken) if entry == name else content)
        try:
            network_of(tmp_path / "m.pt2")
            opened += 1
        except UnbackdoorError:
            pass
    assert opened
