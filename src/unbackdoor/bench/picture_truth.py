"""The truth about an attack whose trigger is a picture: ``--trigger`` of ``train`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unbackdoor.attacks import AttackTruth
from unbackdoor.data.trigger_picture import picture_label, without_class
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError
from unbackdoor.types import Images

ATTACK = "picture"


def picture_options(trigger: str, class_names: Sequence[str], *, target: int | None = None) -> dict[str, Any]:
    """Return the options of the attack ``picture`` for a text such as ``patch.png,class=3,place=24x24``.

    Args:
        trigger: See ``data/trigger_picture.py``.
        class_names: Classes of the data set.
        target: Class that the trigger leads to, where the text does not say so.

    Raises:
        InputError: If no class or one that there is not is named.
        ConfigError: If two classes are named.
    """
    named = picture_label(trigger, class_names, required=target is None)
    if named is not None and target not in (None, named):
        raise ConfigError("the attack", [f"the target {target} is not the trigger's class {named}"])
    return {"picture": without_class(trigger), "target": target if named is None else named}


def truth_of_picture(trigger: str, images: Images, run: Run) -> AttackTruth:
    """Return the truth about a model that a picture is said to trigger, to be judged on such images.

    Raises:
        InputError: If the picture cannot be read or does not fit.
        UnsafeFile: If it declares an absurd number of pixels.
    """
    options = picture_options(trigger, images.class_names)
    truth = AttackTruth.describe(ATTACK, options, shape=images.shape, classes=images.classes, seed=run.seed)
    learning = truth.trigger.learning
    assert learning is not None
    return truth.learned(learning.fit(images, run))
