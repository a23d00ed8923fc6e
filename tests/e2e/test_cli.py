"""The command line as a user meets it: results on one stream, one paragraph of error, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from unbackdoor import __version__
from unbackdoor.cli import app
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import draw_clean

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")

TINY = ["--dataset", "digits", "--architecture", "small_cnn[width=8]", "--set", "epochs=12", "--quiet"]
COMMANDS = ["demo", "train", "inspect", "scan", "purify", "verify", "screen", "evaluate", "list"]


class Outcome:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """Standard output as JSON; fails where anything else stands there."""
        return json.loads(self.out)


def call(*arguments: str | Path) -> Outcome:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def refused(*arguments: str | Path, code: int = 2) -> str:
    """Run a command that must fail, and return its one paragraph as one line."""
    outcome = call(*arguments)
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n")
    assert "\n\n" not in outcome.err and "Traceback" not in outcome.err
    assert max(map(len, outcome.err.splitlines())) <= 160
    return " ".join(outcome.err.split())


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before a test is watched: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained victim with its card and its truth."""
    path = tmp_path_factory.mktemp("victim") / "victim.safetensors"
    outcome = call("train", *TINY, "--poison-rate", "0.2", "--target", "3", "--out", path)
    assert outcome.code == 0, outcome.err
    return path


def copied(victim: Path, folder: Path, *suffixes: str) -> Path:
    """Copy the victim and some of what lies beside it into a folder of its own."""
    for suffix in (".safetensors", *suffixes):
        shutil.copy(victim.with_suffix(suffix), folder / f"victim{suffix}")
    return folder / "victim.safetensors"


UNJUDGED = ("--search-budget", "0.001")  # without the searches, which have tests of their own
NOT_SHOWN = 4  # the exit code of what was written, and not shown to be repaired


def purify(model: Path, out: Path, *more: str | Path, data: str | Path = "digits") -> Outcome:
    how = ("--method", "random_prune", "--out", out, "--quiet", *UNJUDGED)
    return call("purify", model, "--data", data, *how, *more)


# ---------------------------------------------------------------------------------------------------
# Help and lists


def test_help_and_version_do_not_import_torch() -> None:
    for arguments in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        code = (
            "import sys, atexit, unbackdoor.cli\n"
            "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
            f"sys.argv = ['unbackdoor', *{arguments!r}]\n"
            "unbackdoor.cli.main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.strip()) == (0, "False"), arguments


def test_help_documents_commands_and_exit_codes() -> None:
    text = call("--help").out
    assert all(command in text for command in COMMANDS)
    codes = re.findall(r"^\s+(\d+) {2,}\w", text, flags=re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "4", "130"]
    assert call().code == 2
    assert call("--version").out == f"unbackdoor {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    text = call(command, "--help").out
    assert text.count("--") > 1
    assert "[width=16]" in text or command != "train", "brackets were taken for markup"
    lines = [line for line in text.splitlines() if re.match(r"│ \*? *--", line)]
    assert lines and all(re.search(r"[A-Z][a-z]+", line) for line in lines)


def test_python_m_unbackdoor_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unbackdoor", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"unbackdoor {__version__}\n")


def test_list_shows_everything_and_every_option_with_its_source() -> None:
    text = call("list").out
    for name in ("badnets", "rnp", "small_cnn", "plain", "digits"):
        assert name in text
    one = call("list", "defenses", "rnp")
    assert one.code == 0
    for shown in ("unlearn_lr", "0.01", "> 0, <= 1", "reference code", "preset reference"):
        assert shown in one.out


def test_list_as_json_has_all_parts_with_documented_options() -> None:
    everything = call("list", "--json").json
    assert set(everything) - {"schema", "schema_version", "tool_version", "date"} == {
        "attacks",
        "defenses",
        "scanners",
        "screeners",
        "architectures",
        "recipes",
        "datasets",
    }
    for kind, entries in everything.items():
        if kind in {"schema", "schema_version", "tool_version", "date"}:
            continue
        assert entries and all(entry["name"] and entry["summary"] for entry in entries), kind
        for option in (option for entry in entries for option in entry.get("options", ())):
            assert option["meaning"] and option["source"] and option["type"], (kind, option)
    (recipe,) = call("list", "recipes", "mixup", "--json").json["recipes"]
    assert {o["name"]: o["default"] for o in recipe["options"]}["mixup"] == 0.2


# ---------------------------------------------------------------------------------------------------
# Errors


HERE = __file__  # a file that is there


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "defences"], "did you mean 'defenses'?"),
        (["list", "defenses", "rmp"], "unknown defense 'rmp' (did you mean 'rnp'?)"),
        (["list", "datasets", "digit"], "did you mean 'digits'?"),
        (["trian"], "Did you mean 'train'? Try: unbackdoor --help"),
        (["train"], "Missing option '--out'. Try: unbackdoor train --help"),
        (["train", "--seed", "x", "--out", "x"], "Invalid value for '--seed'"),
        (
            ["train", "--dataset", "digitz", "--out", "x"],
            "unknown data set 'digitz' (did you mean 'digits'?)",
        ),
        (["train", "--attack", "badnet", "--out", "x"], "did you mean 'badnets'?"),
        (["train", "--architecture", "resnet19", "--out", "x"], "did you mean"),
        (["train", "--recipe", "plane", "--out", "x"], "did you mean 'plain'?"),
        (["train", "--set", "epoch=2", "--out", "x"], "did you mean 'epochs'?"),
        (["train", "--set", "epochs", "--out", "x"], "expected key=value, got 'epochs'"),
        (["train", "--set", "lr=1", "--set", "lr=2", "--out", "x"], "'lr' stands twice"),
        (["train", "--poison-rate", "2", "--out", "x"], "poison_rate"),
        (["train", *TINY, "--device", "cuda:9", "--out", "x"], "there is no device 'cuda:9'"),
        (["evaluate", "nothing", "--dataset", "digits"], "there is no record of the attack"),
        (["purify", "nothing", "--data", "digits", "--method", "rnpp", "--out", "x"], "did you mean 'rnp'?"),
        (["purify", "nothing", "--data", "digits", "--method", "rnp", "--out", "x"], "nothing"),
        (
            ["purify", __file__, "--data", "digitz", "--method", "rnp", "--out", "x"],
            "unknown data set 'digitz'",
        ),
        (
            ["purify", __file__, "--data", "./digitz", "--method", "rnp", "--out", "x"],
            "no such file or folder",
        ),
        (
            ["purify", "m", "--data", "digits", "--method", "rnp", "--out", "x", "--select-fraction", "1"],
            "--select-fraction must lie in (0, 1), got 1.0",
        ),
    ],
)
def test_an_error_is_one_paragraph_that_says_what_to_do(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_all_faults_of_the_options_are_told_at_once(tmp_path: Path) -> None:
    text = refused("train", "--set", "lr=-1", "--set", "epochs=zero", "--out", tmp_path / "x")
    assert "2 faults" in text and "lr:" in text and "epochs:" in text
    both = ("--poison-rate", "2", "--target", "3", "--attack-set", "size=-1")
    text = refused("train", *both, "--out", tmp_path / "x")
    assert "2 faults" in text and "poison_rate:" in text and "size:" in text
    text = refused("train", *both, "--attack-set", "target=4", "--out", tmp_path / "x")
    assert "'target' stands twice" in text


def test_a_network_that_does_not_fit_the_file_gives_exit_code_3(victim: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(victim.read_bytes())
    outcome = call("scan", bare, "--data", "digits", "--arch", "preact_resnet18[width=8]", "--quiet")
    assert (outcome.code, outcome.out) == (3, ""), outcome.err
    assert outcome.err.startswith("error: ")


def test_images_of_another_size_are_made_to_fit(victim: Path, tmp_path: Path) -> None:
    data = tmp_path / "clean.npz"
    np.savez(data, images=np.zeros((20, 5, 5), np.uint8), labels=np.arange(20) % 10)
    outcome = call("scan", victim, "--data", data, "--checks", "weight_statistics", "--json")
    assert json.loads(outcome.out)["setting"]["input_shape"] == [1, 8, 8]
    assert "resized" in " ".join(outcome.err.split())


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text = refused("evaluate", tmp_path / "a\x1b[31mb\nc", "--dataset", "digits")
    assert "\x1b" not in text and r"a\x1b[31mb" in text


def test_a_file_that_the_system_refuses_is_no_defect(victim: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder.truth.json"
    folder.mkdir()
    text = refused("evaluate", victim, "--truth", folder, "--dataset", "digits")
    assert "folder.truth.json" in text and "defect" not in text


def test_debug_shows_where_an_error_came_from() -> None:
    outcome = call("--debug", "list", "nothing")
    assert outcome.code == 2
    assert "Traceback" in outcome.err and "error: there is no list of 'nothing'" in outcome.err
    assert "Traceback" not in call("list", "nothing").err


def test_a_defect_shows_its_traceback_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("unbackdoor.cli.listing._row", broken)
    outcome = call("list", "datasets")
    assert outcome.code == 2
    assert "ZeroDivisionError: oh" in outcome.err and "Please report it" in outcome.err


# ---------------------------------------------------------------------------------------------------
# Train, purify, evaluate


def test_train_writes_model_card_and_truth(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "victim"
    outcome = call("train", *TINY, "--attack-set", "size=3", "--out", out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    told = outcome.json
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "victim.json",
        "victim.safetensors",
        "victim.truth.json",
    ]
    assert told["model"] == str(out) + ".safetensors"
    assert told["attack"]["options"]["size"] == 3
    for name in ("acc", "asr", "ra"):
        assert (
            0 <= told["scores"][name]["low"] <= told["scores"][name]["value"] <= told["scores"][name]["high"]
        )
    card = out.with_suffix(".json").read_text()
    assert "badnets" not in card and "poison" not in card, "the card tells the defender of the attack"
    assert json.loads(card)["history"][0]["options"]["epochs"] == 12


def test_train_of_a_clean_network_has_no_asr(tmp_path: Path) -> None:
    told = call("train", *TINY, "--attack", "none", "--out", tmp_path / "clean", "--json").json
    assert told["scores"]["acc"]["total"] == 597
    assert told["scores"]["asr"] is None and told["scores"]["ra"] is None


def test_train_replaces_nothing_unless_told_to(victim: Path) -> None:
    before = victim.read_bytes()
    assert "the file exists" in refused("train", *TINY, "--out", victim)
    assert victim.read_bytes() == before
    # The truth alone is worth keeping, too.
    lonely = victim.with_name("other.truth.json")
    lonely.write_text("{}")
    assert "other.truth.json" in refused("train", *TINY, "--out", victim.with_name("other"))
    assert call("train", *TINY, "--out", victim.with_name("other"), "--force").code == 0
    assert lonely.read_text() != "{}"


def test_the_three_commands_in_a_row(victim: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired.safetensors"
    told = purify(victim, out, "--clean", "50", "--set", "tolerance=0.1", "--json", "--seed", "4").json
    assert told["clean_images"] == 50 and told["method"]["options"]["tolerance"] == 0.1
    assert told["accuracy"]["before"]["total"] == told["images_for_the_proof"]
    history = json.loads(out.with_suffix(".json").read_text())["history"]
    assert [step["step"] for step in history] == ["trained", "purified"]
    assert history[1]["of"] == told["source_sha256"] and history[1]["method"]["seed"] == 4

    judged = call("evaluate", out, "--before", victim, "--dataset", "digits", "--json").json
    assert judged["attack"]["options"]["target"] == 3
    assert 0 <= judged["der"] <= 1 and 0 <= judged["rir"] <= 1
    alone = call("evaluate", victim, "--dataset", "digits", "--json").json
    assert alone["scores"] == judged["before"]
    assert alone["before"] is None and "der" not in alone

    shown = call("evaluate", out, "--before", victim, "--dataset", "digits").out
    assert "before" in shown and "after" in shown and "DER" in shown
    shown = purify(victim, tmp_path / "again", "--per-class", "3").out
    assert "30 clean images" in shown and "cut" in shown and "again.safetensors" in shown


def test_purify_opens_nothing_of_the_judge(victim: Path, tmp_path: Path) -> None:
    model = copied(victim, tmp_path, ".json", ".truth.json")
    code = (
        "import sys, unbackdoor.cli\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None)\n"
        "try:\n"
        "    unbackdoor.cli.main()\n"
        "finally:\n"
        "    assert any(name.endswith('victim.safetensors') for name in seen)\n"
        "    assert not any('.truth.json' in name for name in seen), 'the truth was opened'\n"
    )
    arguments = ["purify", model, "--data", "digits", "--method", "none", "--out", tmp_path / "out", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == NOT_SHOWN, done.stderr  # nothing was done


def test_purify_without_a_truth_gives_the_same_model(victim: Path, tmp_path: Path) -> None:
    model = copied(victim, tmp_path, ".json")
    with_truth = purify(victim, tmp_path / "a", "--json").json
    without = purify(model, tmp_path / "b", "--json").json
    assert with_truth["sha256"] == without["sha256"]


def test_purify_never_replaces_the_suspicious_model(victim: Path) -> None:
    before = victim.read_bytes()
    outcome = purify(victim, victim, "--force")
    assert outcome.code == 2 and "would replace the suspicious one" in outcome.err
    assert victim.read_bytes() == before


def test_purify_with_images_of_ones_own(victim: Path, tmp_path: Path) -> None:
    images = draw_clean(load_dataset("digits").test, per_class=4)
    pixels, labels = images.pixels.numpy()[:, 0], images.truth.numpy()
    folder, npz = tmp_path / "images", tmp_path / "clean.npz"
    for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / str(label) / f"{i}.png")
    np.savez(npz, images=pixels, labels=labels)
    for data in (folder, npz):
        told = purify(victim, tmp_path / data.stem, "--json", data=data).json
        assert told["clean_images"] + told["images_for_the_proof"] == 40
    outcome = purify(victim, tmp_path / "x", "--clean", "10", data=npz)
    assert outcome.code == 2 and "images from a path are all used" in " ".join(outcome.err.split())

    large = tmp_path / "large.npz"
    np.savez(large, images=np.kron(pixels, np.ones((1, 2, 2), np.uint8)), labels=labels)
    loud = call("purify", victim, "--data", large, "--method", "none", "--out", tmp_path / "y")
    assert loud.code == NOT_SHOWN and "16 x 16" in loud.err  # what was done to the images is told


def test_a_checkpoint_without_a_card_is_judged_as_the_same_model(victim: Path, tmp_path: Path) -> None:
    from unbackdoor.opening.classifier_files import load_model

    checkpoint = tmp_path / "foreign.pt"
    torch.save(load_model(victim).network.state_dict(), checkpoint)
    truth = victim.with_suffix(".truth.json")
    arguments = ["--dataset", "digits", "--truth", str(truth), "--json"]
    spec = ["--architecture", "small_cnn[width=8]"]
    told = call("evaluate", checkpoint, *arguments, *spec).json
    assert told["scores"] == call("evaluate", victim, *arguments).json["scores"]
    other = call("evaluate", checkpoint, *arguments, *spec, "--mean", "0.1", "--std", "0.9").json
    assert other["scores"] != told["scores"]
    # Opened as scan opens it: without a name the architecture is recognised, and a card stands back.
    assert call("evaluate", checkpoint, *arguments).json["scores"] == told["scores"]
    assert call("evaluate", victim, *arguments, *spec).json["scores"] == told["scores"]
    assert "expected numbers" in refused("evaluate", checkpoint, *arguments[:-1], *spec, "--mean", "x")
    assert purify(checkpoint, tmp_path / "out", *spec).code == NOT_SHOWN


def test_evaluate_refuses_a_truth_of_another_data_set(victim: Path, tmp_path: Path) -> None:
    truth = json.loads(victim.with_suffix(".truth.json").read_text())
    other = tmp_path / "other.truth.json"
    other.write_text(json.dumps({**truth, "shape": [3, 32, 32]}))
    text = refused("evaluate", victim, "--truth", other, "--dataset", "digits")
    assert "the attack was made for images of another form" in text


# ---------------------------------------------------------------------------------------------------
# Interruptions


def interrupt(arguments: list[str | Path], when: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Run a command and send it Ctrl-C once a condition holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "unbackdoor", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs deaf to Ctrl-C, and this suite may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        limit = time.monotonic() + 600
        while not when():
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_ctrl_c_leaves_whole_files_and_says_how_to_continue(tmp_path: Path) -> None:
    checkpoint = tmp_path / "victim.checkpoint"
    arguments = ["train", *TINY, "--set", "epochs=10000", "--out", tmp_path / "victim"]
    arguments.remove("epochs=12")
    arguments.remove("--set")
    done = interrupt(arguments, checkpoint.exists)
    assert (done.returncode, done.stdout) == (130, "")
    assert "continues from" in done.stderr and done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["victim.checkpoint"]
    assert torch.load(checkpoint, weights_only=True)["losses"]
