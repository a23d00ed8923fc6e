"""Networks written by hand, with a shortcut to a class or without: those of the contract suite."""

from unbackdoor.testing.examples import BLOCKS, Blocks, block_data, planted

NAMES = BLOCKS

__all__ = ["NAMES", "Blocks", "block_data", "planted"]
