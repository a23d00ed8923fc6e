"""Every verb is one function: the command line parses, calls it and prints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import inspect as inspect_command
from unbackdoor.cli import patch as patch_commands
from unbackdoor.cli import purify as purify_command
from unbackdoor.cli import scan as scan_command
from unbackdoor.cli import verify as verify_command
from unbackdoor.cli.app import app
from unbackdoor.weights.patch import read_patch

# What is written and printed: methods of the result do it.
PRESENTATION = {"report", "sarif_file", "out", "patch", "force", "as_json", "quiet", "tensors"}
HIDDEN = {"resize"}  # of old scripts; does nothing
PROGRESS = {"progress"}  # a display, which the command line makes of --quiet
VERBS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "inspect": (inspect_command.inspect, unbackdoor.inspect),
    "scan": (scan_command.scan, unbackdoor.scan),
    "purify": (purify_command.purify, unbackdoor.purify),
    "verify": (verify_command.verify, unbackdoor.verify),
    "patch make": (patch_commands.make, unbackdoor.patch.make),
    "patch apply": (patch_commands.apply, unbackdoor.patch.apply),
    "patch revert": (patch_commands.revert, unbackdoor.patch.revert),
}
OPTIONS: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
TYPED = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet", "--json"]


def names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_command_and_function_take_the_same_options(verb: str) -> None:
    command, function = VERBS[verb]
    assert names(command) - PRESENTATION - HIDDEN == names(function) - PROGRESS


@pytest.mark.parametrize("verb", VERBS)
def test_what_has_a_default_has_the_same_one(verb: str) -> None:
    command, function = (inspect.signature(f).parameters for f in VERBS[verb])
    empty = inspect.Parameter.empty
    for name in command.keys() & function.keys():
        typed, called = command[name].default, function[name].default
        if typed is not empty and called is not empty:
            assert getattr(typed, "value", typed) == called, name


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    network = tiny_classifier("conv-bn").network
    torch.save({"net": dict(network.state_dict())}, tmp_path / "model.pth")
    images = tiny_data(60, seed=11)
    np.savez(
        tmp_path / "clean.npz",
        images=images.pixels.numpy()[:, 0],
        labels=images.truth.numpy(),
        class_names=np.array(images.class_names),
    )
    return tmp_path / "model.pth", tmp_path / "clean.npz"


def timeless(value: Any) -> Any:
    """Return a record without what a clock says."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name != "seconds"}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def typed(*arguments: str | Path) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    told: dict[str, Any] = json.loads(outcome.stdout)
    return told


def as_json(record: dict[str, Any]) -> Any:
    return timeless(json.loads(json.dumps(record, allow_nan=False)))


def test_a_scan_is_the_same_by_both(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    called = unbackdoor.scan(model, data, checks=["tac", "weight_statistics"], **OPTIONS)
    told = typed("scan", model, "--data", data, "--checks", "tac,weight_statistics", *TYPED)
    assert timeless(told) == as_json(called.to_dict())
    page = called.save_report(tmp_path / "report")
    assert page.exists() and json.loads((page.parent / "result.json").read_text())["verdict"]
    with pytest.raises(unbackdoor.InputError, match="the file exists"):
        called.save_report(tmp_path / "report")
    # What is opened already, and what is in memory, is as good as a path.
    opened = unbackdoor.open_model(model, images=data, **OPTIONS)
    for brought in ((opened,), (unbackdoor.open_source(model), opened.images)):
        more = {} if brought[0] is opened else OPTIONS
        again = unbackdoor.scan(*brought, checks=["tac", "weight_statistics"], **more)
        assert as_json(again.to_dict())["checks"] == timeless(told)["checks"]
    in_memory = unbackdoor.scan(opened.model, opened.images, checks="tac")
    assert in_memory.to_dict()["file_sha256"] is None
    assert in_memory.save_report(tmp_path / "memory").exists()


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_repair_is_the_same_by_both(case: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    model, data = case
    out, patch = tmp_path / name, tmp_path / "p.patch"
    outputs = ("--out", out, "--patch", patch, "--report", tmp_path / "report")
    told = typed("purify", model, "--data", data, "--method", "random_prune", *outputs, *TYPED)
    written = read_patch(patch)
    done = unbackdoor.purify(model, data, "random_prune", **OPTIONS)
    done.save(out, force=True)
    done.save_patch(patch, force=True)
    done.save_report(tmp_path / "report", force=True)
    assert timeless(told) == as_json(done.to_dict())
    assert timeless(json.loads((tmp_path / "report" / "result.json").read_text())) == timeless(told)
    assert read_patch(patch) == written
    again = [unbackdoor.open_source(out).state(), done.model.network.state_dict()]
    assert all(torch.equal(tensor, again[1][name]) for name, tensor in again[0].items())
    applied = unbackdoor.patch.apply(model, patch).save(tmp_path / "applied.pth")
    reverted = unbackdoor.patch.revert(applied, patch)
    assert all(torch.equal(t, reverted.state[n]) for n, t in unbackdoor.open_source(model).state().items())


def test_a_repair_of_a_model_in_memory_is_saved_with_a_card(tmp_path: Path) -> None:
    done = unbackdoor.purify(tiny_classifier("conv-bn"), tiny_data(60), "none")
    out = done.save(tmp_path / "repaired")
    assert unbackdoor.open_model(out).model.sha256() == done.model.sha256()
    with pytest.raises(unbackdoor.InputError, match="is of none"):
        done.save_patch(tmp_path / "p")
    with pytest.raises(unbackdoor.InputError, match="the file exists"):
        done.save(tmp_path / "repaired")


def test_the_original_is_never_replaced(case: tuple[Path, Path]) -> None:
    model, data = case
    done = unbackdoor.purify(model, data, "none", **OPTIONS)
    for write in (done.save, done.save_patch):
        with pytest.raises(unbackdoor.InputError, match="would replace an input"):
            write(model, force=True)


def test_a_comparison_is_the_same_by_both(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    after = unbackdoor.purify(model, data, "random_prune", **OPTIONS).save(tmp_path / "after.pth")
    options = {**OPTIONS, "budget": 1e-6}  # every check is out of budget in both
    done = unbackdoor.verify(model, after, data, **options)
    told = typed("verify", model, after, "--data", data, "--budget", "0.000001", *TYPED)
    assert timeless(told) == as_json(done.to_dict())
    assert done.save_report(tmp_path / "report").exists()


def test_an_inspection_and_a_patch_are_the_same_by_both(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    assert typed("inspect", model, "--json") == as_json(unbackdoor.inspect(model).to_dict())
    after = unbackdoor.purify(model, data, "random_prune", **OPTIONS).save(tmp_path / "after.pth")
    made = unbackdoor.patch.make(model, after)
    told = typed("patch", "make", model, after, "--out", tmp_path / "p", "--json")
    assert {name: told[name] for name in made.to_dict()} == made.to_dict()


def test_what_contradicts_itself_is_refused(case: tuple[Path, Path]) -> None:
    opened = unbackdoor.open_model(case[0], **OPTIONS)
    with pytest.raises(unbackdoor.ConfigError, match="opened already: arch"):
        unbackdoor.scan(opened, arch="vgg11")
    with pytest.raises(unbackdoor.ConfigError, match="named data set"):
        unbackdoor.scan(opened, tiny_data(20), clean=5)
    with pytest.raises(unbackdoor.InputError, match="another type"):
        unbackdoor.scan(7)  # type: ignore[arg-type]
    with pytest.raises(unbackdoor.InputError, match="no clean image"):
        unbackdoor.purify(opened, method="none")
