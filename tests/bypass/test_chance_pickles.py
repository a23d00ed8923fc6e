"""Weights in another container may begin a pickle by chance: deceptive is only what could be loaded."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from unbackdoor.weights.read import read_contents


def padded(length: int, tensor: torch.Tensor) -> bytes:
    """Return a safetensors file whose header has so many bytes: its first byte is an instruction."""
    bare = len(save({"w": tensor}, metadata={"pad": ""})) - tensor.nbytes - 8
    content = save({"w": tensor}, metadata={"pad": "z" * (length - bare)})
    assert int.from_bytes(content[:8], "little") == length
    return content


@pytest.mark.parametrize("first", range(0, 256, 8))
def test_a_header_that_begins_like_a_pickle(tmp_path: Path, first: int) -> None:
    # A line feed early in the weights ends names and numbers, and the rest is read as instructions.
    weights = np.random.default_rng(first).integers(0, 256, 4000, dtype=np.uint8)
    weights[10], weights[20], weights[21] = ord("\n"), ord("\n"), ord(".")
    file = tmp_path / "m.safetensors"
    file.write_bytes(padded(0x400 + first, torch.from_numpy(weights)))
    contents = read_contents(file)
    assert contents.problem is None
    assert not contents.names
    assert list(contents.tensors) == ["w"]


@pytest.mark.parametrize(
    "content", [b"P\xf0\n.", b"c\xf0os\nsystem\n.", b"i\xf0os\nsystem\n.", b"Pab\n."], ids=repr
)
def test_what_no_reader_loads_is_no_pickle(content: bytes) -> None:
    # The premise: neither of Python's readers gets past it.
    for reader in (pickle.loads, lambda c: pickle._Unpickler(io.BytesIO(c)).load()):  # type: ignore[attr-defined]
        with pytest.raises((pickle.UnpicklingError, UnicodeDecodeError, IndexError)):
            reader(content)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("first", [0x63, 0x69, 0x82, 0x83, 0x84])
def test_a_header_of_any_length_that_begins_like_a_name(
    tmp_path: Path, first: int, indent: int | None
) -> None:
    # Not every writer pads the header; its length is then an instruction that imports, of what cannot be.
    header: dict[str, object] = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    bare = len(json.dumps({"__metadata__": {"pad": ""}, **header}, indent=indent))
    padding = {"__metadata__": {"pad": "z" * (0x400 + first - bare)}}
    text = json.dumps({**padding, **header}, indent=indent).encode()
    assert len(text) == 0x400 + first
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    contents = read_contents(file)
    assert contents.problem is None
    assert not contents.names


@pytest.mark.parametrize("content", [b"\x82\x01", b"\x80\x02\x83\x01\x02", b"c\x01\0\na\n"], ids=repr)
def test_an_array_of_numbers_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    for name, values in (("a", np.frombuffer(content.ljust(64), np.uint8)), ("b", np.arange(3.0))):
        np.savez(tmp_path / f"{name}.npz", w=values)
        contents = read_contents(tmp_path / f"{name}.npz")
        assert not contents.names
        assert contents.problem is not None
        assert "no checkpoint" in str(contents.problem) or "not a checkpoint" in str(contents.problem)


def test_a_name_of_the_extension_table_in_a_whole_pickle_stays_dangerous(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02\x82\x01K\x01\x85R.")
    assert read_contents(tmp_path / "m.pkl").dangerous == ("copyreg.extension_1",)
