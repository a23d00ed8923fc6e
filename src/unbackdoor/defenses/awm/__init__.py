"""Adversarial weight masking: scale weights down until no universal perturbation moves the labels."""

from unbackdoor.defenses.awm.method import AWMConfig, purify

__all__ = ["AWMConfig", "purify"]
