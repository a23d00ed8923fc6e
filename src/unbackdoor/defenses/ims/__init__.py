"""Invertible masking using selection: a mask that keeps the clean task, and whose inverse keeps the rest."""

from unbackdoor.defenses.ims.method import IMSConfig, purify

__all__ = ["IMSConfig", "purify"]
