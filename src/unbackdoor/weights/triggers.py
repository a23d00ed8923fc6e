"""A recovered trigger as files: a picture of it, and its exact values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from unbackdoor.confinement import rehearsed
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.files import atomic_write, is_there, parse_json, writing
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier
from unbackdoor.weights.formats.limits import accounting
from unbackdoor.weights.formats.safetensors import header as safetensors
from unbackdoor.weights.formats.tensors import materialise
from unbackdoor.weights.stored_file import read_file

PNG, TENSORS, FOLDER = "trigger.png", "trigger.safetensors", "trigger-{}"
MAX_KEPT = 3  # triggers in the folder of a report
_NAMES = ("pattern", "mask")
MAX_TRIGGER = 1 << 28  # bytes; a bound against nonsense, as 4 x 4096 x 4096 numbers of 4 bytes


def trigger_files(folder: Path, count: int) -> tuple[Path, ...]:
    """Return the files of the first ``count`` triggers in a folder of a report."""
    return tuple(folder / FOLDER.format(i) / name for i in range(count) for name in (PNG, TENSORS))


def write_triggers(
    folder: Path,
    triggers: Sequence[RecoveredTrigger],
    facts: Mapping[str, Any],
    *,
    most: int,
    force: bool = False,
) -> list[dict[str, Path]]:
    """Write the first triggers into ``trigger-0``, ``trigger-1`` ... of a folder.

    Args:
        folder: Made where it is missing.
        triggers: The most suspicious first.
        facts: JSON-ready; kept beside class and check of each.
        most: How many at most.
        force: Whether those of an earlier scan may be replaced. Then all up to ``most`` are removed that are
            not written anew: they would pass for some of this one.

    Raises:
        InputError: If there are triggers of an earlier scan, or a link stands in the place of a folder.
    """
    with writing(trigger_files(folder, most), force=force, below=folder):
        written = [write_trigger(folder / FOLDER.format(i), t, facts) for i, t in enumerate(triggers[:most])]
        for i in range(len(written), most if force else 0):
            remove_trigger(folder / FOLDER.format(i))
    return written


def write_trigger(folder: Path, trigger: RecoveredTrigger, facts: Mapping[str, Any]) -> dict[str, Path]:
    """Write a trigger into a folder, each file whole or not at all.

    Args:
        folder: Made where it is missing.
        trigger: The trigger.
        facts: JSON-ready; kept in the metadata of the tensors beside its class and check.

    Returns:
        ``picture``: a PNG, from left to right the pattern, the mask, and the pattern where the mask is, or
        only the pattern around grey, stretched; and ``tensors``: a safetensors file with both.
    """
    tensors_of = {name: t.detach().float().cpu().contiguous() for name, t in trigger.tensors().items()}
    pattern = tensors_of["pattern"]
    # A picture has 1 or 3 channels; of other patterns the mean is shown.
    displayed = pattern if len(pattern) in (1, 3) else pattern.mean(0, keepdim=True)
    if trigger.mask is None:
        row = 0.5 + displayed / (2 * (float(displayed.abs().max()) or 1.0))  # (C, H, W)
    else:
        mask = tensors_of["mask"]
        row = torch.cat([displayed, mask.expand_as(displayed), displayed * mask], 2)  # (C, H, 3 W)
    pixels = (row * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture, tensors = folder / PNG, folder / TENSORS
    with atomic_write(picture) as draft:
        Image.fromarray(pixels[:, :, 0] if len(displayed) == 1 else pixels).save(draft, format="PNG")
    record = {**facts, "class": trigger.label, "check": trigger.check}
    metadata = {"facts": json.dumps(record, sort_keys=True, allow_nan=False)}
    with atomic_write(tensors) as draft:
        save_file(tensors_of, draft, metadata=metadata)
    return {"picture": picture, "tensors": tensors}


def read_trigger(path: Path, model: Classifier, *, of: str | None = None) -> RecoveredTrigger:
    """Read a trigger that :func:`write_trigger` wrote, in a process of its own first.

    Args:
        path: The file of the tensors, or the folder that it lies in.
        model: The classifier that it is to be tried on.
        of: SHA-256 of the weights of the model that it must have been recovered from; None: of any.

    Raises:
        InputError: If it cannot be read or does not fit the model.
        IntegrityError: If it was recovered from another model.
        UnsafeFile: If it is too large, or built to exhaust its reader.
    """
    file = path / TENSORS if is_there(path) and path.is_dir() else path
    options = {"input_shape": list(model.input_shape), "classes": model.classes, "of": of}
    with rehearsed("unbackdoor.weights.triggers:rehearse", file, options):
        return _read_trigger(file, model.input_shape, model.classes, of)


def rehearse(path: Path, options: Mapping[str, Any]) -> None:
    """Read a trigger in a process of its own."""
    channels, height, width = options["input_shape"]
    _read_trigger(path, (channels, height, width), options["classes"], options["of"])


def _read_trigger(
    file: Path, input_shape: tuple[int, int, int], classes: int, of: str | None
) -> RecoveredTrigger:
    def misfit(got: str) -> InputError:
        return InputError(
            "the trigger does not fit the model",
            expected=f"a pattern of shape {input_shape}, perhaps a mask in 0..1, and a class in "
            f"0..{classes - 1}",
            got=got,
            where=file,
        )

    expected = {"pattern": input_shape, "mask": input_shape[1:]}
    stored = read_file(file, limit=MAX_TRIGGER, what="the trigger")
    try:
        with accounting():
            described, metadata = safetensors.read(stored.content, file)
            facts = parse_json(metadata["facts"], "the record of the trigger")
            label = int(facts["class"])
            taken = {name: described[name] for name in _NAMES if name == "pattern" or name in described}
            wrong = next((name for name in taken if taken[name].shape != expected[name]), None)
            tensors = {} if wrong else materialise(taken, stored.size)
    except (InputError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError("the trigger cannot be read", got=str(error)[:200], where=file) from error
    if wrong:
        raise misfit(f"a {wrong} of shape {taken[wrong].shape}")
    if of is not None and facts.get("model_sha256") != of:
        raise IntegrityError(
            "the trigger was recovered from another model",
            expected=f"SHA-256 of the weights {of}",
            got=str(facts.get("model_sha256"))[:80],
            where=file,
        )
    mask = tensors["mask"].float() if "mask" in tensors else None
    trigger = RecoveredTrigger(label, tensors["pattern"].float(), mask, file.name)
    faults = trigger.faults(input_shape, classes)
    if faults:
        raise misfit(faults[0])
    return trigger


def remove_trigger(folder: Path) -> None:
    """Remove what :func:`write_trigger` wrote, and the folder if nothing else is in it."""
    for name in (PNG, TENSORS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
