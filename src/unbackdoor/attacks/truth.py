"""The truth about an attack, which only the attacker and the judge know.

No defense and no scanner may import this package; a test walks the imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.registry import ATTACKS, Config, option
from unbackdoor.types import Augmentation, Classifier, Images, state_sha256

if TYPE_CHECKING:
    from unbackdoor.engine.training import Recipe  # named only: the judge depends on no training

BATCH = 1024  # images stamped at a time; bounds the float copies that some triggers make
Stamp = Callable[[Tensor], Tensor]
Tensors = Mapping[str, Tensor]
TrainingStamp = Callable[[Tensor, torch.Generator], Tensor]
LabelMapping = Literal["all-to-one", "all-to-all", "several", "none"]


class AttackConfig(Config):
    """Options that every attack takes."""

    poison_rate: float = option(
        0.1, "share of all training images that carry the trigger", source="BackdoorBench, 10 %", ge=0, le=1
    )
    target: int = option(0, "class that triggered images are sent to", source="BackdoorBench", ge=0)


class CleanLabelConfig(AttackConfig):
    """Options of attacks that poison images of the target class alone and keep their labels."""

    rate_of: Literal["all", "target"] = option(
        "all",
        "what poison_rate is a share of: all training images, or those of the target class; a tenth of all "
        "is the whole class where there are ten classes of one size",
        source="all: BackdoorBench; target: Barni et al. 2019",
    )


class MappedConfig(AttackConfig):
    """Options of attacks that may send every class to the one behind it instead of all to one."""

    mapping: Literal["all-to-one", "all-to-all"] = option(
        "all-to-one",
        "where triggered images are sent: all to target, or those of class y to y + 1 mod K, where target "
        "plays no part",
        source="BackdoorBench",
    )


class TrainVictim(Protocol):
    """Training that the attacker controls: the victim learns in place, and the trigger with it."""

    def __call__(
        self,
        model: Classifier,
        images: Images,
        fitted: Tensors,
        recipe: Recipe,
        run: Run,
        *,
        augmentation: Augmentation,
        checkpoint: Path | None,
        label: str,
    ) -> Tensors:
        """Train on clean images; see :func:`unbackdoor.engine.training.train`.

        Args:
            model: Untrained, on the run's device.
            images: Clean training images.
            fitted: What :attr:`Learning.fit` returned.
            recipe: How the victim is trained.
            run: Seed, device, precision and progress.
            augmentation: What ``auto`` in the recipe stands for.
            checkpoint: File from which a killed training goes on.
            label: Name in the progress display.

        Returns:
            All tensors of the trigger, on the CPU.
        """
        ...


@dataclass(frozen=True)
class Learning:
    """The source of a learned trigger, which is not a function of options and seed alone.

    What was learned are a few tensors. They are kept with the truth, so that the judge learns nothing again.

    Attributes:
        fit: Clean training images and a run -> tensors on the CPU, before anything is poisoned.
        restore: All tensors -> the stamp.
        train: Trains the victim in place of the ordinary training, from clean images; None where the images
            are poisoned once and training stays ordinary.
        restore_training: All tensors -> :attr:`Trigger.in_training`; None where poisoned training images
            carry the trigger itself.
    """

    fit: Callable[[Images, Run], Tensors]
    restore: Callable[[Tensors], Stamp]
    train: TrainVictim | None = None
    restore_training: Callable[[Tensors], TrainingStamp] | None = None


def of_classes(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Return which labels (N,) are of these classes; of no classes at all means of any."""
    return torch.isin(labels, torch.tensor(classes)) if classes else torch.ones_like(labels, dtype=torch.bool)


def unlearned(pixels: Tensor) -> Tensor:
    """Refuse: the stamp of a trigger that was not learned yet."""
    raise InputError("the trigger is not learned yet", remedy="Train a victim, or load its truth")


@dataclass(frozen=True)
class Trigger:
    """A trigger as a function of pixels, and what it does to labels.

    Attributes:
        stamp: uint8 pixels (B, C, H, W) -> triggered uint8 pixels of the same shape; deterministic.
        mapping: ``all-to-one`` (to the target), ``all-to-all`` (y to y + 1 mod K), ``several`` (to what
            ``choose_target`` says) or ``none``.
        clean_label: True where only images of the target class are poisoned and no label changes.
        decoy: Pixels and a generator -> pixels that look triggered but keep their label in training (the
            noise mode of WaNet), or None.
        decoy_rate: Share of all training images that become decoys, in 0..1.
        learning: Where the stamp comes from if it is learned; None if it is given.
        in_training: Clean pixels and a generator -> what poisoned training images carry, where that is not
            the trigger itself; None where it is.
        sources: Classes whose images the trigger is meant for; empty for all.
        decoy_sources: Classes that decoys are drawn from; empty for all.
        choose_target: Clean uint8 pixels (B, C, H, W) -> the class (B,) that the stamp sends them to, where
            that depends on the image; deterministic.
    """

    stamp: Stamp = unlearned
    mapping: LabelMapping = "all-to-one"
    clean_label: bool = False
    decoy: Callable[[Tensor, torch.Generator], Tensor] | None = None
    decoy_rate: float = 0.0
    learning: Learning | None = None
    in_training: TrainingStamp | None = None
    sources: tuple[int, ...] = ()
    decoy_sources: tuple[int, ...] = ()
    choose_target: Callable[[Tensor], Tensor] | None = None


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
        tensors: What a learned trigger learned, on the CPU; empty for all others.
    """

    attack: str
    options: Mapping[str, Any]
    shape: tuple[int, int, int]
    classes: int
    seed: int
    trigger: Trigger = field(repr=False)
    poisoned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    decoys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    tensors: Tensors = field(default_factory=dict, repr=False)

    @property
    def target(self) -> int | None:
        """The attacker's class, or None where there is no single one."""
        return int(self.options["target"]) if self.trigger.mapping == "all-to-one" else None

    def target_labels(self, labels: Tensor) -> Tensor:
        """Return the class (N,) that the attacker sends triggered images of these classes (N,) to.

        Raises:
            InputError: If that depends on the image; ask :meth:`targets_of`.
        """
        if self.trigger.choose_target is not None:
            raise InputError("the target depends on the image and not on its class", got=self.attack)
        if self.trigger.mapping == "all-to-one":
            return torch.full_like(labels, int(self.options["target"]))
        if self.trigger.mapping == "all-to-all":
            return (labels + 1) % self.classes
        return labels.clone()

    def targets_of(self, images: Images) -> Tensor:
        """Return the class (N,) that the attacker sends each of these clean labelled images to."""
        choose = self.trigger.choose_target
        if choose is None:
            return self.target_labels(images.truth)
        parts = [choose(part) for part in images.pixels.split(BATCH)]
        return torch.cat(parts) if parts else images.truth.clone()

    def eligible(self, images: Images) -> Images:
        """Return the images on which ASR and RA are measured.

        They are not of the target class already, and of the classes that the trigger is meant for.
        """
        labels = images.truth
        rows = (self.targets_of(images) != labels) & of_classes(labels, self.trigger.sources)
        return images.subset(rows.nonzero().flatten())

    def learned(self, tensors: Tensors) -> Self:
        """Return the truth with the stamp that these tensors make."""
        learning = self.trigger.learning
        assert learning is not None  # only learned triggers have tensors
        trigger = replace(self.trigger, stamp=learning.restore(tensors))
        if learning.restore_training is not None:
            trigger = replace(trigger, in_training=learning.restore_training(tensors))
        return replace(self, trigger=trigger, tensors=dict(tensors))

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description from which :meth:`from_spec` makes the trigger again.

        Tensors of a learned trigger are named by their hash and kept beside it.
        """
        digest = {"tensors_sha256": state_sha256(self.tensors)} if self.tensors else {}
        return {
            "attack": self.attack,
            "options": dict(self.options),
            "shape": list(self.shape),
            "classes": self.classes,
            "seed": self.seed,
            **digest,
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
    def from_spec(cls, spec: Mapping[str, Any], tensors: Tensors | None = None) -> AttackTruth:
        """Make the truth again from :meth:`spec`, without the rows of the training set.

        Raises:
            IntegrityError: If the tensors of a learned trigger are not those of the description.
        """
        channels, height, width = spec["shape"]
        truth = cls.describe(
            str(spec["attack"]),
            spec["options"],
            shape=(int(channels), int(height), int(width)),
            classes=int(spec["classes"]),
            seed=int(spec["seed"]),
        )
        if truth.trigger.learning is None:
            return truth
        expected, got = str(spec["tensors_sha256"]), state_sha256(tensors or {})
        if expected != got:
            raise IntegrityError(
                "the tensors of the trigger are not those of its description",
                expected=expected[:12],
                got=got[:12] if tensors else "none",
            )
        return truth.learned(tensors or {})
