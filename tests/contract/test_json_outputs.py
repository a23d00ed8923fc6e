"""Every ``--json`` output has one form: a header, a schema that is shipped, and an error where it failed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.bench.rows import Row, write_rows
from unbackdoor.bench.store import Store
from unbackdoor.cli.app import COMMANDS, app

jsonschema = pytest.importorskip("jsonschema", reason="outputs are held against their schema (extra: dev)")

TYPED = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet", "--json"]
SCHEMA = unbackdoor.json_schema()


def closed(schema: Any) -> Any:
    """Return a schema that accepts no key that it does not describe: readers ignore such, a test does not."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: closed(inner) for name, inner in schema.items()}
    if "required" in out and "properties" in out and out.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


def part(name: str) -> Any:
    """Return the part of the schema for one command's result, header included."""
    strict = closed(SCHEMA["$defs"])
    header = {key: value for key, value in SCHEMA["properties"].items() if key not in ("error", "exit_code")}
    strict[name] = {**strict[name], "properties": {**strict[name]["properties"], **header}}
    return {"$schema": SCHEMA["$schema"], "$ref": f"#/$defs/{name.replace(' ', '%20')}", "$defs": strict}


def call(*words: str | Path) -> tuple[int, dict[str, Any], str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, json.loads(done.stdout), done.stderr


def check(told: dict[str, Any], name: str) -> dict[str, Any]:
    jsonschema.Draft202012Validator(SCHEMA).validate(told)
    assert told["schema"] == name and told["tool_version"] == unbackdoor.__version__
    if "error" not in told:
        jsonschema.Draft202012Validator(part(name)).validate(told)
    return told


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its repair, a patch, a report and clean images."""
    folder = tmp_path_factory.mktemp("case")
    torch.save({"net": dict(tiny_classifier("conv-bn").network.state_dict())}, folder / "model.pth")
    images = tiny_data(60, seed=11)
    np.savez(folder / "clean.npz", images=images.pixels.numpy()[:, 0], labels=images.truth.numpy())
    return folder


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    names = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(SCHEMA)))
    assert names <= SCHEMA["$defs"].keys()


def commands(group: Any, before: str = "") -> Iterator[str]:
    for command in group.registered_commands:
        names = [p for p in command.callback.__annotations__ if p == "as_json"]
        if names:
            yield f"{before}{command.name or command.callback.__name__}"


def all_commands() -> Iterator[str]:
    for name, place in COMMANDS.items():
        command = place.load()
        if isinstance(command, typer.Typer):
            yield from commands(command, f"{name} ")
        elif "as_json" in command.__annotations__:
            yield name


def test_every_command_with_the_option_has_a_schema() -> None:
    described = set(SCHEMA["else"]["properties"]["schema"]["enum"])
    assert set(all_commands()) == described <= SCHEMA["$defs"].keys()


def test_what_the_auditor_gets(case: Path) -> None:
    model, data = case / "model.pth", case / "clean.npz"
    check(call("inspect", model, "--json")[1], "inspect")
    checks = ("--checks", "tac,weight_statistics,neural_cleanse", "--set", "neural_cleanse.steps=20")
    scanned = check(call("scan", model, "--data", data, *checks, "--report", case / "r", *TYPED)[1], "scan")
    assert json.loads((case / "r" / "result.json").read_text()) == scanned
    few = ("--checks", "weight_statistics", "--method", "random_prune", "--out", case / "a")
    audited = check(call("audit", model, "--data", data, *few, *TYPED)[1], "audit")
    assert {**json.loads((case / "a" / "result.json").read_text()), "date": ""} == {**audited, "date": ""}
    check(call("audit", model, "--data", data, "--plan", *TYPED)[1], "audit")
    words = ("--data", data, "--method", "random_prune", "--patch", case / "p", "--max-accuracy-drop", "90")
    check(call("purify", model, *words, "--out", case / "after.pth", *TYPED)[1], "purify")
    few = ("--checks", "weight_statistics", "--data", data)
    check(call("verify", model, case / "after.pth", *few, *TYPED)[1], "verify")
    strip = ("--images", data, "--data", data, "--method", "strip", "--set", "overlays=5")
    check(call("screen", model, *strip, *TYPED)[1], "screen")
    made = check(
        call("patch", "make", model, case / "after.pth", "--out", case / "q", "--json")[1], "patch make"
    )
    for direction, name in (("apply", "model.pth"), ("revert", "after.pth")):
        words = ("patch", direction, case / name, case / "q", "--out", case / f"{direction}.pth", "--json")
        assert check(call(*words)[1], f"patch {direction}")["sha256"] in made.values()


def test_what_the_judge_gets(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    check({**call("list", "--json")[1]}, "list")
    words = ("--dataset", "digits", "--architecture", "small_cnn[width=8]", "--quiet", "--json")
    recipe = ("--set", "epochs=1", "--set", "batch_size=256", "--target", "3")
    check(call("train", *words, *recipe, "--out", tmp_path / "v")[1], "train")
    told = call("evaluate", tmp_path / "v", "--before", tmp_path / "v", "--dataset", "digits", "-q", "--json")
    check(told[1], "evaluate")


def test_what_a_store_and_two_sets_of_rows_say(tmp_path: Path) -> None:
    with Store(tmp_path / "store"):
        pass
    check(call("bench", "status", "--store", tmp_path / "store", "--json")[1], "bench status")
    row = {
        "suite": "s", "dataset": "digits", "architecture": "a", "width": 8, "recipe": "plain",
        "attack": "badnets", "poison_rate": 0.1, "victim_seed": 0, "defense": "none",
        "clean_images": 50, "defender_seed": 1,
    }  # fmt: skip
    for name, acc in (("a.jsonl", 0.9), ("b.jsonl", 0.8)):
        write_rows(tmp_path / name, [Row.model_validate({**row, "acc": acc})])
    code, told, _ = call("bench", "diff", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json")
    assert code == 1 and check(told, "bench diff")["differences"][0]["kind"] == "changed"


FAULTS = [
    (("scan", "nothing.pth"), 2, "InputError", "scan"),
    (("scan", "nothing.pth", "--no-such-option"), 2, "Error", "scan"),
    (("scan",), 2, "Error", "scan"),
    (("audit", "nothing.pth"), 2, "InputError", "audit"),
    (("audit", "model.pth", "--method", "rpn"), 2, "InputError", "audit"),
    (
        ("purify", "model.pth", "--data", "clean.npz", "--method", "rpn", "--out", "o"),
        2,
        "InputError",
        "purify",
    ),
    (("verify", "a", "b", "--data", "clean.npz", "--budget", "long"), 2, "InputError", "verify"),
    (("screen", "model.pth", "--images", "x", "--method", "strip"), 2, "ConfigError", "screen"),
    (("train", "--dataset", "digits", "--out", "v", "--set", "epoch=1"), 2, "ConfigError", "train"),
    (("evaluate", "nothing", "--dataset", "digits"), 2, "InputError", "evaluate"),
    (("import-backdoorbench", "nothing.pt", "--out", "o"), 2, "InputError", "import-backdoorbench"),
    (("inspect", "nothing.pth"), 2, "InputError", "inspect"),
    (("list", "defences"), 2, "InputError", "list"),
    (("patch", "apply", "model.pth", "nothing", "--out", "o.pth"), 2, "InputError", "patch apply"),
    (("bench", "status", "--store", "nothing"), 2, "InputError", "bench status"),
    (("bench", "nothing"), 2, "Error", "bench"),
    (("nothing",), 2, "Error", ""),
]


@pytest.mark.parametrize(("words", "code", "kind", "command"), FAULTS, ids=lambda v: str(v)[:40])
def test_a_failure_is_an_object_too(
    case: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, kind: str, command: str
) -> None:
    monkeypatch.chdir(case)
    ended, told, said = call(*words, "--json")
    check(told, command)
    assert (ended, told["exit_code"], told["error"]["type"]) == (code, code, kind)
    assert "error:" in said and told["error"]["message"]


def test_a_failure_that_no_one_foresaw_is_an_object_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unbackdoor, "list", lambda *words: 1 / 0)
    ended, told, said = call("list", "--json")
    assert (ended, check(told, "list")["error"]["type"]) == (2, "ZeroDivisionError")
    assert "defect" in said


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unbackdoor, "list", interrupt)
    ended, told, _ = call("list", "--json")
    assert (ended, told["error"]["message"], told["exit_code"]) == (130, "interrupted", 130)


def test_facts_of_an_error_are_printable_and_complete(case: Path) -> None:
    _, told, _ = call("scan", case / "model.pth", "--data", case / "cl\x1b[2Jean", "--json", "--quiet")
    error = check(told, "scan")["error"]
    assert "\x1b" not in json.dumps(error, ensure_ascii=False) and error["problem"] in error["message"]
    _, told, _ = call("train", "--out", "v", "--set", "epoch=1", "--set", "momentums=2", "--json")
    assert len(told["error"]["faults"]) == 2


def test_without_the_option_a_failure_prints_no_object() -> None:
    done = CliRunner().invoke(app, ["scan", "nothing.pth"])
    assert done.exit_code == 2 and done.stdout == ""
    # What stands behind "--" is a file's name.
    assert CliRunner().invoke(app, ["scan", "--", "--json"]).stdout == ""
