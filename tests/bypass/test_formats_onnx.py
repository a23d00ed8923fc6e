"""Hostile ONNX files: what lies outside their folder is not opened, what they claim is not believed."""

from __future__ import annotations

import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from unbackdoor.errors import InputError, MissingExtra, UnbackdoorError, UnsafeFile
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.onnx import initializers as reader
from unbackdoor.weights.read import read_state, sniff

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError:
    onnx = None

needs_onnx = pytest.mark.skipif(onnx is None, reason="ONNX files need the package onnx (extra: onnx)")


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def handmade(graph: bytes) -> bytes:
    """Return a model of version 10 around the bytes of a graph, without the package."""
    return b"\x08\x0a" + field(7, graph)


def model(path: Path, **changes: Any) -> Path:
    tensor = helper.make_tensor("fc.weight", TensorProto.FLOAT, [2], [1.0, 2.0])
    for name, value in changes.items():
        if name == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        elif name == "data_type":
            tensor.data_type = value
        else:
            tensor.ClearField("float_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in value.items():
                tensor.external_data.add(key=key, value=text)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "fc.weight"], ["y"])],
        "graph",
        [value("x", TensorProto.FLOAT, None)],
        [value("y", TensorProto.FLOAT, None)],
        [tensor],
    )
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "m.onnx").write_bytes(handmade(b""))
    assert sniff(tmp_path / "m.onnx") == "onnx"
    with pytest.raises(MissingExtra, match="onnx"):
        read_state(tmp_path / "m.onnx")
    assert "onnx" in str(inspect(tmp_path / "m.onnx").problem)


@needs_onnx
@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "..",
        "",
        "c:/x",
        "..\\secret",
        "link",
        "folder/../../secret",
    ],
)
def test_data_outside_the_folder_is_not_opened(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    inside = tmp_path / "inside"
    (inside / "folder").mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFile, match="outside its folder"):
        read_state(model(inside / "m.onnx", external={"location": location}))


@needs_onnx
def test_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(4) + b"\0\0\x80?\0\0\0@")
    path = model(tmp_path / "m.onnx", external={"location": "weights.bin", "offset": "4", "length": "8"})
    assert read_state(path)["fc.weight"].tolist() == [1.0, 2.0]


@needs_onnx
@pytest.mark.parametrize(
    "place", [{"offset": "8"}, {"offset": "-4"}, {"length": "4"}, {"length": "1" * 30}, {"offset": "x"}]
)
def test_places_that_hold_no_tensor(tmp_path: Path, place: dict[str, str]) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(InputError):
        read_state(model(tmp_path / "m.onnx", external={"location": "weights.bin", **place}))


@needs_onnx
@pytest.mark.parametrize("location", ["folder", "missing.bin", "pipe"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, location: str) -> None:
    import os

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="missing"):
        read_state(model(tmp_path / "m.onnx", external={"location": location}))


@needs_onnx
@pytest.mark.parametrize("dims", [[1 << 62], [1 << 39, 1 << 39], [-2], [3], [1] * 40, [0, 1 << 62]])
def test_absurd_shapes(tmp_path: Path, dims: list[int]) -> None:
    with pytest.raises((InputError, UnsafeFile)):
        read_state(model(tmp_path / "m.onnx", dims=dims))


@needs_onnx
@pytest.mark.parametrize("kind", [0, 8, 14, 99])
def test_types_that_no_network_has(tmp_path: Path, kind: int) -> None:
    with pytest.raises(InputError, match="type"):
        read_state(model(tmp_path / "m.onnx", data_type=kind))


@needs_onnx
def test_messages_that_grow_when_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two bytes each, a hundred when parsed.
    monkeypatch.setattr(reader, "MAX_FIELDS", 50_000)
    (tmp_path / "m.onnx").write_bytes(handmade(field(1, b"") * 60_000))
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(UnsafeFile, match="too many parts"):
        read_state(tmp_path / "m.onnx")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert time.process_time() - begun < 5


@needs_onnx
def test_graphs_within_graphs(tmp_path: Path) -> None:
    graph = b""
    for _ in range(30):
        graph = field(1, field(5, field(6, graph)))
    (tmp_path / "m.onnx").write_bytes(handmade(graph))
    with pytest.raises(UnsafeFile, match="within each other"):
        read_state(tmp_path / "m.onnx")


@needs_onnx
def test_two_graphs_and_two_weights_of_one_name(tmp_path: Path) -> None:
    good = model(tmp_path / "m.onnx").read_bytes()
    loaded = onnx.load_model_from_string(good)
    (tmp_path / "m.onnx").write_bytes(good + field(7, loaded.graph.SerializeToString()))
    with pytest.raises(UnsafeFile, match="several graphs"):
        read_state(tmp_path / "m.onnx")
    loaded.graph.initializer.append(loaded.graph.initializer[0])
    (tmp_path / "m.onnx").write_bytes(loaded.SerializeToString())
    with pytest.raises(UnsafeFile, match="one name"):
        read_state(tmp_path / "m.onnx")


@needs_onnx
@pytest.mark.parametrize(
    "name", ['a"]; import os #', "__class__.x.weight", "forward.weight", "graph.weight", "x.\n.weight"]
)
def test_names_become_no_code(tmp_path: Path, name: str) -> None:
    from unbackdoor.weights.formats.onnx.graph import import_graph

    loaded = onnx.load_model_from_string(model(tmp_path / "m.onnx").read_bytes())
    loaded.graph.initializer[0].name = name
    loaded.graph.node[0].input[1] = name
    loaded.graph.node[0].name = name
    (tmp_path / "m.onnx").write_bytes(loaded.SerializeToString())
    network = import_graph(tmp_path / "m.onnx")
    assert network(torch.ones(1, 2)).tolist() == [[1.0, 2.0]]
    assert "import os" not in network.code


@needs_onnx
def test_mutated_models_give_weights_or_a_typed_error(tmp_path: Path) -> None:
    from unbackdoor.weights.formats.onnx.graph import import_graph

    content = model(tmp_path / "m.onnx").read_bytes()
    generator = torch.Generator().manual_seed(5)
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(3):
            place, value = torch.randint(0, 1 << 20, (2,), generator=generator).tolist()
            broken[place % len(broken)] = value % 256
        (tmp_path / "m.onnx").write_bytes(broken)
        with suppress(UnbackdoorError):
            read_state(tmp_path / "m.onnx")
        with suppress(UnbackdoorError):
            import_graph(tmp_path / "m.onnx")
