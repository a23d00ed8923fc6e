"""A file is opened once: what is scanned, hashed, repaired and reported are the same bytes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit import purifying, scanning
from unbackdoor.errors import InputError, IntegrityError, UnbackdoorError, UnsafeFile
from unbackdoor.types import state_sha256
from unbackdoor.weights import read, source, stored_file
from unbackdoor.weights.formats.safetensors import header
from unbackdoor.weights.stored_file import read_file

HOW: dict[str, Any] = {"arch": "small_cnn[width=8]", "mean": (0.35,), "std": (0.25,)}
OPENED: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.fspath(arguments[0]))


sys.addaudithook(_listen)  # cannot be taken away; it does nothing outside of the one test that counts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of somebody else."""
    path = tmp_path / "foreign.pth"
    torch.save(dict(tiny_classifier("conv-bn").network.state_dict()), path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model of the same form."""
    path = tmp_path / "other" / "foreign.pth"  # the name is in the file
    path.parent.mkdir()
    state = tiny_classifier("conv-bn").network.state_dict()
    torch.save({name: t * 2 if t.is_floating_point() else t for name, t in state.items()}, path)
    return path


def replaced(path: Path, other: Path) -> None:
    other.replace(path)


def overwritten(path: Path, other: Path) -> None:
    # In place, of the same length, with the old times: only the bytes tell.
    before, content = path.stat(), other.read_bytes()
    assert len(content) == before.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncated(path: Path, other: Path) -> None:
    os.truncate(path, 100)


def linked(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def removed(path: Path, other: Path) -> None:
    path.unlink()


SWAPS = [replaced, overwritten, truncated, linked, removed]


@pytest.fixture(params=SWAPS, ids=lambda swap: swap.__name__)
def swap(request: pytest.FixtureRequest) -> Callable[[Path, Path], None]:
    chosen: Callable[[Path, Path], None] = request.param
    return chosen


def test_a_source_is_of_the_bytes_that_were_parsed(model: Path, other: Path, swap: Any) -> None:
    digest, held = hashlib.sha256(model.read_bytes()).hexdigest(), read.read_state(model)
    opened = unbackdoor.open_source(model)
    swap(model, other)
    assert opened.sha256 == digest and opened.state().keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in opened.state().items())
    with pytest.raises(IntegrityError, match="changed since it was read"):
        opened.require_unchanged()
    with pytest.raises(AttributeError):
        opened.sha256 = ""  # type: ignore[misc]


def test_a_file_that_is_put_back_is_the_same_file(model: Path, other: Path) -> None:
    content = model.read_bytes()
    opened = unbackdoor.open_source(model)
    replaced(model, other)
    model.write_bytes(content)
    opened.require_unchanged()


def test_what_is_done_to_the_model_does_not_reach_the_source(model: Path) -> None:
    opened = unbackdoor.open_model(model, **HOW)
    assert opened.source is not None
    before = state_sha256(opened.source.contents.tensors)
    with torch.no_grad():
        for weight in opened.model.parameters():
            weight.zero_()
    assert state_sha256(opened.source.contents.tensors) == before


def test_a_file_that_is_written_while_it_is_read_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = os.readv

    def slow(descriptor: int, buffers: Any) -> int:
        count = genuine(descriptor, buffers)
        with model.open("ab") as file:
            file.write(b"more")
        return count

    monkeypatch.setattr(os, "readv", slow)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        read_file(model)


def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            unbackdoor.open_source(path)


def _swap_inside(monkeypatch: pytest.MonkeyPatch, home: Any, name: str, act: Callable[[], None]) -> None:
    """Let something happen just before a step of a verb."""
    genuine = getattr(home, name)

    def step(*arguments: Any, **options: Any) -> Any:
        act()
        return genuine(*arguments, **options)

    monkeypatch.setattr(home, name, step)


def test_a_scan_speaks_of_what_it_scanned_and_no_report_is_written(
    model: Path, other: Path, swap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    weights = unbackdoor.open_model(model, **HOW).model.sha256()
    _swap_inside(monkeypatch, scanning, "plan_checks", lambda: swap(model, other))
    audit = unbackdoor.scan(model, tiny_data(40), checks="weight_statistics", **HOW)
    told = audit.to_dict()
    assert (told["file_sha256"], told["model_sha256"]) == (digest, weights)
    for write in (
        lambda: audit.save_report(tmp_path / "report"),
        lambda: unbackdoor.save_sarif(audit, tmp_path / "log.sarif"),
    ):
        with pytest.raises(IntegrityError, match="changed since"):
            write()
    assert not (tmp_path / "report").exists() and not (tmp_path / "log.sarif").exists()


@pytest.mark.parametrize("moment", ["before the method", "after the method"])
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_repair_of_a_file_that_was_swapped_is_not_written(
    model: Path,
    other: Path,
    swap: Any,
    moment: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    if moment == "before the method":
        _swap_inside(monkeypatch, purifying, "split_proof", lambda: swap(model, other))
    done = unbackdoor.purify(model, tiny_data(60), "random_prune", **HOW)
    if moment == "after the method":
        swap(model, other)
    assert done.to_dict()["source_file_sha256"] == digest
    written: list[Callable[[], Path]] = [
        lambda: done.save(tmp_path / name),
        lambda: done.save_patch(tmp_path / "repair.patch"),
        lambda: done.save_report(tmp_path / "report"),
    ]
    for write in written:
        with pytest.raises(IntegrityError, match="changed since"):
            write()
    assert not {"out.pth", "out.json", "out.safetensors", "repair.patch", "report"} & {
        path.name for path in tmp_path.iterdir()
    }


def test_verify_and_patch_refuse_what_was_swapped(
    model: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = tmp_path / "third.pth"
    third.write_bytes(other.read_bytes())
    done = unbackdoor.verify(model, other, tiny_data(60), budget=1e-6, **HOW)
    made = unbackdoor.patch.make(model, other)
    assert made.save(tmp_path / "good.patch").exists()
    applied = unbackdoor.patch.apply(model, tmp_path / "good.patch")
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    assert done.to_dict()["after_file_sha256"] == digest
    other.write_bytes(model.read_bytes())  # the second file, not the first
    for write in (
        lambda: done.save_report(tmp_path / "report"),
        lambda: made.save(tmp_path / "bad.patch"),
    ):
        with pytest.raises(IntegrityError, match="changed since"):
            write()
    overwritten(model, third)
    with pytest.raises(IntegrityError, match="changed since"):
        applied.save(tmp_path / "applied.pt")
    assert not {"report", "bad.patch", "applied.pt"} & {path.name for path in tmp_path.iterdir()}


def test_the_card_belongs_to_the_source(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    unbackdoor.save_model(tiny_classifier("conv-bn"), path, history=[{"step": "trained"}])
    opened = unbackdoor.open_model(path)
    assert opened.source is not None and len(opened.source.files) == 2
    card = path.with_suffix(".json")
    card.write_text(card.read_text().replace("trained", "retrained"))
    assert opened.source.history() == [{"step": "trained"}]
    with pytest.raises(IntegrityError, match=r"m\.json"):
        opened.source.require_unchanged()
    card.unlink()
    with pytest.raises(IntegrityError, match=r"m\.json"):
        opened.source.require_unchanged()


def test_a_repair_keeps_the_history_of_the_card_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    unbackdoor.save_model(tiny_classifier("conv-bn"), path, history=[{"step": "trained"}])
    done = unbackdoor.purify(path, tiny_data(60), "none")
    out = done.save(tmp_path / "out")
    again = unbackdoor.open_source(out)
    assert [entry["step"] for entry in again.history()] == ["trained", "purified"]
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed since"):
        done.save(tmp_path / "more")


def test_weights_in_other_files_belong_to_the_source(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from graphs import node, write_onnx

    weight = torch.arange(108.0).reshape(4, 3, 3, 3)
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", "c", "p"),
        node("Flatten", "p"),
    ]
    path = tmp_path / "m.onnx"
    write_onnx(path, nodes, {"w": weight}, shape=("b", 3, 8, 8))
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    opened = unbackdoor.open_source(path)
    assert [file.path.name for file in opened.files] == ["m.onnx", "w.bin"]
    (tmp_path / "w.bin").write_bytes(bytes((tmp_path / "w.bin").stat().st_size))
    network = unbackdoor.open_model(opened).model.network
    assert any(torch.equal(tensor, weight) for tensor in network.state_dict().values())
    with pytest.raises(IntegrityError, match=r"w\.bin"):
        opened.require_unchanged()


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_purify_opens_and_parses_the_file_once(
    model: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global OPENED
    parsed: list[Path] = []
    genuine = read.read_contents
    monkeypatch.setattr(source, "read_contents", lambda file: parsed.append(file.path) or genuine(file))
    OPENED = []
    try:
        done = unbackdoor.purify(model, tiny_data(60), "random_prune", **HOW)
        assert OPENED.count(str(model)) == 1
        hashed: list[Path] = []
        check = stored_file.sha256_file
        monkeypatch.setattr(stored_file, "sha256_file", lambda path: hashed.append(path) or check(path))
        done.save(tmp_path / name)
        done.save_patch(tmp_path / "repair.patch")
        done.save_report(tmp_path / "report")
    finally:
        seen, OPENED = OPENED, None
    # Once to read it, and once before each thing that is written, only to hash it again.
    assert parsed == [model] and hashed == [model] * 3 and seen.count(str(model)) == 4


def test_inspect_tells_of_one_reading(model: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, parameters = hashlib.sha256(model.read_bytes()).hexdigest(), unbackdoor.inspect(model).parameters
    _swap_inside(monkeypatch, source, "read_contents", lambda: truncated(model, other))
    found = unbackdoor.inspect(model)
    assert (found.sha256, found.parameters, found.problem) == (digest, parameters, None)


# ---------------------------------------------------------------------------------------------------
# Safetensors from memory, as strictly as by their own library


def _accepted(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def _mutants() -> Iterator[bytes]:
    content = save({"a": torch.arange(4, dtype=torch.float32), "b": torch.ones(2, dtype=torch.int64)})
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length].decode(), content[8 + length :]
    for old, new in [
        ("", ""), ("[0,16]", "[0,32]"), ("[16,32]", "[8,24]"), ("[16,32]", "[0,16]"), ("[4]", "[5]"),
        ("[4]", "[2,2]"), ("[4]", "[-4]"), ("[4]", "[4.0]"), ("F32", "F99"), ("F32", "I32"),
        ('"b"', '"a"'), ("data_offsets", "offsets"), ("[0,16]", "[0,16,16]"), ("[0,16]", "null"),
        ("{", "["), ("}}", "}"),
        ("[4]", "[18446744073709551616]"), ("[4]", "[1099511627776,1099511627776]"),
        ('"a"', '"\\ud800"'), ("[4]", "[NaN]"), ("[4]", "[true]"),
    ]:  # fmt: skip
        changed = text.replace(old, new, 1).encode()
        yield len(changed).to_bytes(8, "little") + changed + data
    yield content + b"\0"
    yield content[:-1]
    yield content[:7]
    yield (1 << 62).to_bytes(8, "little") + content[8:]


@pytest.mark.parametrize("content", list(_mutants()))
def test_what_the_library_refuses_is_refused_from_memory(content: bytes, tmp_path: Path) -> None:
    try:
        references, _ = header.read(content, "test")
    except UnbackdoorError:
        accepted = False
    else:
        accepted = True
        assert references.keys() == {name for name, _ in deserialize(content)}
    assert accepted <= _accepted(content)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_are_never_accepted_alone(data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.float16)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        header.read(bytes(content), "test")
    except UnbackdoorError:
        return
    assert _accepted(bytes(content))


def test_every_type_reads_as_by_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
             torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
    state = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    state |= {"one": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    save_file(state, tmp_path / "m.safetensors", metadata={"by": "test"})
    contents = read.read_contents(tmp_path / "m.safetensors")
    wanted = load_file(tmp_path / "m.safetensors")
    assert contents.metadata == {"by": "test"} and contents.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert contents.tensors[name].dtype == tensor.dtype and torch.equal(contents.tensors[name], tensor)


def test_a_name_that_stands_twice_is_refused() -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b"{" + entry + b"," + entry + b"}"
    with pytest.raises(UnsafeFile, match="twice"):
        header.read(len(text).to_bytes(8, "little") + text + b"\0", "test")
