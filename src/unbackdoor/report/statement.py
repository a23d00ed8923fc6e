"""A signed statement of what was done, and an entry for a bill of materials, made of a record of a verb.

Source:  in-toto Attestation Framework, "Statement" v1; Dead Simple Signing Envelope (DSSE) v1.0.2; RFC 8032
         (Ed25519); CycloneDX 1.6, ML-BOM.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor import __version__
from unbackdoor.audit.result import Result
from unbackdoor.errors import InputError, IntegrityError, MissingExtra
from unbackdoor.files import atomic_write, parse_json, read_text, write_json, writing
from unbackdoor.report.json_output import with_header
from unbackdoor.weights.stored_file import read_file

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
_PREDICATE = "urn:unbackdoor:{}:1"
_LARGEST = 64 << 20  # bytes of a record or an envelope
_KEY = 16 << 10  # bytes of a key
_LONGEST = 80  # characters of a value in a bill of materials
# Where a record names a file and its hash, and which of the two is said to be what.
_SUBJECTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "scan": (("model", "file_sha256"),),
    "audit": (("model", "file_sha256"),),
    "screen": (("model", "file_sha256"),),
    "inspect": (("path", "sha256"),),
    "purify": (("source", "source_file_sha256"),),
    "verify": (("before", "before_file_sha256"), ("after", "after_file_sha256")),
}


def make(record: Result | Mapping[str, Any] | Path | str, key: Path | str) -> dict[str, Any]:
    """Return a signed statement of what a verb did: an in-toto statement in a DSSE envelope.

    The subjects are the files by their SHA-256, the predicate is the whole record. Whoever has the public key
    can see that it was not changed; that it is true rests on who holds the private one.

    Args:
        record: The result of a verb, what its ``to_dict`` gave, or its ``result.json``.
        key: Private Ed25519 key, an unencrypted PEM file, as :func:`key` writes it.

    Raises:
        InputError: If the record or the key cannot be used, or the record names no file.
        MissingExtra: Without the package cryptography.
    """
    private = _private(Path(key))
    command, content = _record(record)
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha}} for name, sha in _subjects(command, content)],
        "predicateType": _PREDICATE.format(command.replace(" ", "-")),
        "predicate": content,
    }
    payload = json.dumps(statement, ensure_ascii=True, sort_keys=True, allow_nan=False).encode()
    signature = private.sign(_pre_authentication(payload))
    return {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": _key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def check(
    statement: Mapping[str, Any] | Path | str, key: Path | str, files: Sequence[Path | str] | None = None
) -> dict[str, Any]:
    """Return what a signed statement says, if it was signed with a key and speaks of given files.

    Args:
        statement: The envelope, or its file.
        key: Public Ed25519 key, a PEM file.
        files: Files that the statement must be about, by their content.

    Raises:
        IntegrityError: If the signature does not fit, or a file is none of the subjects.
        InputError: If it is no statement, or the key cannot be used.
        MissingExtra: Without the package cryptography.
    """
    public = _public(Path(key))
    where = statement if isinstance(statement, Path | str) else "the statement"
    envelope = statement if isinstance(statement, Mapping) else _json(Path(statement), "the statement")
    try:
        if envelope["payloadType"] != PAYLOAD:
            raise ValueError("another type of payload")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"]]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError("this is no signed statement", got=str(error)[:100], where=where) from None
    if not any(_fits(public, signature, payload) for signature in signatures[:16]):
        raise IntegrityError(
            "the statement was not signed with this key, or was changed since",
            where=where,
            remedy="Do not rely on it",
        )
    content = parse_json(payload.decode("utf-8", "replace"), "the statement", Path(str(where)))
    try:
        if content["_type"] != STATEMENT:
            raise ValueError("another type of statement")
        named = {subject["digest"]["sha256"] for subject in content["subject"]}
        dict(content["predicate"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("this is no statement of in-toto", got=str(error)[:100], where=where) from None
    for file in files or ():
        found = read_file(Path(file), lambda head, size: 0).sha256
        if found not in named:
            raise IntegrityError(
                "the statement is not about this file",
                expected=" or ".join(sorted(named)),
                got=found,
                where=file,
            )
    return dict(content)


def key(path: Path | str) -> tuple[Path, Path]:
    """Write a new Ed25519 key: the private part, which only its owner may read, and ``PATH.pub``.

    Returns:
        The two files.

    Raises:
        InputError: If one exists, or cannot be written.
        MissingExtra: Without the package cryptography.
    """
    _cryptography()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = Path(path), Path(f"{path}.pub")
    made = Ed25519PrivateKey.generate()
    secret = made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    open_part = made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    with writing((private, public), force=False):
        with atomic_write(private) as draft:
            draft.touch(mode=0o600)
            draft.chmod(0o600)  # before there is anything to read
            draft.write_bytes(secret)
        os.chmod(private, 0o600)  # noqa: PTH101  whatever the usual mode of new files is
        with atomic_write(public) as draft:
            draft.write_bytes(open_part)
    return private, public


def bom(record: Result | Mapping[str, Any] | Path | str) -> dict[str, Any]:
    """Return a CycloneDX 1.6 bill of materials with the models that a record is about.

    Args:
        record: The result of a verb, what its ``to_dict`` gave, or its ``result.json``.

    Raises:
        InputError: If it is no record, or names no file.
    """
    command, content = _record(record)
    subjects = list(_subjects(command, content))
    components = [_component(command, content, name, sha) for name, sha in subjects]
    out: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same record gives the same number.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))}",
        "version": 1,
        "metadata": {
            "timestamp": content["date"],
            "tools": {"components": [{"type": "application", "name": "unbackdoor", "version": __version__}]},
        },
        "components": components,
    }
    found = _verdict(content) == "backdoor found"
    if found and command in ("scan", "audit"):
        suspects = ", ".join(str(one.get("name")) for one in content.get("classes", ())[:10])
        out["vulnerabilities"] = [
            {
                "id": f"unbackdoor-{components[0]['bom-ref'][:16]}",
                "source": {"name": "unbackdoor"},
                "ratings": [{"severity": "critical", "method": "other"}],
                "cwes": [506],
                "description": f"Evidence of a backdoor towards {suspects or 'no single class'}",
                "detail": " ".join(map(str, content.get("reasons", ()))),
                "affects": [{"ref": components[0]["bom-ref"]}],
            }
        ]
    return out


def save(content: Mapping[str, Any], path: Path | str, *, force: bool = False) -> Path:
    """Write a statement or a bill of materials.

    Raises:
        InputError: If the file exists or cannot be written.
    """
    path = Path(path)
    with writing((path,), force=force):
        write_json(path, dict(content))
    return path


def _component(command: str, content: Mapping[str, Any], name: str, sha: str) -> dict[str, Any]:
    facts = {"command": command, "verdict": _verdict(content), "architecture": content.get("architecture")}
    if command in ("scan", "audit"):
        facts |= {"level": content.get("level"), "partial": content.get("partial")}
    if command == "inspect":
        facts |= {"loading": content.get("loading"), "executes": content.get("executes")}
    if command == "purify":
        facts |= {"repaired-sha256": content.get("sha256"), "method": dict(content["method"]).get("name")}
    parameters: dict[str, Any] = {"task": "image classification"}
    if content.get("architecture"):
        parameters["modelArchitecture"] = str(content["architecture"])[:_LONGEST]
    card: dict[str, Any] = {"modelParameters": parameters}
    accuracy = (content.get("accuracy") or {}).get("before") if command == "purify" else None
    if accuracy:
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {
                    "type": "clean accuracy",
                    "value": f"{accuracy['value']:.4f}",
                    "confidenceInterval": {
                        "lowerBound": f"{accuracy['low']:.4f}", "upperBound": f"{accuracy['high']:.4f}"
                    },
                }
            ]
        }  # fmt: skip
    card["considerations"] = {
        "technicalLimitations": ["No scan finds every backdoor: no evidence found is not a certificate."]
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": sha,
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": sha}],
        "modelCard": card,
        "properties": [
            {"name": f"unbackdoor:{key}", "value": str(value)[:_LONGEST]}
            for key, value in facts.items()
            if value is not None
        ],
    }


def _verdict(content: Mapping[str, Any]) -> str | None:
    verdict = content.get("verdict")
    return str(verdict) if verdict is not None else None


def _record(record: Result | Mapping[str, Any] | Path | str) -> tuple[str, dict[str, Any]]:
    """Return the command that a record is of, and the record with its header."""
    where: object = "the record"
    if isinstance(record, Path | str):
        where = record
        content = _json(Path(record), "the record")
    elif isinstance(record, Mapping):
        content = dict(record)
    else:
        content = record.to_dict()
    command = content.get("schema")
    if command is None:
        command = next((name for name, keys in _SIGNS.items() if keys <= content.keys()), None)
    if not isinstance(command, str) or command not in _SUBJECTS:
        raise InputError(
            "this is no record of a model",
            expected="result.json, or what --json printed, of " + ", ".join(_SUBJECTS),
            where=where,
        )
    return command, with_header(command, content)


# Keys by which a record without a header is known.
_SIGNS: Mapping[str, frozenset[str]] = {
    "audit": frozenset({"planned_only", "file_sha256"}),
    "purify": frozenset({"source_file_sha256", "promise"}),
    "verify": frozenset({"before_file_sha256", "comparison"}),
    "screen": frozenset({"scores", "p_values", "model_sha256"}),
    "scan": frozenset({"verdict", "checks", "file_sha256"}),
    "inspect": frozenset({"path", "loading", "sha256"}),
}


def _subjects(command: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    named = 0
    for path, digest in _SUBJECTS[command]:
        name, sha = content.get(path), content.get(digest)
        if isinstance(name, str) and isinstance(sha, str) and len(sha) == 64:
            named += 1
            yield Path(name).name, sha
    if not named:
        raise InputError("the record is of a model in memory", expected="a model that was opened from a file")


def _json(path: Path, what: str) -> dict[str, Any]:
    content = parse_json(read_text(path, what, limit=_LARGEST), what, path)
    if not isinstance(content, dict):
        raise InputError(f"{what} is no object", where=path)
    return content


def _pre_authentication(payload: bytes) -> bytes:
    """Return the bytes that are signed: PAE of DSSE, which binds the type to the payload."""
    kind = PAYLOAD.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingExtra("cryptography", "sign", "a signed statement") from None


def _private(path: Path) -> Any:
    _cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text = read_text(path, "the key", limit=_KEY).encode()
    try:
        loaded = load_pem_private_key(text, password=None)
    except (ValueError, TypeError) as error:
        raise InputError("this is no private key", got=str(error)[:100], where=path) from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise InputError("the key is of another kind", expected="Ed25519", where=path)
    return loaded


def _public(path: Path) -> Any:
    _cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text = read_text(path, "the key", limit=_KEY).encode()
    try:
        loaded = load_pem_public_key(text)
    except (ValueError, TypeError) as error:
        raise InputError("this is no public key", got=str(error)[:100], where=path) from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise InputError("the key is of another kind", expected="Ed25519", where=path)
    return loaded


def _fits(public: Any, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, _pre_authentication(payload))
    except InvalidSignature:
        return False
    return True


def _key_id(public: Any) -> str:
    from cryptography.hazmat.primitives import serialization as form

    raw = public.public_bytes(form.Encoding.Raw, form.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()
