"""Triggers that are brought to a verb: recovered ones, their files, or pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor.confinement import rehearsed
from unbackdoor.data.trigger_picture import names_picture, read_trigger_picture
from unbackdoor.errors import InputError
from unbackdoor.files import is_there
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier
from unbackdoor.weights.triggers import TENSORS, read_trigger


def read_triggers(
    triggers: Sequence[Path | str | RecoveredTrigger] | None, model: Classifier
) -> tuple[RecoveredTrigger, ...]:
    """Return triggers, read from files where they are not in memory.

    Args:
        triggers: Recovered triggers, their files, or pictures with what is said of them; see
            ``data/trigger_picture.py``.
        model: The classifier that they are to be tried on.

    Raises:
        InputError: If one cannot be read or does not fit the model.
        UnsafeFile: If a picture declares an absurd number of pixels.
    """
    out = []
    for one in triggers or ():
        if isinstance(one, RecoveredTrigger):
            out.append(one)
        elif names_picture(one):
            out.append(_picture(str(one), model.input_shape, model.class_names))
        else:
            out.append(read_trigger(Path(one), model))
    return tuple(out)


def _picture(text: str, input_shape: tuple[int, int, int], class_names: Sequence[str]) -> RecoveredTrigger:
    # Libraries of pictures decode it, so that a process of its own does it first.
    text = str(Path.cwd() / text)  # that process may stand in another folder
    options = {"text": text, "input_shape": list(input_shape), "class_names": list(class_names)}
    with rehearsed("unbackdoor.audit.trigger_files:rehearse", _path_in(text), options):
        return read_trigger_picture(text, input_shape, class_names)


def rehearse(path: Path, options: Mapping[str, Any]) -> None:
    """Read a picture in a process of its own."""
    channels, height, width = options["input_shape"]
    read_trigger_picture(options["text"], (channels, height, width), options["class_names"])


def _path_in(text: str) -> Path:
    return Path(text.split(",", 1)[0])


def require_trigger_files(triggers: Sequence[Path | str | RecoveredTrigger] | None) -> None:
    """Raise InputError unless all files are there; what they hold is read once the model is open."""
    for one in triggers or ():
        if isinstance(one, RecoveredTrigger):
            continue
        if not isinstance(one, Path | str):
            raise InputError(
                "the trigger is of another type",
                expected="a recovered trigger, its file, or a picture with what is said of it",
                got=type(one).__name__,
            )
        path = _path_in(str(one)) if names_picture(one) else Path(one)
        if is_there(path) and path.is_dir():
            path = path / TENSORS
        if not is_there(path):
            raise InputError("the trigger does not exist", where=path)
