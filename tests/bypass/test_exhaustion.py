"""Files of a few bytes that took minutes or gigabytes: each is refused at a limit that is counted."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hostile import Entry, archive
from tiny import tiny_classifier, tiny_data
from unbackdoor import files
from unbackdoor.audit.references import read_references
from unbackdoor.bench.rows import read_rows
from unbackdoor.bench.suites import load_suite
from unbackdoor.cli.app import app
from unbackdoor.cli.auditor import class_names
from unbackdoor.cli.settings import read_settings
from unbackdoor.data.loaders import load_images
from unbackdoor.data.sources import image_files, label_table, parquet
from unbackdoor.errors import ConfigError, InputError, UnbackdoorError, UnsafeFile
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import open_model
from unbackdoor.weights import stored_file
from unbackdoor.weights.card import read_card
from unbackdoor.weights.formats import state_dicts
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.limits import Account, Limits, accounting
from unbackdoor.weights.formats.onnx import initializers
from unbackdoor.weights.formats.torch_save import checkpoints, pickle_reader
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.formats.torchscript.archive import _texts
from unbackdoor.weights.patch import read_patch
from unbackdoor.weights.read import read_contents
from unbackdoor.weights.source import open_source
from unbackdoor.weights.triggers import read_trigger

pytestmark = pytest.mark.leaves_traces
SMALL = Limits(instructions=5_000, visits=2_000, tensors=50, unpacked=50_000, name=100)


def saved(content: object, **options: bool) -> bytes:
    held = io.BytesIO()
    torch.save(content, held, **options)
    return held.getvalue()


def stub(name: str) -> type:
    """Return a class that pickles as a name of torch.nn, and is never built."""
    return type(name, (), {"__module__": "torch.nn.modules.container"})


# ---------------------------------------------------------------------------------------------------
# Work: the whole kind counts on one account


def shared_dictionaries() -> bytes:
    shared = {f"k{i}_extra_state": 0 for i in range(300)}
    return pickle.dumps({f"a{i}": shared for i in range(300)}, protocol=2)


def modules_in_squares() -> bytes:
    shared = nn.Linear(1, 1)
    module = nn.Module()
    for i in range(60):
        module.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
    top = nn.ModuleDict({f"m{i}": module for i in range(60)})
    top.add_module("last", shared)
    return saved(top)


def nested_pickles() -> bytes:
    inner = saved(torch.zeros(1), _use_new_zipfile_serialization=False)
    out = (
        b"\x80\x02(ctorch.storage\n_load_from_bytes\nq\x00" + b"B" + len(inner).to_bytes(4, "little") + inner
    )
    return out + b"q\x01" + b"h\x00h\x01\x85R" * 500 + b"l."


def encoded_again() -> bytes:
    text = b"X" + (10_000).to_bytes(4, "little") + b"x" * 10_000
    arguments = text + b"X\x06\x00\x00\x00latin1\x86q\x01"
    return b"\x80\x02(c_codecs\nencode\nq\x00" + arguments + b"h\x00h\x01R" * 100 + b"l."


def many_pickles() -> bytes:
    return archive([Entry(b"m/data.pkl", pickle.dumps({}, 2)), Entry(b"m/x.pkl", b"N." * 3_000, method=8)])


def long_header() -> bytes:
    header = b'{"__metadata__": {"a": "' + b"," * 3_000 + b'"}}'
    return len(header).to_bytes(8, "little") + header


def many_tensors() -> bytes:
    return saved({f"t{i}": torch.zeros(1) for i in range(60)})


def long_names() -> bytes:
    return saved({"n" * 101: torch.zeros(1)})


def unpacked_program() -> bytes:
    noise = bytes(np.random.default_rng(0).integers(32, 127, 2_000, dtype=np.uint8))
    # The text of each is read where the pickle names one of its classes.
    texts = [Entry(f"m/code/__torch__/n{i}.py".encode(), noise * 20, method=8) for i in range(3)]
    parts = b"".join(b"U\x01%dc__torch__.n%d\nNet\n)\x81}b" % (i, i) for i in range(3))
    program = b"\x80\x02c__torch__.n0\nNet\n)\x81}(" + parts + b"ub."
    return archive([Entry(b"m/data.pkl", program), Entry(b"m/constants.pkl", b"\x80\x02)."), *texts])


@pytest.mark.parametrize(
    "build",
    [
        shared_dictionaries, modules_in_squares, nested_pickles, encoded_again, many_pickles, long_header,
        many_tensors, long_names, unpacked_program,
    ],
    ids=lambda build: build.__name__,
)  # fmt: skip
def test_work_without_measure_is_refused(build: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(build())
    with accounting(SMALL):
        found = read_contents(path)
    assert isinstance(found.problem, UnsafeFile) or found.dangerous, found
    with accounting(SMALL):
        facts = inspect(path)
    assert facts.loading in ("deceptive", "dangerous")


def test_honest_files_are_far_from_every_limit(tmp_path: Path) -> None:
    network = tiny_classifier("conv-bn").network
    momentum = torch.optim.Adam(network.parameters())
    content = {"state_dict": network.state_dict(), "optimizer": momentum.state_dict(), "epoch": 3}
    (tmp_path / "m.pth").write_bytes(saved(content))
    with accounting() as account:
        assert read_contents(tmp_path / "m.pth").problem is None
    for kind, spent in account.spent.items():
        assert spent * 500 < getattr(account.limits, kind), kind


def test_one_account_is_for_all_parts_of_a_file() -> None:
    account = Account(Limits(visits=10))
    account.spend("visits", 6)
    with pytest.raises(UnsafeFile, match="at most 10 entries"):
        account.spend("visits", 6)
    with accounting(SMALL) as outer, accounting(Limits()) as inner:
        assert inner is outer


def test_long_integers_are_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []

    class Noted(pickle_reader.UnhashedKey):
        def __init__(self, *given: Any) -> None:
            replaced.append(given)
            super().__init__(*given)

    monkeypatch.setattr(pickle_reader, "UnhashedKey", Noted)
    number = (1 << 800_000).to_bytes(100_001, "little")
    content = b"\x80\x02}(" + b"\x8b" + len(number).to_bytes(4, "little") + number + b"q\x00K\x01"
    content += b"h\x00K\x01" * 200 + b"u."
    (tmp_path / "m.pkl").write_bytes(content)
    found = read_contents(tmp_path / "m.pkl")
    assert isinstance(found.problem, InputError)  # it ends, and says that there is no state dict
    assert len(replaced) == 201  # none of them was hashed


def test_masks_are_looked_at_once() -> None:
    looked = 0

    class Counted(dict[str, Tensor]):
        def items(self) -> Any:
            nonlocal looked
            for pair in super().items():
                looked += 1
                yield pair

    names = [f"l{i}.weight" for i in range(200)]
    state = Counted({n + end: torch.full((2,), 0.5) for n in names for end in ("_orig", "_mask")})
    out = state_dicts.unpruned(state, Trail())
    assert list(out) == names and looked <= len(state)
    assert all(value.tolist() == [0.25, 0.25] for value in out.values())


def test_a_mask_of_a_mask_is_left_as_it_is() -> None:
    one = torch.ones(1)
    state = {"a_orig": one, "a_mask": one, "a_mask_orig": one, "a_mask_mask": one}
    assert "a" in state_dicts.unpruned(state, Trail())


def test_program_text_is_read_once_from_left_to_right() -> None:
    assert list(_texts('"weight", "a\\"b", ')) == ["weight", 'a\\"b']
    # Each of these made a search begin anew at every quote.
    for odd in ('"' + '\\"' * 200_000, '"a" ' * 100_000 + '"', "\\" * 300_000):
        assert len(list(_texts(odd))) <= 100_000


def lists_in_lists() -> Any:
    value: Any = []
    for _ in range(100):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value", [lists_in_lists(), (lists_in_lists(),), 10**6000, {"a": lists_in_lists()}], ids=type
)
def test_a_message_about_anything_is_short(value: object) -> None:
    assert len(short(value)) <= 120


def test_a_text_is_not_made_of_a_reference_in_an_old_file(tmp_path: Path) -> None:
    # 2 ** 60 entries, if it were written out.
    twice = b"(l" + b"q\x01(h\x01h\x01l" * 60
    parts = {
        "storages": pickle.dumps(0, 2) + pickle.dumps([], 2),
        "tensors": pickle.dumps(0, 2),
        "pickle": b"\x80\x02" + twice + b"Q.",
    }
    import tarfile

    with tarfile.open(tmp_path / "m.tar", "w") as out:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    assert isinstance(read_contents(tmp_path / "m.tar").problem, UnbackdoorError)


# ---------------------------------------------------------------------------------------------------
# Type and size of a path are looked at before anything is read


def of_model(path: Path, folder: Path) -> None:
    open_source(path)


def of_card(path: Path, folder: Path) -> None:
    read_card(path)


def of_card_beside(path: Path, folder: Path) -> None:
    save_file({"fc.weight": torch.zeros(2, 2)}, folder / "weights.safetensors")
    (folder / "weights.json").symlink_to(path)
    open_source(folder / "weights.safetensors").card()


def of_patch(path: Path, folder: Path) -> None:
    read_patch(path)


def of_trigger(path: Path, folder: Path) -> None:
    read_trigger(path, tiny_classifier("conv-bn"))


def of_references(path: Path, folder: Path) -> None:
    read_references([path])


def of_suite(path: Path, folder: Path) -> None:
    load_suite(path)


def of_rows(path: Path, folder: Path) -> None:
    if not read_rows(path):
        raise InputError("there is no such file of rows")


def of_class_names(path: Path, folder: Path) -> None:
    class_names(str(path))


def of_images(suffix: str) -> Callable[[Path, Path], None]:
    def read(path: Path, folder: Path) -> None:
        (folder / f"set{suffix}").symlink_to(path)
        load_images(folder / f"set{suffix}", cache=folder / "cache")

    read.__name__ = f"of_{suffix[1:]}"
    return read


def of_table_in_folder(path: Path, folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "labels.csv").symlink_to(path)
    load_images(folder / "set", cache=folder / "cache")


LINKED = [
    of_card_beside,
    *(of_images(end) for end in (".npz", ".parquet", ".csv", ".png")),
    of_table_in_folder,
]
READERS = [
    of_model, of_card, of_patch, of_trigger, of_references, of_suite, of_rows, of_class_names, *LINKED
]  # fmt: skip


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def holes(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 42)
    return path


PLACES: dict[str, Callable[[Path], Path]] = {
    "pipe": pipe,
    "holes": holes,
    "zeros": lambda path: Path("/dev/zero"),
    "system": lambda path: Path("/proc/self/mem"),
}


NAMES: dict[str, Callable[[Path], Path]] = {
    "null in its name": lambda path: path.with_name("a\0b"),
    "half of a character": lambda path: path.with_name("a\ud800b"),
    "too long a name": lambda path: path.with_name("a" * 300),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_path_that_is_no_file_is_refused_unread(
    read: Callable[[Path, Path], None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.read

    def counted(descriptor: int, count: int) -> bytes:
        content = usual(descriptor, count)
        assert not content, "it was read"
        return content

    path = PLACES[place](tmp_path / "odd")
    monkeypatch.setattr(os, "read", counted)
    with pytest.raises(UnbackdoorError):
        read(path, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "read",
    [r for r in READERS if r not in LINKED and r is not of_class_names],
    ids=lambda read: read.__name__,
)
def test_a_path_that_cannot_be_is_refused(
    read: Callable[[Path, Path], None], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UnbackdoorError):
        read(NAMES[name](tmp_path / "odd"), tmp_path)


@pytest.mark.parametrize("path", ["a\0b.npz", "a\ud800b.npz", "a" * 300 + ".npz"], ids=len)
def test_a_set_of_images_that_cannot_be_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_images(tmp_path / path, cache=tmp_path / "cache")


def test_a_large_file_of_holes_is_refused_below_the_limit_of_its_size(tmp_path: Path) -> None:
    with (tmp_path / "m.pth").open("wb") as file:
        file.write(b"\x80\x02")
        file.truncate(1 << 27)
    with pytest.raises(UnsafeFile, match="consists of holes"):
        open_source(tmp_path / "m.pth")


def test_a_file_that_grows_is_read_to_its_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("abc")
    usual = os.read

    def grown(descriptor: int, count: int) -> bytes:
        with path.open("a") as file:
            file.write("more")
        return usual(descriptor, count)

    monkeypatch.setattr(os, "read", grown)
    assert files.read_bytes(path, limit=100) == b"abc"


# ---------------------------------------------------------------------------------------------------
# Sets of images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / name / "a.png")
    return tmp_path / "set"


@pytest.mark.parametrize("target", ["/", "..", "../.."])
def test_a_class_folder_that_leads_above_itself_is_refused(pictures: Path, target: str) -> None:
    (pictures / "fox").symlink_to(target)
    with pytest.raises(UnsafeFile, match="leads to a folder that it lies in"):
        load_images(pictures, cache=pictures.parent / "cache")


def test_a_folder_without_end_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_ENTRIES", 3)
    for i in range(3):
        (pictures / "cat" / f"{i}.txt").touch()
    with pytest.raises(UnsafeFile, match="too many files"):
        load_images(pictures, cache=pictures.parent / "cache")


def test_links_to_folders_within_a_class_are_not_followed(pictures: Path) -> None:
    (pictures / "cat" / "more").symlink_to("/")
    assert len(load_images(pictures, cache=pictures.parent / "cache")) == 2


def test_rows_are_counted_while_a_table_is_read(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_table, "_MAX_ROWS", 3)
    made = 0

    def reader(*args: Any, **options: Any) -> Iterator[list[str]]:
        nonlocal made
        for _ in range(100):
            made += 1
            yield ["cat/a.png", "cat"]

    monkeypatch.setattr(label_table.csv, "reader", reader)
    (pictures / "labels.csv").write_text("file,label\n")
    with pytest.raises(InputError, match="too many rows"):
        load_images(pictures, cache=pictures.parent / "cache")
    assert made == 4


def test_fields_of_a_table_are_counted(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_table, "_MAX_FIELDS", 10)
    (pictures / "labels.csv").write_text("file,label\n" + "," * 20)
    with pytest.raises(UnsafeFile, match="too many fields"):
        load_images(pictures, cache=pictures.parent / "cache")


def test_a_batch_of_parquet_is_small_where_its_images_may_be_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(held, "PNG")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": held.getvalue(), "path": None}] * 50, kind)
    pq.write_table(pa.table({"image": images, "label": [0] * 50}), tmp_path / "a.parquet")
    sizes = []
    usual = pq.ParquetFile.iter_batches

    def batches(self: Any, batch_size: int, **options: Any) -> Any:
        sizes.append(batch_size)
        return usual(self, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", batches)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 50_000)
    assert len(load_images(tmp_path / "a.parquet", cache=tmp_path / "cache")) == 50
    assert sizes and sizes[0] * len(held.getvalue()) <= 2 * 50_000


# ---------------------------------------------------------------------------------------------------
# Cards, suites


def test_a_card_that_states_a_large_input_is_refused(tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    card = save_model(model, tmp_path / "m.safetensors").model_dump(mode="json")
    state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")  # without the seal of the card
    digest = files.sha256_file(tmp_path / "m.safetensors")
    card |= {"file_sha256": digest, "input_shape": [model.input_shape[0], 4096, 4096]}
    (tmp_path / "m.json").write_text(json.dumps(card))
    with pytest.raises((InputError, UnsafeFile), match="absurdly"):
        open_model(tmp_path / "m.safetensors", images=tiny_data(8, seed=1))
    assert load_model(tmp_path / "m.safetensors", input_shape=model.input_shape).classes == model.classes


TOO_MUCH_TOML = [
    "a." * 50_000 + "b = 1", "[" + "a." * 50_000 + "b]", "a = " + "[" * 50_000, "a = {b = " * 5_000,
    "a" + ".b" * 60 + " = {c" + ".d" * 60 + " = 1}", "a = " + "9" * 5_000, "a = 0x" + "f" * 500_000,
]  # fmt: skip


@pytest.mark.parametrize("name", ["unbackdoor.toml", "pyproject.toml"])
@pytest.mark.parametrize("text", TOO_MUCH_TOML, ids=lambda text: text[:8])
def test_options_that_are_built_to_exhaust_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, InputError)):
        read_settings(tmp_path / name, typer.main.get_command(app))


@pytest.mark.parametrize("text", TOO_MUCH_TOML, ids=lambda text: text[:8])
def test_such_a_file_of_another_project_is_left_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_settings(None, typer.main.get_command(app)) is None


@pytest.mark.parametrize(
    "text", [*TOO_MUCH_TOML, "a = 1e999", "\ufeff", "a = '\0'"], ids=lambda text: text[:8]
)
def test_suites_that_are_built_to_exhaust_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s-v1.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_suite(tmp_path / "s-v1.toml")


def test_the_order_of_a_state_dict_is_kept() -> None:
    one = torch.ones(1)
    state = OrderedDict([("a", one), ("b_mask", one), ("b_orig", one), ("c", one)])
    assert list(state_dicts.unpruned(state, Trail())) == ["a", "b", "c"]


def test_scanning_for_pickles_ends_at_the_account() -> None:
    trail = Trail()
    with accounting(SMALL):
        checkpoints.scan(b"N." * 10_000, trail)
    assert trail.dangerous == ["a pickle.that is built to deceive or to exhaust its reader"]


# ---------------------------------------------------------------------------------------------------
# ONNX: what becomes far larger as an object than it is as bytes


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protocol buffer with a length."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    return varint(number << 3 | 2) + varint(len(content)) + content


GRAPH, TENSOR = 7, 5
HONEST = field(GRAPH, field(TENSOR, b"\x08\x01" + b"\x10\x01" + field(8, b"w") + field(9, b"\0" * 4)))
PARTS: dict[str, bytes] = {
    "graphs of the training": field(20, field(1, field(1, b"") * 200)),
    "steps of the training": field(20, field(2, field(5, b"") * 200)),
    "packed dimensions": field(GRAPH, field(TENSOR, field(1, b"\1" * 300))),
    "packed numbers of an attribute": field(GRAPH, field(1, field(5, field(8, b"\1" * 300)))),
    "packed floats of an attribute": field(GRAPH, field(1, field(5, field(7, b"\1" * 300)))),
    "packed dimensions of a sparse tensor": field(GRAPH, field(15, field(3, b"\1" * 300))),
    "functions": field(25, field(7, b"") * 300),
    "fields at the top": field(14, b"") * 300,
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_graph_counts(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr(initializers, "MAX_FIELDS", 150)
    content = PARTS[part] if part.startswith("packed") else HONEST + PARTS[part]
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08" + field(2, b"") + content)
    problem = read_contents(tmp_path / "m.onnx").problem
    assert isinstance(problem, UnsafeFile) and "too many parts" in str(problem)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08" + field(2, b"") + HONEST)
    assert read_contents(tmp_path / "m.onnx").problem is None


def test_all_files_of_a_model_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_file, "MAX_FILE", 100)
    (tmp_path / "m.onnx").write_bytes(b"x" * 60)
    (tmp_path / "weights").write_bytes(b"x" * 60)
    file = stored_file.read_file(tmp_path / "m.onnx")
    with pytest.raises(UnsafeFile, match="at most 40 bytes"):
        file.other("weights", tmp_path / "weights")
