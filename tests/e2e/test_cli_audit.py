"""The audit on the command line: scan, repair under a promise, compare and patch a foreign checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.types import state_sha256
from unbackdoor.weights.read import read_state

ARCH = ("--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


def call(*arguments: str | Path) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "unbackdoor", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout, " ".join(done.stderr.split()))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint as other people save them, and clean images beside it."""
    folder = tmp_path_factory.mktemp("foreign")
    network = tiny_classifier("conv-bn").network
    wrapped = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"net": wrapped, "epoch": 3, "acc": 97.0}, folder / "foreign.pth")
    images = tiny_data(80, seed=11)
    np.savez(
        folder / "clean.npz",
        images=images.pixels.numpy()[:, 0],
        labels=images.truth.numpy(),
        class_names=np.array(images.class_names),
    )
    return folder / "foreign.pth", folder / "clean.npz"


def test_a_scan_writes_a_page_a_record_and_a_log(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    arguments = ["scan", model, "--data", data, *ARCH, "--checks", "tac,neural_cleanse"]
    outcome = call(*arguments, "--report", tmp_path / "out", "--sarif", tmp_path / "log.sarif", "--json")
    told = outcome.json
    # Four classes are too few for a test of outliers, and the scan says so.
    assert (outcome.code, told["verdict"]) == (2, "undecided"), outcome.err
    assert told == json.loads((tmp_path / "out" / "result.json").read_text())
    assert {c["check"] for c in told["checks"]} == {"tac", "neural_cleanse"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "could not be decided" in page and "foreign.pth" in page
    log = json.loads((tmp_path / "log.sarif").read_text())
    assert log["runs"][0]["results"][0]["level"] == "warning"
    again = call(*arguments, "--report", tmp_path / "out")
    assert again.code == 2 and "the file exists" in again.err


@pytest.mark.slow
def test_purify_verify_and_patch(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    out, patch = tmp_path / "repaired.pth", tmp_path / "repair.patch"
    repair = ["purify", model, "--data", data, "--method", "random_prune", *ARCH]
    told = call(
        *(*repair, "--out", out, "--patch", patch, "--max-accuracy-drop", "60"),
        *("--report", tmp_path / "r", "--json"),
    ).json
    assert told["accuracy"]["before"]["total"] == told["images_for_the_proof"] > 0
    assert (tmp_path / "r" / "report.html").exists()
    # It lies where it lay in the original, under the same names.
    whole, original = (torch.load(path, weights_only=True) for path in (out, model))
    assert list(whole) == ["net"] and list(whole["net"]) == list(original["net"])
    assert json.loads(out.with_suffix(".json").read_text())["file_sha256"]

    applied, reverted = tmp_path / "applied.safetensors", tmp_path / "reverted.pt"
    assert call("patch", "apply", model, patch, "--out", applied).code == 0
    assert state_sha256(read_state(applied)) == state_sha256(read_state(out))
    assert call("patch", "revert", out, patch, "--out", reverted).code == 0
    assert state_sha256(read_state(reverted)) == state_sha256(read_state(model))
    wrong = call("patch", "apply", out, patch, "--out", tmp_path / "x.pt")
    assert wrong.code == 2 and "applied already" in wrong.err

    checked = call("verify", model, out, "--data", data, *ARCH, "--json").json["comparison"]
    assert checked["changes"] and not checked["identical"]
    assert {c["check"] for c in checked["after"]["checks"]} >= {"tac", "neural_cleanse"}


@pytest.mark.slow
def test_what_is_no_part_of_the_network_is_kept_and_the_patch_fits_the_file(
    case: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = case
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in read_state(model).items()
    }
    scale = {"normalize.mean": torch.tensor([0.4]), "normalize.std": torch.tensor([0.3])}
    torch.save({"net": state | scale}, tmp_path / "half.pth")
    out, patch = tmp_path / "repaired.pth", tmp_path / "repair.patch"
    repair = ("--data", data, "--method", "random_prune", *ARCH[:2])
    done = call("purify", tmp_path / "half.pth", *repair, "--out", out, "--patch", patch)
    assert done.code == 4, done.err  # four classes are too few for a search to answer
    repaired = read_state(out)
    assert {name: tensor.dtype for name, tensor in repaired.items()} == {
        name: tensor.dtype for name, tensor in (state | scale).items()
    }
    assert torch.equal(repaired["normalize.mean"], scale["normalize.mean"])
    assert any(not torch.equal(repaired[name], state[name]) for name in state)
    for direction, source, goal in (
        ("apply", tmp_path / "half.pth", out),
        ("revert", out, tmp_path / "half.pth"),
    ):
        written = tmp_path / f"{direction}.pth"
        assert call("patch", direction, source, patch, "--out", written).code == 0
        assert state_sha256(read_state(written)) == state_sha256(read_state(goal))


def test_a_promise_that_cannot_be_kept_writes_nothing(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    harsh = ["--method", "random_prune", "--set", "tolerance=1", "--set", "step=0.1"]
    out, patch = tmp_path / "out.safetensors", tmp_path / "p"
    outcome = call(
        *("purify", model, "--data", data, *harsh, *ARCH),
        *("--out", out, "--patch", patch, "--max-accuracy-drop", "0"),
    )
    assert outcome.code == 1 and "loses more accuracy than was allowed" in outcome.err
    assert "Loss:" in outcome.out and "is broken" in outcome.out
    assert not list(tmp_path.iterdir())


def test_a_fraction_is_no_number_of_points_and_is_noted(tmp_path: Path) -> None:
    missing = ("purify", tmp_path / "no.pth", "--data", tmp_path, "--method", "none")
    outcome = call(*missing, "--out", tmp_path / "o.pth", "--max-accuracy-drop", "0.04")
    assert outcome.code == 2 and "counts points of 100" in outcome.err


def test_a_repair_to_safetensors_has_a_card_and_opens_again(case: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = case
    out = tmp_path / "repaired.safetensors"
    done = call("purify", model, "--data", data, "--method", "none", *ARCH, "--out", out)
    assert done.code == 4, done.err  # nothing was done
    scanned = call("scan", out, "--data", data, "--checks", "weight_statistics", "--quiet", "--json")
    assert scanned.json["opened"]["card"]


def _nothing(folder: Path) -> tuple[str, ...]:
    return ("scan", str(folder / "missing.pth"))


def _garbage(folder: Path) -> tuple[str, ...]:
    (folder / "x.pth").write_bytes(b"\x80\x04garbage")
    return ("scan", str(folder / "x.pth"))


def _evil(folder: Path) -> tuple[str, ...]:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("executed",))

    (folder / "evil.pth").write_bytes(pickle.dumps({"net": Evil()}))
    return ("scan", str(folder / "evil.pth"))


@pytest.mark.parametrize("make", [_nothing, _garbage, _evil])
def test_a_file_that_cannot_be_used_is_one_paragraph(
    make: Callable[[Path], tuple[str, ...]], tmp_path: Path
) -> None:
    outcome = call(*make(tmp_path))
    told = re.sub(r"^unbackdoor [a-z]+: starting ", "", outcome.err)  # the first line of a command
    assert outcome.code == 2 and told.startswith("error: ")
    assert "executed" not in outcome.out and "Traceback" not in outcome.err
