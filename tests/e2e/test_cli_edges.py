"""What goes wrong around a command: outputs that cannot be written, readers that leave, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import app
from unbackdoor.cli.options import require_writable, seconds_of
from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.weights.triggers import remove_trigger, write_trigger

ARCH = ("--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet")


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a checkpoint and clean images."""
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "m.pth")
    images = tiny_data(40, seed=11)
    np.savez(tmp_path / "clean.npz", images=images.pixels.numpy()[:, 0], labels=images.truth.numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


PURIFY = ("purify", "m.pth", "--data", "clean.npz", "--method", "none", *ARCH)
SCAN = ("scan", "m.pth", "--data", "clean.npz", "--checks", "weight_statistics", *ARCH)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*PURIFY, "--out", "a.pth", "--patch", "a.pth"), "two outputs have the same name (a.pth)"),
        ((*PURIFY, "--out", "result.pth", "--report", "."), "two outputs have the same name (result.json)"),
        ((*PURIFY, "--out", "a.pth", "--patch", "m.pth", "--force"), "would replace an input (m.pth)"),
        ((*PURIFY, "--out", "folder.pth", "--force"), "there is a folder of that name (folder.pth)"),
        ((*PURIFY, "--out", "m.pth/a.pth"), "this is no folder (m.pth)"),
        ((*SCAN, "--sarif", "m.pth", "--force"), "would replace an input (m.pth)"),
        ((*SCAN, "--sarif", "clean.npz"), "the file exists (clean.npz)"),
        ((*SCAN, "--sarif", "folder.pth"), "there is a folder of that name (folder.pth)"),
        ((*SCAN, "--checks", ""), "no check was named"),
        ((*SCAN, "--data", "clean"), "or the path of a file or folder that exists"),
        (("patch", "make", "m.pth", "m.pth", "--out", "m.pth", "--force"), "would replace an input (m.pth)"),
        (("patch", "apply", "m.pth", "p", "--out", "a.weird"), "format of the output is not known"),
    ],
)
def test_outputs_are_looked_at_before_any_work(case: Path, arguments: tuple[str, ...], expected: str) -> None:
    (case / "folder.pth").mkdir()
    before = {path.name: path.stat().st_size for path in case.iterdir()}
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and expected in err
    assert {path.name: path.stat().st_size for path in case.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="the folder cannot be written"):
        require_writable((tmp_path / "deep" / "file",), force=False)
    tmp_path.chmod(0o700)


def test_the_verdict_is_shown_even_if_the_report_cannot_be_written(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr("unbackdoor.report.saving.write_json", full)
    code, out, err = call(*SCAN, "--report", "out")
    assert code == 2 and "Verdict: " in out and "the disk is full" in err


def test_names_that_are_too_few_are_told_and_not_a_wrong_architecture(case: Path) -> None:
    code, _, err = call(*SCAN, "--class-names", "a,b")
    assert code == 3 and "the class names do not fit the model" in err and "got 2" in err


def test_a_data_set_whose_name_a_folder_bears_as_well_is_noted(case: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    (case / "digits" / "0").mkdir(parents=True)
    Image.new("L", (8, 8)).save(case / "digits" / "0" / "a.png")
    _, _, err = call("scan", "m.pth", "--data", "digits", "--checks", "weight_statistics", "--quiet")
    assert "digits is taken as the data set of that name" in err and "./digits" in err


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("1.5", 1.5), ("90s", 90), ("2m", 120), ("1h", 3600)]
)
def test_a_time_is_seconds_unless_it_says_otherwise(text: str, value: float) -> None:
    assert seconds_of(text, "--budget") == value


@pytest.mark.parametrize("text", ["", "s", "x", "5x", "-1", "0", "nan", "inf"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a time"):
        seconds_of(text, "--budget")


@pytest.mark.parametrize("shape", [["list"], ["list", "--json"]])
def test_a_reader_that_leaves_changes_no_exit_code(shape: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)  # as head does
    done = subprocess.run(
        [sys.executable, "-m", "unbackdoor", *shape],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*arguments: object) -> None:
        with atomic_write(tmp_path / "file") as draft:
            draft.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal must have been heard by now")

    monkeypatch.setattr("unbackdoor.cli.listing._row", terminated)
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = call("list", "datasets")
    assert (code, out, err) == (130, "", "interrupted")
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


def test_a_warning_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warned(*arguments: object) -> None:
        warnings.warn("something is odd", UserWarning, stacklevel=1)
        raise InputError("enough")

    monkeypatch.setattr("unbackdoor.cli.listing._row", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, _, err = call("list", "datasets")
    assert re.fullmatch(r"mind: something is odd error: enough\.", err)


def test_a_trigger_of_an_earlier_report_can_be_removed(tmp_path: Path) -> None:
    folder = tmp_path / "trigger-1"
    remove_trigger(folder)
    write_trigger(folder, RecoveredTrigger(0, torch.full((1, 8, 8), 0.5), None), {})
    remove_trigger(folder)
    assert not folder.exists()
    write_trigger(folder, RecoveredTrigger(0, torch.full((1, 8, 8), 0.5), None), {})
    (folder / "mine.txt").write_text("kept")
    remove_trigger(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
