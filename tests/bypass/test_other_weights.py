"""Checkpoints of which torch would load other weights than are scanned: refused, or read as torch does.

Every test here reads the file as ``torch.load(weights_only=True)`` does too; ``conftest`` compares the two.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from differential import difference, torch_reads
from hostile import Entry, archive
from unbackdoor.errors import UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.load_tensors import fill
from unbackdoor.weights.read import read_contents, read_state

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

GOOD, OTHER = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [-9.0] * 6


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def row(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(key: str = "0", kind: str = "FloatStorage", count: int = 6, place: str = "cpu") -> bytes:
    return row(text("storage"), name(f"torch.{kind}"), text(key), text(place), number(count)) + b"Q"


EMPTY = name("collections.OrderedDict") + b")R"


def tensor(stored: bytes = storage(), *beside: bytes, hooks: bytes = EMPTY) -> bytes:
    called = row(stored, number(0), row(number(6)), row(number(1)), b"\x89", hooks, *beside)
    return name("torch._utils._rebuild_tensor_v2") + called + b"R"


def call(function: str, *args: bytes) -> bytes:
    return name(function) + row(*args) + b"R"


def entry(value: bytes, key: str = "a") -> bytes:
    return text(key) + value + b"s"


def attributes(**values: bytes) -> bytes:
    return b"}" + b"".join(entry(value, key) for key, value in values.items())


def checkpoint(path: Path, described: bytes, *extra: Entry, number_of_bytes: int = 24) -> Path:
    numbers = {b"0": GOOD, b"1": OTHER}
    entries = [Entry(b"m/data.pkl", b"\x80\x02" + described + b".")]
    for key, values in numbers.items():
        content = struct.pack("<6f", *values)[:number_of_bytes].ljust(number_of_bytes, b"\0")
        entries.append(Entry(b"m/data/" + key, content))
    path.write_bytes(archive([*entries, Entry(b"m/version", b"3\n"), *extra]))
    return path


DATA = attributes(data=tensor(storage("1")))
LEGACY = row(storage("1"), number(0), row(number(6)), row(number(1)))
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
PLAIN_ARGS = row(storage(), number(0), row(number(6)), row(number(1)), b"\x89", EMPTY)
OF_TYPE = (name("torch._utils._rebuild_tensor_v2"), name("torch.Tensor"), PLAIN_ARGS)
SAME = "torch._utils._rebuild_device_tensor_from_cpu_tensor"  # gives back its argument
TOUCHED = {
    "attribute of a parameter": call(
        "torch._utils._rebuild_parameter_with_state", tensor(), b"\x89", EMPTY, DATA
    ),
    "slot of a parameter": call(
        "torch._utils._rebuild_parameter_with_state", tensor(), b"\x89", EMPTY, row(b"N", DATA)
    ),
    "attribute of a subclass": call(FROM_TYPE, *OF_TYPE, DATA),
    "attribute that is no weight": call(FROM_TYPE, *OF_TYPE, attributes(requires_grad=b"\x88")),
    "build": tensor() + LEGACY + b"b",
    "build of attributes": tensor() + DATA + b"b",
    "build of a parameter": call("torch._utils._rebuild_parameter", tensor(), b"\x89", EMPTY) + DATA + b"b",
    "build of a storage": tensor(storage() + attributes(_untyped_storage=storage("1")) + b"b"),
    "item of a storage": tensor(storage() + number(0) + number(9) + b"s"),
    "item": tensor() + number(0) + number(9) + b"s",
    "items": tensor() + b"(" + number(0) + number(9) + b"u",
    "entry": tensor() + number(9) + b"a",
    "entries": tensor() + b"(" + number(9) + b"e",
    # The same tensor by another way, after it went into the dictionary.
    "memo": tensor() + b"q\x01" + LEGACY + b"b",
    "item of what shares the storage": call("torch.nn.parameter.Parameter", tensor())
    + number(0)
    + number(9)
    + b"s0"
    + tensor(),
}


@pytest.mark.parametrize("kind", TOUCHED)
def test_a_tensor_that_is_changed_after_it_was_made(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(TOUCHED[kind]))
    with pytest.raises(UnsafeFile, match="changed after it was made"):
        read_state(path)
    assert inspect(path).loading == "deceptive"


def test_a_tensor_that_is_changed_through_a_call_that_gives_it_back(tmp_path: Path) -> None:
    kept = tensor() + b"q\x01"
    same = row(b"h\x01", name("torch.float32"), text("cpu"), b"\x89")
    changed = call(FROM_TYPE, name(SAME), name("torch.Tensor"), same, DATA)
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(kept) + changed + b"0")
    with pytest.raises(UnsafeFile, match="changed after it was made"):
        read_state(path)


def test_attributes_that_leave_a_tensor_as_it_is_are_read(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.no_decay = True  # type: ignore[attr-defined]
    buffer = torch.ones(2)
    buffer._is_buffer = True  # type: ignore[attr-defined]
    torch.save({"a": parameter, "b": buffer}, tmp_path / "m.pt")
    assert set(read_state(tmp_path / "m.pt")) == {"a", "b"}


NOT_READ = {
    "negated": tensor(storage(), attributes(neg=b"\x88")),
    "conjugated": tensor(storage(), attributes(conj=b"\x88")),
    "negated, in the third form": call(
        "torch._utils._rebuild_tensor_v3", storage(), number(0), row(number(6)), row(number(1)), b"\x89",
        EMPTY, name("torch.float32"), attributes(neg=b"\x88"),
    ),
    "with a hook": tensor(hooks=b"}" + number(1) + name("torch.Size") + b"s"),
    "hooks that are none": tensor(hooks=number(1)),
    "too many arguments": tensor(storage(), b"N", b"N"),
    "too few arguments": name("torch._utils._rebuild_tensor_v2") + PLAIN_ARGS[:-5] + b"tR",
    "an unknown type": call(
        "torch._utils._rebuild_tensor_v3", storage(), number(0), row(number(6)), row(number(1)), b"\x89",
        EMPTY, name("collections.float64"),
    ),
    "a class of its own": call(FROM_TYPE, OF_TYPE[0], name("torch.storage.UntypedStorage"), PLAIN_ARGS, b"N"),
    "without content": tensor(storage(place="meta")),
    "beyond its storage": tensor(storage(count=5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_tensor_that_this_reader_does_not_make_as_torch_does(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(NOT_READ[kind]))
    with pytest.raises(UnbackdoorError):
        read_state(path)


@pytest.mark.parametrize(
    "second",
    [
        storage(kind="IntStorage"),
        storage(count=3),
        storage(place="cuda:0"),
        storage(kind="UntypedStorage"),
        storage(kind="QInt8Storage", count=24),
        storage(place="meta"),
    ],
)
def test_one_storage_in_two_ways(tmp_path: Path, second: bytes) -> None:
    described = EMPTY + tensor(second) + b"0" + entry(tensor())
    with pytest.raises(UnsafeFile, match=r"two ways|not as many as"):
        read_state(checkpoint(tmp_path / "m.pt", described))


@pytest.mark.parametrize("number_of_bytes", [20, 28, 48])
def test_a_storage_of_more_or_fewer_bytes_than_it_says(tmp_path: Path, number_of_bytes: int) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()), number_of_bytes=number_of_bytes)
    with pytest.raises(UnsafeFile, match="not as many as the checkpoint says"):
        read_state(path)


def test_views_of_the_older_form_that_collide(tmp_path: Path) -> None:
    head = b"".join(
        b"\x80\x02" + code + b"."
        for code in (
            b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
            number(1001),
            attributes(little_endian=b"\x88"),
        )
    )

    def view(key: str, first: int, of: str = "0") -> bytes:
        stored = storage(of)[:-2] + row(text(key), number(first), number(2)) + b"tQ"
        return call("torch._utils._rebuild_tensor", stored, number(0), row(number(2)), row(number(1)))

    def written(*values: bytes) -> Path:
        described = b"\x80\x02" + EMPTY + b"".join(entry(v, f"k{i}") for i, v in enumerate(values)) + b"."
        keys = b"\x80\x02]" + b"".join(text(key) + b"a" for key in "01") + b"."
        data = b"".join(struct.pack("<q6f", 6, *numbers) for numbers in (GOOD, OTHER))
        (tmp_path / "m.pt").write_bytes(head + described + keys + data)
        return tmp_path / "m.pt"

    plain = view("v", 0, "1")
    state = read_state(written(view("w", 2), plain, view("w", 2)))
    assert state["k0"].tolist() == GOOD[2:4]
    for collision in (view("w", 4), view("0", 4), view("1", 4)):
        with pytest.raises(UnsafeFile, match=r"two ways|name of a storage"):
            read_state(written(view("w", 2), plain, collision))
    # A view that is named before the storage of that name.
    with pytest.raises(UnsafeFile, match="name of a storage"):
        read_state(written(view("0", 2, "1"), view("w", 2)))


CONTAINERS = {
    # Making is not initialising, so that the arguments are thrown away.
    "made and not called": name("collections.OrderedDict")
    + row(attributes(a=tensor(storage("1"))))
    + b"\x81"
    + entry(tensor()),
    "out of another": attributes(a=tensor(), b=tensor(storage("1")))
    + b"q\x01"
    + call("collections.OrderedDict", b"h\x01"),
    "out of another that is changed later": EMPTY
    + entry(attributes(a=tensor()) + b"q\x01", "beside")
    + entry(call("collections.Counter", b"h\x01"), "state_dict")
    + entry(b"h\x01" + entry(tensor(storage("1"))), "again"),
    "out of pairs": call("collections.OrderedDict", b"](" + row(text("a"), tensor()) + b"e"),
    "text of Python 2": EMPTY + b"U\x02\xc3\xa9" + tensor() + b"s",
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_dictionaries_hold_what_they_hold_for_torch(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / "m.pt", CONTAINERS[kind])
    assert torch_reads(path.read_bytes()) is not None
    state = read_contents(path).tensors  # where there are several sets, the first
    assert difference(path.read_bytes(), state) is None


@pytest.mark.parametrize("key", ["items", "keys", "__class__", "get"])
def test_attributes_of_a_dictionary_that_hide_its_content(tmp_path: Path, key: str) -> None:
    hiding = b"}" + entry(name("collections.OrderedDict"), key) + b"b"
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()) + hiding)
    with pytest.raises(UnsafeFile, match="dictionary is changed"):
        read_state(path)
    # While the one that torch writes is none of these.
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "n.pt")
    assert set(read_state(tmp_path / "n.pt")) == {"weight", "bias"}


def test_attributes_that_are_set_twice(tmp_path: Path) -> None:
    net = name("torch.nn.modules.linear.Linear") + b")\x81"
    parts = [attributes(_parameters=attributes(weight=tensor(storage(key)))) + b"b" for key in "01"]
    with pytest.raises(UnsafeFile, match="set twice"):
        read_state(checkpoint(tmp_path / "m.pt", net + parts[0] + parts[1]))


def test_a_module_that_grows_while_it_is_loaded(tmp_path: Path) -> None:
    net = name("torch.nn.modules.container.Sequential") + b")\x81"
    body = net + attributes(_modules=b"}", _parameters=attributes(weight=tensor())) + b"b"
    for grown in (b"Na", text("1") + b"Ns"):
        with pytest.raises(UnsafeFile, match="changed while it is loaded"):
            read_state(checkpoint(tmp_path / "m.pt", body + grown))


def test_entries_of_the_archive_are_found_as_torch_finds_them(tmp_path: Path) -> None:
    described = EMPTY + entry(tensor())
    path = checkpoint(tmp_path / "m.pt", described, Entry(b"m/ByteOrder", b"big"))
    with pytest.raises(UnsafeFile, match="other readers find none"):
        read_state(path)
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor(storage("A"))), Entry(b"m/data/a", bytes(24)))
    with pytest.raises(UnsafeFile, match="other readers find none"):
        read_state(path)
    path = checkpoint(tmp_path / "m.pt", described, Entry(b"m/byteorder", b"little\n"))
    with pytest.raises(UnbackdoorError, match="byte order"):
        read_state(path)


@pytest.mark.parametrize("beside", [b"n/data.pkl", b"n/data/0", b"notes.txt", b"M/notes"])
def test_entries_outside_the_folder_that_torch_reads(tmp_path: Path, beside: bytes) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()), Entry(beside, b"\x80\x02}."))
    with pytest.raises(UnsafeFile, match="outside its folder"):
        read_state(path)


def test_a_second_pickle_of_weights_in_the_archive(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()), Entry(b"m/x/data.pkl", b"\x80\x02}."))
    with pytest.raises(UnsafeFile, match="several pickles of weights"):
        read_state(path)


@pytest.mark.parametrize("beside", [b"m/code/a.py", b"m/x/constants.pkl", b"m/x/code/b.py"])
def test_what_torch_does_not_take_for_a_program_is_read_as_a_checkpoint(
    tmp_path: Path, beside: bytes
) -> None:
    # Attributes that a reader of programs would take for the weights.
    other = b"}" + entry(tensor(storage("1")), "b") + b"b"
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()), Entry(beside, b"\x80\x02]."))
    assert read_contents(path).format == "checkpoint"
    assert list(read_state(path)) == ["a"]
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()) + other, Entry(beside, b"\x80\x02]."))
    with pytest.raises(UnsafeFile):
        read_state(path)


@pytest.mark.parametrize(
    "beside",
    [
        [Entry(b"m/constants.pkl", b"\x80\x02]."), Entry(b"m/archive_format", b"pt2")],
        [Entry(b"m/archive_format", b"pt2")],
        [Entry(b"m/data/weights/model_weights_config.json", b"{}")],
    ],
)
def test_an_archive_of_two_kinds(tmp_path: Path, beside: list[Entry]) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()), *beside)
    with pytest.raises(UnsafeFile, match="two kinds"):
        read_state(path)
    assert inspect(path).loading == "deceptive"


@pytest.mark.parametrize("target", ["torch.nn.modules.linear.Linear", "torch.relu", "argparse.Namespace"])
@pytest.mark.parametrize("way", [b"b", b"Ns", b"a"])
def test_what_changes_an_imported_name_is_dangerous(tmp_path: Path, target: str, way: bytes) -> None:
    changed = name(target) + attributes(forward=name("torch.tanh")) + way
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()) + changed + b"0")
    assert "an imported name.that is changed while loading" in read_contents(path).dangerous
    assert inspect(path).loading == "dangerous"


_LINEAR = "__torch__.torch.classes.quantized.LinearPackedParamsBase"


@pytest.mark.parametrize(
    ("described", "harmless"),
    [
        (name("torch.ScriptObject") + b")\x81(K\x01" + text(_LINEAR) + b"tb", True),
        (name("torch.ScriptObject") + b")\x81(K\x01" + text("__torch__.Other") + b"tb", False),
        (name("torch.ScriptObject") + b")\x81(K\x01" + text(_LINEAR + "\n") + b"tb", False),
        (name("torch.ScriptObject") + b")\x81", False),
        (name("torch.ScriptObject"), False),
        (name("torch.ScriptObject") + b")R", False),
        (name("torch.ScriptObject") + b"(K\x01t\x81(K\x01" + text(_LINEAR) + b"tb", False),
        (name("torch.ScriptObject") + b")\x81(K\x01" + text(_LINEAR) + b"K\x02tb", False),
    ],
)
def test_packed_weights_are_made_of_torchs_own_classes_alone(
    tmp_path: Path, described: bytes, harmless: bool
) -> None:
    path = checkpoint(tmp_path / "m.pt", EMPTY + entry(tensor()) + described + b"0")
    assert ("torch.ScriptObject" in read_contents(path).dangerous) == (not harmless)


@pytest.mark.parametrize(
    "value",
    [torch.eye(2).to_sparse(), torch.empty(2, device="meta")],
    ids=["sparse", "meta"],
)
def test_other_kinds_of_tensors_are_said_not_to_be_read(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save({"a": value}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedModel, match="not read"):
        read_state(tmp_path / "m.pt")


def test_no_program_of_parts_is_read_otherwise_than_by_torch(tmp_path: Path) -> None:
    # Programs put together at random out of the parts above; conftest compares each that both readers read.
    draw = random.Random(0)
    parts = [tensor(), tensor(storage("1")), *TOUCHED.values(), *NOT_READ.values()]
    read = 0
    for _ in range(300):
        described = draw.choice([EMPTY, b"}", *CONTAINERS.values()]) + b"q\x09"
        for key in draw.sample("abcd", 2):
            described += entry(draw.choice([*parts[:2] * 9, b"h\x09", *parts]), key)
        path = checkpoint(tmp_path / "m.pt", described)
        try:
            read_state(path)
        except UnbackdoorError:
            continue
        read += 1
    assert read > 50


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    # Without their scale they are the weights of another network, which fits as well.
    net = build("small_cnn[width=2]", input_shape=(1, 8, 8), class_names=["a", "b"]).network
    state = net.state_dict()
    state.update({name: tensor.to(dtype) for name, tensor in state.items() if tensor.dim() > 1})
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedModel, match="do not fit"):
        fill("small_cnn[width=2]", state, input_shape=(1, 8, 8), classes=2, where="a test")
    notes = inspect(tmp_path / "m.safetensors").notes
    assert any("quantised" in note for note in notes) == (dtype in (torch.int8, torch.uint8))


def _pair(key: str) -> bytes:
    weight = tensor(storage(key))
    return EMPTY + b"(" + text("fc.weight") + weight + text("fc.bias") + weight + b"u"


def _module(params: bytes, **attribute: bytes) -> bytes:
    own = {"_parameters": params, "_buffers": EMPTY, "_modules": EMPTY, **attribute}
    return name("torch.nn.modules.linear.Linear") + b")\x81" + attributes(**own) + b"b"


FIRST, SECOND = _pair("0"), _pair("1")
BESIDE = EMPTY + text("state_dict") + FIRST + b"s"
HIDDEN = {
    "extra state": FIRST + text("ema_extra_state") + SECOND + b"s",
    "metadata": FIRST + text("_metadata") + SECOND + b"s",
    "attribute of a module": _module(FIRST, ema=SECOND),
    "module in an attribute": _module(FIRST, ema=_module(SECOND)),
    "argument of a call": BESIDE + text("x") + name("my.Thing") + b"(" + SECOND + b"tRs",
    "list in a call": BESIDE + text("x") + name("collections.deque") + b"(]" + SECOND + b"atRs",
    "no key": BESIDE + b"N" + SECOND + b"s",
    "key of bytes": BESIDE + b"C\x03ema" + SECOND + b"s",
    "key of a fraction": BESIDE + b"G\x3f\xf0" + bytes(6) + SECOND + b"s",
    "key of a tuple": BESIDE + b"K\x01\x85" + SECOND + b"s",
    "key with a dot": EMPTY + text("a.b") + FIRST + b"s" + text("a") + EMPTY + text("b") + SECOND + b"ss",
    "the same key with a dot, last": EMPTY
    + text("a")
    + EMPTY
    + text("b")
    + SECOND
    + b"ss"
    + text("a.b")
    + FIRST
    + b"s",
    "one that is not read": BESIDE
    + text("state_dict_ema")
    + EMPTY
    + text("w")
    + call("torch._utils._rebuild_sparse_tensor", b"N", b"N")
    + b"ss",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_second_set_of_weights_is_found_wherever_it_lies(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / "m.pt", HIDDEN[kind])
    assert len(inspect(path).sets) == 2
    with pytest.raises(UnbackdoorError, match="several sets of weights"):
        read_state(path)


@pytest.mark.parametrize("kind", ["list", "set"])
def test_tensors_without_names_are_named(tmp_path: Path, kind: str) -> None:
    inner = b"]" + tensor(storage("1")) + b"a"
    held = row(inner) if kind == "list" else call("builtins.set", inner)
    path = checkpoint(tmp_path / "m.pt", BESIDE + text("x") + held + b"s")
    assert inspect(path).other_tensors


def test_what_is_not_read_beside_the_weights_leaves_them_readable(tmp_path: Path) -> None:
    sparse = torch.eye(2).to_sparse()
    torch.save(
        {"graph": {"adjacency": sparse}, "extra": sparse, "model": {"w": torch.ones(2)}}, tmp_path / "m"
    )
    assert list(read_state(tmp_path / "m")) == ["w"]


def test_a_module_that_lists_its_own_layers_has_one_set(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    net.layers = [net[0], net[0].weight]
    torch.save(net, tmp_path / "m")
    assert list(read_contents(tmp_path / "m").sets) == [""]
    assert not inspect(tmp_path / "m").other_tensors
