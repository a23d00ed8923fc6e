"""No attack: the clean control, which is an attack setting like any other.

Paper:   none.
Departs: in nothing.
"""

from __future__ import annotations

from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.registry import attack, option


class NoneConfig(AttackConfig):
    """Options of the clean control."""

    poison_rate: float = option(0.0, "always 0", source="a clean control", ge=0, le=0)


@attack("none", config=NoneConfig, paper="a control")
def none(cfg: NoneConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return a trigger that changes nothing."""
    return Trigger(stamp=lambda pixels: pixels.clone(), mapping="none")
