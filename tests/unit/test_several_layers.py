"""Heads of several layers in the place of a network's last linear layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from unbackdoor import load_model, open_model, save_model
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.networks.build import canonical
from unbackdoor.networks.heads import with_head
from unbackdoor.opening.recognise_head import find_head

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
}


@pytest.mark.parametrize("place", ["fc", "classifier", "heads", "backbone.fc", "model.head", "body+head"])
@pytest.mark.parametrize("kind", HEADS)
def test_such_a_model_is_opened(tmp_path: Path, kind: str, place: str) -> None:
    make, tokens = HEADS[kind]
    network = build(SPEC, input_shape=(3, 16, 16), class_names=list("abcde"), seed=0).network
    network.fc = make()  # type: ignore[assignment]
    name, body = place.rpartition(".")[2], place.rpartition(".")[0]
    body = f"{body}." if body else ""
    if place == "body+head":
        name, body = "head", ""
    state = {}
    for old, tensor in network.state_dict().items():
        if old.startswith("fc."):
            state[f"{body}{name}{old[2:]}"] = tensor
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
