"""Weights that have no place in the file that a repair is written as: said before the work, never dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbackdoor import open_model
from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening.open_model import Opened
from unbackdoor.opening.write_back import repaired_state, require_places
from unbackdoor.weights.formats.onnx.node import Place

SPEC = "small_cnn[width=2]"


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    model = build(SPEC, input_shape=(3, 8, 8), class_names=["a", "b"])
    torch.save(model.network.state_dict(), tmp_path / "m.pth")
    return open_model(tmp_path / "m.pth", arch=SPEC, size=(8, 8), mean=(), std=())


def test_every_weight_of_an_ordinary_file_has_a_place(opened: Opened) -> None:
    for suffix in (".pth", ".safetensors"):
        require_places(Path(f"out{suffix}"), opened)
    require_places(Path("out.safetensors"), None)


def test_a_weight_without_one_is_named_before_the_work(opened: Opened) -> None:
    elsewhere = replace(opened, names={**opened.names, "conv2.weight": "not.in.the.file"})
    with pytest.raises(UnsupportedModel, match=r"no place in the file.*conv2\.weight"):
        require_places(Path("out.pth"), elsewhere)
    require_places(Path("out.safetensors"), elsewhere)  # which holds the whole network
    places = {name: Place(0, 1) for name in opened.model.network.state_dict() if name != "fc.bias"}
    with pytest.raises(UnsupportedModel, match=r"no place in the file.*fc\.bias"):
        require_places(Path("out.onnx"), replace(opened, places=places))


def test_a_change_without_one_is_not_dropped_in_silence(opened: Opened) -> None:
    elsewhere = replace(opened, names={**opened.names, "conv2.weight": "not.in.the.file"})
    repaired = opened.model.copy()
    assert repaired_state(elsewhere, repaired).keys() == opened.model.network.state_dict().keys()
    with torch.no_grad():
        repaired.network.get_parameter("conv2.weight").mul_(2)
    with pytest.raises(UnsupportedModel, match=r"no place in the file.*conv2\.weight"):
        repaired_state(elsewhere, repaired)
