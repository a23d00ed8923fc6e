"""Randomness that belongs to a run and never to the process.

Every draw comes from a generator whose seed is derived from the run's seed and a label, so that adding a
draw in one place does not shift the draws of another.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a seed in 0..2**63-1 that depends on the given seed and labels only."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a CPU generator seeded from :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@contextmanager
def seeded(seed: int, *labels: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it.

    For code that cannot take a generator: dropout, and the initialisation of layers.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *labels))
        yield


@dataclass(frozen=True)
class GlobalRandomness:
    """A snapshot of all generators that belong to the process."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def take(cls) -> GlobalRandomness:
        """Read the state of torch, CUDA, NumPy and Python."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        # NumPy's legacy global generator is read because a method might draw from it unasked.
        return cls(torch.get_rng_state(), cuda, np.random.get_state(legacy=True), random.getstate())  # noqa: NPY002

    def changed(self) -> list[str]:
        """Return the names of the generators that have moved since the snapshot."""
        now = GlobalRandomness.take()
        moved = []
        if not torch.equal(self.cpu, now.cpu):
            moved.append("torch's global generator")
        if self.cuda and not all(torch.equal(a, b) for a, b in zip(self.cuda, now.cuda, strict=True)):
            moved.append("CUDA's global generator")
        if not all(np.array_equal(a, b) for a, b in zip(self.numpy, now.numpy, strict=True)):
            moved.append("NumPy's global generator")
        if self.python != now.python:
            moved.append("Python's global generator")
        return moved

    def restore(self) -> None:
        """Put every generator back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
