"""Reading weights from files of unknown origin; nothing in a file is ever executed.

A checkpoint saved by ``torch.save`` is a pickle, and a pickle is a program. Its names are first listed
without running it; only where all of them belong to plain tensors is it read, and then with torch's
weights-only reader. The list is shorter than torch's own, and no allow-list of the process widens it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unbackdoor.errors import InputError, UnsafeFile

Format = Literal["safetensors", "zip", "pickle"]

MAX_FILE = 8 << 30  # bytes; a bound against nonsense, since a ResNet-18 of the usual width has 45 MB
MAX_HEADER = 16 << 20  # bytes of a safetensors header or of the pickle inside a checkpoint
# Tied weights may let a file describe more tensor than it holds; expanded ones must not describe the world.
MAX_TIED = 4

_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, storage keys
_HARMLESS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|device)"
    r"|torch\.\w+Storage|torch\.storage\.(Untyped|Typed)Storage|torch\.(bool|bfloat16|float(16|32|64)|u?int(8|16|32|64))"
)
_PLAIN = {
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_NESTS = ("state_dict", "model_state_dict", "model", "net", "network")
_PREFIXES = ("module.", "_orig_mod.", "network.")
# Everything that torch's readers raise on files that are cut short or scrambled.
_BROKEN = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, whatever its name says it is.

    Known are safetensors and the checkpoints of ``torch.save``, old and new, with the state dict at the
    top or one level down. The prefixes that wrappers put before all keys are taken off.

    Args:
        path: File with weights.

    Returns:
        Tensors by name, in memory of their own, on the CPU.

    Raises:
        InputError: If the file is missing, cut short, or holds no state dict.
        UnsafeFile: If the file would run code or describes far more than it holds. Nothing was executed.
    """
    kind = sniff(path)
    if kind == "safetensors":
        state = _read_safetensors(path)
    else:
        _refuse_code(path, kind)
        state = _strip(_find_state(_load_checkpoint(path, kind), path))
    for name, tensor in state.items():
        if tensor.dtype not in _PLAIN:
            raise InputError(
                "a tensor is of a type that no network here has",
                expected="floating point of 16 to 64 bits, integers or truth values",
                got=tensor.dtype,
                where=f"{path}, tensor {_short(name)}",
            )
    return state


def sniff(path: Path) -> Format:
    """Return the format of a file, judged by its first bytes.

    Raises:
        InputError: If the file cannot be read or is of no known format.
        UnsafeFile: If the file is larger than any model this package can build.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise InputError("the model file cannot be read", got=error.strerror, where=path) from error
    if size > MAX_FILE:
        raise UnsafeFile(
            "the model file is too large", expected=f"at most {MAX_FILE} bytes", got=size, where=path
        )
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # Before pickle: a header of 640 bytes begins with 80 02, as a pickle does. A pickle's first eight
    # bytes, read as a length, are beyond any file size.
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if len(head) == 9 and head[8:] == b"{":
        return "safetensors"  # cut short; its reader says so
    raise InputError(
        "the file is not a model file, or it is damaged",
        expected="safetensors, or a checkpoint of torch.save",
        got=f"{size} bytes that begin with {head[:8].hex() or 'nothing'}",
        where=path,
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; empty for every other format."""
    if sniff(path) != "safetensors":
        return {}
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, *_BROKEN) as error:
        raise _damaged(path, error) from error


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise InputError(
            "the model file is cut short",
            expected=f"a header of {length} bytes",
            got=f"{size - 8} bytes in all",
            where=path,
            remedy="Copy or download it again",
        )
    if length > MAX_HEADER:
        raise UnsafeFile(
            "the header of the model file is too large",
            expected=f"at most {MAX_HEADER} bytes",
            got=length,
            where=path,
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned because the tensors are windows into the file, which may be replaced at any time.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, *_BROKEN) as error:
        raise _damaged(path, error) from error


# ---------------------------------------------------------------------------------------------------
# Checkpoints of torch.save


def foreign_globals(stream: IO[bytes]) -> set[str]:
    """List the names in one pickle that do not belong to plain tensors, without running it.

    Raises:
        ValueError: If the stream is no pickle or ends inside one.
    """
    found: set[str] = set()
    texts = ["?", "?"]
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".", 1)
            if not _HARMLESS.fullmatch(name):
                found.add(name)
        elif opcode.name == "STACK_GLOBAL":
            # The name is put together while the pickle runs, so no guess may make it harmless.
            found.add(".".join(texts))
        elif opcode.name.startswith("EXT"):
            found.add("an entry of the copyreg extension table")
        elif isinstance(argument, str):
            texts = [texts[1], argument]
    return found


def _refuse_code(path: Path, kind: Format) -> None:
    try:
        names = _zip_globals(path) if kind == "zip" else _pickle_globals(path)
    except _BROKEN as error:
        raise _damaged(path, error) from error
    if names:
        raise UnsafeFile(
            f"the file names {_listed(names)}, which is more than plain tensors; it was not executed",
            expected="a state dict of plain tensors",
            where=path,
            remedy="Ask its author for the state dict alone, at best as safetensors",
        )


def _zip_globals(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # Lower-cased because torch's reader looks names up without regard to case.
        names = [entry.filename.lower() for entry in entries]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise UnsafeFile(
                "the file is a TorchScript program; it was not executed",
                where=path,
                remedy="Ask its author for the state dict",
            )
        total = sum(entry.file_size for entry in entries)
        packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        # torch.save stores its records as they are; entries that are packed or overlap are made to expand.
        if packed or total > path.stat().st_size:
            raise UnsafeFile(
                "the archive unpacks to more than it holds",
                expected=f"at most {path.stat().st_size} bytes in unpacked entries",
                got=f"{total} bytes, {len(packed)} packed entries",
                where=path,
            )
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1:
            raise InputError(
                "the archive is not a checkpoint", expected="one data.pkl", got=len(pickles), where=path
            )
        if pickles[0].file_size > MAX_HEADER:
            raise UnsafeFile(
                "the pickle in the checkpoint is too large",
                expected=f"at most {MAX_HEADER} bytes",
                got=pickles[0].file_size,
                where=path,
            )
        return foreign_globals(io.BytesIO(archive.read(pickles[0])))


def _pickle_globals(path: Path) -> set[str]:
    with path.open("rb") as file:
        legacy = file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
        file.seek(0)
        found: set[str] = set()
        for _ in range(_LEGACY_PICKLES if legacy else 1):
            found |= foreign_globals(file)
    if not legacy and not found:
        raise InputError(
            "the file is a pickle but not a checkpoint",
            expected="a file of torch.save or safetensors",
            where=path,
        )
    return found


def _load_checkpoint(path: Path, kind: Format) -> object:
    try:
        # Said explicitly: where it is left to its default, an environment variable can turn it off.
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise UnsafeFile(
            "the weights-only reader refused the checkpoint; it was not executed",
            got=_short(str(error).split("\n")[0]),
            where=path,
            remedy="Ask its author for the state dict alone, at best as safetensors",
        ) from error
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _find_state(loaded: object, path: Path) -> dict[str, Tensor]:
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in _NESTS if key in loaded]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and _all_tensors(candidate):
            return _owned(candidate, path)
    keys = ", ".join(_short(key) for key in list(loaded)[:5]) if isinstance(loaded, Mapping) else None
    raise InputError(
        "the checkpoint holds no state dict",
        expected="tensors by name, at the top or under " + ", ".join(_NESTS),
        got=f"keys {keys}" if keys else type(loaded).__name__,
        where=path,
    )


def _all_tensors(candidate: Mapping[object, object]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())


def _owned(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    # A stride of zero lets one stored number stand for any amount of tensor: count before copying.
    held = path.stat().st_size
    described = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    if described > MAX_TIED * held or sum(stored.values()) > held:
        raise UnsafeFile(
            "the checkpoint describes more than it holds",
            expected=f"tensors of at most {MAX_TIED * held} bytes in a file of {held} bytes",
            got=f"{described} bytes",
            where=path,
        )
    # Detached and copied, so that neither a window into the file nor a stored hook stays behind.
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in state.items()}


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _strip({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _damaged(path: Path, error: BaseException) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(
        "the model file is damaged or cut short",
        got=_short(str(error).strip().split("\n")[0] or type(error).__name__),
        where=path,
        remedy="Copy or download it again",
    )


def _short(value: object) -> str:
    # Names come from the file: shown quoted, so that no control character reaches a terminal.
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _listed(names: set[str], limit: int = 5) -> str:
    shown = ", ".join(_short(name)[1:-1] for name in sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
