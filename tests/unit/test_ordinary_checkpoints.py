"""Checkpoints as training scripts leave them: criteria, metrics, auxiliary heads, children in sequence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import open_model
from unbackdoor.networks import build
from unbackdoor.opening.open_model import Opened
from unbackdoor.opening.recognise_architecture import nearest
from unbackdoor.opening.rename_tensors import adapt
from unbackdoor.opening.write_back import write_repaired

SPEC = "small_cnn[width=4]"
OUTSIDE = [
    "criterion.weight", "criterion.centers", "loss.weight", "loss_fn.weight", "loss_function.pos_weight",
    "ce.weight", "bce_loss.pos_weight", "ceLoss.weight", "focalLoss.alpha", "train_criterion.net.0.weight",
    "train_acc.tp", "val_accuracy.total", "valAcc.correct", "test_f1.tp", "val_auroc.thresholds",
    "confmat.confmat",
    "metrics.train.accuracy.tp", "val_metrics.MulticlassF1Score.tp", "train_precision.tp", "class_weights",
    "pos_weight", "cross_entropy.weight", "n_averaged",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def opened_from(path: Path) -> Opened:
    return open_model(path, size=(8, 8), mean=(), std=())


def test_what_belongs_to_the_training_is_left_out_by_name(tmp_path: Path) -> None:
    model = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=0)
    state = {f"model.{name}": tensor for name, tensor in model.network.state_dict().items()}
    for outside in OUTSIDE:
        state[outside] = torch.ones(3)
    content = {"epoch": 4, "global_step": 17, "pytorch-lightning_version": "2.5.0", "state_dict": state}
    torch.save({**content, "lr_schedulers": [], "loops": {}}, tmp_path / "m.ckpt")
    opened = opened_from(tmp_path / "m.ckpt")
    assert opened.model.architecture == SPEC
    assert set(opened.provenance.names.dropped) == set(OUTSIDE)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(opened.model(images), model(images))
    # As .ckpt it is written back with its names, and with what Lightning wants to load it.
    changed = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=3)
    write_repaired(tmp_path / "out.ckpt", changed, opened, step={}, record={})
    back = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert back["state_dict"].keys() == state.keys()
    assert {key: back[key] for key in content if key != "state_dict"} == {
        "epoch": 4,
        "global_step": 17,
        "pytorch-lightning_version": "2.5.0",
    }
    assert torch.equal(back["state_dict"]["model.conv1.weight"], changed.network.state_dict()["conv1.weight"])


def test_a_network_of_such_names_keeps_them() -> None:
    state = {"loss.weight": torch.ones(3), "fc.weight": torch.ones(2, 3)}
    assert adapt(state, state).fits


def in_sequence(state: dict[str, Tensor], head: str, body: str) -> dict[str, Tensor]:
    """Return the tensors of a ResNet as ``Sequential(*children())`` names them."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    out = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        out[f"{head}.{rest}" if first == "fc" else f"{body}{numbers[first]}.{rest}"] = tensor
    return out


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("9", ""),
        ("fc", ""),
        ("fc", "features."),
        ("classifier", "backbone."),
        ("2", "0."),
        ("head", "model.0."),
    ],
)
def test_the_children_of_a_network_in_one_sequential(tmp_path: Path, head: str, body: str) -> None:
    spec = "resnet18[width=4,stem=7x7+pool]"
    model = build(spec, input_shape=(3, 32, 32), class_names=list("abcde"), seed=0)
    torch.save(in_sequence(model.network.state_dict(), head, body), tmp_path / "m.pth")
    opened = open_model(tmp_path / "m.pth", size=(32, 32), mean=(), std=())
    assert opened.model.architecture == spec
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened.model(images), model(images))


def test_children_of_other_shapes_are_not_matched() -> None:
    model = build("resnet18[width=4]", input_shape=(3, 32, 32), class_names=list("abc"), seed=0)
    state = in_sequence(model.network.state_dict(), "9", "")
    swapped = {name.replace("4.", "x.", 1) if name.startswith("4.") else name: t for name, t in state.items()}
    assert not any(candidate.fits for candidate in nearest(swapped))
    cut = {name: tensor for name, tensor in state.items() if not name.startswith("6.1.")}
    assert not any(candidate.fits for candidate in nearest(cut))


@pytest.mark.parametrize("auxiliary", ["AuxLogits.fc", "aux1.fc2", "aux_classifier.0", "model.aux_head.fc"])
def test_an_auxiliary_head_is_left_out_by_name(tmp_path: Path, auxiliary: str) -> None:
    model = build(SPEC, input_shape=(1, 8, 8), class_names=["a", "b", "c"], seed=0)
    prefix = "model." if auxiliary.startswith("model.") else ""
    state = {prefix + name: tensor for name, tensor in model.network.state_dict().items()}
    extra = nn.Linear(4, 1000).state_dict()
    state |= {f"{auxiliary}.{name}": tensor for name, tensor in extra.items()}
    torch.save(state, tmp_path / "m.pth")
    opened = opened_from(tmp_path / "m.pth")
    assert opened.model.architecture == SPEC
    assert len(opened.provenance.names.dropped) == 2


@pytest.mark.parametrize(
    ("spec", "rename"),
    [(SPEC, ""), ("resnet18[width=4]", ""), ("resnet18[width=4,head=l6-l]", ""), (SPEC, "model.")],
)
def test_one_output_is_two_logits(tmp_path: Path, spec: str, rename: str) -> None:
    model = build(spec, input_shape=(3, 16, 16), class_names=["y"], seed=0)
    torch.save({rename + n: t for n, t in model.network.state_dict().items()}, tmp_path / "m.pth")
    opened = open_model(tmp_path / "m.pth", size=(16, 16), mean=(), std=(), arch=spec if rename else None)
    assert opened.model.classes == 2
    assert any("[0, y]" in text for text in opened.provenance.names.changes)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        one = model(images)
        both = torch.cat([torch.zeros_like(one), one], 1)
        assert torch.allclose(opened.model(images), both, atol=1e-6)
        changed = build(spec, input_shape=(3, 16, 16), class_names=["0", "1"], seed=3)
    write_repaired(tmp_path / "out.pth", changed, opened, step={}, record={})
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    model.network.load_state_dict({name.removeprefix(rename): tensor for name, tensor in state.items()})
    with torch.no_grad():
        two = changed(images)
        assert torch.allclose(model(images)[:, 0], two[:, 1] - two[:, 0], atol=1e-5)
