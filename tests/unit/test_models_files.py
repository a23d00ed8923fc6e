"""Saving and loading what this package wrote itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unbackdoor.errors import ConfigError, InputError, IntegrityError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening import classifier_files as model_files
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier
from unbackdoor.weights.card import ModelCard, read_card

# Initialisers and inputs are drawn from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

SHAPE = (3, 8, 8)
SPEC = "small_cnn[width=4]"
GIVEN: dict[str, Any] = {"architecture": SPEC, "input_shape": SHAPE, "class_names": ["cat", "dog"]}


def make(seed: int = 0, spec: str = SPEC) -> Classifier:
    return build(
        spec,
        input_shape=SHAPE,
        class_names=["cat", "dög"],
        mean=[0.4914, 0.4822, 0.4465],
        std=[0.2470, 0.2435, 0.2616],
        seed=seed,
        origin="a test",
    )


def edit(card: Path, **changes: Any) -> None:
    content = json.loads(card.read_text(encoding="utf-8"))
    content.update(changes)
    card.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("spec", [SPEC, "wrn16", "vit_small[width=16,depth=1]", "mobilenet_v2[width=0.1]"])
def test_round_trip_is_exact(tmp_path: Path, spec: str) -> None:
    model = make(spec=spec)
    model.train()(torch.rand(4, *SHAPE))  # so that running statistics are not their defaults
    written = save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    pixels = torch.rand(3, *SHAPE)
    assert torch.equal(loaded(pixels), model.eval()(pixels))
    assert loaded.sha256() == model.sha256() == written.weights_sha256
    assert (loaded.architecture, loaded.input_shape) == (model.architecture, model.input_shape)
    assert (loaded.class_names, loaded.origin) == (model.class_names, "a test")
    assert torch.equal(loaded.mean, model.mean)
    assert torch.equal(loaded.std, model.std)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.json"}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = make()
    for name in ("a", "b"):
        save_model(model, tmp_path / name)
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_weights_file_keeps_the_networks_own_names(tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == set(model.network.state_dict())


def test_the_card_says_what_the_model_is_and_what_was_done(tmp_path: Path) -> None:
    history = [{"trained": {"epochs": 3, "rate": 0.1}}, {"method": "ft", "options": {"note": None}}]
    written = save_model(make(), tmp_path / "m", history=history)
    card = read_card(tmp_path / "m.json")
    assert card == written
    assert list(card.history) == history
    assert card.mean == (0.4914, 0.4822, 0.4465)
    assert card.parameters == sum(p.numel() for p in make().parameters())
    assert set(card.created_with) == {"unbackdoor", "torch"}
    again = save_model(
        load_model(tmp_path / "m"), tmp_path / "n", history=[*card.history, {"method": "none"}]
    )
    assert len(again.history) == 3
    assert again.weights_sha256 == card.weights_sha256


def test_no_normalisation_stays_none(tmp_path: Path) -> None:
    model = build(SPEC, input_shape=SHAPE, class_names=["a", "b"])
    assert save_model(model, tmp_path / "m").mean == ()
    pixels = torch.rand(2, *SHAPE)
    assert torch.equal(load_model(tmp_path / "m")(pixels), model(pixels))


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    model = make()
    model.network.bfloat16()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(
            tensor.to(loaded.network.state_dict()[name].dtype), loaded.network.state_dict()[name]
        )


# ---------------------------------------------------------------------------------------------------
# Refusals when saving


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    model = make()
    with torch.no_grad():
        model.network.get_parameter("conv2.weight")[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"conv2\.weight"):
        save_model(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [{"x": math.nan}, {"x": object()}, {"x": {1, 2}}])
def test_a_history_that_is_not_json_is_refused_before_anything_is_written(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="card"):
        save_model(make(), tmp_path / "m", history=[entry])
    assert not list(tmp_path.iterdir())


def test_a_network_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    model = make()
    model.architecture = ""
    with pytest.raises(UnsupportedModel, match="architecture"):
        save_model(model, tmp_path / "m")
    model.architecture = "small_cnn[width=5]"
    with pytest.raises(UnsupportedModel, match="do not fit"):
        save_model(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------
# Interrupted saves


def test_an_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(1)
    save_model(old, tmp_path / "m")

    def half(state: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_model(make(2), tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.json"}
    assert load_model(tmp_path / "m").sha256() == old.sha256()


def test_a_save_interrupted_between_weights_and_card_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make(1), tmp_path / "m")

    def fail(path: Path, content: object) -> None:
        raise OSError("unplugged")

    monkeypatch.setattr(model_files, "write_json", fail)
    new = make(2)
    with pytest.raises(OSError, match="unplugged"):
        save_model(new, tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.json"}
    with pytest.raises(IntegrityError, match="interrupted"):
        load_model(tmp_path / "m")
    # The way out that the message names.
    (tmp_path / "m.json").unlink()
    assert load_model(tmp_path / "m", **GIVEN).sha256() == new.sha256()


# ---------------------------------------------------------------------------------------------------
# Weights and card that do not belong together


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    save_model(make(), tmp_path / "m")
    content = bytearray((tmp_path / "m.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="weights do not match"):
        load_model(tmp_path / "m")


def test_a_changed_header_is_noticed(tmp_path: Path) -> None:
    save_model(make(), tmp_path / "m")
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors")
    with pytest.raises(IntegrityError, match="file does not match"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["dog", "cat"]},
        {"mean": [0.0, 0.0, 0.0]},
        {"std": [1.0, 1.0, 1.0]},
        {"architecture": "small_cnn[width=5]"},
        {"history": [{"method": "invented"}]},
        {"origin": "a better place"},
        {"parameters": 1},
        {"weights_sha256": "0" * 64},
        {"file_sha256": "0" * 64},
    ],
)
def test_a_changed_card_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    save_model(make(), tmp_path / "m")
    edit(tmp_path / "m.json", **change)
    with pytest.raises(IntegrityError):
        load_model(tmp_path / "m")


def test_the_card_of_another_model_is_refused(tmp_path: Path) -> None:
    save_model(make(1), tmp_path / "a")
    save_model(make(2), tmp_path / "b")
    with pytest.raises(IntegrityError):
        load_model(tmp_path / "a", card=tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------
# Without a card


def test_without_a_card_the_facts_must_be_given(tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path / "m")
    (tmp_path / "m.json").unlink()
    with pytest.raises(InputError, match="no card"):
        load_model(tmp_path / "m")
    with pytest.raises(InputError, match="no card"):
        load_model(tmp_path / "m", architecture=SPEC, input_shape=SHAPE)
    assert load_model(tmp_path / "m", **GIVEN).sha256() == model.sha256()
    with pytest.raises(InputError, match="cannot be read"):
        load_model(tmp_path / "m", card=tmp_path / "none.json")


def test_arguments_come_before_the_card(tmp_path: Path) -> None:
    save_model(make(), tmp_path / "m")
    loaded = load_model(tmp_path / "m", class_names=["x", "y"], mean=(), std=())
    assert loaded.class_names == ("x", "y")
    assert not loaded.mean.any()


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    save_model(make(), tmp_path / "m")
    (tmp_path / "m.json").unlink()
    with pytest.raises(UnsupportedModel) as caught:
        load_model(tmp_path / "m", **{**GIVEN, "architecture": "wrn16"})
    message = str(caught.value)
    for part in ("missing: ", "unexpected: ", "of another shape: conv1.weight is (4, 3, 3, 3)", " more"):
        assert part in message
    with pytest.raises(UnsupportedModel, match=r"fc\.weight is \(2, 8\) instead of \(3, 8\)"):
        load_model(tmp_path / "m", **{**GIVEN, "class_names": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="did you mean"):
        load_model(tmp_path / "m", **{**GIVEN, "architecture": "smal_cnn"})


def test_card_is_frozen_and_strict() -> None:
    assert ModelCard.model_config["extra"] == "forbid"
    assert ModelCard.model_config["frozen"]
