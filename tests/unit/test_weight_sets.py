"""Several sets of weights in one file: each is named, and where they differ the user chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import app
from unbackdoor.errors import InputError
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.read import read_contents, read_state

pytestmark = pytest.mark.leaves_traces  # initialisers draw from the global generator
OPTIONS: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
TYPED = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet", "--json"]


def weights() -> dict[str, Tensor]:
    return dict(tiny_classifier("conv-bn").network.state_dict())


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t + 0.25 if t.is_floating_point() else t for name, t in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


class Averaged:
    """An object of some training script that holds a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def in_a_module(state: dict[str, Tensor]) -> nn.Module:
    network = tiny_classifier("conv-bn").network
    network.load_state_dict(state)
    return network


BESIDE: dict[str, tuple[Any, str, str]] = {
    "an average": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    "two usual keys": (lambda a, b: {"net": b, "state_dict": a}, "state_dict", "net"),
    "an unusual key": (lambda a, b: {"net": a, "teacher": b, "epoch": 1}, "net", "teacher"),
    "a prefix": (lambda a, b: {"net": a, "x": {f"module.{n}": t for n, t in b.items()}}, "net", "x"),
    "deeper": (
        lambda a, b: {"state_dict": a, "callbacks": {"EMA": {"w": b}}},
        "state_dict",
        "callbacks.EMA.w",
    ),
    "nested": (lambda a, b: {"model": {"state_dict": a, "ema": b}}, "model.state_dict", "model.ema"),
    "a whole module": (lambda a, b: {"model": a, "ema": in_a_module(b)}, "model", "ema"),
    "an object": (lambda a, b: {"model": a, "swa": Averaged(in_a_module(b))}, "model", "swa.module"),
    "at the top of a list": (lambda a, b: (a, {"best": b}), "0", "1.best"),
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("case", BESIDE)
def test_a_second_set_is_named_and_can_be_chosen(tmp_path: Path, case: str, kind: str) -> None:
    make, first, second = BESIDE[case]
    one = weights()
    other = moved(one)
    path = tmp_path / "m.pth"
    torch.save(make(one, other), path, _use_new_zipfile_serialization=kind == "zip")
    contents = read_contents(path)
    assert contents.key == first
    assert contents.other_sets == {second: "different"}
    with pytest.raises(InputError, match="several sets of weights") as caught:
        read_state(path)
    assert second in str(caught.value) and first in str(caught.value) and "--weights" in str(caught.value)
    for key, expected in ((first, one), (second, other)):
        chosen = contents.choose(key).state()
        assert chosen.keys() == expected.keys()
        assert all(torch.equal(chosen[name], expected[name]) for name in expected)
    found = inspect(path)
    assert {s.key: s.state for s in found.sets} == {first: "shown", second: "different"}
    assert found.problem is None
    json.dumps(found.to_dict())
    with pytest.raises(InputError, match="no such set"):
        contents.choose("nowhere")


def test_equal_sets_need_no_choice(tmp_path: Path) -> None:
    one = weights()
    copies = {name: tensor.clone() for name, tensor in one.items()}
    for content in ({"net": one, "ema": one}, {"net": one, "ema": copies}):
        path = saved(tmp_path / "m.pth", content)
        assert read_contents(path).other_sets == {"ema": "the same"}
        assert read_state(path).keys() == one.keys()
    # The sign of a zero and the bits of a number that is none count.
    one["fc.bias"], copies["fc.bias"] = torch.zeros(4), -torch.zeros(4)
    assert read_contents(saved(tmp_path / "n.pth", {"net": one, "ema": copies})).rivals == ("ema",)


def test_what_no_program_takes_for_the_network_is_named_only(tmp_path: Path) -> None:
    one = weights()
    content = {
        "netC": one,
        "netG": {"up.weight": torch.ones(3, 3), "up.bias": torch.ones(3)},
        "identity_grid": torch.ones(2, 2),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }
    contents = read_contents(saved(tmp_path / "m.pth", content))
    assert contents.rivals == ()
    assert contents.state().keys() == one.keys()
    assert contents.other_sets == {"netG": "different"}
    assert set(contents.others) == {"identity_grid", "optimizer"}
    found = inspect(tmp_path / "m.pth")
    assert set(found.other_tensors) == {"identity_grid", "optimizer"}


def test_where_none_is_usual_the_user_chooses(tmp_path: Path) -> None:
    one = weights()
    in_a_list = read_contents(saved(tmp_path / "l.pth", [one, moved(one)]))
    assert "several state dicts" in str(in_a_list.problem)
    assert in_a_list.choose("1").state().keys() == one.keys()
    path = saved(tmp_path / "m.pth", {"teacher": moved(one), "student": one})
    with pytest.raises(InputError, match="--weights"):
        unbackdoor.open_model(path, **OPTIONS)
    opened = unbackdoor.open_model(path, weights="student", **OPTIONS)
    state = opened.model.network.state_dict()
    assert all(torch.equal(state[name], one[name]) for name in one)


def test_a_set_that_cannot_be_read_is_named_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pth", {"net": weights(), "ema": {"w": torch.ones(2, dtype=torch.complex64)}})
    contents = read_contents(path)
    assert set(contents.other_sets) == {"ema"}


def test_many_sets_take_no_more_than_the_file_describes(tmp_path: Path) -> None:
    stored = torch.zeros(1000)
    # Each within the bound for itself, and all of them together far beyond it.
    content = {f"set{k}": {"w": stored.expand(3, 1000)[:, : 900 + k]} for k in range(40)}
    path = saved(tmp_path / "m.pth", {"net": {"w": stored}, **content})
    contents = read_contents(path)
    assert len(contents.sets) == 41
    held = sum(t.numel() * 4 for one in contents.sets.values() for t in one.tensors.values())
    assert held <= 4 * path.stat().st_size


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    one = weights()
    images = tiny_data(60, seed=11)
    np.savez(
        tmp_path / "clean.npz",
        images=images.pixels.numpy()[:, 0],
        labels=images.truth.numpy(),
        class_names=np.array(images.class_names),
    )
    return saved(
        tmp_path / "m.pth", {"state_dict": one, "state_dict_ema": moved(one)}
    ), tmp_path / "clean.npz"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_commands_name_both_and_drop_none_silently(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    scan = ("scan", model, "--data", data, "--checks", "tac", *TYPED)
    refused = call(*scan)
    assert refused.exit_code == 2
    done = call(*scan, "--weights", "state_dict_ema", "--report", tmp_path / "report")
    told = json.loads(done.stdout)["opened"]["in_file"]
    assert (told["weights"], told["other_weights"]) == ("state_dict_ema", {"state_dict": "different"})
    assert "state_dict (different)" in (tmp_path / "report" / "report.html").read_text()
    repair = ("purify", model, "--data", data, "--method", "random_prune", *TYPED)
    assert call(*repair, "--out", tmp_path / "r.pth").exit_code == 2
    done = call(*repair, "--out", tmp_path / "r.pth", "--weights", "state_dict_ema")
    assert "state_dict" in " ".join(json.loads(done.stdout)["left_behind"])
    assert list(torch.load(tmp_path / "r.pth", weights_only=True)) == ["state_dict_ema"]
    printed = call(*[text for text in repair if text not in ("--json", "--quiet")],
                   "--out", tmp_path / "s.pth", "--weights", "state_dict")  # fmt: skip
    assert "state_dict_ema" in printed.stdout
    listing = call("inspect", model)
    assert listing.exit_code == 0
    assert "state_dict_ema" in listing.stdout and "different" in listing.stdout


def test_a_patch_finds_the_set_that_it_was_made_for(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    done = unbackdoor.purify(model, data, "random_prune", weights="state_dict_ema", **OPTIONS)
    patch = done.save_patch(tmp_path / "p")
    applied = unbackdoor.patch.apply(model, patch)
    assert applied.left_behind == ("state_dict",)
    network = done.model.network.state_dict()
    assert all(torch.equal(tensor, network[name]) for name, tensor in applied.state.items())
    with pytest.raises(unbackdoor.IntegrityError):
        unbackdoor.patch.apply(model, patch, weights="state_dict")
    with pytest.raises(InputError, match="several sets"):
        unbackdoor.patch.make(model, model)
    assert unbackdoor.patch.make(model, model, weights="state_dict").patch.changed == 0


def test_two_files_are_compared_by_the_set_that_one_of_them_has(
    case: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = case
    alone = saved(tmp_path / "alone.pth", moved(weights()))
    done = unbackdoor.verify(model, alone, data, checks="tac", weights="state_dict_ema", **OPTIONS)
    assert done.identical
    with pytest.raises(InputError, match="no such set"):
        unbackdoor.verify(model, alone, data, checks="tac", weights="nowhere", **OPTIONS)
