"""Recovered triggers read from the files of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from unbackdoor.audit.scanning import ShownTrigger
from unbackdoor.errors import InputError
from unbackdoor.types import Classifier

TENSORS = "trigger.safetensors"


def read_triggers(
    triggers: Sequence[Path | str | ShownTrigger] | None, model: Classifier
) -> tuple[ShownTrigger, ...]:
    """Return recovered triggers, read from files where they are paths.

    Args:
        triggers: Triggers, or files as a report holds them, or the folders of these.
        model: The model that they must fit.

    Raises:
        InputError: If one cannot be read or does not fit the model.
    """
    out = []
    for file in triggers or ():
        if isinstance(file, ShownTrigger):
            out.append(file)
            continue
        file = Path(file)
        path = file / TENSORS if file.is_dir() else file
        try:
            with safe_open(path, framework="pt", device="cpu") as stored:
                facts = json.loads((stored.metadata() or {})["facts"])
                pattern = stored.get_tensor("pattern").float()
                mask = stored.get_tensor("mask").float() if "mask" in stored.keys() else None  # noqa: SIM118
                label = int(facts["class"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise InputError("the trigger cannot be read", got=str(error)[:200], where=path) from error
        fits = tuple(pattern.shape) == model.input_shape and 0 <= label < model.classes
        if not fits or (mask is not None and tuple(mask.shape) != model.input_shape[1:]):
            raise InputError(
                "the trigger does not fit the model",
                expected=f"a pattern of shape {model.input_shape} and a class in 0..{model.classes - 1}",
                got=f"{tuple(pattern.shape)}, class {label}",
                where=path,
            )
        out.append(ShownTrigger(label, pattern, mask, path.name))
    return tuple(out)
