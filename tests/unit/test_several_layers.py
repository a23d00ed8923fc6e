"""Heads of several layers in the place of a network's last linear layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fake_zoo
from unbackdoor import load_model, open_model, save_model
from unbackdoor.engine.heads import find_affine_head
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.networks.build import canonical
from unbackdoor.networks.heads import with_head
from unbackdoor.networks.spec import read_spec
from unbackdoor.opening.recognise_head import find_head
from unbackdoor.opening.write_back import write_repaired
from unbackdoor.types import Images
from unbackdoor.weights.read import read_state

SPEC = "resnet18[width=4]"
WIDTH = 32  # values that the head takes


@pytest.fixture(autouse=True)
def own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 5)), "l8-a-l"),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5)),
        "d-l8-a-d-l",
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)),
        "l8n-b-a-l",
    ),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)), "y-l"),
    "norm and dropout": (
        lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(), nn.Linear(WIDTH, 5)),
        "b-d-l",
    ),
    "three": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5)),
        "l9-a-l8-a-l",
    ),
    "without activation": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, 5)), "l8-l"),
    "names": (
        lambda: nn.Sequential(
            OrderedDict(fc1=nn.Linear(WIDTH, 8), relu=nn.ReLU(), drop=nn.Dropout(), fc2=nn.Linear(8, 5))
        ),
        "l8-a-l",
    ),
    "names of norms": (
        lambda: nn.Sequential(
            OrderedDict(lin1=nn.Linear(WIDTH, 8), bn=nn.BatchNorm1d(8), act=nn.ReLU(), lin2=nn.Linear(8, 5))
        ),
        "l8-b-a-l",
    ),
    "of fastai": (
        lambda: nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Dropout(), nn.Linear(WIDTH, 8, bias=False), nn.ReLU(),
            nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5, bias=False),
        ),
        "b-d-l8n-a-b-d-ln",
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 5)),
        "d-l8-a-l",
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout()), nn.Linear(8, 5)
        ),
        "l8-b-a-l",
    ),
    "nested twice": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            nn.Linear(8, 5),
        ),
        "l8-a-l8-a-l",
    ),
    "a module of its own": (
        lambda: nn.ModuleDict({"layers": nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 5))}),
        "l8-a-l",
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.PReLU(), nn.Linear(8, 5)), "l8-p-l"),
    "one in a list in a list": (
        lambda: nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 5))),
        "d-l",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", ["fc", "classifier", "heads", "backbone.fc", "model.head", "body+head"])
@pytest.mark.parametrize("kind", HEADS)
def test_such_a_model_is_opened(tmp_path: Path, kind: str, place: str) -> None:
    make, tokens = HEADS[kind]
    network = build(SPEC, input_shape=(3, 16, 16), class_names=list("abcde"), seed=0).network
    made = make()
    network.fc = made if isinstance(made, nn.Sequential) else nn.Sequential(*made.values())  # type: ignore
    name, body = place.rpartition(".")[2], place.rpartition(".")[0]
    body = f"{body}." if body else ""
    if place == "body+head":
        name, body = "head", ""
    state = {}
    for old, tensor in network.state_dict().items():
        if old.startswith("fc."):
            inner = old[2:] if made is network.fc else old[2:].replace(".0", ".layers", 1)
            state[f"{body}{name}{inner}"] = tensor
        else:
            state[("encoder." if place == "body+head" else body) + old] = tensor
    torch.save(state, tmp_path / "m.pth")
    arch = f"{SPEC[:-1]},head={tokens},head_activation=relu]" if "a" in tokens else None
    opened = open_model(tmp_path / "m.pth", arch=arch, size=(16, 16), mean=(), std=())
    assert opened.model.architecture == canonical(f"{SPEC[:-1]},head={tokens}]")
    assert opened.source is not None
    assert set(opened.names.values()) == set(opened.source.contents.tensors)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(opened.model(images), network.eval()(images))
    save_model(opened.model, tmp_path / "again")
    again = load_model(tmp_path / "again.safetensors")
    with torch.no_grad():
        assert torch.equal(again(images), opened.model(images))


def test_an_activation_that_nothing_shows_is_not_guessed_in_silence(tmp_path: Path) -> None:
    model = build(f"{SPEC[:-1]},head=l8-a-l]", input_shape=(3, 16, 16), class_names=list("abcde"))
    torch.save(model.network.state_dict(), tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"head=l8-a-l\].*head_activation=gelu"):
        open_model(tmp_path / "m.pth", size=(16, 16), mean=(), std=())
    named = f"{SPEC[:-1]},head=l8-a-l,head_activation=gelu]"
    opened = open_model(tmp_path / "m.pth", arch=named, size=(16, 16), mean=(), std=())
    assert opened.model.architecture == named


def test_what_is_no_head_of_several_layers() -> None:
    one, two = torch.ones(5, 8), torch.ones(8, 5)
    for state in (
        {"blocks.0.mlp.fc1.weight": one, "blocks.0.mlp.fc2.weight": two, "x": one},
        {"fc.weight": one, "x": one},
        {"fc.0.weight": one, "fc.1.weight": one, "x": one},  # of other widths
        {"fc.0.weight": two, "fc.1.weight": one, "fc.1.extra": one, "x": one},
        {"fc.0.weight": torch.ones(3, 3, 1, 1), "fc.1.weight": one, "x": one},
        {"fc.0.weight": torch.ones(0, 8), "fc.1.weight": torch.ones(5, 0), "x": one},
        {"fc.0.weight": two, "fc.1.weight": one},  # nothing but a head
    ):
        assert find_head(state) is None, state.keys()


@pytest.mark.parametrize(
    "head",
    ["", "l8", "l-l", "l8-a", "x-l", "l8.5-l", "-".join(["d"] * 50 + ["l"]), "l-l8", "l999999-l"],
)
def test_heads_that_cannot_be_built(head: str) -> None:
    with pytest.raises(ConfigError):
        canonical(f"resnet18[head={head}]")
    with pytest.raises(ConfigError, match="head_activation"):
        canonical("resnet18[head=l8-a-l,head_activation=eval]")
    with pytest.raises(ConfigError, match="head"):
        canonical("resnet18[head_activation=gelu]")


def test_a_network_that_ends_in_no_linear_layer_takes_no_head() -> None:
    for network in (nn.Sequential(nn.Conv2d(3, 5, 1)), nn.Sequential(nn.Linear(4, 6)), nn.Linear(4, 5)):
        with pytest.raises(UnsupportedModel, match="does not end in a linear layer"):
            with_head(network, {"head": "l8-a-l"}, 5, "here")


def test_an_argument_of_the_users_code_is_theirs() -> None:
    assert canonical("own.py:make[head=big]") == "own.py:make[head=big]"


def test_layers_beside_the_body_are_a_head(tmp_path: Path) -> None:
    # As ``self.backbone``, ``self.fc1``, ``self.norm`` and ``self.fc2`` of a module of one's own.
    spec = f"{SPEC[:-1]},head=l8-b-a-l]"
    network = build(spec, input_shape=(3, 16, 16), class_names=list("abcde"), seed=0).network
    names = {"fc.0": "fc1", "fc.1": "norm", "fc.3": "fc2"}
    parts = [(name.rpartition("."), tensor) for name, tensor in network.state_dict().items()]
    state = {f"{names.get(layer, f'backbone.{layer}')}.{leaf}": t for (layer, _, leaf), t in parts}
    for number, saved in enumerate((state, dict(sorted(state.items())))):
        path = tmp_path / f"{number}.pth"
        torch.save(saved, path)
        opened = open_model(path, arch=f"{spec[:-1]},head_activation=relu]", size=(16, 16), mean=(), std=())
        images = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(opened.model(images), network.eval()(images))
        with pytest.raises(InputError, match=r"head=l8-b-a-l\].*head_activation=gelu"):
            open_model(path, size=(16, 16), mean=(), std=())


LIBRARIES = {
    "timm:tiny_net": ("head", [("stem", nn.Conv2d(3, 4, 3)), ("blocks.0", nn.Conv2d(4, 4, 1)),
                               ("blocks.1", nn.Conv2d(4, 4, 1))]),
    "torchvision:tiny_net": ("fc", [("body", nn.Conv2d(3, 4, 3))]),
    "hf:{folder}": ("classifier", [("vit", nn.Conv2d(3, 4, 3))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["l8-a-l", "y-l8-a-l", "l8n-b-a-d-l", "names", "d-l"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_named_network_of_a_library_takes_the_head_that_the_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    place, body = LIBRARIES[library]
    layers: dict[str, nn.Module] = {
        "l8-a-l": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)),
        "y-l8-a-l": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)),
        "l8n-b-a-d-l": nn.Sequential(
            nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5)
        ),
        "names": nn.Sequential(OrderedDict(fc1=nn.Linear(4, 8), relu=nn.ReLU(), fc2=nn.Linear(8, 5))),
        "d-l": nn.Sequential(nn.Dropout(), nn.Linear(4, 5)),
    }
    tokens = {"names": "l8-a-l"}.get(kind, kind)
    state = {
        f"{name}.{leaf}": tensor for name, module in body for leaf, tensor in module.state_dict().items()
    }
    state |= {f"{place}.{name}": tensor for name, tensor in layers[kind].state_dict().items()}
    torch.save(state, tmp_path / "m.pth")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"model_type": "tiny", "num_channels": 3}')
    folder = fake_zoo.write(
        tmp_path / "site",
        timm=fake_zoo.TIMM,
        torchvision="",
        torchvision__models=fake_zoo.TORCHVISION_MODELS,
        transformers=fake_zoo.TRANSFORMERS,
    )
    arch = library.format(folder=tmp_path / "config")
    with fake_zoo.importable(folder, monkeypatch):
        images = Images(
            torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20) % 5, tuple("abcde")
        )
        opened = open_model(tmp_path / "m.pth", arch=arch, images=images, size=(16, 16), mean=(), std=())
        assert opened.source is not None
        spec = read_spec(opened.model.architecture)
        assert spec.options.get("head") == tokens or "a" not in tokens  # a single layer may be renamed
        assert set(opened.names.values()) == set(opened.source.contents.tensors)
        note = opened.provenance.architecture.note
        assert ("which activation stands in the head" in note) == ("a" in tokens)
        linear = find_affine_head(opened.model)  # what methods act on
        assert linear.features == (8 if "a" in tokens else 4)
        repaired = opened.model.copy()
        with torch.no_grad():
            linear.of(repaired).module.weight.mul_(0.5)
        write_repaired(tmp_path / "out.pth", repaired, opened, step={}, record={})
        written = read_state(tmp_path / "out.pth")
        last = list(layers[kind].state_dict())[-2]
        assert torch.equal(written[f"{place}.{last}"], state[f"{place}.{last}"] * 0.5)
        assert written.keys() == state.keys()


def test_the_activation_is_chosen_by_accuracy(tmp_path: Path) -> None:
    spec = f"{SPEC[:-1]},head=l8-a-l,head_activation=tanh]"
    model = build(spec, input_shape=(3, 16, 16), class_names=list("abcde"), seed=0)
    pixels = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in model.network.fc[0].parameters():  # type: ignore[index, union-attr]
            parameter.mul_(30)
        logits = model.network(pixels.float() / 255)
        model.network.fc[2].bias.sub_(logits.mean(0))  # type: ignore[index, union-attr]
        labels = model.network(pixels.float() / 255).argmax(1)
    torch.save(model.network.state_dict(), tmp_path / "m.pth")
    opened = open_model(tmp_path / "m.pth", images=Images(pixels, labels, tuple("abcde")), mean=(), std=())
    assert opened.model.architecture == canonical(spec)
