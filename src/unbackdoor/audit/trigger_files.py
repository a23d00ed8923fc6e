"""Triggers that are brought to a verb: recovered ones, their files, or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unbackdoor.data.trigger_picture import names_picture, picture_path, read_trigger_picture
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
            out.append(read_trigger_picture(str(one), model.input_shape, model.class_names))
        else:
            out.append(read_trigger(Path(one), model))
    return tuple(out)


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
        path = picture_path(one) if names_picture(one) else Path(one)
        if is_there(path) and path.is_dir():
            path = path / TENSORS
        if not is_there(path):
            raise InputError("the trigger does not exist", where=path)
