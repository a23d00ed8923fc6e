"""Weights in another container may begin a pickle by chance: deceptive is only what could be loaded."""

from __future__ import annotations

import io
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
