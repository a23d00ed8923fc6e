"""The default repair: compare with a re-learned twin, and teach away what moves the network alone."""

from unbackdoor.defenses.auto.method import AutoConfig, purify

__all__ = ["AutoConfig", "purify"]
