"""Weights of honest files, equal to what their own loaders give: the same names, values, types and order."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from shared_material import shared_checkpoints
from unbackdoor.errors import InputError
from unbackdoor.networks import build
from unbackdoor.weights.formats.buffers import LONGEST, listed
from unbackdoor.weights.read import read_contents, read_state

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

SHAPE = (3, 8, 8)
WRITERS = ["zip", "legacy", "raw"]


def network() -> nn.Module:
    return build("small_cnn[width=4]", input_shape=SHAPE, class_names=["a", "b"]).network


def save(content: object, path: Path, kind: str) -> Path:
    if kind == "raw":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_all_types_and_layouts(tmp_path: Path, kind: str) -> None:
    grid = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "turned": grid.transpose(0, 2),
        "part": grid[1, :, 1:3],
        "spread": torch.ones(1, 3).expand(4, 3),
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "double": torch.tensor([1e300], dtype=torch.float64),
        "long": torch.tensor([-(1 << 62)]),
        "int": torch.tensor([-7], dtype=torch.int32),
        "short": torch.tensor([-7], dtype=torch.int16),
        "byte": torch.tensor([200], dtype=torch.uint8),
        "char": torch.tensor([-7], dtype=torch.int8),
        "truth": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2)),
        "last": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    read = read_state(save(state, tmp_path / "m.pt", kind))
    assert equal(read, {name: tensor.detach() for name, tensor in state.items()})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("nest", ["state_dict", "model", "net", "my_network"])
def test_what_lies_beside_the_weights_is_told(tmp_path: Path, kind: str, nest: str) -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, *SHAPE)).sum().backward()
    optimizer.step()
    content = {
        nest: OrderedDict(("module." + name, t) for name, t in net.state_dict().items()),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "best": np.float64(0.93),
        "acc": np.float32(0.5),
        "args": argparse.Namespace(rate=0.1),
        "losses": np.arange(3.0),
        "loss": float("nan"),
    }
    contents = read_contents(save(content, tmp_path / "m.pt", kind))
    assert equal(contents.state(), net.state_dict())
    assert contents.beside == {"epoch": 7, "best": 0.93, "acc": 0.5, "loss": "nan"}
    assert contents.prefix == "module."
    assert "argparse.Namespace" in contents.foreign
    assert not contents.dangerous
    assert any("optimizer" in note for note in contents.notes)


@pytest.mark.parametrize("kind", WRITERS)
def test_whole_modules(tmp_path: Path, kind: str) -> None:
    net = network()
    net.register_buffer("passing", torch.ones(1), persistent=False)
    for content in (net, nn.DataParallel(net), {"net": net, "epoch": 1}):
        contents = read_contents(save(content, tmp_path / "m.pt", kind))
        assert equal(contents.state(), net.state_dict())
        assert set(contents.names.values()) <= {"library"}
        assert any("whole module" in note for note in contents.notes)


class Mine(nn.Module):
    """A class that the reader has never heard of, and that would complain if it were built."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("built")


def test_modules_of_unknown_classes(tmp_path: Path) -> None:
    net = Mine()
    contents = read_contents(save(net, tmp_path / "m.pt", "zip"))
    assert equal(contents.state(), net.state_dict())
    assert contents.names[f"{Mine.__module__}.Mine"] == "unknown"


def test_masks_of_pruning_are_multiplied_in(tmp_path: Path) -> None:
    net = network()
    plain = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    prune.random_unstructured(net.conv1, "weight", 0.5)  # type: ignore[no-untyped-call]
    expected = {**plain, "conv1.weight": net.conv1.weight.detach()}
    for content in (net.state_dict(), net):
        contents = read_contents(save(content, tmp_path / "m.pt", "zip"))
        state = contents.state()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert any("1 pruning masks" in note for note in contents.notes)


def test_other_ways_of_writing_a_weight_are_remarked_upon(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    contents = read_contents(save(layer.state_dict(), tmp_path / "m.pt", "zip"))
    assert set(contents.state()) == set(layer.state_dict())
    assert any("parametris" in note for note in contents.notes)
    state = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3)}
    assert any("length" in note for note in read_contents(save(state, tmp_path / "n.pt", "zip")).notes)


def test_where_several_entries_hold_tensors_none_is_chosen(tmp_path: Path) -> None:
    content = {"teacher": {"a": torch.ones(1)}, "student": {"a": torch.zeros(1)}}
    contents = read_contents(save(content, tmp_path / "m.pt", "zip"))
    assert isinstance(contents.problem, InputError)
    assert any("'student'" in note or "student" in note for note in contents.notes)
    assert "several state dicts" in str(contents.problem)
    assert "student" in str(contents.problem)


def test_a_state_dict_in_a_list(tmp_path: Path) -> None:
    contents = read_contents(save(({"a": torch.ones(1)}, 7), tmp_path / "m.pt", "zip"))
    assert list(contents.state()) == ["a"]
    assert any("under 0" in note for note in contents.notes)


def test_every_key_of_a_state_dict_counts_for_a_prefix(tmp_path: Path) -> None:
    state = {"model.a": torch.ones(1), "model.b": torch.ones(1)}
    contents = read_contents(save(state, tmp_path / "m.pt", "zip"))
    assert (list(contents.tensors), contents.prefix) == (["a", "b"], "model.")
    contents = read_contents(save({**state, "fc": torch.ones(1)}, tmp_path / "m.pt", "zip"))
    assert (len(contents.tensors), contents.prefix) == (3, "")
    # A prefix that would leave nothing of a name is none.
    assert read_contents(save({"module.": torch.ones(1)}, tmp_path / "m.pt", "zip")).prefix == ""


# ---------------------------------------------------------------------------------------------------
# TorchScript


class Scripted(nn.Module):
    """With a buffer, a tensor that is neither parameter nor buffer, numbers and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.arange(4.0).reshape(4, 1, 1))
        self.plain = torch.ones(3)
        self.sizes = [1, 2]
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((self.conv(x) * self.scale).mean((2, 3)))
        return out + self.plain.sum() + self.sizes[0]


@pytest.mark.parametrize("way", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_read_as_its_own_loader_reads_it(tmp_path: Path, way: str) -> None:
    net = Scripted() if way == "script" else network()
    made: Any = (
        torch.jit.script(net) if way == "script" else torch.jit.trace(net.eval(), torch.rand(1, *SHAPE))
    )
    torch.jit.save(made, tmp_path / "m.pt")
    contents = read_contents(tmp_path / "m.pt")
    expected = torch.jit.load(tmp_path / "m.pt").state_dict()
    assert contents.format == "torchscript"
    assert equal(contents.state(), expected)
    assert contents.names == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_frozen_torchscript_has_lost_its_names(tmp_path: Path) -> None:
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 2)).eval()))
    torch.jit.save(frozen, tmp_path / "m.pt")
    contents = read_contents(tmp_path / "m.pt")
    assert all(name.startswith("constants.") for name in contents.tensors)
    assert any("frozen" in note for note in contents.notes)


# ---------------------------------------------------------------------------------------------------
# torch.export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """An exported program and its state dict."""
    net = network().eval()
    path = tmp_path_factory.mktemp("exported") / "m.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.rand(1, *SHAPE),))
        torch.export.save(program, path)
    return path, dict(program.state_dict)


def test_exported_programs_are_read_without_their_loader(
    exported: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = exported
    monkeypatch.setattr(torch.export, "load", None)
    contents = read_contents(path)
    assert contents.format == "torch.export"
    read = contents.state()
    assert set(read) == set(state)
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert any("sample inputs" in note for note in contents.notes)


@pytest.mark.parametrize("old", ["weights", "serialized"])
def test_older_layouts_of_exported_programs(
    exported: tuple[Path, dict[str, Tensor]], tmp_path: Path, old: str
) -> None:
    import io
    import zipfile

    path, state = exported
    held = io.BytesIO()
    torch.save(state, held)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "m.pt2", "w") as out:
        if old == "serialized":
            out.writestr("serialized_exported_program.json", json.dumps({}))
            out.writestr("serialized_state_dict.pt", held.getvalue())
        else:
            for name in source.namelist():
                if "/data/weights/" not in name:
                    out.writestr(name, source.read(name))
            out.writestr(f"{path.stem}/data/weights/model.pt", held.getvalue())
    contents = read_contents(tmp_path / "m.pt2")
    assert contents.format == "torch.export"
    assert equal(contents.state(), state)


# ---------------------------------------------------------------------------------------------------
# Other people's files


CHECKPOINTS = shared_checkpoints()


@pytest.mark.shared
@pytest.mark.skipif(not CHECKPOINTS, reason="the checkpoints of the development material are not here")
@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.name)
def test_published_checkpoints_are_read(path: Path) -> None:
    contents = read_contents(path)
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    loaded = loaded.get("net", loaded.get("state_dict", loaded))
    assert equal(contents.state(), {name.removeprefix("module."): t for name, t in loaded.items()})
    assert contents.foreign == ()


def test_names_of_a_file_are_shown_bounded_and_without_control_characters() -> None:
    """Three helpers did this, and one ended what it cut with two full stops."""
    assert listed(["a", "b"]) == "a, b"
    assert listed(("a\x1b[31m", "b", "c"), 2) == r"a\x1b[31m, b and 1 more"
    (long,) = listed(["x" * 10_000]).split(", ")
    assert len(long) == LONGEST and long.endswith("xxx...")
    assert len(listed(["\x00" * 10_000] * 10_000)) < 6 * LONGEST + 20


def test_a_header_that_begins_as_a_text_of_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    # 0x58 is X, and what stands where that text would end begins with i, an opcode that names a module.
    for length in range(0x58, 0x4000, 0x100):
        for word in (b"itecture", b"classifier", b"conv1.weight"):
            at = (length >> 8) - 3  # in the header, behind the length of the text and the text
            head = b'{"__metadata__":{"' + b"_" * max(0, at - 18) + word + b'":"a"},"w":'
            head += b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
            if len(head) > length:
                continue
            path = tmp_path / "m.safetensors"
            path.write_bytes(length.to_bytes(8, "little") + head.ljust(length) + b"\n\na\n")
            contents = read_contents(path)
            assert contents.problem is None, (length, word)
            assert not contents.names
