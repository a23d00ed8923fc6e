"""Triggers that are brought to a verb: recovered ones, their files, or pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unbackdoor.data.trigger_picture import names_picture, read_trigger_picture
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier
from unbackdoor.weights.triggers import read_trigger


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
            out.append(read_trigger_picture(one, model.input_shape, model.class_names))
        else:
            out.append(read_trigger(Path(one), model))
    return tuple(out)
