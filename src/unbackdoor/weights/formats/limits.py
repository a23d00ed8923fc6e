"""How much work and memory one opened file may cost: one accountant, one limit of each kind.

A file of a few bytes can describe any amount of work: names that stand for each other, pickles that are read
again and again, lists without end. What a reader does for a file is therefore counted while it is done, over
all its parts together, and refused beyond limits that no honest model comes near. The bytes of its files are
bounded before they are read (``weights.stored_file.MAX_FILE``). What is not foreseen here ends at the limits
of the process in which files are opened (``unbackdoor.confinement``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from unbackdoor.errors import UnsafeFile

Kind = Literal["instructions", "visits", "tensors", "unpacked"]


@dataclass(frozen=True)
class Limits:
    """The limits of one opened file.

    Attributes:
        instructions: Of all its pickles together; a ResNet-152 with its optimizer has 50,000.
        visits: Entries of its dictionaries, lists and modules that are walked through, and elements of its
            lists of tensors; the largest models have some 10,000 tensors, each of which is visited ten times.
        tensors: Tensors that are copied out of it.
        unpacked: Bytes that are unpacked, or copied for anything but a tensor.
        name: Characters of the name of a tensor; the longest of timm has 80.
    """

    instructions: int = 4_000_000
    visits: int = 2_000_000
    tensors: int = 100_000
    unpacked: int = 512 << 20
    name: int = 1000


_IN_WORDS: dict[Kind, str] = {
    "instructions": "instructions in its pickles",
    "visits": "entries that are walked through",
    "tensors": "tensors",
    "unpacked": "bytes unpacked",
}


class Account:
    """What reading one file has cost so far.

    Args:
        limits: What it may cost.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.spent: dict[Kind, int] = dict.fromkeys(_IN_WORDS, 0)

    def spend(self, kind: Kind, count: int) -> None:
        """Add to one of the costs.

        Raises:
            UnsafeFile: If the limit is exceeded.
        """
        self.spent[kind] += count
        limit: int = getattr(self.limits, kind)
        if self.spent[kind] > limit:
            raise UnsafeFile(
                "reading the file takes more work than that of any model",
                expected=f"at most {limit} {_IN_WORDS[kind]}",
                got="more",
                remedy="It is built to exhaust its reader: do not load it",
            )


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def accounting(limits: Limits | None = None) -> Iterator[Account]:
    """Count what is read inside of the block; within another block, on the account of that one.

    Args:
        limits: Of a new account; None takes the usual ones.
    """
    account = _account.get()
    if account is not None:
        yield account
        return
    token = _account.set(Account(limits or Limits()))
    try:
        account = _account.get()
        assert account is not None
        yield account
    finally:
        _account.reset(token)


def spend(kind: Kind, count: int = 1) -> None:
    """Add to a cost of the file that is being read; see :meth:`Account.spend`."""
    account = _account.get()
    if account is not None:
        account.spend(kind, count)


def limits() -> Limits:
    """Return the limits of the file that is being read."""
    account = _account.get()
    return Limits() if account is None else account.limits
