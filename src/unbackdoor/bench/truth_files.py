"""The record of an attack beside a victim's weights; no defender is given it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbackdoor.attacks import AttackTruth
from unbackdoor.data.sources.checks import MAX_CLASSES
from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write, is_there, opened, parse_json, read_text, write_json

_MAX_JSON = 1 << 24  # bytes
_MAX_TENSORS = 1 << 32  # bytes of what a trigger learned
_MAX_SIDE = 1 << 11  # pixels of an image
TRUTH_SUFFIX = ".truth.json"
TENSORS_SUFFIX = ".truth.safetensors"  # beside it, where the trigger was learned


def save_truth(truth: AttackTruth, path: Path) -> None:
    """Write the truth beside a model, and the tensors of a learned trigger."""
    tensors = path.with_suffix(TENSORS_SUFFIX)
    if truth.tensors:
        with atomic_write(tensors) as draft:
            save_file(dict(truth.tensors), draft)
    else:
        tensors.unlink(missing_ok=True)  # of a victim that this one replaces
    write_json(path.with_suffix(TRUTH_SUFFIX), truth.spec())


def load_truth(path: Path) -> AttackTruth:
    """Read the truth beside a model, or a truth file.

    Raises:
        InputError: If there is none, or it cannot be read.
        IntegrityError: If the tensors of a learned trigger belong to another victim.
    """
    file = path if path.name.endswith(TRUTH_SUFFIX) else path.with_suffix(TRUTH_SUFFIX)
    if not is_there(file):
        raise InputError(
            "there is no record of the attack",
            where=file,
            remedy="Only a model that was trained here can be judged; for others use a scan",
        )
    beside = file.with_name(file.name.removesuffix(TRUTH_SUFFIX) + TENSORS_SUFFIX)
    what = "the record of the attack"
    try:
        spec = parse_json(read_text(file, what, limit=_MAX_JSON), what, file)
        _require_form(spec)
        tensors = _tensors(beside) if "tensors_sha256" in spec else None
        return AttackTruth.from_spec(spec, tensors)
    except FileNotFoundError as error:
        raise InputError("what the trigger learned is missing", where=beside) from error
    # RuntimeError: tensors of another form than the trigger has.
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError("the record of the attack cannot be read", got=str(error), where=file) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    if not is_there(path):
        raise FileNotFoundError(path)
    with opened(path, "what the trigger learned", limit=_MAX_TENSORS):
        pass  # the library opens the path by itself, and would wait for a pipe
    return load_file(path)


def _require_form(spec: Any) -> None:
    """Raise ValueError where the numbers of a record are none of an image set, before anything is made."""
    if not isinstance(spec, dict):
        raise ValueError("it is no object")
    for name, numbers, least, most in (
        ("shape", spec["shape"], 1, _MAX_SIDE),
        ("classes", [spec["classes"]], 1, MAX_CLASSES),
        ("seed", [spec["seed"]], 0, (1 << 63) - 1),
    ):
        if not isinstance(numbers, list) or not all(type(n) is int and least <= n <= most for n in numbers):
            raise ValueError(f"{name} is not within {least}..{most}")
