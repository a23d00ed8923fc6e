"""What an unlearned network tells, by the commands that a user meets: scan, screen and purify."""

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

DIGITS = ["--data", "digits", "--quiet"]
VOTE = [*DIGITS, "--checks", "rnp_vote", "--set", "rnp_vote.repeats=2", "--set", "rnp_vote.batch_size=32"]
SCREEN = [*DIGITS, "--method", "rnp", "--set", "repeats=2", "--set", "batch_size=32"]


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def told(*arguments: str | Path) -> Any:
    outcome = call(*arguments, "--json")
    assert outcome.stdout, outcome.stderr
    return json.loads(outcome.stdout)


def voted(model: Path, *arguments: str | Path) -> Any:
    """Return the whole record of a scan, without its times."""
    record = told("scan", model, *VOTE, *arguments)
    for timed in (record, record["checks"][0]):
        timed["seconds"] = 0
    return {**record, "date": ""}


def refused(*arguments: str | Path, code: int = 2) -> str:
    outcome = call(*arguments)
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


@pytest.fixture(scope="module")
def own(victim: Path) -> Any:
    """The scan of the victim."""
    return voted(victim)


@pytest.fixture(scope="module")
def foreign(victim: Path) -> Path:
    """The same weights without a card, as somebody else would save them."""
    path = victim.with_name("foreign.pth")
    torch.save({"net": load_file(victim)}, path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "deep").mkdir()
    for i, picture in enumerate(load_dataset("digits").test.pixels[:6, 0].numpy()):
        Image.fromarray(picture).save(folder / "deep" / f"{i}.png")
    return folder


# ---------------------------------------------------------------------------------------------------
# The vote and the trigger


def test_the_vote_and_its_trigger_are_a_scans(victim: Path, tmp_path: Path) -> None:
    before = victim.read_bytes()
    recover = ("--set", "rnp_vote.recover_trigger=true")
    record = voted(victim, *recover, "--report", tmp_path / "out")
    assert victim.read_bytes() == before
    assert record["verdict"] == "undecided"  # two repeats cannot say more
    findings = {f["statistic"]: f for f in record["checks"][0]["report"]["findings"]}
    attraction = findings["attraction"]
    assert attraction["classes"] == [int(np.argmax(attraction["per_class"]))]
    assert sum(name.startswith("share of votes") for name in findings) >= 1
    (trigger,) = record["triggers"]
    assert trigger["class"]["index"] == attraction["classes"][0] and 0 <= trigger["success"] <= 1
    folder = tmp_path / "out" / "trigger-0"
    assert sorted(file.name for file in folder.iterdir()) == ["trigger.png", "trigger.safetensors"]
    tensors = load_file(folder / "trigger.safetensors")
    assert tensors["pattern"].shape == (1, 8, 8) and tensors["mask"].shape == (8, 8)
    assert float(tensors["mask"].sum()) == pytest.approx(trigger["mask_l1"], rel=1e-5)


def test_the_same_scan_says_the_same_and_opens_nothing_of_the_judge(
    victim: Path, own: Any, tmp_path: Path
) -> None:
    alone = tmp_path / "victim.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copy(victim.with_suffix(suffix), alone.with_suffix(suffix))
    assert {**voted(alone), "model": ""} == {**own, "model": ""}
    assert voted(victim, "--seed", "4")["checks"] != own["checks"]


def test_references_calibrate_and_are_checked(victim: Path, own: Any, tmp_path: Path) -> None:
    def clean(path: Path, value: object, sha256: str, **changes: Any) -> Path:
        record = json.loads(json.dumps({**own, **changes, "model_sha256": sha256}))
        for finding in [f for check in record["checks"] for f in check["report"]["findings"]]:
            if finding["statistic"] == "attraction":
                finding["value"] = value
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    files: list[str | Path] = []
    for i in range(19):
        files += ["--references", clean(tmp_path / f"{i}.json", i / 1000, f"clean {i}")]
    # What the numbers do not depend on may differ.
    record = voted(victim, *files, "--set", "rnp_vote.alpha=0.1")
    report = record["checks"][0]["report"]
    assert len(report["options"]["references"]) == 19
    if report["findings"][0]["statistic"] == "attraction":
        assert report["findings"][0]["p_value"] == pytest.approx(0.05)
    else:  # two repeats of ten classes cannot reach the level, whatever they say
        assert record["verdict"] == "undecided"
        assert "2 repeats that agree cannot reach" in report["skipped"]["stability"]

    spoilt = tmp_path / "spoilt.json"

    def why(content: str) -> str:
        spoilt.write_text(content)
        return refused("scan", victim, *VOTE, "--references", spoilt)

    for content in ("{", "[]", "{}", '{"checks": 3}', "[" * 100_000):
        assert "cannot be read" in why(content)
    assert "is the suspicious model itself" in why(json.dumps(own))
    clean(spoilt, float("nan"), "another")
    assert "NaN is no number" in why(spoilt.read_text())
    clean(spoilt, None, "another")
    assert "has no attraction of the check 'rnp_vote'" in why(spoilt.read_text())
    clean(spoilt, 0.1, "another", checks=[])
    assert "has no attraction of the check 'rnp_vote'" in why(spoilt.read_text())
    clean(spoilt, 0.1, "another", setting={**own["setting"], "clean_images": [1, 1]})
    assert "got different clean images" in why(spoilt.read_text())
    other = clean(tmp_path / "other.json", 0.1, "another")
    repeats = ["--set", "rnp_vote.margin=0.2"]
    assert "got different options" in refused("scan", victim, *VOTE, *repeats, "--references", other)
    twice = [*files, "--references", tmp_path / "0.json"]
    assert "of the same model" in refused("scan", victim, *VOTE, *twice)
    assert "no such reference" in refused("scan", victim, *VOTE, "--references", tmp_path / "none.json")
    tac = [*DIGITS, "--checks", "tac", "--references", other]
    assert "expected one of rnp_vote" in refused("scan", victim, *tac)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "rnp_vote.repeat=2"], "did you mean 'repeats'?"),
        (["--set", "rnp_vote.margin=2"], "margin"),
        (["--set", "margin=0.2"], "expected CHECK.KEY=VALUE"),
        (["--set", "tac.level=0.2"], "options for 'tac', which is no check of this scan"),
        (["--set", "rnp_votes.margin=0.2"], "options for 'rnp_votes'"),
        (["--device", "cuda:9"], "there is no device 'cuda:9'"),
    ],
)
def test_wrong_options_are_told_before_the_work(victim: Path, arguments: list[str], expected: str) -> None:
    assert expected in refused("scan", victim, *VOTE, *arguments)


def test_a_class_that_there_is_none_of_ends_the_check(victim: Path) -> None:
    (check,) = voted(victim, "--set", "rnp_vote.target=10")["checks"]
    assert check["status"] == "failed" and "there is no such class" in check["reason"]


# ---------------------------------------------------------------------------------------------------
# Screening, and the repair; one way to open a model


def test_screening_by_the_unlearned_with_every_score(victim: Path, inputs: Path) -> None:
    scores = []
    for choice in (["score=kept"], ["score=lost"], ["score=voted"], ["score=kept", "centred=true"]):
        chosen = [word for text in choice for word in ("--set", text)]
        record = told("screen", victim, "--images", inputs, *SCREEN, *chosen)
        assert record["names"] == [f"deep/{i}.png" for i in range(6)]
        assert len(record["scores"]) == len(record["p_values"]) == 6
        assert record["evidence"]["voted"] in range(10)
        scores.append(record["scores"])
    assert all(one != other for i, one in enumerate(scores) for other in scores[:i])
    assert "score" in refused("screen", victim, "--images", inputs, *SCREEN, "--set", "score=best")
    assert "no such file" in refused("screen", victim, "--images", "./nowhere", *SCREEN)


def test_inputs_of_another_size_are_made_to_fit(victim: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.npz"
    np.savez(large, images=np.zeros((3, 9, 9), np.uint8))
    assert len(told("screen", victim, "--images", large, *SCREEN)["scores"]) == 3


def test_every_use_opens_a_foreign_file_in_the_same_way(
    victim: Path, own: Any, foreign: Path, inputs: Path, tmp_path: Path
) -> None:
    card = json.loads(victim.with_suffix(".json").read_text())
    known = ["--mean", str(card["mean"][0]), "--std", str(card["std"][0])]
    theirs = voted(foreign, *known)
    assert theirs["opened"]["architecture"]["source"] != own["opened"]["architecture"]["source"]
    assert theirs["model_sha256"] == own["model_sha256"] and theirs["setting"] == own["setting"]
    screened = [
        told("screen", model, "--images", inputs, *SCREEN, *more)["scores"]
        for model, more in ((victim, []), (foreign, known))
    ]
    assert screened[0] == pytest.approx(screened[1], abs=1e-4)
    repair = ("--method", "unlearned_prune", "--preset", "lipschitz", "--set", "batch_size=32", *DIGITS)
    done = told("purify", foreign, *repair, *known, "--out", tmp_path / "repaired.pth")
    assert done["method"]["options"]["score"] == "lipschitz" and done["evidence"]["channels"] > 0


def test_the_command_that_was_names_those_that_do_its_work(victim: Path) -> None:
    text = refused("unlearn", victim, "--data", "digits", "--detect", "--recover-trigger", "x")
    for words in (
        "scan --checks rnp_vote",
        "rnp_vote.recover_trigger=true",
        "screen --method rnp",
        "purify --method unlearned_prune",
    ):
        assert words in text
    assert "unlearn" not in [line.split()[1:2] for line in call("--help").stdout.splitlines()]


def test_scanners_are_listed() -> None:
    assert "references" in call("list", "scanners", "rnp_vote").stdout
