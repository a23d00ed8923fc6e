"""Whatever a file holds, only our own errors come out of its reader, and nothing unseen is shown."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tiny import tiny_classifier
from unbackdoor.attacks import poison
from unbackdoor.audit.references import read_references
from unbackdoor.bench.rows import read_rows, read_scans
from unbackdoor.bench.suites import SHIPPED, load_suite
from unbackdoor.bench.truth_files import TRUTH_SUFFIX, load_truth
from unbackdoor.cli.auditor import class_names
from unbackdoor.data.loaders import load_images
from unbackdoor.errors import UnbackdoorError
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import open_model
from unbackdoor.opening.rename_tensors import adapt
from unbackdoor.report.markdown import to_markdown
from unbackdoor.report.page import render
from unbackdoor.report.tables import Document
from unbackdoor.text import json_text, printable
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.weights.card import read_card
from unbackdoor.weights.patch import make_patch, read_patch, use_patch, write_patch
from unbackdoor.weights.source import open_source
from unbackdoor.weights.triggers import read_trigger, write_trigger

pytestmark = pytest.mark.leaves_traces
# The short profile is the same at every run; the long one is for the nightly job.
PROFILES = pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.slow)])


def hold(strategy: st.SearchStrategy[Any], reader: Callable[[Any], object], examples: int) -> None:
    """Run a reader on drawn inputs; all but our own errors fail the test."""

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def check(drawn: Any) -> None:
        with suppress(UnbackdoorError):
            reader(drawn)

    check()


# ---------------------------------------------------------------------------------------------------
# What strangers write

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", ".", "..", "\ud800", "a\udfffb", "\x1b[2J", "\u202eevil", "a\nb", "a\0b", "\u2028", "9" * 5000,
         "9" * 400, "\u00b2", "\u0661", "-1", "1e999", "x" * 3000, "in", "__class__", "fc.weight"]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63, 2**64, 1e308, -0.0, 0.5]),
    st.floats(),
)


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from([deep(60), deep(90), deep(400)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a JSON document with one of its values replaced, left out or added to."""
    document = deepcopy(document)
    place = document
    for _ in range(draw(st.integers(0, 3))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        inner = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
        if not inner:
            break
        place = place[draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 4)) == 0:
        del place[key]
    else:
        place[key] = draw(VALUES)
    return document


def written(value: Any) -> str:
    return json.dumps(value)  # NaN and infinities included, as Python writes them


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file with some bytes changed, moved or cut out."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        kind = draw(st.integers(0, 3))
        if kind == 0 and out:
            out[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x2E, 0x28]) | st.integers(0, 255))
        elif kind == 1:
            del out[at : at + draw(st.integers(1, 40))]
        elif kind == 2:
            start = draw(st.integers(0, max(len(out) - 1, 0)))
            out[at:at] = out[start : start + draw(st.integers(1, 40))]
        elif len(out) > at + 8:
            out[at : at + 8] = struct.pack("<q", draw(st.sampled_from([-1, 2**31, 2**62, 0])))
    return bytes(out)


# ---------------------------------------------------------------------------------------------------
# Records


@PROFILES
def test_cards(examples: int, tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    card = save_model(model, tmp_path / "m", history=[{"a": 1}]).model_dump(mode="json")
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")

    def read(document: Any) -> None:
        (tmp_path / "m.json").write_text(written(document))
        with suppress(UnbackdoorError):
            json_text(inspect(tmp_path / "m.safetensors").to_dict())
        with suppress(UnbackdoorError):
            load_model(tmp_path / "m.safetensors")
        read_card(tmp_path / "m.json")

    hold(changed(card) | VALUES, read, examples)


@PROFILES
def test_patches(examples: int, tmp_path: Path) -> None:
    before = {"a": torch.zeros(4, 3), "b": torch.zeros(2, dtype=torch.int64)}
    after = {"a": torch.ones(4, 3), "b": torch.tensor([1, 0])}
    patch = make_patch(before, after, {"names": {"a": "a", "b": "b"}})
    write_patch(tmp_path / "p", patch)
    entries = [[name, list(e.shape), e.dtype, e.changed, e.sparse] for name, e in patch.entries.items()]
    tensors = {
        str(i): torch.frombuffer(bytearray(e.packed), dtype=torch.uint8)
        for i, e in enumerate(patch.entries.values())
    }
    head = {"kind": "unbackdoor-patch-1", "before": patch.before, "after": patch.after, "facts": "{}"}

    def read(document: Any) -> None:
        described = document if isinstance(document, dict) else {"entries": document, "facts": {}}
        texts = {key: written(value) for key, value in described.items() if isinstance(key, str)}
        save_file(
            tensors,
            tmp_path / "p",
            metadata={**head, **{k: texts[k] for k in ("entries", "facts") if k in texts}},
        )
        use_patch(read_patch(tmp_path / "p"), before, "apply")

    hold(changed({"entries": entries, "facts": {"names": {"a": "b"}}}) | VALUES, read, examples)
    content = (tmp_path / "p").read_bytes()

    def read_bytes(content: bytes) -> None:
        (tmp_path / "p").write_bytes(content)
        use_patch(read_patch(tmp_path / "p"), before, "revert")

    hold(damaged(content), read_bytes, examples)


@PROFILES
def test_triggers(examples: int, tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    pattern = torch.zeros(model.input_shape)
    write_trigger(tmp_path, RecoveredTrigger(1, pattern, torch.zeros(pattern.shape[1:]), "check"), {})

    def read(document: Any) -> None:
        save_file({"pattern": pattern}, tmp_path / "t", metadata={"facts": written(document)})
        read_trigger(tmp_path / "t", model)

    hold(changed({"class": 1, "check": "x"}) | VALUES, read, examples)
    content = (tmp_path / "trigger.safetensors").read_bytes()

    def read_bytes(content: bytes) -> None:
        (tmp_path / "t").write_bytes(content)
        read_trigger(tmp_path / "t", model)

    hold(damaged(content), read_bytes, examples)


@PROFILES
def test_rows_and_references(examples: int, tmp_path: Path) -> None:
    row = {"suite": "s-v1", "clean_images": 5, "attack": "none", "acc": 0.5, "flags": ["a"], "seed": 1}
    record = {"model_sha256": "0", "setting": {"a": [1]}, "checks": [{"check": "x", "report": {}}]}

    def read(document: Any) -> None:
        (tmp_path / "r").write_text(written(document))
        for reader in (read_rows, read_scans):
            with suppress(UnbackdoorError):
                reader(tmp_path / "r")
        read_references([tmp_path / "r"])

    hold(changed(row) | changed(record) | VALUES, read, examples)


@PROFILES
def test_truths(examples: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=[0, 1] * 10)
    images = load_images(tmp_path / "d.npz", cache=tmp_path / "cache")
    spec = poison(images, "badnets")[1].spec()

    def read(document: Any) -> None:
        (tmp_path / f"m{TRUTH_SUFFIX}").write_text(written(document))
        load_truth(tmp_path / f"m{TRUTH_SUFFIX}")

    hold(changed(spec) | VALUES, read, examples)


@PROFILES
def test_suites(examples: int, tmp_path: Path) -> None:
    content = next(iter(sorted(SHIPPED.glob("*.toml")))).read_bytes()[:3000]

    def read(content: bytes) -> None:
        (tmp_path / "s-v1.toml").write_bytes(content)
        load_suite(tmp_path / "s-v1.toml")

    hold(damaged(content) | TEXTS.map(lambda text: text.encode("utf-8", "replace")), read, examples)


@PROFILES
def test_class_names(examples: int, tmp_path: Path) -> None:
    def read(drawn: tuple[str, bytes]) -> None:
        (tmp_path / "names.txt").write_bytes(drawn[1])
        with suppress(UnbackdoorError):
            class_names(str(tmp_path / "names.txt"))
        class_names(drawn[0])

    hold(st.tuples(TEXTS, st.binary(max_size=40)), read, examples)


def test_the_names_of_a_hundred_classes_can_be_typed() -> None:
    names = tuple(f"class_{i}" for i in range(100))
    assert class_names(",".join(names)) == names


# ---------------------------------------------------------------------------------------------------
# Weights

NAMES = st.one_of(
    TEXTS,
    st.builds(
        lambda *parts: ".".join(parts),
        st.sampled_from(
            ["conv1", "features.0", "features.3", "features.99999999999", "features.\u00b2", "layer1.0.conv1",
             "layer3.0.conv1", "block2.layer.0.bn1", "group1.conv1", "patch_embed.proj", "fc", "classifier",
             "classifier.1", "classifier.\u0661", "head", "normalize", "bn1", "layer2.0.bn1", "blocks.0.n"]
        ),
        st.sampled_from(
            ["weight", "bias", "running_mean", "num_batches_tracked", "mean", "std", "weight_orig",
             "weight_mask", "neuron_mask", "weight_g", "weight_v"]
        ),
    ),
    st.sampled_from(["cls_token", "pos_embed", "whiten.weight", "mean", "std", "n_averaged"]),
)  # fmt: skip
SHAPES = st.one_of(
    st.sampled_from(
        [(), (0,), (1,), (3,), (0, 0), (4, 0), (0, 4), (3, 4), (2, 3, 3, 3), (0, 3, 3, 3), (2, 0, 1, 1)]
    ),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
)
STATES = st.dictionaries(
    NAMES, st.tuples(SHAPES, st.sampled_from(["float32", "float16", "int64", "bool"])), max_size=8
)


def tensors_of(drawn: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in drawn.items()}


def open_everything(path: Path) -> None:
    facts = inspect(path).to_dict()
    shown = json_text(facts)
    assert json.loads(shown) == json.loads(json.dumps(facts)) and unseen(shown) <= {"\n"}
    with suppress(UnbackdoorError):
        open_model(path, arch="small_cnn[width=1]", size=(8, 8))
    open_model(path)


def unseen(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()}


@PROFILES
def test_state_dicts(examples: int, tmp_path: Path) -> None:
    def read(drawn: dict[str, Any]) -> None:
        torch.save(tensors_of(drawn), tmp_path / "m.pth")
        open_everything(tmp_path / "m.pth")

    hold(STATES, read, examples)


@PROFILES
def test_names_in_safetensors(examples: int, tmp_path: Path) -> None:
    def read(drawn: dict[str, Any]) -> None:
        header, at = {}, 0
        for name, (shape, _) in drawn.items():
            size = 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * at)
        open_everything(tmp_path / "m.safetensors")

    hold(STATES, read, examples)


@PROFILES
def test_headers_of_safetensors(examples: int, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

    def read(document: Any) -> None:
        text = written(document).encode()
        (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        open_everything(tmp_path / "m.safetensors")

    hold(changed({"fc.weight": entry, "__metadata__": {"a": "b"}}) | VALUES, read, examples)


@PROFILES
def test_adapting_names(examples: int) -> None:
    def read(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
        adapt(*map(tensors_of, drawn), in_order=bool(len(drawn[0]) % 2))  # type: ignore[call-arg]

    hold(st.tuples(STATES, STATES), read, examples)


@PROFILES
def test_onnx(examples: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    weight = helper.make_tensor("fc.weight", TensorProto.FLOAT, [3, 4], [0.5] * 12)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "t"], ["y"])]
    nodes.insert(1, helper.make_node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )  # fmt: skip
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    assert onnx.ModelProto.FromString(content)

    def read(content: bytes) -> None:
        (tmp_path / "m.onnx").write_bytes(content)
        with suppress(UnbackdoorError):
            open_source(tmp_path / "m.onnx")
        open_everything(tmp_path / "m.onnx")

    hold(damaged(content), read, examples)


# ---------------------------------------------------------------------------------------------------
# Sets of images


def sets(tmp_path: Path, name: str, *, size: tuple[int, int] | None = None) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with suppress(UnbackdoorError):
            load_images(tmp_path / name, cache=tmp_path / "cache", size=size)

    return read


def npz(**arrays: Any) -> bytes:
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


@st.composite
def npz_files(draw: st.DrawFn) -> bytes:
    """Return an npz file whose headers, methods and names are odd."""
    held = io.BytesIO()
    descriptions = st.sampled_from(
        ["|u1", "<f8", "<f2", "|O", "<U3", "<U0", "|V0", "<M8[s]", "<c16", "[('a','<i4')]", ">i8", "x", "",
         "<f" * 300, "<u8", "|b1"]
    )  # fmt: skip
    shapes = st.sampled_from(
        ["(2, 4, 4, 3)", "()", "(2,)", "(0, 4, 4)", "(-1, -2)", "(2**60,)", "(1, 2, 3, 4, 5)", "2", "(None,)",
         "(" * 90 + ")" * 90, "(4, 4, 4)", "(True, 4, 4)"]
    )  # fmt: skip
    methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(held, "w") as out:
        for name in draw(
            st.lists(st.sampled_from(["images", "labels", "class_names", "x", "y"]), max_size=3, unique=True)
        ):
            header = f"{{'descr': {draw(descriptions)!r}, 'fortran_order': {draw(st.booleans())}, 'shape': "
            header = (header + draw(shapes) + ", }" + draw(st.sampled_from(["", ",", "#", "\0"]))).ljust(
                60
            ) + "\n"
            version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
            length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
            body = draw(st.sampled_from([b"\0" * 96, b"", b"\xff" * 64, b"\x01\0" * 8]))
            content = b"\x93NUMPY" + version + length + header.encode("latin1") + body
            out.writestr(zipfile.ZipInfo(f"{name}.npy"), content, compress_type=draw(methods))
    return held.getvalue()


@PROFILES
def test_npz(examples: int, tmp_path: Path) -> None:
    honest = npz(images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1], class_names=["a", "b"])
    hold(npz_files(), sets(tmp_path, "a.npz"), examples)
    hold(damaged(honest), sets(tmp_path, "a.npz"), examples)
    hold(npz_files().flatmap(damaged), sets(tmp_path, "a.npz"), examples)


def test_class_names_that_are_no_characters(tmp_path: Path) -> None:
    names = np.array([0xD800, 0x110000], np.uint32).view("<U1")
    content = npz(images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1], class_names=names)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UnbackdoorError, match="class names"):
        load_images(tmp_path / "a.npz", cache=tmp_path / "cache")


def parquet(tables: pa.Table) -> bytes:
    held = io.BytesIO()
    pq.write_table(tables, held)
    return held.getvalue()


def image_bytes() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 4)).save(held, "PNG")
    return held.getvalue()


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    """Return a Parquet file with odd columns, twice or dotted, and odd metadata."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": image_bytes(), "path": None}] * 2, kind),
        "label": pa.array(draw(st.sampled_from([[0, 1], [0, None], [-1, 0], [2**62, 0]])), pa.int64()),
        "text": pa.array(["a", "b"]),
        "null": pa.array([{"bytes": None, "path": None}, None], kind),
        "bytes": pa.array([image_bytes()] * 2),
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    }
    names = st.sampled_from(
        ["image", "label", "image.bytes", "label.x", "", ".", "\u202e", "image.", "Image"]
    )
    chosen = draw(st.lists(st.tuples(names, st.sampled_from(list(columns))), min_size=1, max_size=4))
    if draw(st.booleans()):
        chosen += [("image", "image"), ("label", "label")]
    metadata = draw(st.none() | changed({"info": {"features": {"label": {"names": ["a", "b"]}}}}) | VALUES)
    schema = pa.schema([pa.field(name, columns[key].type) for name, key in chosen])
    if metadata is not None:
        schema = schema.with_metadata({"huggingface": written(metadata)})
    return parquet(pa.Table.from_arrays([columns[key] for _, key in chosen], schema=schema))


@PROFILES
def test_parquet(examples: int, tmp_path: Path) -> None:
    hold(parquet_files(), sets(tmp_path, "a.parquet"), examples)
    hold(parquet_files().flatmap(damaged), sets(tmp_path, "a.parquet"), examples)


@PROFILES
def test_tables(examples: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes())
    cells = st.one_of(
        TEXTS, st.sampled_from(["a.png", "file", "label", "0", "1", '"', "../a.png", "/dev/zero"])
    )
    rows = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=5).map("\n".join)
    encoded = rows.map(lambda text: text.encode("utf-8", "surrogatepass"))
    hold(encoded | st.binary(max_size=60), sets(tmp_path, "labels.csv"), examples)


@pytest.mark.parametrize("first", ["file,label\n", ""])
@pytest.mark.parametrize("name", ["9" * 300, "a/" + "9" * 300 + "/b.png", "loop/a.png", "loop"])
def test_a_table_names_what_cannot_be_a_file(first: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "labels.csv").write_text(f"{first}{name},0\n{name},1\n")
    with pytest.raises(UnbackdoorError):
        load_images(tmp_path / "labels.csv", cache=tmp_path / "cache")


@PROFILES
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.filterwarnings("ignore")  # of the decoders, about the damage
def test_images(kind: str, examples: int, tmp_path: Path) -> None:
    held = io.BytesIO()
    Image.effect_noise((12, 9), 50).convert("RGB").save(held, kind)
    hold(damaged(held.getvalue()), sets(tmp_path, "a.png", size=(8, 8)), examples)


# ---------------------------------------------------------------------------------------------------
# What is shown


@PROFILES
def test_nothing_that_cannot_be_seen_is_shown(examples: int) -> None:
    def read(value: Any) -> None:
        text = str(value)
        assert not unseen(printable(text))
        assert not unseen(str(UnbackdoorError(text, got=text, where=text, remedy=text))) - {"\n"}
        shown = json_text({"a": text})
        assert unseen(shown) <= {"\n"} and json.loads(shown) == {"a": text}
        document = Document(title=text, lead=(text,), sections=())
        assert unseen(to_markdown(document)) <= {"\n"}

    hold(TEXTS, read, examples)


def test_a_page_shows_the_codes_of_what_cannot_be_seen() -> None:
    title = "cat\x1b[2J\u202egod"
    page = render(
        "document.html", document=Document(title=title, lead=(), sections=()), script="", script_hash=""
    )
    assert "cat\\x1b[2J\\u202egod" in page and not {"\x1b", "\u202e"} & set(page)
