"""Attacks: clean data in, poisoned data and the truth about it out; for the judge alone."""

from unbackdoor.attacks.poison import impossible, poison, prepare, spread, stamped
from unbackdoor.attacks.truth import AttackConfig, AttackTruth, Learning, Trigger
from unbackdoor.registry import load_all

load_all(__name__)

__all__ = [
    "AttackConfig",
    "AttackTruth",
    "Learning",
    "Trigger",
    "impossible",
    "poison",
    "prepare",
    "spread",
    "stamped",
]
