"""``inspect``: what is told of good, bad and broken files, as a function and as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

import unbackdoor
from hostile import Payload
from unbackdoor.cli import app
from unbackdoor.errors import InputError
from unbackdoor.networks import build
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.opening.inspection import Inspection, inspect

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

STATE = {"normalize.mean": torch.tensor([0.5, 0.4, 0.3]), "normalize.std": torch.full((3,), 0.2)}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)


def test_a_good_file(tmp_path: Path) -> None:
    state = {**STATE, "conv.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(2, dtype=torch.float16)}
    save_file(state, tmp_path / "m.safetensors", metadata={"author": "x"})
    seen: list[str] = []

    def progress(items: Any, label: str, total: int | None = None) -> Any:
        seen.append(label)
        return items

    found = inspect(tmp_path / "m.safetensors", progress)
    assert seen == ["Inspecting"]
    assert (found.format, found.loading, found.executes, found.problem) == (
        "safetensors",
        "no code",
        False,
        None,
    )
    assert found.parameters == 3 + 3 + 108 + 2
    assert found.channels == 3
    shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in found.tensors}
    assert shapes["conv.weight"] == ((4, 3, 3, 3), "float32")
    assert shapes["fc.bias"] == ((2,), "float16")
    assert found.normalisation is not None
    assert found.normalisation.mean == pytest.approx((0.5, 0.4, 0.3))
    assert "normalize.mean" in found.normalisation.source
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["sha256"] == found.sha256


def test_the_card_tells_the_normalisation(tmp_path: Path) -> None:
    model = build(
        "small_cnn[width=4]", input_shape=(3, 8, 8), class_names=["a", "b"], mean=(0.5,) * 3, std=(0.25,) * 3
    )
    save_model(model, tmp_path / "m")
    found = unbackdoor.inspect(tmp_path / "m.safetensors")
    assert isinstance(found, Inspection)
    assert found.normalisation is not None
    assert (found.normalisation.mean, found.normalisation.std) == ((0.5,) * 3, (0.25,) * 3)
    (tmp_path / "m.json").write_text("{")
    assert inspect(tmp_path / "m.safetensors").normalisation is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    torch.save({"a": torch.tensor([1.0, value, value]), "b": torch.tensor([1])}, tmp_path / "m.pt")
    found = inspect(tmp_path / "m.pt")
    assert found.not_finite == 2
    assert [tensor.not_finite for tensor in found.tensors] == [2, 0]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_dangerous_file_is_told_with_its_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": Payload(tmp_path / "executed")}, tmp_path / "m.pt")
    found = inspect(tmp_path / "m.pt")
    assert (found.loading, found.executes, len(found.tensors)) == ("dangerous", True, 2)
    assert any("system" in name for name in found.dangerous)
    assert not (tmp_path / "executed").exists()


def test_a_damaged_file_is_told_and_not_raised(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(content[:200])
    found = inspect(tmp_path / "m.pt")
    assert found.loading == "undecided"
    assert found.problem is not None
    assert "damaged" in found.problem
    (tmp_path / "m.pt").write_bytes(b"some text")
    assert inspect(tmp_path / "m.pt").format == "unknown"
    (tmp_path / "m.pt").write_bytes(b"")
    assert inspect(tmp_path / "m.pt").problem is not None


def test_only_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "the folder holds no weights"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=words):
            inspect(path)


class Unknown:
    """A class that the reader has never heard of."""


def test_the_degrees_of_danger(tmp_path: Path) -> None:
    import argparse

    for beside, loading in (
        (1, "no code"),
        (argparse.Namespace(), "known classes"),
        (Unknown(), "unknown code"),
    ):
        torch.save({"state_dict": STATE, "beside": beside}, tmp_path / "m.pt")
        assert inspect(tmp_path / "m.pt").loading == loading


def test_the_command_and_its_exit_codes(tmp_path: Path) -> None:
    good = {**{f"layer{i}": torch.zeros(1) for i in range(20)}, "\x1b[31mred\u202e": torch.zeros(1)}
    save_file(good, tmp_path / "m.safetensors")
    ran = command(str(tmp_path / "m"), "--tensors")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert "executes no code" in ran.stdout
    assert "21 tensors" in ran.stdout
    assert "\x1b" not in ran.stdout
    assert "\u202e" not in ran.stdout
    torch.save({"a": torch.zeros(1), "x": Payload(tmp_path / "executed")}, tmp_path / "m.pt")
    ran = command(str(tmp_path / "m.pt"), "--json")
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["loading"] == "dangerous"
    (tmp_path / "m.pt").write_bytes(b"PK\x03\x04")
    ran = command(str(tmp_path / "m.pt"))
    assert ran.exit_code == 2
    assert "Not readable" in ran.stdout
    ran = command(str(tmp_path / "none.pt"))
    assert ran.exit_code == 2
    assert "cannot be read" in ran.stderr
    assert not (tmp_path / "executed").exists()
