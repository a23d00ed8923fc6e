"""The judge of screenings: how well scores tell triggered images from clean ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unbackdoor.attacks import AttackTruth, stamped
from unbackdoor.errors import InputError
from unbackdoor.metrics import auroc, average_precision, tpr_at_fpr
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Images

FPR = 0.01
VISIBLE = 1 / 255  # mean change of a pixel's value from which on the attacker's trigger counts as present


@dataclass(frozen=True)
class Separation:
    """How well triggered images are separated from one kind of clean ones.

    Attributes:
        auroc: Probability that a triggered image scores higher.
        average_precision: Area under the precision-recall curve; it depends on their share.
        tpr: Share of the triggered images that are found at 1 % false alarms.
        clean: Number of clean images of this kind.
    """

    auroc: float
    average_precision: float
    tpr: float
    clean: int


@dataclass(frozen=True)
class ScreeningScores:
    """How well scores separate triggered images from clean ones.

    Attributes:
        all: Against all clean images.
        target: Against those of the attacker's class, the hardest; None without a single such class.
        others: Against those of the other classes; None likewise.
        triggered: Number of triggered images.
    """

    all: Separation
    target: Separation | None
    others: Separation | None
    triggered: int

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)


def judge_screening(
    screen: Callable[[Images], Tensor],
    truth: AttackTruth,
    test: Images,
    *,
    most: int | None = None,
    labelled: bool = False,
) -> ScreeningScores:
    """Measure a screening with the truth.

    The triggered images are those whose label the attack changes; the clean ones are the whole set.

    Args:
        screen: Images to scores (N,), high for suspicious. It is called once, with all images in one set, so
            that it cannot know the two kinds by the call.
        truth: The attack.
        test: Labelled images that nobody trained or selected on.
        most: Triggered images at most; all by default. Screenings of a set depend on their share.
        labelled: Whether the set has labels as a poisoned training set has them: the attacker's class for
            triggered images. Otherwise it has none.

    Raises:
        InputError: If there was no attack, or a score is missing.
    """
    eligible = truth.eligible(test)
    if not len(eligible):
        raise InputError("there is nothing to find without an attack", got=truth.attack)
    eligible = eligible.subset(torch.arange(len(eligible))[:most])
    pixels = torch.cat([test.pixels, stamped(eligible.pixels, truth)])
    labels = torch.cat([test.truth, truth.targets_of(eligible)]) if labelled else None
    mixture = Images(pixels, labels, test.class_names, "images to screen")
    scores = screen(mixture)
    if tuple(scores.shape) != (len(mixture),):
        raise InputError("scores do not fit the images", expected=(len(mixture),), got=tuple(scores.shape))
    clean, triggered = scores[: len(test)], scores[len(test) :]

    def against(negatives: Tensor) -> Separation | None:
        if not len(negatives):
            return None
        both = torch.cat([negatives, triggered])
        positive = torch.arange(len(both)) >= len(negatives)
        return Separation(
            auroc(both, positive),
            average_precision(both, positive),
            tpr_at_fpr(both, positive, FPR),
            len(negatives),
        )

    everything = against(clean)
    assert everything is not None  # an attack that has eligible images has clean ones
    if truth.target is None:
        return ScreeningScores(everything, None, None, len(triggered))
    target = test.truth == truth.target  # (N,)
    return ScreeningScores(everything, against(clean[target]), against(clean[~target]), len(triggered))


@dataclass(frozen=True)
class Resemblance:
    """How much a recovered trigger is like the attacker's.

    Attributes:
        iou: Pixels that the recovered mask covers by half or more (without a mask: that the pattern changes)
            and that the attacker's trigger changes, over those that either does.
        cosine: Between the mean changes of an image by the two.
    """

    iou: float
    cosine: float


def resemblance(recovered: RecoveredTrigger, truth: AttackTruth, images: Images) -> Resemblance:
    """Compare a recovered trigger with the attacker's.

    Args:
        recovered: The recovered trigger.
        truth: The attack.
        images: Images (N, C, H, W) that both are put on, at least one.
    """
    plain = images.pixels.float() / 255
    ours, theirs = (
        put.float() / 255 - plain  # (N, C, H, W)
        for put in (recovered.apply_bytes(images.pixels), stamped(images.pixels, truth))
    )
    there = theirs.abs().mean(0).amax(0) >= VISIBLE  # (H, W)
    covered = recovered.pattern.abs().amax(0) >= VISIBLE if recovered.mask is None else recovered.mask >= 0.5
    covered = covered.to(there.device)  # (H, W)
    either = int((there | covered).sum())
    cosine = torch.cosine_similarity(ours.mean(0).flatten(), theirs.mean(0).flatten(), dim=0)
    return Resemblance(int((there & covered).sum()) / either if either else 0.0, float(cosine))
