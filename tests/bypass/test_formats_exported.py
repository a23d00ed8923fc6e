"""Programs of torch.export and TorchScript that carry pickles: none is followed, all are told."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile import Entry, Payload, archive, exported
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.read import read_contents, read_state

WEIGHTS = {"fc.weight": [1.0, 2.0, 3.0], "fc.bias": [0.5]}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def evil(marker: Path) -> bytes:
    held = io.BytesIO()
    torch.save(Payload(marker), held)
    return held.getvalue()


def test_the_program_of_these_tests_is_read(tmp_path: Path) -> None:
    contents = read_contents(written(tmp_path / "m.pt2", exported(WEIGHTS)))
    assert contents.format == "torch.export"
    assert {name: tensor.tolist() for name, tensor in contents.state().items()} == WEIGHTS


@pytest.mark.parametrize(
    "place", ["data/sample_inputs/model.pt", "data/constants/custom_obj_0", "extra/x.pkl"]
)
def test_a_pickle_that_the_loader_would_execute(tmp_path: Path, place: str) -> None:
    # File scanners that do not open the archive within the archive call this one clean.
    content = exported(WEIGHTS, Entry(f"m/{place}".encode(), evil(tmp_path / "executed")))
    path = written(tmp_path / "m.pt2", content)
    with pytest.raises(UnsafeFile, match="system"):
        read_state(path)
    assert inspect(path).executes
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("claim", [True, "yes", 1, None])
def test_weights_that_say_they_are_pickles(tmp_path: Path, claim: Any) -> None:
    path = written(tmp_path / "m.pt2", exported(WEIGHTS, use_pickle=claim))
    with pytest.raises(UnsafeFile, match="said to be a pickle"):
        read_state(path)
    assert inspect(path).executes


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", "", "\\x"])
def test_weights_outside_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeFile, match="outside the folder"):
        read_state(written(tmp_path / "m.pt2", exported(WEIGHTS, path_name=name)))


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [{"as_int": 1 << 60}]},
        {"sizes": [{"as_int": -1}]},
        {"sizes": [{"as_int": 4}]},
        {"sizes": [{"as_int": 1 << 30}], "strides": [{"as_int": 0}]},
        {"sizes": [{"as_expr": "s0"}]},
        {"sizes": "no"},
        {"strides": [{"as_int": -1}]},
        {"storage_offset": {"as_int": 1 << 40}},
        {"dtype": 99},
        {"dtype": "7"},
        {"path_name": "weight_9"},
        {"tensor_meta": None},
    ],
)
def test_lists_of_weights_that_make_no_sense(tmp_path: Path, change: dict[str, Any]) -> None:
    path = written(tmp_path / "m.pt2", exported(WEIGHTS, **change))
    with pytest.raises((InputError, UnsafeFile)):
        read_state(path)
    inspect(path).to_dict()


@pytest.mark.parametrize("listing", [b"", b"[]", b'{"config": []}', b"[" * 100_000, b'{"config": {"a": 1}}'])
def test_lists_of_weights_that_are_none(tmp_path: Path, listing: bytes) -> None:
    entries = [
        Entry(b"m/data/weights/model_weights_config.json", listing or b" "),
        Entry(b"m/archive_format", b"pt2"),
    ]
    with pytest.raises(InputError):
        read_state(written(tmp_path / "m.pt2", archive(entries)))


def test_machine_code_is_told(tmp_path: Path) -> None:
    code = Entry(b"m/data/aotinductor/model/x.wrapper.so", b"\x7fELF")
    path = written(tmp_path / "m.pt2", exported(WEIGHTS, code))
    assert "machine code.x.wrapper.so" in read_contents(path).dangerous
    assert inspect(path).executes


def test_two_programs_in_one_archive(tmp_path: Path) -> None:
    other = Entry(b"m/data/weights/other_weights_config.json", json.dumps({"config": {}}).encode())
    with pytest.raises(InputError, match="several programs"):
        read_state(written(tmp_path / "m.pt2", exported(WEIGHTS, other)))


# ---------------------------------------------------------------------------------------------------
# TorchScript


def script(pickled: bytes, text: bytes = b"", constants: bytes = b"\x80\x02).") -> bytes:
    return archive(
        [
            Entry(b"m/data.pkl", pickled),
            Entry(b"m/code/__torch__.py", text, method=8),
            Entry(b"m/constants.pkl", constants),
        ]
    )


@pytest.mark.parametrize("where", ["attribute", "constants", "class"])
def test_python_in_a_torchscript_archive(tmp_path: Path, where: str) -> None:
    call = b"cposix\nsystem\nX\x04\0\0\0true\x85R"
    module = (
        b"\x80\x02c__torch__\nNet\n)\x81}X\x01\0\0\0a" + (call if where == "attribute" else b"N") + b"sb."
    )
    if where == "class":
        module = b"\x80\x02c__torch__.os\nsystem\n)\x81}b." + pickle.dumps(Payload(tmp_path / "executed"))
    constants = b"\x80\x02" + call + b"\x85." if where == "constants" else b"\x80\x02)."
    path = written(tmp_path / "m.pt", script(module, constants=constants))
    with pytest.raises(UnbackdoorError):
        read_state(path)
    # Behind the end of its pickle nobody reads; the name of a class of the program imports nothing.
    assert inspect(path).executes == (where != "class")
    assert not (tmp_path / "executed").exists()


def test_a_program_text_of_a_million_brackets_costs_nothing(tmp_path: Path) -> None:
    numbers = b"".join(b'"a%d", ' % (i * 7919 % 10**9) for i in range(100_000))
    text = (
        b"class Net(Module):\n  __parameters__ = [" + numbers + b"\nclass Net(Module):\n  __parameters__ = ["
    )
    module = b"\x80\x02c__torch__\nNet\n)\x81}b."
    with pytest.raises(InputError, match="no weights"):
        read_state(written(tmp_path / "m.pt", script(module, text)))
