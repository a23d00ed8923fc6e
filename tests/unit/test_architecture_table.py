"""Files of timm and torchvision are recognised by a table that a script makes of both libraries."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fake_zoo
from unbackdoor import open_model
from unbackdoor.errors import InputError, MissingExtra, UnsupportedModel
from unbackdoor.networks.build import canonical, network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.spec import read_spec
from unbackdoor.opening import architecture_table
from unbackdoor.opening.architecture_table import FILE, lookup, parse_table, table_text
from unbackdoor.opening.recognise_architecture import ends, in_libraries
from unbackdoor.types import Images

pytestmark = pytest.mark.leaves_traces
ROOT = Path(__file__).parents[2]
State = dict[str, Tensor]
VGG11 = (
    "sequential_cnn[features=c64-a-m-c128-a-m-c256-a-c256-a-m-c512-a-c512-a-m-c512-a-c512-a-m,"
    "classifier=l4096-a-d-l4096-a-d-l,side=7]"
)


def shapes(spec: str, geometry: Geometry) -> State:
    return network(spec, geometry, device="meta").state_dict()


# The file ------------------------------------------------------------------------------------------


def test_the_table_is_small_sorted_and_says_what_it_was_made_of() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text) < 500_000
    rows, libraries = parse_table(text)
    assert table_text(rows, libraries) == text
    assert table_text(rows[::-1], libraries) == text
    assert set(libraries) == {"timm", "torchvision"}
    assert rows == sorted(rows, key=lambda row: row.networks)
    assert len({(row.names, row.shapes) for row in rows}) == len(rows)
    assert all(row.classes for row in rows)


def test_the_table_holds_nearly_all_names_of_both_libraries() -> None:
    rows, _ = parse_table(FILE.read_text(encoding="utf-8"))
    specs = [spec for row in rows for same in row.networks for spec in same]
    assert len(specs) == len(set(specs))
    assert sum(spec.startswith("timm:") for spec in specs) > 1300
    assert sum(spec.startswith("torchvision:") for spec in specs) >= 80
    for spec in specs:
        assert str(read_spec(spec)) == spec
    for name in (
        *("resnet50", "vgg16", "vgg16_bn", "densenet121", "densenet161", "wide_resnet50_2", "alexnet"),
        *("resnext50_32x4d", "inception_v3", "inception_v3[aux_logits=false]", "googlenet", "mnasnet1_0"),
        *("googlenet[aux_logits=false]", "efficientnet_b0", "efficientnet_b3", "mobilenet_v3_small"),
        *("mobilenet_v3_large", "convnext_tiny", "vit_b_16", "swin_t", "shufflenet_v2_x1_0", "squeezenet1_1"),
    ):
        assert f"torchvision:{name}" in specs
    for name in ("tiny", "small", "base"):
        assert f"timm:vit_{name}_patch16_224" in specs
    assert {"timm:efficientnet_b0", "timm:convnext_tiny", "timm:swin_tiny_patch4_window7_224"} <= set(specs)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        *((f"resnet{depth}[width=64,stem=7x7+pool]", f"resnet{depth}") for depth in (18, 34, 50, 101, 152)),
        ("mobilenet_v2[width=1.0,strides=large]", "mobilenet_v2"),
        (VGG11, "vgg11"),
    ],
)
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 1000)])
def test_our_own_networks_with_the_same_tensors_are_found(
    own: str, theirs: str, channels: int, classes: int
) -> None:
    """The table was made of the real libraries, so that their hashes must be those of our equivalents."""
    state = shapes(own, Geometry(channels, 224, 224, classes))
    match = lookup(state)
    assert match is not None
    assert match.networks[0][0] == f"torchvision:{theirs}"
    assert (match.classes, match.channels) == (classes, channels)
    counters = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    assert lookup(counters) == match


def test_one_other_tensor_is_another_network() -> None:
    state = shapes("resnet18[width=64,stem=7x7+pool]", Geometry(3, 224, 224, 10))
    assert lookup(state | {"layer1.0.bn1.weight": torch.empty(65)}) is None
    assert lookup(state | {"conv1.weight": torch.empty(64)}) is None
    assert lookup(state | {"fc.bias": torch.empty(11)}) is None  # the classes of weight and bias
    assert lookup(state | {"another": torch.empty(1)}) is None
    assert lookup({name: t for name, t in state.items() if name != "layer4.1.conv2.weight"}) is None
    assert lookup({}) is None


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("head", ["fc", "classifier", "fc.1", "head"])
def test_wrappers_and_renamed_last_layers_do_no_harm(prefix: str, head: str) -> None:
    own = shapes("resnet18[width=64,stem=7x7+pool]", Geometry(3, 224, 224, 10))
    state = {prefix + re.sub(r"^fc\b", head, name): tensor for name, tensor in own.items()}
    assert in_libraries(state)
    assert ends(state) == (3, 10)
    del state[f"{prefix}layer1.0.conv1.weight"]
    assert not in_libraries(state)


# The script, and opening by its table, with stand-ins of the libraries -------------------------------

MORE_OF_TIMM = """
class Tanh(Tiny):
    def forward(self, x):
        return self.head(self.blocks(self.stem(x).tanh()).mean((2, 3)))

class Deep(Tiny):
    def __init__(self, in_chans, num_classes, depth):
        super().__init__(in_chans, num_classes, depth)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1))) for _ in range(depth)))

class Grey(Deep):
    def __init__(self, in_chans, num_classes, depth):
        assert in_chans == 3
        super().__init__(in_chans, num_classes, depth)
        self.more = nn.Parameter(torch.ones(3))

class Features(nn.Module):
    def __init__(self, in_chans, num_classes, depth):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3)

KINDS = {
    "tiny_net": Tiny, "tiny_twin": Tiny, "tiny_tanh": Tanh, "deep_net": Deep, "fixed_net": Grey,
    "features": Features,
}

def list_models():
    return sorted(KINDS)

def list_pretrained(pattern):
    return [pattern] if pattern == "tiny_net.*" else []

def is_model(name):
    return name in KINDS

def create_model(name, *, pretrained, num_classes, in_chans, exportable, scriptable, depth=2, img_size=16):
    assert not pretrained
    return KINDS[name](in_chans, num_classes, depth)
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, and two small libraries; what it makes of them is the table."""
    folder = fake_zoo.write(
        tmp_path / "site",
        timm=fake_zoo.TIMM + MORE_OF_TIMM,
        torchvision='__version__ = "0.9+cpu"',
        torchvision__models=fake_zoo.TORCHVISION_MODELS,
    )
    script = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "architecture_table.py")
    assert script is not None
    assert script.loader is not None
    module = importlib.util.module_from_spec(script)
    monkeypatch.setitem(sys.modules, "script", module)
    monkeypatch.setenv("UNBACKDOOR_CACHE", str(tmp_path / "cache"))
    script.loader.exec_module(module)
    with fake_zoo.importable(folder, monkeypatch):
        (tmp_path / "table.json").write_text(module.make_table(re.compile("")), encoding="utf-8")
        monkeypatch.setattr(architecture_table, "FILE", tmp_path / "table.json")
        architecture_table.forget_table()
        try:
            yield module
        finally:
            architecture_table.forget_table()


def test_the_script_makes_the_same_file_twice_and_puts_together_what_is_one_network(zoo: Any) -> None:
    text = architecture_table.FILE.read_text(encoding="utf-8")
    assert zoo.make_table(re.compile("")) == text
    rows, libraries = parse_table(text)
    assert libraries == {"timm": "1.2", "torchvision": "0.9"}
    by_name = {row.networks[0][0]: row for row in rows}
    # The published one first, its twin beside it, and the other activation apart; no classifier is left out.
    assert by_name["timm:tiny_net"].networks == (("timm:tiny_net", "timm:tiny_twin"), ("timm:tiny_tanh",))
    assert set(by_name) == {"timm:tiny_net", "timm:deep_net", "timm:fixed_net", "torchvision:tiny_net"}
    assert by_name["timm:tiny_net"].classes == ("head.bias:0", "head.weight:0")
    assert by_name["timm:tiny_net"].channels == ("stem.weight:1",)
    assert by_name["timm:fixed_net"].channels == ()


def saved(spec: str, path: Path, *, prefix: str = "", head: str = "head", classes: int = 5) -> State:
    state = network(spec, Geometry(3, 16, 16, classes), seed=3).state_dict()
    renamed = {prefix + name.replace("head", head): tensor for name, tensor in state.items()}
    save_file(renamed, path)
    return state


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("head", ["head", "fc", "classifier.1"])
def test_a_file_opens_without_an_architecture(zoo: Any, tmp_path: Path, prefix: str, head: str) -> None:
    state = saved("timm:deep_net", tmp_path / "m.safetensors", prefix=prefix, head=head)
    opened = open_model(tmp_path / "m.safetensors")
    assert opened.model.architecture == "timm:deep_net"
    assert opened.model.input_shape == (3, 16, 16)
    assert opened.model.classes == 5
    assert opened.provenance.to_dict()["normalisation"]["mean"] == [0.1, 0.2, 0.3]
    held = opened.model.network.state_dict()
    assert all(torch.equal(held[name], state[name]) for name in state)


def test_a_network_that_takes_colour_images_alone(zoo: Any, tmp_path: Path) -> None:
    saved("timm:fixed_net", tmp_path / "m.safetensors", classes=7)
    opened = open_model(tmp_path / "m.safetensors")
    assert (opened.model.architecture, opened.model.classes) == ("timm:fixed_net", 7)


def test_an_absent_library_is_named_with_what_was_recognised(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("timm:deep_net", tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"the weights of timm:deep_net.*unbackdoor\[zoo\]") as caught:
        open_model(tmp_path / "m.safetensors")
    assert (caught.value.module, caught.value.extra) == ("timm", "zoo")


def test_an_absent_library_is_named_where_a_chain_fits_too(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("timm:tiny_net", tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"sequential_cnn.*timm:tiny_net.*unbackdoor\[zoo\]"):
        open_model(tmp_path / "m.safetensors")


def test_of_several_networks_with_the_same_tensors_labelled_images_decide(zoo: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    saved("timm:tiny_tanh", path)
    with pytest.raises(InputError, match="several networks") as caught:
        open_model(path)
    assert "timm:tiny_net, timm:tiny_tanh" in str(caught.value)
    pixels = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    net = open_model(path, arch="timm:tiny_tanh").model
    with torch.no_grad():
        labels = net(pixels.float() / 255).argmax(1)
    images = Images(pixels=pixels, labels=labels, class_names=tuple("01234"), name="clean")
    assert open_model(path, images=images).provenance.to_dict()["architecture"]["fitting"] == [
        "timm:tiny_net",
        "timm:tiny_tanh",
    ]


def test_what_is_named_is_named_by_its_shapes_where_the_names_are_others(zoo: Any, tmp_path: Path) -> None:
    state = network("timm:fixed_net", Geometry(3, 16, 16, 5)).state_dict()
    renamed = {name.replace("blocks", "stages").replace("stem", "entry"): t for name, t in state.items()}
    save_file(renamed, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedModel, match=r"timm:fixed_net \(all of its shapes, under other names\)"):
        open_model(tmp_path / "m.safetensors")


# Our own families ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        *("resnet18[width=8]", "preact_resnet18[width=8]", "cifar_resnet[depth=20,width=8,shortcut=conv]"),
        *("wrn16[width=1]", "vgg19_bn[width=4]", "mobilenet_v2[width=0.25]", "vit_small[width=32,depth=2]"),
        "small_cnn[width=8]",
    ],
)
def test_each_own_family_still_opens_unaided(spec: str, tmp_path: Path) -> None:
    save_file(network(spec, Geometry(3, 32, 32, 7), seed=1).state_dict(), tmp_path / "m.safetensors")
    opened = open_model(tmp_path / "m.safetensors", size=(32, 32))
    assert opened.model.architecture == canonical(spec)
    assert opened.model.classes == 7
