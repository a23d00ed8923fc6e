"""A folder of models, a pattern or several names: one answer for each, and the exit code of the worst."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tiny import tiny_classifier, tiny_data
from unbackdoor import InputError
from unbackdoor.cli.app import app
from unbackdoor.cli.several import worst
from unbackdoor.weights import model_files as several
from unbackdoor.weights.model_files import is_several, model_files, report_names

STATE = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def call(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_a_folder_a_pattern_and_a_model_folder_are_told_apart(tmp_path: Path) -> None:
    top = tmp_path / "models"
    touch(
        top / "b.pth", top / "a.safetensors", top / "in" / "c.ONNX", top / "README.md", top / ".git" / "x.pt"
    )
    touch(top / "hub" / "model.safetensors", top / "hub" / "training_args.bin", top / "hub" / "config.json")
    touch(top / "sharded" / "model.safetensors.index.json", top / "sharded" / "model-1-of-2.safetensors")
    (top / "loop").symlink_to(top)
    (top / "gone.pth").symlink_to(top / "nothing")
    names = ["a.safetensors", "b.pth", "hub", "in/c.ONNX", "sharded"]
    assert [str(p.relative_to(top)) for p in model_files(top)] == names
    assert model_files(top / "hub") == (top / "hub",) and not is_several(top / "hub")
    assert model_files(top / "sharded") == (top / "sharded",)
    assert model_files(top / "b.pth") == (top / "b.pth",)
    # One file of weights alone is a model folder, as ever; with more in a folder inside, it is not.
    touch(tmp_path / "one" / "only.pt")
    assert not is_several(tmp_path / "one")
    touch(tmp_path / "one" / "more" / "other.pt")
    assert len(model_files(tmp_path / "one")) == 2
    for pattern, wanted in (
        ("*.pth", ["b.pth"]),
        ("**/*.ONNX", ["in/c.ONNX"]),
        ("*", ["a.safetensors", "b.pth", "hub", "sharded"]),
        ("[ab].*", ["a.safetensors", "b.pth"]),
        ("*.md", ["README.md"]),  # asked for by name
    ):
        found = [str(p.relative_to(top)) for p in model_files(top / pattern)]
        assert [name for name in found if not name.startswith(("loop", "gone"))] == wanted, pattern
    # A file may be called like a pattern.
    touch(top / "m[1].pth")
    assert model_files(top / "m[1].pth") == (top / "m[1].pth",)


@pytest.mark.parametrize("name", ["empty", "images/**/*.pth", "empty/*", "**no"])
def test_where_there_is_no_model_it_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    code, _, said = call("inspect", tmp_path / name)
    assert code == 2 and "error:" in said and "Traceback" not in said


def test_what_cannot_be_looked_through_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / "many" / f"{k}.pth" for k in range(12)))
    monkeypatch.setattr(several, "MAX_MODELS", 10)
    with pytest.raises(InputError, match="too many models"):
        model_files(tmp_path / "many")
    monkeypatch.setattr(several, "MAX_ENTRIES", 10)
    for path in (tmp_path / "many", tmp_path / "many" / "*.pth"):
        with pytest.raises(InputError, match="too many files"):
            model_files(path)
    deep = tmp_path / "deep"
    for _ in range(several.MAX_DEPTH + 4):
        deep = deep / "d"
    touch(deep / "x.pth", tmp_path / "deep" / "y.pth", tmp_path / "deep" / "z.pth")
    monkeypatch.setattr(several, "MAX_ENTRIES", 1000)
    assert [p.name for p in model_files(tmp_path / "deep")] == ["y.pth", "z.pth"]


def test_reports_of_models_of_one_name_lie_apart() -> None:
    paths = [Path("a/x.pth"), Path("b/x.pth"), Path("b-x.pth"), Path("c/d/x.pth")]
    names = report_names(paths)
    assert len(set(names)) == 4 and all("/" not in name for name in names)
    assert report_names([Path("a/x.pth"), Path("a/y.pth")]) == ["x.pth", "y.pth"] and report_names([]) == []


def test_an_accusation_is_worse_than_an_error() -> None:
    assert [worst(c) for c in ([], [0, 0], [0, 3], [3, 2, 0], [2, 1, 3], [1, 2])] == [0, 0, 3, 2, 1, 1]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a folder with a harmless file, one that executes code, and one that is damaged."""
    folder = tmp_path / "models"
    folder.mkdir()
    save_file(STATE, folder / "good.safetensors")
    (folder / "evil.pth").write_bytes(pickle.dumps(Harm()))
    (folder / "broken.safetensors").write_bytes(b"\xff" * 40)
    return folder


def test_every_file_of_a_folder_is_inspected(models: Path) -> None:
    code, out, said = call("inspect", models, "--json")
    told = json.loads(out)
    assert (code, told["exit_code"], told["schema"]) == (1, 1, "inspect")
    codes = {Path(one["path"]).name: one["exit_code"] for one in told["models"]}
    assert codes == {"broken.safetensors": 2, "evil.pth": 1, "good.safetensors": 0}
    assert all(one["result"]["sha256"] for one in told["models"]) and "harm" not in out.lower().split('"')
    # Several names, as a shell makes them of a pattern, and a pattern that no shell has seen.
    assert call("inspect", *sorted(models.iterdir()), "--json")[0] == 1
    assert call("inspect", models / "*.safetensors", "--json")[0] == 2
    assert call("inspect", models / "good*", "--json")[0] == 0
    # One that is not there does not keep the others from being told.
    code, out, said = call("inspect", models / "good.safetensors", models / "nothing.pt", "--json")
    good, absent = json.loads(out)["models"]
    assert (code, good["exit_code"], absent["exit_code"]) == (2, 0, 2)
    assert absent["error"]["type"] == "InputError" and "nothing.pt" in said
    assert "models" not in json.loads(call("inspect", models / "good.safetensors", "--json")[1])
    code, out, _ = call("inspect", models, "--quiet")
    assert code == 1 and "evil.pth" in out and "Exit code of the worst: 1" in out


ARCH = ("--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet")


def test_every_model_of_a_folder_is_scanned(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "in").mkdir(parents=True)
    for name in ("a.pth", "in/a.pth"):
        torch.save({"net": dict(tiny_classifier("conv-bn").network.state_dict())}, folder / name)
    save_file(STATE, folder / "other.safetensors")
    images = tiny_data(40, seed=11)
    np.savez(tmp_path / "clean.npz", images=images.pixels.numpy()[:, 0], labels=images.truth.numpy())
    words = ("scan", folder, "--data", tmp_path / "clean.npz", "--checks", "weight_statistics", *ARCH)
    outputs = ("--report", tmp_path / "reports", "--sarif", tmp_path / "log.sarif")
    code, out, said = call(*words, *outputs, "--json")
    told = json.loads(out)
    assert [Path(one["path"]).relative_to(folder).as_posix() for one in told["models"]] == [
        "a.pth", "in/a.pth", "other.safetensors",
    ]  # fmt: skip
    first, second, third = told["models"]
    assert first["result"]["verdict"] == second["result"]["verdict"] and "error" in third
    assert code == told["exit_code"] == 2 and f"SARIF log: {tmp_path / 'log.sarif'}" in " ".join(said.split())
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["a.pth", "in-a.pth"]
    assert json.loads((tmp_path / "reports" / "in-a.pth" / "result.json").read_text()) == {
        **second["result"], **{k: told[k] for k in ("schema", "schema_version", "tool_version")},
    }  # fmt: skip
    (run,) = json.loads((tmp_path / "log.sarif").read_text())["runs"]
    assert len(run["artifacts"]) == 3 and not run["invocations"][0]["executionSuccessful"]
    # Nothing is begun where an output could not be written.
    code, out, said = call(*words, *outputs)
    assert code == 2 and "the file exists" in said and out == ""
    code, out, _ = call(*words, *outputs, "--force")
    assert code == 2 and "a.pth" in out and f"SARIF log: {tmp_path / 'log.sarif'}" in out
