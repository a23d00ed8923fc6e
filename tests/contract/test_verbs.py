"""Every verb is one function: the command line parses, calls it and prints."""

from __future__ import annotations

import builtins
import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import audit as audit_command
from unbackdoor.cli import evaluate as evaluate_command
from unbackdoor.cli import import_backdoorbench as import_command
from unbackdoor.cli import inspect as inspect_command
from unbackdoor.cli import listing as list_command
from unbackdoor.cli import patch as patch_commands
from unbackdoor.cli import purify as purify_command
from unbackdoor.cli import scan as scan_command
from unbackdoor.cli import screen as screen_command
from unbackdoor.cli import statement as statement_commands
from unbackdoor.cli import train as train_command
from unbackdoor.cli import verify as verify_command
from unbackdoor.cli.app import COMMANDS, app
from unbackdoor.weights.patch import read_patch

# What is written and printed: methods of the result do it.
PRESENTATION = {"report", "sarif_file", "out", "patch", "force", "as_json", "quiet", "tensors"}
HIDDEN = {"resize"}  # of old scripts; does nothing
PROGRESS = {"progress"}  # a display, which the command line makes of --quiet
VERBS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "audit": (audit_command.audit, unbackdoor.audit),
    "inspect": (inspect_command.inspect, unbackdoor.inspect),
    "scan": (scan_command.scan, unbackdoor.scan),
    "purify": (purify_command.purify, unbackdoor.purify),
    "verify": (verify_command.verify, unbackdoor.verify),
    "screen": (screen_command.screen, unbackdoor.screen),
    "train": (train_command.train, unbackdoor.train),
    "evaluate": (evaluate_command.evaluate, unbackdoor.evaluate),
    "import-backdoorbench": (import_command.import_backdoorbench, unbackdoor.import_backdoorbench),
    "list": (list_command.listing, unbackdoor.list),
    "patch make": (patch_commands.make, unbackdoor.patch.make),
    "patch apply": (patch_commands.apply, unbackdoor.patch.apply),
    "patch revert": (patch_commands.revert, unbackdoor.patch.revert),
    "statement make": (statement_commands.make, unbackdoor.statement.make),
    "statement check": (statement_commands.check, unbackdoor.statement.check),
    "statement key": (statement_commands.key, unbackdoor.statement.key),
    "statement bom": (statement_commands.bom, unbackdoor.statement.bom),
}
OPTIONS: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
TYPED = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet", "--json"]


def names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


NO_VERBS = {"demo", "bench", "unlearn"}  # a demonstration, a group of its own, and a pointer to its heirs


def test_the_walk_is_over_every_command() -> None:
    assert {verb.split()[0] for verb in VERBS} == set(COMMANDS) - NO_VERBS
    for verb in VERBS:
        name = verb.split()[0].replace("-", "_")
        assert getattr(unbackdoor, name)
        # A star import would hide the builtin.
        assert (name in unbackdoor.__all__) != hasattr(builtins, name)


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


READS_IMAGES = {
    "data",
    "image_column",
    "label_column",
    "skip_damaged",
    "clean",
    "per_class",
    "fraction",
    "data_root",
}


@pytest.mark.parametrize("verb", [verb for verb, (_, function) in VERBS.items() if "data" in names(function)])
def test_verbs_that_take_images_read_them_with_the_same_options(verb: str) -> None:
    for function in VERBS[verb]:
        assert names(function) >= READS_IMAGES


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
    """Return a record without its header and what a clock says."""
    if isinstance(value, dict):
        left_out = {"seconds", "schema", "schema_version", "tool_version", "date"}
        return {name: timeless(inner) for name, inner in value.items() if name not in left_out}
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
    assert timeless(typed("inspect", model, "--json")) == as_json(unbackdoor.inspect(model).to_dict())
    after = unbackdoor.purify(model, data, "random_prune", **OPTIONS).save(tmp_path / "after.pth")
    made = unbackdoor.patch.make(model, after)
    told = typed("patch", "make", model, after, "--out", tmp_path / "p", "--json")
    assert {name: told[name] for name in made.to_dict()} == made.to_dict()


SCREEN = {"options": {"overlays": 5}, "precision": "fp32", "select_fraction": 0.4, "seed": 3}


def test_a_screening_is_the_same_by_both(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    done = unbackdoor.screen(model, data, "strip", data, **SCREEN, **OPTIONS)
    words = ("--method", "strip", "--set", "overlays=5", "--precision", "fp32", "--select-fraction", "0.4")
    words += ("--seed", "3", "--out", str(tmp_path / "typed.csv"))
    told = typed("screen", model, "--images", data, "--data", data, *words, *TYPED)
    assert timeless(told) == as_json(done.to_dict()) and len(told["scores"]) == 60
    called = done.save(tmp_path / "called.csv")
    assert called.read_text() == (tmp_path / "typed.csv").read_text()
    with pytest.raises(unbackdoor.InputError, match="the file exists"):
        done.save(called)
    with pytest.raises(unbackdoor.InputError, match="would replace an input"):
        done.save(model, force=True)
    # What is opened already, and what is in memory, is as good as a path.
    opened = unbackdoor.open_model(model, images=data, **OPTIONS)
    again = unbackdoor.screen(opened, unbackdoor.load_images(data), "strip", **SCREEN)
    assert again.to_dict()["scores"] == told["scores"]
    in_memory = unbackdoor.screen(opened.model, opened.images, "spectral_signatures")
    assert in_memory.to_dict()["model"] is None and len(in_memory.to_dict()["labels"]) == 60
    with pytest.raises(unbackdoor.ConfigError, match="compares with clean images"):
        unbackdoor.screen(opened.model, data, "strip")
    with pytest.raises(unbackdoor.InputError, match="another type"):
        unbackdoor.screen(opened, 7, "strip")


def test_the_names_of_screened_images_are_escaped(case: tuple[Path, Path], tmp_path: Path) -> None:
    """They come from files of unknown origin, and a CSV file is often shown by a terminal."""
    (tmp_path / "suspects").mkdir()
    for name in ("a\x1b[31m.png", "b\n.png"):
        Image.fromarray(tiny_data(1).pixels[0, 0].numpy()).save(tmp_path / "suspects" / name)
    done = unbackdoor.screen(case[0], tmp_path / "suspects", "strip", case[1], **SCREEN, **OPTIONS)
    lines = done.save(tmp_path / "out.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["image", r"a\x1b[31m.png", r"b\n.png"]


TRAIN = {"architecture": "small_cnn[width=8]", "target": 3, "poison_rate": 0.2, "precision": "fp32"}
TRAINED = [
    *("--dataset", "digits", "--architecture", "small_cnn[width=8]", "--target", "3", "--poison-rate", "0.2"),
    *("--precision", "fp32", "--set", "epochs=1", "--set", "batch_size=256", "--attack-set", "size=2"),
]


def test_a_training_and_its_evaluation_are_the_same_by_both(tmp_path: Path) -> None:
    checkpoint = tmp_path / "kept"
    victim = unbackdoor.train(
        "digits",
        attack_options={"size": 2},
        options={"epochs": 1, "batch_size": 256},
        checkpoint=checkpoint,
        **TRAIN,
    )
    called = victim.save(tmp_path / "called")
    told = typed("train", *TRAINED, "--out", tmp_path / "typed", "--quiet", "--json")
    files = {"model", "card", "truth"}
    assert {k: v for k, v in timeless(told).items() if k not in files} == {
        k: v for k, v in as_json(victim.to_dict()).items() if k not in files
    }
    assert {name.removeprefix("called") for name in map(os.path.basename, victim.written.values())} == {
        name.removeprefix("typed") for name in map(os.path.basename, (told[name] for name in files))
    }
    assert not checkpoint.exists() and not (tmp_path / "typed.checkpoint").exists()
    assert (tmp_path / "typed.truth.json").read_text() == (tmp_path / "called.truth.json").read_text()
    with pytest.raises(unbackdoor.InputError, match="the file exists"):
        victim.save(tmp_path / "called")

    words = ("--dataset", "digits", "--before", called, "--precision", "fp32", "--quiet", "--json")
    judged = typed("evaluate", tmp_path / "typed", *words)
    done = unbackdoor.evaluate(tmp_path / "typed", "digits", before=called, precision="fp32")
    assert timeless(judged) == as_json(done.to_dict()) and judged["scores"] == told["scores"]
    # A model, an attack and a data set in memory are as good as their files and names.
    data = unbackdoor.load_dataset("digits")
    before = victim.model.sha256()
    in_memory = unbackdoor.evaluate(victim.model, data, truth=victim.truth, precision="fp32")
    assert in_memory.to_dict()["scores"] == judged["scores"] and in_memory.der is None
    assert victim.model.sha256() == before
    with pytest.raises(unbackdoor.InputError, match="no record of the attack"):
        unbackdoor.evaluate(victim.model, data)
    with pytest.raises(unbackdoor.ConfigError, match="'target' stands twice"):
        unbackdoor.train(data, target=1, attack_options={"target": 2})


def test_a_stored_model_is_compared_with_one_in_memory(case: tuple[Path, Path], tmp_path: Path) -> None:
    """The options of a model are of the one that is a file; a model of another input is refused."""
    data = unbackdoor.load_dataset("digits")
    facts = {"input_shape": data.test.shape, "class_names": data.test.class_names}
    network = unbackdoor.build("small_cnn[width=8]", mean=data.mean, std=data.std, seed=0, **facts)
    torch.save({"net": dict(network.network.state_dict())}, tmp_path / "model.pth")
    truth = unbackdoor.AttackTruth.describe("none", None, shape=data.test.shape, classes=10, seed=0)
    arch = {"arch": "small_cnn[width=8]", "truth": truth}
    for one, other in ((network, tmp_path / "model.pth"), (tmp_path / "model.pth", network)):
        done = unbackdoor.evaluate(one, data, before=other, **arch)
        assert done.before == done.scores and done.der is None  # there was no attack
    with pytest.raises(unbackdoor.ConfigError, match="opened already: arch"):
        unbackdoor.evaluate(network, data, **arch)
    with pytest.raises(unbackdoor.InputError, match="another order"):  # it was judged by the wrong classes
        unbackdoor.evaluate(tmp_path / "model.pth", data, class_names=data.test.class_names[::-1], **arch)
    with pytest.raises(unbackdoor.UnsupportedModel):
        unbackdoor.evaluate(case[0], data, truth=truth, class_names=tuple("abcd"), **OPTIONS)


INPUTS = tiny_data(4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: unbackdoor.train(7),
        lambda: unbackdoor.train(Path("digits")),
        lambda: unbackdoor.train("digits", attack=7),
        lambda: unbackdoor.train("digits", architecture=None),
        lambda: unbackdoor.train("digits", options={"epoch": 1}),
        lambda: unbackdoor.train("digits", attack_options={"sizes": 1}),
        lambda: unbackdoor.train("digits", device="cuda:99"),
        lambda: unbackdoor.evaluate("nothing", "digits"),
        lambda: unbackdoor.evaluate(7, "digits"),
        lambda: unbackdoor.evaluate(tiny_classifier(), "digits", truth=7),
        lambda: unbackdoor.evaluate(tiny_classifier(), "digits", truth="nothing.truth.json"),
        lambda: unbackdoor.screen(tiny_classifier(), INPUTS, 7),
        lambda: unbackdoor.screen(tiny_classifier(), INPUTS, "strip", tiny_data(20), options={"a": 1}),
        lambda: unbackdoor.screen(tiny_classifier(), INPUTS, "spectral_signatures", clean=4),
        lambda: unbackdoor.screen(tiny_classifier(), "nothing.npz", "spectral_signatures"),
        *(
            lambda verb=verb, share=share: verb(select_fraction=share)
            for verb in (
                lambda **how: unbackdoor.screen(
                    tiny_classifier(), tiny_data(4), "strip", tiny_data(20), **how
                ),
                lambda **how: unbackdoor.purify(tiny_classifier(), tiny_data(20), "none", **how),
            )
            for share in (2, 1, 0, -1, math.nan)
        ),
        lambda: unbackdoor.list([]),
        lambda: unbackdoor.list("defenses", 7),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(call: Callable[[], Any]) -> None:
    with pytest.raises(unbackdoor.UnbackdoorError):
        call()


def test_labels_that_a_screener_is_not_shown_may_be_of_any_classes() -> None:
    suspects = replace(tiny_data(8), class_names=("p", "q", "r", "s", "t"))
    done = unbackdoor.screen(tiny_classifier(), suspects, "strip", tiny_data(60), **SCREEN)
    assert done.labels is None and done.names == tuple(f"row {i}" for i in range(8))
    with pytest.raises(unbackdoor.InputError, match="classes of the images"):
        unbackdoor.screen(tiny_classifier(), suspects, "spectral_signatures")


@pytest.mark.parametrize("words", [(), ("defenses",), ("recipes", "mixup"), ("datasets", "digits")])
def test_a_list_is_the_same_by_both(words: tuple[str, ...]) -> None:
    assert timeless(typed("list", *words, "--json")) == as_json(unbackdoor.list(*words))


def test_a_list_of_nothing_is_refused() -> None:
    for words, expected in ((("defences",), "did you mean 'defenses'"), ((None, "rnp"), "belongs to a kind")):
        with pytest.raises(unbackdoor.InputError, match=expected):
            unbackdoor.list(*words)
    names: dict[str, Any] = {}
    exec("from unbackdoor import *", names)
    assert "list" not in names and names["screen"] is unbackdoor.screen


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
