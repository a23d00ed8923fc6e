"""Opening a stranger's file: what is assumed, from where, and what is said about it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fake_zoo
from shared_material import shared_checkpoints
from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor import Opened, load_model, open_model, save_model
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import ConfigError, InputError, UnsafeFile, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.types import Classifier, Images


def run() -> Run:
    return Run.create(policy="fp32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBACKDOOR_CACHE", str(tmp_path / "cache"))


@lru_cache
def _trained(spec: str, scale: float) -> Classifier:
    model = build(spec, input_shape=(1, 8, 8), class_names=NAMES, mean=(0.5,), std=(scale,), seed=0)
    train(
        model,
        tiny_data(320),
        Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=0.003),
        Run.create(policy="fp32"),
    )
    return model


def bare(tmp_path: Path, model: Classifier, **rename: str) -> Path:
    """Write the weights alone, under other names where any are given."""
    state = {}
    for name, tensor in model.network.state_dict().items():
        head, _, leaf = name.rpartition(".")
        state[f"{rename.get(head, head)}.{leaf}"] = tensor.clone()
    save_file(state, tmp_path / "victim.safetensors")
    return tmp_path / "victim.safetensors"


def folder_of(tmp_path: Path, images: Images, names: Any = None) -> Path:
    root = tmp_path / "clean"
    for row, (pixels, label) in enumerate(zip(images.pixels, images.truth.tolist(), strict=True)):
        name = (names or images.class_names)[label]
        (root / name).mkdir(parents=True, exist_ok=True)
        array = pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(root / name / f"{row}.png")
    return root


# Without any hint -----------------------------------------------------------------------------------


def test_a_bare_file_and_images_are_enough(tmp_path: Path) -> None:
    model = _trained("small_cnn[width=8]", 0.5)
    path = bare(tmp_path, model, fc="linear")
    held = tiny_data(120, seed=1)
    opened = open_model(path, images=held, run=run())
    assert isinstance(opened, Opened)
    assert opened.model.architecture == "small_cnn[width=8]"
    assert opened.model.input_shape == (1, 8, 8)
    assert opened.model.class_names == NAMES
    assert accuracy(opened.model, held, run()) > 0.95
    story = opened.provenance.to_dict()
    assert story["architecture"]["source"].startswith("guessed")
    assert story["normalisation"]["source"] == "inferred from clean accuracy"
    assert story["names"]["renamed"] == {"linear.weight": "fc.weight", "linear.bias": "fc.bias"} or story[
        "names"
    ]["renamed"] == {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    assert opened.names["fc.weight"] == "linear.weight"
    assert set(opened.names) == set(opened.model.network.state_dict())
    assert story["clean_accuracy"]["value"] > 0.95
    assert opened.warnings == ()
    json.dumps(story, allow_nan=False)
    # What was found is enough to open it again.
    again = open_model(
        path, arch=opened.model.architecture, mean=story["normalisation"]["mean"],
        std=story["normalisation"]["std"], size=opened.model.input_shape[1:], class_names=NAMES, run=run(),
    )  # fmt: skip
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.model(pixels), opened.model(pixels))
    assert again.warnings == ()


def test_the_activation_is_found_by_accuracy(tmp_path: Path) -> None:
    spec = "sequential_cnn[features=c8-b-a-m-c8-b-a-m,activation=elu]"
    path = bare(tmp_path, _trained(spec, 0.5))
    opened = open_model(path, images=tiny_data(200, seed=1), run=run())
    assert opened.model.architecture == spec
    assert opened.provenance.to_dict()["inference"]["tried_in_all"] > 20
    assert "activation" in opened.provenance.to_dict()["architecture"]["note"]
    with pytest.raises(InputError, match=r"several networks.*activation=elu.*Name the architecture"):
        open_model(path, run=run())
    with pytest.raises(InputError, match="several networks"):
        unlabelled = tiny_data(40, seed=1)
        open_model(path, images=Images(unlabelled.pixels, None, ()), run=run())


def test_a_repaired_model_is_saved_and_opened_by_its_card(tmp_path: Path) -> None:
    held = tiny_data(60, seed=1)
    opened = open_model(
        bare(tmp_path, _trained("small_cnn[width=8]", 0.5), fc="linear"), images=held, run=run()
    )
    save_model(opened.model, tmp_path / "repaired")
    again = open_model(tmp_path / "repaired", images=held, run=run())
    assert again.provenance.to_dict()["card"]
    assert again.provenance.to_dict()["normalisation"]["source"] == "the card"
    assert again.model.sha256() == opened.model.sha256()
    assert again.warnings == ()
    assert load_model(tmp_path / "repaired").sha256() == opened.model.sha256()
    scaled = open_model(tmp_path / "repaired", mean=[0.4], std=[0.2], run=run())
    assert scaled.provenance.to_dict()["normalisation"]["source"] == "arguments"
    assert float(scaled.model.mean) == pytest.approx(0.4)


def test_nothing_is_guessed_in_silence_without_images(tmp_path: Path) -> None:
    opened = open_model(bare(tmp_path, _trained("small_cnn[width=8]", 0.5)), run=run())
    assert opened.model.class_names == ("0", "1", "2", "3")
    assert opened.images is None
    assert any("normalisation is not known" in warning for warning in opened.warnings)
    assert any("input size is not known" in warning for warning in opened.warnings)


def test_unseen_but_usual_options_are_assumed_aloud(tmp_path: Path) -> None:
    model = build("cifar_resnet[depth=8,width=4]", input_shape=(3, 32, 32), class_names=NAMES)
    opened = open_model(bare(tmp_path, model), run=run())
    assert opened.model.architecture == "cifar_resnet[depth=8,width=4]"
    assert any("skips" in warning and "assumed" in warning for warning in opened.warnings)


# With an architecture --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["small_cnn", "unbackdoor:small_cnn[width=8]", "small_cnn[width=8]"])
def test_options_that_were_not_typed_are_read_off_the_tensors(tmp_path: Path, arch: str) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    opened = open_model(path, arch=arch, images=tiny_data(40, seed=1), run=run())
    assert opened.model.architecture == "small_cnn[width=8]"
    assert opened.provenance.to_dict()["architecture"]["source"] == "named by the user"


def test_an_architecture_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    for arch in ("small_cnn[width=4]", "wrn16"):
        with pytest.raises(UnsupportedModel, match=r"do not fit.*These weights fit: small_cnn\[width=8\]"):
            open_model(path, arch=arch, images=tiny_data(40, seed=1), run=run())
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(UnsupportedModel, match=r"no known architecture.*FILE\.py:CALLABLE"):
        open_model(tmp_path / "odd.safetensors", run=run())


CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, softmax=False, pair=False):
        super().__init__()
        self.strange = nn.Conv2d(1, 8, 3, padding=1)
        self.odd = nn.Bilinear(8, 8, 4)
        self.softmax, self.pair = softmax, pair

    def forward(self, x):
        x = self.strange(x).relu().mean((2, 3))
        x = self.odd(x, x)
        x = x.softmax(1) if self.softmax else x
        return (x, x) if self.pair else x
"""


def test_the_users_own_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CODE)
    spec = f"{tmp_path / 'net.py'}:Net"
    weights = {
        "strange.weight": (8, 1, 3, 3),
        "strange.bias": (8,),
        "odd.weight": (4, 8, 8),
        "odd.bias": (4,),
    }
    draws = torch.Generator().manual_seed(0)
    save_file({k: torch.randn(s, generator=draws) for k, s in weights.items()}, tmp_path / "m.safetensors")
    opened = open_model(tmp_path / "m.safetensors", arch=spec, images=tiny_data(40, seed=1), run=run())
    assert opened.model.architecture == spec
    assert any("Clean accuracy is only" in warning for warning in opened.warnings)
    save_model(opened.model, tmp_path / "again")
    with pytest.raises(UnsafeFile, match="Python file"):
        open_model(tmp_path / "again", run=run())
    assert open_model(tmp_path / "again", arch=spec, run=run()).model.sha256() == opened.model.sha256()
    soft = open_model(tmp_path / "m.safetensors", arch=f"{spec}[softmax=true]", size=(8, 8), run=run())
    assert any("probabilities" in warning for warning in soft.warnings)
    with pytest.raises(UnsupportedModel, match="returns no logits"):
        open_model(tmp_path / "m.safetensors", arch=f"{spec}[pair=true]", size=(8, 8), run=run())


@pytest.mark.leaves_traces
def test_a_library_tells_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_zoo.write(
        tmp_path / "site", timm=fake_zoo.TIMM, transformers=fake_zoo.TRANSFORMERS,
        torchvision="", torchvision__models=fake_zoo.TORCHVISION_MODELS,
    )  # fmt: skip
    from unbackdoor.networks.build import network
    from unbackdoor.networks.geometry import Geometry

    (tmp_path / "hf").mkdir()
    config = {"model_type": "tiny", "num_channels": 3, "id2label": {str(k): n for k, n in enumerate("wxyz")}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    mean = {"image_mean": [0.3] * 3, "image_std": [0.2] * 3, "size": {"height": 16, "width": 16}}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(mean))
    with fake_zoo.importable(folder, monkeypatch):
        for spec in ("timm:tiny_net", f"hf:{tmp_path / 'hf'}"):
            net = network(spec, Geometry(3, 16, 16, 4))
            save_file(net.state_dict(), tmp_path / "m.safetensors")
            opened = open_model(tmp_path / "m.safetensors", arch=spec, run=run())
            assert opened.model.input_shape == (3, 16, 16)
            source = "preprocessor_config.json" if spec[0] == "h" else "timm's configuration of tiny_net"
            assert opened.provenance.to_dict()["normalisation"]["source"] == source
            assert opened.model.class_names == (
                ("w", "x", "y", "z") if spec[0] == "h" else ("0", "1", "2", "3")
            )
            # A library's default is no statement about this file, so that it is warned of.
            assert bool(opened.warnings) == (spec[0] == "t")


# Facts and their order --------------------------------------------------------------------------------


def test_a_normalising_layer_in_the_file_is_used(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in _trained("small_cnn[width=8]", 0.5).network.state_dict().items()}
    state |= {"normalize.mean": torch.tensor([0.5]), "normalize.std": torch.tensor([0.5])}
    save_file(state, tmp_path / "m.safetensors")
    opened = open_model(tmp_path / "m.safetensors", images=tiny_data(40, seed=1), run=run())
    assert opened.provenance.to_dict()["normalisation"]["source"] == "a normalising layer in the file"
    assert set(opened.provenance.to_dict()["names"]["dropped"]) == {"normalize.mean", "normalize.std"}
    assert float(opened.model.std) == 0.5
    given = open_model(tmp_path / "m.safetensors", size=(8, 8), mean=[0.1], std=[0.2], run=run())
    assert given.provenance.to_dict()["normalisation"]["source"] == "arguments"


def test_a_wrong_normalisation_is_noticed_and_the_better_one_named(tmp_path: Path) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    opened = open_model(path, images=tiny_data(200, seed=1), mean=[0.0], std=[0.004], run=run())
    assert any("Clean accuracy is only" in warning for warning in opened.warnings)
    assert any("With another normalisation" in warning for warning in opened.warnings)


@pytest.mark.parametrize(
    "arguments",
    [{"mean": [0.5]}, {"mean": [0.5], "std": [0.0]}, {"mean": [0.5], "std": [1, 1]}, {"size": (0, 8)}],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        open_model(tmp_path / "none", **arguments)


def test_a_missing_file_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_model(tmp_path / "none.pth", run=run())
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    with pytest.raises(UnsupportedModel, match=r"class names do not fit|do not fit the architecture"):
        open_model(path, class_names=["a", "b"], size=(8, 8), run=run())


# Images ----------------------------------------------------------------------------------------------


def test_colour_images_of_another_size_are_brought_into_form(tmp_path: Path) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    grey = tiny_data(60, seed=1)
    large = grey.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1).contiguous()
    held = Images(large, grey.labels, NAMES)
    opened = open_model(path, images=held, size=(8, 8), run=run())
    assert opened.images is not None
    assert opened.images.shape == (1, 8, 8)
    assert any("turned grey" in line for line in opened.provenance.to_dict()["images"])
    assert any("resized from 16 x 16 to 8 x 8" in line for line in opened.provenance.to_dict()["images"])
    assert opened.provenance.to_dict()["clean_accuracy"]["value"] > 0.9


@pytest.mark.parametrize("indices", [True, False])
def test_a_folder_with_some_of_the_classes(tmp_path: Path, indices: bool) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    every = tiny_data(80, seed=1)
    some = every.subset((every.truth != 1).nonzero().flatten())
    root = folder_of(tmp_path, some, ("0", "1", "2", "3") if indices else None)
    if indices:
        opened = open_model(path, images=root, run=run())
        assert opened.model.class_names == ("0", "1", "2", "3")
    else:
        with pytest.raises(InputError, match=r"none of the model's.*Give the model's class names"):
            open_model(path, images=root, run=run())
        opened = open_model(path, images=root, class_names=NAMES, run=run())
        assert opened.model.class_names == NAMES
    assert opened.images is not None
    assert set(opened.images.truth.tolist()) == {0, 2, 3}
    assert opened.provenance.to_dict()["clean_accuracy"]["value"] > 0.9


def test_images_of_many_sizes_take_the_size_that_was_given(tmp_path: Path) -> None:
    path = bare(tmp_path, _trained("small_cnn[width=8]", 0.5))
    root = folder_of(tmp_path, tiny_data(40, seed=1))
    one = next(root.rglob("*.png"))
    Image.fromarray(np.asarray(Image.open(one)).repeat(2, 0).repeat(2, 1)).save(one)
    with pytest.raises(InputError, match="differ in size"):
        open_model(path, images=root, run=run())
    opened = open_model(path, images=root, size=(8, 8), class_names=NAMES, run=run())
    assert opened.images is not None
    assert len(opened.images) == 40


def test_a_card_with_a_transformer_is_opened_as_it_is(tmp_path: Path) -> None:
    model = tiny_classifier("transformer")
    save_model(model, tmp_path / "m")
    opened = open_model(tmp_path / "m", images=tiny_data(40, seed=1), run=run())
    assert opened.model.sha256() == model.sha256()
    assert opened.provenance.to_dict()["clean_accuracy"]["value"] > 0.9


# Other people's checkpoints ---------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "normalised"),
    [
        ("backdoor-lth-cifar10-resnet20", "cifar_resnet[width=16]", True),
        ("ibau-cifar10-badnets", "activation=elu", False),
        ("ibau-cifar10-trojan-wm", "activation=elu", False),
    ],
)
def test_published_checkpoints_open_without_a_hint(name: str, architecture: str, normalised: bool) -> None:
    folders = [file.parent for file in shared_checkpoints() if file.parent.name == name]
    if not folders:
        pytest.skip("the checkpoints of the development material are not beside the repository")
    folder = folders[0]
    from unbackdoor.data.datasets import load_dataset

    facts = json.loads((folder / "card.json").read_text())
    test = load_dataset("cifar10").test
    held = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(7))[:256])
    opened = open_model(folder / facts["file"], images=held, run=Run.create())
    assert architecture in opened.model.architecture
    accuracy = opened.provenance.to_dict()["clean_accuracy"]
    assert accuracy["interval"][0] <= facts["measured"]["acc"] <= accuracy["interval"][1]
    assert bool(opened.provenance.to_dict()["normalisation"]["mean"]) == normalised
    assert opened.warnings == ()
