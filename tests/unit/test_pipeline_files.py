"""The GitHub Action, the pre-commit hook and the container: their files are whole, and the script works."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_classifier
from unbackdoor.weights.model_files import SUFFIXES

yaml = pytest.importorskip("yaml", reason="the files are YAML (PyYAML, extra: dev)")

ROOT = Path(__file__).parents[2]


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_every_file_of_the_repository_s_service_is_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_action_puts_no_input_into_a_script() -> None:
    action = loaded("action.yml")
    used = set()
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert "uses" in step or step["shell"] == "bash"
        used |= {str(value) for value in step.get("env", {}).values()}
    assert used == {f"${{{{ inputs.{name} }}}}" for name in action["inputs"]}
    script = (ROOT / "scripts" / "action.sh").read_text()
    given = set(action["runs"]["steps"][-1]["env"])
    assert set(re.findall(r"UNBACKDOOR_[A-Z_]+", script)) == given
    written = set(re.findall(r"^tell ([a-z-]+)", script, re.MULTILINE))
    assert written == set(action["outputs"])


def test_the_hook_knows_the_files_that_are_models() -> None:
    (hook,) = loaded(".pre-commit-hooks.yaml")
    pattern = re.compile(hook["files"])
    pickles = {".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".ckpt", ".bin", ".th"}
    for suffix in SUFFIXES - {".tar", ".h5", ".hdf5", ".keras", ".pb"}:
        assert pattern.search(f"models/x{suffix}") and pattern.search(f"X{suffix.upper()}")
    assert pickles <= SUFFIXES and not pattern.search("binary.md")
    assert hook["entry"].split()[:2] == ["unbackdoor", "inspect"]


def test_the_container_copies_what_the_build_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = {
        name for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for name in line.split()
    }
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "src"}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and "USER auditor" in text


STUB = """#!/bin/sh
printf '%s|' "$@" >> "$RECORD"; echo >> "$RECORD"
for word in "$@"; do [ "$word" != "$SARIF" ] || : > "$word"; done
case " $* " in *" inspect "*) exit "$INSPECT" ;; *) exit "$SCAN" ;; esac
"""


def run(
    work: Path, command: str = STUB, *, inspect: int = 0, scan: int = 0, **inputs: str
) -> tuple[int, dict[str, str], str]:
    """Run the action's script in a folder with a command ``unbackdoor``; return code, outputs and errors."""
    if shutil.which("bash") is None:
        pytest.skip("the action's script needs bash")
    (work / "bin").mkdir(exist_ok=True)
    (work / "bin" / "unbackdoor").write_text(command)
    (work / "bin" / "unbackdoor").chmod(0o755)
    for name in ("told", "record"):
        (work / name).write_text("")
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNBACKDOOR_")}
    env |= {"PATH": f"{work / 'bin'}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(work / "told")}
    env |= {"RECORD": str(work / "record"), "INSPECT": str(inspect), "SCAN": str(scan)}
    env |= {"SARIF": "unbackdoor-results/scan.sarif"}
    env |= {f"UNBACKDOOR_{name.upper()}": value for name, value in inputs.items()}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "action.sh")],
        cwd=work, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = dict(line.split("=", 1) for line in (work / "told").read_text().splitlines())
    return done.returncode, told, done.stderr


@pytest.mark.parametrize(
    ("inspect", "scan", "fail_on", "code", "wanted"),
    [
        (0, 0, "undecided", 0, "0"),
        (0, 1, "undecided", 1, "1"),
        (0, 2, "undecided", 2, "2"),
        (0, 2, "found", 0, "2"),
        (0, 1, "found", 1, "1"),
        (0, 1, "never", 0, "1"),
        (2, 2, "found", 0, "2"),  # the scan says what is wrong with the file
        (1, 0, "found", 1, "1"),
    ],
)
def test_the_script_fails_as_was_asked(
    tmp_path: Path, inspect: int, scan: int, fail_on: str, code: int, wanted: str
) -> None:
    ended, told, _ = run(tmp_path, inspect=inspect, scan=scan, models="m", fail_on=fail_on)
    assert (ended, told["exit-code"]) == (code, wanted)
    calls = (tmp_path / "record").read_text().splitlines()
    # A file that executes code is not scanned.
    assert len(calls) == (1 if inspect == 1 else 2)
    assert told["sarif"] == ("" if inspect == 1 else "unbackdoor-results/scan.sarif")
    assert (tmp_path / told["json"]).exists()


def test_the_script_passes_names_on_as_they_are(tmp_path: Path) -> None:
    hostile = "models/$(touch x) `touch y`;touch z *.pth"
    code, _, said = run(tmp_path, models=hostile, images="a b", checks="tac", budget="9s", config="c.toml")
    assert code == 0, said
    first, second = (line.split("|")[:-1] for line in (tmp_path / "record").read_text().splitlines())
    assert first == ["--config", "c.toml", "inspect", "--json", "--quiet", "--", hostile]
    assert second[:3] == ["--config", "c.toml", "scan"] and second[-2:] == ["--", hostile]
    assert [*itertools.pairwise(second)].count(("--data", "a b")) == 1
    assert {"tac", "9s"} <= set(second) and not {p.name for p in tmp_path.iterdir()} & {"x", "y", "z"}
    assert run(tmp_path, models="m", inspect_only="true")[1]["json"] == "unbackdoor-results/inspect.json"
    code, _, said = run(tmp_path, models="m", fail_on="sometimes")
    assert code == 2 and "fail-on" in said
    assert run(tmp_path)[0] != 0


@pytest.mark.slow
def test_the_script_and_the_command_work_together(tmp_path: Path) -> None:
    torch.save({"net": dict(tiny_classifier("conv-bn").network.state_dict())}, tmp_path / "m.pth")
    (tmp_path / "unbackdoor.toml").write_text(
        'arch = "small_cnn[width=8]"\nmean = 0.35\nstd = 0.25\nclass-names = "a,b,c,d"\n'
    )
    command = f'#!/bin/sh\nexec {sys.executable} -m unbackdoor "$@"\n'
    checks = {"models": "m.pth", "checks": "weight_statistics", "fail_on": "never"}
    code, told, said = run(tmp_path, command, **checks)
    assert code == 0 and told["sarif"], said
    result = json.loads((tmp_path / told["json"]).read_text())
    assert result["schema"] == "scan" and json.loads((tmp_path / told["sarif"]).read_text())["runs"]
