"""``unbackdoor unlearn`` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from unbackdoor.cli import app
from unbackdoor.data.datasets import load_dataset

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")

QUICK = ["--data", "digits", "--set", "repeats=2", "--set", "batch_size=32", "--quiet"]


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def told(*arguments: str | Path) -> Any:
    outcome = call("unlearn", *arguments, "--json")
    assert outcome.exit_code in (0, 1), outcome.stderr
    return json.loads(outcome.stdout)


def refused(*arguments: str | Path, code: int = 2) -> str:
    outcome = call("unlearn", *arguments)
    assert (outcome.exit_code, outcome.stdout) == (code, ""), outcome.stderr
    assert outcome.stderr.startswith("error: ") and "Traceback" not in outcome.stderr
    return " ".join(outcome.stderr.split())


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before a test is watched: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("victim") / "victim.safetensors"
    tiny = ["--dataset", "digits", "--architecture", "small_cnn[width=8]", "--set", "epochs=12", "--quiet"]
    outcome = call("train", *tiny, "--poison-rate", "0.2", "--target", "3", "--out", path)
    assert outcome.exit_code == 0, outcome.stderr
    return path


def test_all_uses_from_one_unlearning(victim: Path, tmp_path: Path) -> None:
    before = victim.read_bytes()
    inputs = tmp_path / "inputs" / "deep"
    inputs.mkdir(parents=True)
    for i, picture in enumerate(load_dataset("digits").test.pixels[:6, 0].numpy()):
        Image.fromarray(picture).save(inputs / f"{i}.png")
    folder = tmp_path / "new" / "trigger"
    uses = ["--detect", "--recover-trigger", folder, "--screen", tmp_path / "inputs"]
    result = told(victim, *QUICK, *uses)
    assert victim.read_bytes() == before
    assert result["detection"]["verdict"] in ("no evidence found", "undecided")
    assert len(result["votes"]["winners"]) == 2 and not result["votes"]["failed"]
    assert result["trigger"]["class"] == int(np.argmax(np.nanmean(result["votes"]["shares"], (0, 1))))
    assert 0 <= result["trigger"]["success"]["low"] <= 1
    assert sorted(file.name for file in folder.iterdir()) == ["trigger.png", "trigger.safetensors"]
    tensors = load_file(folder / "trigger.safetensors")
    assert tensors["pattern"].shape == (1, 8, 8) and tensors["mask"].shape == (8, 8)
    assert float(tensors["mask"].sum()) == pytest.approx(result["trigger"]["mask_l1"], rel=1e-5)
    picture = torch.from_numpy(np.array(Image.open(folder / "trigger.png")))
    assert torch.equal(picture[:, 8:16], (tensors["mask"] * 255).round().to(torch.uint8))
    screening = result["screening"]
    assert screening["names"] == [f"deep/{i}.png" for i in range(6)]
    assert len(screening["scores"]) == len(screening["p_values"]) == 6

    shown = call("unlearn", victim, *QUICK, *uses, "--force", "--class", "5").stdout
    for words in ("2 unlearnings", "Verdict:", "Trigger towards 5", "images are suspicious", "trigger.png"):
        assert words in shown
    text = refused(victim, *QUICK, "--recover-trigger", folder)
    assert "the file exists" in text


def test_the_same_command_says_the_same(victim: Path) -> None:
    one, two = told(victim, *QUICK), told(victim, *QUICK)
    assert one == two
    assert not {"detection", "trigger", "screening"} & set(one)
    assert told(victim, *QUICK, "--seed", "4")["votes"] != one["votes"]


def test_references_calibrate_and_are_checked(victim: Path, tmp_path: Path) -> None:
    own = told(victim, *QUICK, "--detect")
    clean = {**own, "model_sha256": "another", "attraction": 0.0}
    files = []
    for i in range(19):
        files += ["--references", tmp_path / f"{i}.json"]
        (tmp_path / f"{i}.json").write_text(
            json.dumps({**clean, "model_sha256": f"clean {i}", "attraction": i / 1000})
        )
    result = told(victim, *QUICK, "--detect", *files)
    stable = result["detection"]["findings"][-1]
    if stable["p_value"] <= 0.05:
        assert result["detection"]["findings"][0]["p_value"] == pytest.approx(0.05)
    else:  # two repeats of ten classes cannot reach the level, whatever they say
        assert result["detection"]["verdict"] == "undecided"
        assert "2 repeats that agree cannot reach" in result["detection"]["skipped"]["stability"]

    def spoilt(content: str) -> str:
        (tmp_path / "spoilt.json").write_text(content)
        return refused(victim, *QUICK, "--detect", "--references", tmp_path / "spoilt.json")

    assert "cannot be read" in spoilt("{")
    assert "cannot be read" in spoilt("[]")
    assert "cannot be read" in spoilt("{}")
    assert "is not finite" in spoilt(json.dumps({**clean, "attraction": float("nan")}))
    assert "is the suspicious model itself" in spoilt(json.dumps(own))
    kind = {**own["kind"], "options": {}}
    assert "got different options" in spoilt(json.dumps({**clean, "kind": kind}))
    twice = [*files, "--references", tmp_path / "0.json"]
    assert "of the same model" in refused(victim, *QUICK, *twice)
    assert "no such reference" in refused(victim, *QUICK, "--references", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "repeat=2"], "did you mean 'repeats'?"),
        (["--set", "repeats=1"], "repeats"),
        (["--set", "recover_trigger=true"], "name a folder with --recover-trigger"),
        (["--class", "10"], "there is no such class"),
        (["--screen", "./nowhere"], "no such file or folder"),
        (["--select-fraction", "0"], "--select-fraction must lie in (0, 1)"),
        (["--score", "best"], "Invalid value for '--score'"),
        (["--device", "cuda:9"], "there is no device 'cuda:9'"),
    ],
)
def test_wrong_input_is_told_before_the_work(victim: Path, arguments: list[str], expected: str) -> None:
    assert expected in refused(victim, "--data", "digits", "--quiet", *arguments)


def test_images_that_do_not_fit_are_refused(victim: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.npz"
    np.savez(large, images=np.zeros((3, 9, 9), np.uint8))
    assert "do not fit the model" in refused(victim, *QUICK, "--screen", large, code=3)
    assert len(told(victim, *QUICK, "--screen", large, "--resize")["screening"]["scores"]) == 3
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(victim, *QUICK, "--screen", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is no folder" in refused(victim, *QUICK, "--recover-trigger", tmp_path / "file")


def test_nothing_of_the_judge_is_opened(victim: Path, tmp_path: Path) -> None:
    model = tmp_path / "victim.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copy(victim.with_suffix(suffix), model.with_suffix(suffix))
    alone, beside = told(model, *QUICK, "--detect"), told(victim, *QUICK, "--detect")
    assert {**alone, "model": ""} == {**beside, "model": ""}


def test_scanners_are_listed() -> None:
    assert "references" in call("list", "scanners", "rnp_vote").stdout
