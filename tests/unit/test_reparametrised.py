"""Weights in parts: weight norm and spectral norm of torch, read, opened, written back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from unbackdoor import open_model
from unbackdoor.networks import build
from unbackdoor.opening.reparametrised import find_parts, merge, split
from unbackdoor.opening.write_back import write_repaired
from unbackdoor.types import Classifier

SPEC = "small_cnn[width=4]"


def old(name: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = getattr(nn.utils, name)(layer, **options)
        assert isinstance(out, nn.Module)
        return out

    return apply


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]
    "weight norm along another axis": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": old("weight_norm"),
    "old spectral norm": old("spectral_norm"),
}


@pytest.fixture(autouse=True)
def own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3),
}


def used(layer: nn.Module, kind: str) -> Tensor:
    """Return what a layer gives in evaluation."""
    images = torch.ones(1, 5) if kind == "linear" else torch.arange(75.0).reshape(1, 3, 5, 5) / 75
    with torch.no_grad():
        out = layer.eval()(images)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_the_product_is_what_torch_computes(way: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = WAYS[way](LAYERS[kind]())
    used(layer.train(), kind)
    state = layer.state_dict()
    merged, names = merge(state)
    assert names == ("weight",)
    assert merged.keys() == {"weight", "bias"}
    plain = LAYERS[kind]()
    plain.load_state_dict(merged)
    assert torch.allclose(used(plain, kind), used(layer, kind), atol=1e-5)
    # Back: the layer of the original loads the parts and has the other weight, also where rows are 0.
    weight = plain.weight.detach().clone() * 3 + 0.1  # type: ignore[union-attr, operator]
    weight[0] = 0
    (parts,) = find_parts(state)
    layer.load_state_dict(state | split(state, parts, weight))
    plain.load_state_dict({**merged, "weight": weight})
    assert torch.isfinite(used(layer, kind)).all()
    assert torch.allclose(used(layer, kind), used(plain, kind), atol=1e-4)


def reparametrised(way: str) -> tuple[Classifier, nn.Module]:
    model = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=0)
    network = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=0).network
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            WAYS[way](layer)
    return model, network.eval()


@pytest.mark.parametrize("way", ["weight norm", "spectral norm", "old weight norm", "old spectral norm"])
def test_such_a_network_is_opened_and_written_back_as_it_was(tmp_path: Path, way: str) -> None:
    _, network = reparametrised(way)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "m.pth")
    opened = open_model(tmp_path / "m.pth", size=(8, 8), mean=(), std=())
    assert opened.model.architecture == SPEC
    assert any("weight or spectral norm" in text for text in opened.provenance.names.changes)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(opened.model(images), network(images), atol=1e-4)
        changed = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=5)
        for new, one in zip(changed.network.parameters(), opened.model.network.parameters(), strict=True):
            new.copy_(one)
        changed.network.get_parameter("conv2.weight")[0] = 0
        for (_, buffer), (_, one) in zip(
            changed.network.named_buffers(), opened.model.network.named_buffers(), strict=True
        ):
            buffer.copy_(one)
    write_repaired(tmp_path / "out.pth", changed, opened, step={}, record={})
    network.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"])
    with torch.no_grad():
        assert torch.allclose(network(images), changed.network.eval()(images), atol=1e-4)
        assert not torch.allclose(network(images), opened.model(images), atol=1e-4)


def test_code_of_the_users_own_keeps_its_parts(tmp_path: Path) -> None:
    code = (
        "from torch import nn\nfrom torch.nn.utils.parametrizations import weight_norm\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 3)))\n"
    )
    (tmp_path / "own.py").write_text(code)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(192, 3)))
    torch.save(network.state_dict(), tmp_path / "m.pth")
    opened = open_model(
        tmp_path / "m.pth", arch=f"{tmp_path}/own.py:make", size=(8, 8), mean=(), std=(), class_names="abc"
    )
    assert opened.provenance.names.folded == ()
    assert set(opened.model.network.state_dict()) == set(network.state_dict())


@pytest.mark.parametrize(
    "state",
    [
        {"a_g": torch.ones(2), "a_v": torch.ones(3, 4)},  # of other ranks
        {"a_g": torch.ones(2, 1), "a_v": torch.ones(3, 4)},
        {"a_g": torch.ones(3, 1, dtype=torch.int64), "a_v": torch.ones(3, 4)},
        {"a_g": torch.ones(3, 1), "a_v": torch.ones(3, 4), "a": torch.ones(3, 4)},  # beside the product
        {"a_g": torch.ones(()), "a_v": torch.ones(())},
        {"w_orig": torch.ones(3, 4), "w_u": torch.ones(5), "w_v": torch.ones(4)},
        {"w_orig": torch.ones(3, 0), "w_u": torch.ones(3), "w_v": torch.ones(0)},
        {"w_orig": torch.ones(12), "w_u": torch.ones(3), "w_v": torch.ones(4)},
        {"l.parametrizations.weight.original": torch.ones(3, 3)},  # of an unknown function
        {
            "l.parametrizations.weight.original": torch.eye(3),
            "l.parametrizations.weight.0.base": torch.eye(3),
        },
        {
            "l.parametrizations.weight.original0": torch.ones(3, 1),
            "l.parametrizations.weight.original1": torch.ones(3, 3),
            "l.parametrizations.weight.1._u": torch.ones(3),
        },
    ],
)
def test_what_is_not_known_to_be_parts_is_left_alone(state: dict[str, Tensor]) -> None:
    merged, names = merge(state)
    assert names == ()
    assert merged.keys() == state.keys()
