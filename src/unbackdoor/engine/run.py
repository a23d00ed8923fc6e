"""What a method receives besides the model, the data and its options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from unbackdoor.engine import rng
from unbackdoor.engine.precision import Policy, Precision, resolve
from unbackdoor.errors import InputError
from unbackdoor.triggers import Suspicion
from unbackdoor.types import Progress, silent

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """The context of one call of a method; holds nothing that a defender would not have.

    Attributes:
        seed: Seed of the run.
        device: Where the model and the batches are.
        precision: Number format of forward passes.
        show: Progress display.
        suspicion: Suspected classes and recovered triggers, for a defense that is registered with the trait
            :data:`unbackdoor.registry.SUSPICION`; None where nothing is suspected.
    """

    seed: int
    device: torch.device
    precision: Precision
    show: Progress = silent
    suspicion: Suspicion | None = None

    @classmethod
    def create(
        cls,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        policy: Policy = "auto",
        progress: Progress = silent,
    ) -> Run:
        """Return a run on a device, its precision resolved from the policy.

        Raises:
            InputError: If there is no such device.
        """
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise InputError("there is no such device", expected="cpu or cuda", got=device) from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise InputError("there is no such device", expected="cpu, as torch sees no GPU", got=device)
        return cls(seed, place, resolve(policy, place), progress)

    def generator(self, *labels: str | int) -> torch.Generator:
        """Return a CPU generator for the draws that the labels name."""
        return rng.generator(self.seed, *labels)

    def progress(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield the items and show how far the loop has come."""
        return self.show(items, label, total)
