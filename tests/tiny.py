"""Networks and images small enough to train in a second: those of the contract suite, under short names."""

from unbackdoor.testing.examples import ARCHITECTURES, QUADRANTS, tiny_classifier, tiny_data

NAMES = QUADRANTS

__all__ = ["ARCHITECTURES", "NAMES", "tiny_classifier", "tiny_data"]
