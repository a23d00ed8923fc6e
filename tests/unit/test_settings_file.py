"""Options from a file: what is typed wins, what is unknown is told, and a hostile file is not obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tiny import tiny_classifier
from unbackdoor.cli.app import app

ARCH = 'arch = "small_cnn[width=8]"\nmean = 0.35\nstd = "0.25"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, and a model elsewhere."""
    (tmp_path / "models").mkdir()
    torch.save({"net": dict(tiny_classifier("conv-bn").network.state_dict())}, tmp_path / "models" / "m.pth")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def call(*words: str) -> tuple[int, Any, str]:
    done = CliRunner().invoke(app, [*words])
    try:
        told = json.loads(done.stdout)
    except json.JSONDecodeError:
        told = done.stdout
    return done.exit_code, told, " ".join(done.stderr.split())


SCAN = ("scan", "../models/m.pth")


@pytest.mark.parametrize("name", ["unbackdoor.toml", "pyproject.toml", "own.toml"])
def test_options_are_taken_and_what_is_typed_counts_more(folder: Path, name: str) -> None:
    text = (
        f'{ARCH}seed = 5\n[scan]\nchecks = ["weight_statistics"]\njson = true\nlevel = 0.01\n'
        "[patch.make]\nforce = false\n"
    )
    if name == "pyproject.toml":
        text = "[tool.unbackdoor]\n" + text.replace("[scan]", "[tool.unbackdoor.scan]")
        text = text.replace("[patch.make]", "[tool.unbackdoor.patch.make]")
    (folder / name).write_text(text)
    named = ("--config", name) if name == "own.toml" else ()
    code, told, said = call(*named, *SCAN)
    assert code in (0, 2) and (told["level"], told["seed"]) == (0.01, 5), said
    assert [c["check"] for c in told["checks"]] == ["weight_statistics"]
    # What nobody named is told, whatever it says itself.
    assert (f"Options from {name}" in said) == (not named)
    (folder / name).write_text(text.replace("json = true", "json = true\nquiet = true"))
    if not named:
        assert "seed = 5" in call(*SCAN)[2]
    (folder / name).write_text(text)
    code, told, said = call(*named, *SCAN, "--level", "0.2", "--seed", "7", "--json")
    assert (told["level"], told["seed"]) == (0.2, 7)
    # An option that only some commands have is for those, and "_" is as good as "-".
    assert call(*named, "list", "datasets")[0] == 0
    (folder / name).write_text(text.replace("seed = 5", "poison_rate = 0.3\nSEED = 5"))
    assert call(*named, *SCAN)[1]["seed"] == 5


def test_a_failure_is_json_where_the_file_asks_for_it(folder: Path) -> None:
    (folder / "unbackdoor.toml").write_text("[scan]\njson = true\n")
    code, told, _ = call("scan", "nothing.pth")
    assert code == 2 and told["error"]["type"] == "InputError"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sead = 3", "there is no option 'sead' (did you mean 'seed'?)"),
        ("[scn]\nlevel = 0.1", "there is no command 'scn' (did you mean 'scan'?)"),
        ("[scan]\nlevl = 0.1", "scan has no option 'levl' (did you mean 'level'?)"),
        ("[patch]\nmak = 1", "patch has no option 'mak'"),
        ("[patch.mke]\nforce = true", "there is no command 'patch mke' (did you mean 'make'?)"),
        ("[scan]\nquiet = 'yes'", "expected true or false, got 'yes'"),
        ("seed = true", "expected text or a number"),
        ("seed = 1979-05-27", "expected text or a number"),
        ("[scan]\nchecks = [['tac']]", "expected text or a number"),
        ("[scan.level]\nx = 1", "expected text or a number"),
        ("[scan]\nmodel = 'm.pth'", "scan has no option 'model'"),
        ("[scan]\nhelp = true", "scan has no option 'help'"),
        ("seed = ", "no TOML"),
        ("x" * 2_000_000, "too large"),
        ("tool = 3\nseed = 'a'", "there is no option 'tool'"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, text: str, wanted: str) -> None:
    (folder / "unbackdoor.toml").write_text(text)
    code, told, said = call(*SCAN, "--json")
    assert code == 2 and wanted in said, said
    assert told["error"]["type"] in ("ConfigError", "InputError", "UnsafeFile")


def test_all_faults_are_told_at_once_and_values_are_checked_as_typed_ones(folder: Path) -> None:
    (folder / "unbackdoor.toml").write_text("sead = 1\n[scan]\nlevl = 2\n[purify]\npreset = [[1]]\n")
    _, told, _ = call(*SCAN, "--json")
    assert len(told["error"]["faults"]) == 3
    (folder / "unbackdoor.toml").write_text("seed = -4")
    assert call(*SCAN)[0] == 2
    (folder / "unbackdoor.toml").write_text("precision = 'fp8'")
    assert call(*SCAN)[0] == 2


def test_a_file_beside_the_model_is_not_read(folder: Path) -> None:
    for name in ("unbackdoor.toml", "pyproject.toml"):
        (folder.parent / "models" / name).write_text("[tool.unbackdoor]\nlevel = 1e-9\nbroken")
    (folder.parent / "unbackdoor.toml").write_text("broken")  # nor one above the working folder
    words = (
        "--arch",
        "small_cnn[width=8]",
        "--mean",
        "0.35",
        "--std",
        "0.25",
        "--checks",
        "weight_statistics",
    )
    _, told, said = call(*SCAN, *words, "--json", "--quiet")
    assert told["level"] == 0.05 and "Options from" not in said


HOSTILE = [
    "arch = '../models/evil.py:net'",
    "force = true",
    "[purify]\nmethod = 'EVIL.PY:f'",
    "[bench.export]\nforce = true",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_file_that_nobody_named_runs_and_replaces_nothing(folder: Path, text: str) -> None:
    (folder.parent / "models" / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "unbackdoor.toml").write_text(text)
    code, told, said = call(*SCAN, "--json")
    assert code == 2 and told["error"]["type"] == "ConfigError" and "--config" in said
    # Whoever names it has read it.
    if "force" in text:
        assert "is named with" not in call("--config", "unbackdoor.toml", *SCAN)[2]


def test_a_pyproject_of_another_project_is_left_alone(folder: Path) -> None:
    for content in (
        b"[project]\nname = 'x'\n",
        b"\xff\xfe broken",
        b"not toml",
        b"tool = 3\n",
        b"#" * 2_000_000,
    ):
        (folder / "pyproject.toml").write_bytes(content)
        assert call("list", "datasets")[0] == 0, content[:20]
    (folder / "pyproject.toml").write_text("[tool]\nunbackdoor = 3\n")
    assert "is no table" in call("list", "datasets")[2]
    code, _, said = call("--config", "nothing.toml", "list")
    assert code == 2 and "nothing.toml" in said
    (folder / "other.toml").write_text("[tool.unbackdoor]\nseed = 3\n")
    assert call("--config", "other.toml", "list", "datasets")[0] == 0
