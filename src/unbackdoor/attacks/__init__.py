"""Attacks: clean data in, poisoned data and the truth about it out; for the judge alone."""

from unbackdoor.attacks.poison import impossible, poison, stamped
from unbackdoor.attacks.truth import AttackConfig, AttackTruth, Trigger
from unbackdoor.registry import load_all

load_all(__name__)

__all__ = ["AttackConfig", "AttackTruth", "Trigger", "impossible", "poison", "stamped"]
