"""Do nothing: the row that every other row is read against.

Paper:   none.
Needs:   nothing.          Changes: nothing.
Departs: -
Cost:    0.
"""

from __future__ import annotations

from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense
from unbackdoor.types import Classifier, CleanData, Purified


class NoneConfig(Config):
    """No options."""


@defense("none", config=NoneConfig, paper="a control", needs={"images"}, traits={"control"})
def purify(model: Classifier, data: CleanData, cfg: NoneConfig, *, run: Run) -> Purified:
    """Return the model as it came."""
    return Purified(model)
