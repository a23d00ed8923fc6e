"""Any change of a file gives a state dict or a typed error, in bounded time, and executes nothing."""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hostile import Entry, Payload, exported
from unbackdoor.errors import UnbackdoorError
from unbackdoor.networks import build
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_globals import Name, judge
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.read import read_state

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

MUTATIONS = 60


def _network() -> nn.Module:
    return build("small_cnn[width=1]", input_shape=(1, 8, 8), class_names=["a", "b"]).network.eval()


def _saved(content: object, **options: bool) -> bytes:
    held = io.BytesIO()
    torch.save(content, held, **options)
    return held.getvalue()


def _torchscript() -> bytes:
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(_network(), torch.rand(1, 1, 8, 8)), held)
    return held.getvalue()


def _evil(marker: Path) -> dict[str, object]:
    return {"state_dict": _network().state_dict(), "args": Payload(marker)}


KINDS: dict[str, Callable[[Path], bytes]] = {
    "zip": lambda marker: _saved(_evil(marker)),
    "legacy": lambda marker: _saved(_evil(marker), _use_new_zipfile_serialization=False),
    "raw": lambda marker: pickle.dumps(_evil(marker)),
    "module": lambda marker: _saved(_network()),
    "torchscript": lambda marker: _torchscript(),
    "exported": lambda marker: exported(
        {"a": [1.0, 2.0], "b": [3.0]}, Entry(b"m/data/x.pt", _saved(_evil(marker)))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_give_a_state_dict_or_a_typed_error(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "executed"
    content = KINDS[kind](marker)
    path = tmp_path / "m.bin"
    generator = torch.Generator().manual_seed(11)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    for _ in range(MUTATIONS):
        broken = bytearray(content)
        # A few bytes, a piece moved elsewhere, a piece cut out: mostly in the structure, not in the numbers.
        for _ in range(1 + draw(4)):
            broken[draw(len(broken))] = draw(256)
        if draw(3) == 0:
            at, to, size = draw(len(broken)), draw(len(broken)), draw(60)
            broken[to : to + size] = broken[at : at + size]
        if draw(4) == 0:
            at = draw(len(broken))
            del broken[at : at + draw(30)]
        path.write_bytes(broken)
        inspect(path).to_dict()  # raises nothing
        with suppress(UnbackdoorError):
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_state(path).values())
    assert not marker.exists()


PARTS = [
    b"\x80\x02", b"(", b"l", b"t", b"d", b"}", b"]", b")", b"N", b"K\x01", b"U\x01a", b"X\x01\0\0\0a", b"q\0",
    b"h\0", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b"R", b"b", b"\x81", b"\x92", b"\x93", b"\x94",
    b"\x8f", b"\x90", b"\x91", b"\x85", b"\x86", b"\x87", b"Q", b"o", b"\x82\x01", b"cposix\nsystem\n",
    b"cmodels\nNet\n", b"(imodels\nOld\n", b"\x8c\x01a\x8c\x01b\x93", b"I7\n", b"I0x1\n", b"L7L\n", b"F1.5\n",
    b"S'a\xff'\n", b"Va\n", b"p1\n", b"g1\n", b"Pa\n", b"\x95\x05\0\0\0\0\0\0\0", b"\x8e\x01\0\0\0\0\0\0\0a",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.storage\n_load_from_bytes\n", b"C\x01a", b"."
]  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PARTS), max_size=60))
def test_any_sequence_of_instructions_ends_in_a_value_or_a_typed_error(parts: list[bytes]) -> None:
    checkpoints.scan(b"".join(parts), Trail())


class Anything:
    """What every name stands for where Python's own machine is asked which names it would import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any) -> Anything:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class Asked(pickle.Unpickler):
    """Python's own machine, which imports nothing and writes down what it would have."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.names: set[Name] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(Name(module, name))
        return Anything

    def persistent_load(self, saved: Any) -> Any:
        return Anything()


def unmentioned(content: bytes) -> set[Name]:
    """Return the names that pickle would import and that our reader has not told."""
    asked = Asked(content)
    with suppress(Exception):  # whatever it stops at, what came before counts
        asked.load()
    trail = Trail()
    checkpoints.scan(content, trail)
    if any(name.module == "a pickle" for name in trail.names):
        return set()  # told to be deceptive as a whole
    old = {(name.module, name.name) for name in trail.names}
    # Protocols below 3 ask for the new names of what Python 2 called otherwise.
    new = {
        (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        for module, name in {_compat_pickle.NAME_MAPPING.get(pair, pair) for pair in old}
    }
    return {n for n in asked.names if judge(n) != "plain" and (n.module, n.name) not in old | new}


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PARTS), max_size=60))
def test_no_name_that_pickle_would_import_goes_untold(parts: list[bytes]) -> None:
    assert not unmentioned(b"\x80\x02" + b"".join(parts))


def test_no_name_of_a_mutated_pickle_goes_untold() -> None:
    generator = torch.Generator().manual_seed(17)
    for protocol in range(6):
        # Without the letters that make Python's machine put things at absurd places of its memory.
        content = pickle.dumps({"a": Payload(Path("x")), "b": [1.5, 1 << 70, "x", b"y"]}, protocol)
        for _ in range(80):
            broken = bytearray(content)
            for _ in range(2):
                place, value = torch.randint(0, 1 << 20, (2,), generator=generator).tolist()
                broken[place % len(broken)] = value % 256 if value % 256 not in b"rpjg" else 0x30
            assert not unmentioned(bytes(broken)), bytes(broken)
