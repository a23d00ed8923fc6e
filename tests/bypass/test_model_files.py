"""Hostile and damaged model files: refused with a typed error, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.errors import ConfigError, InputError, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.weights.card import read_card
from unbackdoor.weights.read import read_contents, read_state

# Initialisers and inputs are drawn from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

SHAPE = (3, 8, 8)
GIVEN: dict[str, Any] = {
    "architecture": "small_cnn[width=4]",
    "input_shape": SHAPE,
    "class_names": ["a", "b"],
}


def make() -> Any:
    return build("small_cnn[width=4]", input_shape=SHAPE, class_names=["a", "b"])


def weights() -> dict[str, Tensor]:
    state: dict[str, Tensor] = make().network.state_dict()
    return state


class Payload:
    """Leaves a marker where it is executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_raw(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def save_text(content: object, path: Path) -> None:
    path.write_bytes(b"\x80\x02" + pickle.dumps(content, protocol=0))


WRITERS = [save_zip, save_legacy, save_raw, save_text]
Writer = Callable[[object, Path], None]


def refused(path: Path, kind: type[UnbackdoorError] = UnbackdoorError) -> str:
    with pytest.raises(kind) as caught:
        load_model(path, **GIVEN)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------
# Code


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.safetensors", "m"])
@pytest.mark.parametrize("place", ["alone", "inside"])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, writer: Writer, name: str, place: str) -> None:
    payload = Payload(tmp_path / "executed")
    writer(payload if place == "alone" else {"state_dict": weights(), "extra": payload}, tmp_path / name)
    message = refused(tmp_path / name, UnsafeFile)
    assert "system" in message
    assert "not executed" in message
    assert not (tmp_path / "executed").exists()


def test_the_payload_of_these_tests_works(tmp_path: Path) -> None:
    save_raw(Payload(tmp_path / "executed"), tmp_path / "m.pt")
    pickle.loads((tmp_path / "m.pt").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("writer", [save_zip, save_legacy, save_raw])
def test_a_whole_pickled_module_gives_its_tensors_and_its_classes_are_listed(
    tmp_path: Path, writer: Writer
) -> None:
    writer(make(), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt", **GIVEN).sha256() == make().sha256()
    contents = read_contents(tmp_path / "m.pt")
    assert "torch.nn.modules.conv.Conv2d" in contents.foreign
    assert not contents.dangerous


def test_neither_the_environment_nor_torch_opens_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a reader that can execute was asked")

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save_zip(Payload(tmp_path / "executed"), tmp_path / "m.pt")
    save_zip(weights(), tmp_path / "good.pt")
    for owner, name in ((torch, "load"), (torch.jit, "load"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(owner, name, never)
    refused(tmp_path / "m.pt", UnsafeFile)
    assert load_model(tmp_path / "good.pt", **GIVEN).sha256() == make().sha256()
    assert not (tmp_path / "executed").exists()


def test_names_that_the_process_allows_are_refused_here(tmp_path: Path) -> None:
    save_zip({"state_dict": weights(), "x": Payload(tmp_path / "executed")}, tmp_path / "m.pt")
    with torch.serialization.safe_globals([os.system]):
        assert "system" in refused(tmp_path / "m.pt", UnsafeFile)
    assert not (tmp_path / "executed").exists()


def test_a_torchscript_archive_that_names_python_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(Payload(tmp_path / "executed"), protocol=2))
        archive.writestr("m/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("m/code/__torch__.py", "def forward(self): ...")
    assert "system" in refused(tmp_path / "m.pt", UnsafeFile)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "code",
    [
        # The two texts come from the memo, in the other order, with a harmless pair between them.
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94\x8c\x0bcollections\x8c\x0bOrderedDict00h\x01h\x00\x93"
        b"\x8c\x04true\x85R.",
        # One of them is the result of a call: str("os").
        b"\x80\x04cbuiltins\nstr\n\x8c\x02os\x85R\x8c\x06system\x93\x8c\x04true\x85R.",
        # A text that pickletools refuses and pickle accepts stands before it.
        b"\x80\x02S'\xff'\n0cos\nsystem\nS'true'\n\x85R.",
        b"\x80\x02I0x10\n0cos\nsystem\nS'true'\n\x85R.",
        # A part of another name.
        b"\x80\x04\x8c\x17torch.nn.modules.module\x8c\x09os.system\x93\x8c\x04true\x85R.",
        # The name that Python 2 had for it.
        b"\x80\x02ccommands\ngetoutput\nU\x04true\x85R.",
        # A number of the table of extensions.
        b"\x80\x02\x82\x07)R.",
        # An object of the oldest kind.
        b"\x80\x02(U\x04trueios\nsystem\n.",
    ],
)
def test_names_put_together_at_run_time_are_never_harmless(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(code)
    assert "would run code" in refused(tmp_path / "m.pt", UnsafeFile)


# ---------------------------------------------------------------------------------------------------
# Checkpoints that are fine


@pytest.mark.parametrize("writer", [save_zip, save_legacy])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_ordinary_checkpoints_load(tmp_path: Path, writer: Writer, nest: str | None, prefix: str) -> None:
    state = OrderedDict((prefix + name, tensor) for name, tensor in weights().items())
    writer(state if nest is None else {"epoch": 3, nest: state, "best": 0.9}, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", **GIVEN)
    assert loaded.sha256() == make().sha256()
    (tmp_path / "m.pt").write_bytes(b"gone")  # the tensors are no windows into the file
    assert loaded.sha256() == make().sha256()


def test_parameters_and_tied_weights_load(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_zip({"a": torch.nn.Parameter(shared), "b": shared, "c": shared[1:3]}, tmp_path / "m.pt")
    state = read_state(tmp_path / "m.pt")
    assert state["c"].tolist() == [1.0, 2.0]
    assert state["a"].data_ptr() != state["b"].data_ptr()


# ---------------------------------------------------------------------------------------------------
# Sizes


def test_one_number_does_not_stand_for_gigabytes(tmp_path: Path) -> None:
    save_zip({"conv1.weight": torch.zeros(1).expand(10**12)}, tmp_path / "m.pt")
    assert "more than it holds" in refused(tmp_path / "m.pt", UnsafeFile)


def test_a_packed_archive_is_refused(tmp_path: Path) -> None:
    save_zip(weights(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name), compress_type=zipfile.ZIP_DEFLATED)
        bomb.writestr("archive/data/99", bytes(10_000_000), compress_type=zipfile.ZIP_DEFLATED)
    assert "unpacks" in refused(tmp_path / "bomb.pt", UnsafeFile)


def test_an_absurd_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}" + bytes(100))
    assert "cut short" in refused(tmp_path / "m.safetensors", InputError)
    length = 17 << 20
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(length + 8)
    assert "too large" in refused(tmp_path / "m.safetensors", UnsafeFile)


@pytest.mark.parametrize(
    "spec",
    ["vgg19_bn[width=4096]", "resnet18[width=4096]", "vit_small[width=4096,depth=48]", "wrn16[width=256]"],
)
def test_a_width_that_the_weights_do_not_bear_out_costs_nothing(tmp_path: Path, spec: str) -> None:
    # These would take 39 GB and more; the file has a few kilobytes, and no seal to be held against.
    model = make()
    save_model(model, tmp_path / "m")
    save_file(weights(), tmp_path / "bare.safetensors")
    card = json.loads((tmp_path / "m.json").read_text())
    card.update(architecture=spec, file_sha256=_hash(tmp_path / "bare.safetensors"))
    (tmp_path / "bare.json").write_text(json.dumps(card))
    with pytest.raises(UnsupportedModel, match="do not fit"):
        load_model(tmp_path / "bare")


def _hash(path: Path) -> str:
    from unbackdoor.files import sha256_file

    return sha256_file(path)


# ---------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("keep", [0.0, 0.002, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_that_are_cut_short_are_refused(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / "m.bin"
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        (save_zip if kind == "zip" else save_legacy)(weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(path, InputError)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_scrambled_files_raise_typed_errors_or_load(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.bin"
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        (save_zip if kind == "zip" else save_legacy)(weights(), path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        broken = bytearray(content)
        for place in torch.randint(0, len(content), (8,), generator=generator).tolist():
            broken[place] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(broken)
        try:
            load_model(path, **GIVEN)
        except UnbackdoorError:
            continue


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, kind: str, value: float) -> None:
    state = weights()
    state["conv3.weight"][0, 0, 0, 0] = value
    if kind == "zip":
        save_zip(state, tmp_path / "m.pt")
    else:
        save_file(state, tmp_path / "m.pt")
    assert "'conv3.weight'" in refused(tmp_path / "m.pt", InputError)


def test_a_number_that_only_float64_can_hold_is_not_finite(tmp_path: Path) -> None:
    state = weights()
    state["fc.bias"] = torch.tensor([1e300, 0.0], dtype=torch.float64)
    save_zip(state, tmp_path / "m.pt")
    assert "'fc.bias'" in refused(tmp_path / "m.pt", InputError)


def test_types_that_no_network_has_are_refused(tmp_path: Path) -> None:
    state = {**weights(), "fc.bias": torch.zeros(2, dtype=torch.complex64)}
    save_zip(state, tmp_path / "m.pt")
    assert "complex64" in refused(tmp_path / "m.pt", InputError)
    save_file({**weights(), "fc.bias": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    assert "float8" in refused(tmp_path / "m.safetensors", InputError)
    save_zip({**weights(), "fc.bias": torch.zeros(2, dtype=torch.int64)}, tmp_path / "m.pt")
    assert "int64" in refused(tmp_path / "m.pt", UnsupportedModel)


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    save_zip({"epoch": 3, "\x1b[31mred": 1}, tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt", InputError)
    assert "no state dict" in message
    assert "\x1b" not in message
    save_zip([torch.zeros(2)], tmp_path / "m.pt")
    assert "got list" in refused(tmp_path / "m.pt", InputError)


def test_names_in_a_file_reach_no_terminal_unquoted(tmp_path: Path) -> None:
    save_file({**weights(), "\x1b]0;owned\x07": torch.zeros(1)}, tmp_path / "m.safetensors")
    message = refused(tmp_path / "m.safetensors", UnsupportedModel)
    assert "\x1b" not in message
    assert "owned" in message


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is a text", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", InputError)


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, InputError)
    refused(tmp_path / "none.pt", InputError)


# ---------------------------------------------------------------------------------------------------
# Cards


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"mean": [float("nan")] * 3, "std": [1.0] * 3},
        {"std": [0.0, 1.0, 1.0]},
        {"class_names": []},
        {"class_names": "ab"},
        {"input_shape": [3, 8]},
        {"input_shape": [3, 8, "8"]},
        {"parameters": -1},
        {"weights_sha256": "xyz"},
        {"command": "rm"},
        {"history": ["text"]},
        {"architecture": "x" * 2000},
    ],
)
def test_cards_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_model(make(), tmp_path / "m")
    card = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(InputError, match="not a model card"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"null"],
    ids=lambda c: repr(c[:4]),
)
def test_files_that_are_no_cards_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(InputError, match="not a model card"):
        read_card(tmp_path / "m.json")


def test_a_huge_card_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(InputError, match="too large"):
        read_card(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"architecture": "os.system"}, ConfigError),
        ({"architecture": "small_cnn[width=4097]"}, ConfigError),
        ({"input_shape": [3, 10**9, 10**9]}, InputError),
        ({"input_shape": [10**9, 8, 8]}, InputError),
    ],
)
def test_cards_that_ask_for_too_much_are_refused(
    tmp_path: Path, change: dict[str, Any], kind: type[UnbackdoorError]
) -> None:
    save_model(make(), tmp_path / "m")
    save_file(weights(), tmp_path / "bare.safetensors")
    card = json.loads((tmp_path / "m.json").read_text())
    card.update(change, file_sha256=_hash(tmp_path / "bare.safetensors"))
    (tmp_path / "bare.json").write_text(json.dumps(card))
    with pytest.raises(kind):
        load_model(tmp_path / "bare")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle_is_still_safetensors(tmp_path: Path, length: int) -> None:
    # The little-endian length 0x0280 begins with the bytes 80 02, the mark of pickle protocol 2.
    from unbackdoor.weights.read import read_state, sniff

    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"\0" * 8)
    assert sniff(file) == "safetensors"
    assert read_state(file)["a"].tolist() == [0.0, 0.0]
