"""Signed statements hold for what was signed and nothing else; bills of materials name the models."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import unbackdoor
from unbackdoor.cli.app import app
from unbackdoor.errors import InputError, IntegrityError, MissingExtra, UnbackdoorError
from unbackdoor.report import statement

needs_cryptography = pytest.mark.skipif(
    find_spec("cryptography") is None,
    reason="signatures are those of cryptography (extra: sign)",
)
RECORD: dict[str, Any] = {
    "model": "models/m\x1b.pth", "file_sha256": "ab" * 32, "verdict": "backdoor found", "checks": [],
    "classes": [{"index": 2, "name": "c"}], "reasons": ["why"], "architecture": "small_cnn", "level": 0.05,
    "partial": False, "schema": "scan", "schema_version": "1.0", "tool_version": "0.1.0",
    "date": "2026-01-31T12:00:00Z",
}  # fmt: skip


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return statement.key(tmp_path / "k.pem")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"fc.weight": torch.zeros(3, 4)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@needs_cryptography
def test_a_statement_is_of_in_toto_and_signed_as_dsse_says(keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    assert keys[0].stat().st_mode & 0o777 == 0o600
    envelope = statement.make(RECORD, keys[0])
    payload = base64.b64decode(envelope["payload"])
    # The signature is over the type and the payload, each behind its length.
    signed = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    public = load_pem_public_key(keys[1].read_bytes())
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)  # type: ignore[union-attr,call-arg]
    content = statement.check(envelope, keys[1])
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert content["subject"] == [{"name": "m\x1b.pth", "digest": {"sha256": "ab" * 32}}]
    assert content["predicateType"] == "urn:unbackdoor:scan:1" and content["predicate"] == RECORD


@needs_cryptography
def test_what_was_changed_or_signed_by_others_does_not_hold(keys: tuple[Path, Path], tmp_path: Path) -> None:
    envelope = statement.make(RECORD, keys[0])
    forged = copy.deepcopy(envelope)
    payload = base64.b64decode(forged["payload"]).replace(b"backdoor found", b"no evidence")
    forged["payload"] = base64.b64encode(payload).decode()
    stranger = statement.key(tmp_path / "other.pem")
    for given, key in ((forged, keys[1]), (envelope, stranger[1]), ({**envelope, "signatures": []}, keys[1])):
        with pytest.raises(IntegrityError, match="was not signed with this key"):
            statement.check(given, key)
    both = {
        **envelope,
        "signatures": [statement.make(RECORD, stranger[0])["signatures"][0], *envelope["signatures"]],
    }
    assert statement.check(both, keys[1])["predicate"] == RECORD
    for broken in (
        {},
        {**envelope, "payloadType": "x"},
        {**envelope, "payload": "*"},
        {**envelope, "signatures": 3},
    ):
        with pytest.raises(InputError):
            statement.check(broken, keys[1])
    with pytest.raises(InputError, match="private key"):
        statement.make(RECORD, keys[1])
    with pytest.raises(InputError, match="public key"):
        statement.check(envelope, keys[0])
    with pytest.raises(InputError, match="exists"):
        statement.key(keys[0])


@needs_cryptography
def test_a_statement_is_about_a_file(keys: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    made = statement.make(unbackdoor.inspect(model).to_dict(), keys[0])
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert statement.check(made, keys[1], [model])["subject"][0]["digest"]["sha256"] == digest
    (tmp_path / "copy.bin").write_bytes(model.read_bytes())
    statement.check(made, keys[1], [tmp_path / "copy.bin"])
    (tmp_path / "copy.bin").write_bytes(model.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="not about this file"):
        statement.check(made, keys[1], [tmp_path / "copy.bin"])


@needs_cryptography
def test_the_commands_make_and_check(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words])
        return done.exit_code, done.stdout + done.stderr

    Path("r.json").write_text(CliRunner().invoke(app, ["inspect", str(model), "--json"]).stdout)
    assert call("statement", "key", "k")[0] == 0
    assert call("statement", "make", "r.json", "--key", "k", "--out", "s.json")[0] == 0
    code, text = call("statement", "check", "s.json", "--key", "k.pub", "--file", str(model))
    assert code == 0 and "The signature fits: inspect" in text
    code, text = call("statement", "check", "s.json", "--key", "k.pub", "--file", "r.json")
    assert code == 2 and "not about this file" in text
    assert call("statement", "bom", "r.json", "--out", "b.json")[0] == 0
    assert json.loads(Path("b.json").read_text())["specVersion"] == "1.6"
    assert call("statement", "bom", "r.json", "--out", "b.json")[0] == 2  # it exists
    assert call("statement", "make", "r.json", "--key", "k", "--out", "k", "--force")[0] == 2  # an input


def test_a_bill_of_materials_names_the_model_and_what_was_found() -> None:
    made = statement.bom(RECORD)
    (component,) = made["components"]
    assert (made["bomFormat"], made["specVersion"], component["type"]) == (
        "CycloneDX", "1.6", "machine-learning-model",
    )  # fmt: skip
    assert component["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    facts = {one["name"]: one["value"] for one in component["properties"]}
    assert facts["unbackdoor:verdict"] == "backdoor found" and all(isinstance(v, str) for v in facts.values())
    (found,) = made["vulnerabilities"]
    assert found["affects"] == [{"ref": component["bom-ref"]}] and "towards c" in found["description"]
    assert statement.bom(RECORD) == made
    assert "vulnerabilities" not in statement.bom({**RECORD, "verdict": "no evidence found"})


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"schema": "list"},
        {"schema": 3},
        {**RECORD, "file_sha256": None},
        {**RECORD, "model": None},
        "no.json",
    ],
)
def test_what_is_no_record_of_a_file_is_refused(record: Any) -> None:
    with pytest.raises(UnbackdoorError):
        statement.bom(record)


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (lambda: statement.key(tmp_path / "k"), lambda: statement.make(RECORD, tmp_path / "k")):
        with pytest.raises(MissingExtra, match=r"unbackdoor\[sign\]"):
            call()
    assert not (tmp_path / "k").exists()
