"""What only the attacker and the judge know.

No defense and no scanner may import this package; a test walks the imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.registry import ATTACKS, Config, option
from unbackdoor.types import Images

Stamp = Callable[[Tensor], Tensor]
LabelMapping = Literal["all-to-one", "all-to-all", "none"]


class AttackConfig(Config):
    """Options that every attack takes."""

    poison_rate: float = option(
        0.1, "share of all training images that carry the trigger", source="BackdoorBench, 10 %", ge=0, le=1
    )
    target: int = option(0, "class that triggered images are sent to", source="BackdoorBench", ge=0)


@dataclass(frozen=True)
class Trigger:
    """A trigger as a function of pixels, and what it does to labels.

    Attributes:
        stamp: uint8 pixels (B, C, H, W) -> triggered uint8 pixels of the same shape; deterministic.
        mapping: ``all-to-one`` (to the target), ``all-to-all`` (y to y + 1 mod K) or ``none``.
        clean_label: True where only images of the target class are poisoned and no label changes.
        decoy: Pixels and a generator -> pixels that look triggered but keep their label in training (the
            noise mode of WaNet), or None.
        decoy_rate: Share of all training images that become decoys, in 0..1.
    """

    stamp: Stamp
    mapping: LabelMapping = "all-to-one"
    clean_label: bool = False
    decoy: Callable[[Tensor, torch.Generator], Tensor] | None = None
    decoy_rate: float = 0.0


@dataclass(frozen=True)
class AttackTruth:
    """The attack as the judge knows it; enough to trigger any image set again.

    Attributes:
        attack: Registered name.
        options: Options of the attack, JSON-ready.
        shape: (C, H, W) of the images.
        classes: Number of classes K.
        seed: Seed of the trigger and of the choice of poisoned images.
        trigger: See :class:`Trigger`.
        poisoned: Training rows that carry the trigger.
        decoys: Training rows that were disturbed and kept their label.
    """

    attack: str
    options: Mapping[str, Any]
    shape: tuple[int, int, int]
    classes: int
    seed: int
    trigger: Trigger = field(repr=False)
    poisoned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    decoys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)

    @property
    def target(self) -> int | None:
        """The attacker's class, or None where there is no single one."""
        return int(self.options["target"]) if self.trigger.mapping == "all-to-one" else None

    def wanted(self, labels: Tensor) -> Tensor:
        """Return the class (N,) that the attacker wants for triggered images of the given classes (N,)."""
        if self.trigger.mapping == "all-to-one":
            return torch.full_like(labels, int(self.options["target"]))
        if self.trigger.mapping == "all-to-all":
            return (labels + 1) % self.classes
        return labels.clone()

    def eligible(self, images: Images) -> Images:
        """Return the images on which ASR and RA are measured: those not already of the wanted class."""
        labels = images.truth
        return images.subset((self.wanted(labels) != labels).nonzero().flatten())

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description from which :meth:`from_spec` makes the trigger again."""
        return {
            "attack": self.attack,
            "options": dict(self.options),
            "shape": list(self.shape),
            "classes": self.classes,
            "seed": self.seed,
        }

    @classmethod
    def describe(
        cls,
        attack: str,
        options: Mapping[str, Any] | None,
        *,
        shape: tuple[int, int, int],
        classes: int,
        seed: int,
    ) -> AttackTruth:
        """Return an attack on images of this form, before anything is poisoned.

        Raises:
            ConfigError: If an option does not fit its declaration.
        """
        part = ATTACKS[attack]
        config = part.configure(options)
        trigger = part.function(config, shape=shape, classes=classes, seed=seed)
        return cls(part.name, config.model_dump(), shape, classes, seed, trigger)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> AttackTruth:
        """Make the truth again from :meth:`spec`, without the rows of the training set."""
        channels, height, width = spec["shape"]
        return cls.describe(
            str(spec["attack"]),
            spec["options"],
            shape=(int(channels), int(height), int(width)),
            classes=int(spec["classes"]),
            seed=int(spec["seed"]),
        )
