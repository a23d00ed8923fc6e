"""Differences between two models, measured with clean images and recovered triggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.metrics import Rate, agreement
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, Images

# Of the spread of the logits: other orders of summation make some 1e-5 of it, weights in half precision 5e-4.
SAME_LOGITS = 2e-3


@dataclass(frozen=True)
class Accuracy:
    """Clean accuracy of two models on the same images.

    Attributes:
        before: Of the first.
        after: Of the second.
        lost: Images that only the first has right.
        gained: Images that only the second has right.
        agreement: Images that both give the same class.
        per_class: For every class with images: its name, and the two accuracies.
    """

    before: Rate
    after: Rate
    lost: int
    gained: int
    agreement: Rate
    per_class: tuple[tuple[str, Rate, Rate], ...]

    @property
    def drop(self) -> float:
        """Loss of accuracy in -1..1; negative for a gain."""
        return self.before.value - self.after.value

    @property
    def drop_interval(self) -> tuple[float, float]:
        """The 95 % interval of the loss, from the images that the two disagree about."""
        return paired_interval(self.lost, self.gained, self.before.total)


@dataclass(frozen=True)
class TensorChange:
    """How a tensor differs.

    Attributes:
        name: In the state dict.
        entries: Number of its entries.
        changed: Entries that differ.
        channels: Slices along the first dimension that differ at all.
        of_channels: Number of slices.
        relative: L2 norm of the difference over that of the original; infinite where the latter is 0.
    """

    name: str
    entries: int
    changed: int
    channels: int
    of_channels: int
    relative: float


def compare_accuracy(before: Classifier, after: Classifier, images: Images, run: Run) -> Accuracy | None:
    """Compare two models on labelled images; None without labels or images."""
    if images.labels is None or not len(images):
        return None
    truth = images.truth.cpu()
    one, other = (_answers(model, images, run) for model in (before, after))
    first, second = one == truth, other == truth
    per_class = []
    for k, name in enumerate(before.class_names):
        rows = truth == k
        if bool(rows.any()):
            per_class.append(
                (
                    name,
                    Rate(int(first[rows].sum()), int(rows.sum())),
                    Rate(int(second[rows].sum()), int(rows.sum())),
                )
            )
    return Accuracy(
        agreement(one, truth),
        agreement(other, truth),
        int((first & ~second).sum()),
        int((second & ~first).sum()),
        agreement(one, other),
        tuple(per_class),
    )


def agree_on(before: Classifier, after: Classifier, images: Images, run: Run) -> Rate:
    """Return the share of images that both models give the same class; needs no labels."""
    return agreement(_answers(before, images, run), _answers(after, images, run))


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of two models lie apart.

    Attributes:
        largest: Largest difference of a logit, after the mean over the classes was taken off each image's:
            a number added to all logits of an image, as a logarithm of a softmax does, changes no answer.
        spread: Standard deviation of the first model's logits, likewise.
        images: Number of images.
    """

    largest: float
    spread: float
    images: int

    @property
    def relative(self) -> float:
        """The largest difference in units of the spread."""
        if not self.spread:
            return 0.0 if not self.largest else math.inf
        return self.largest / self.spread

    @property
    def same(self) -> bool:
        """Whether the two compute the same, up to the rounding of another order of operations."""
        return bool(self.images) and self.relative <= SAME_LOGITS

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; what is infinite is None."""
        relative = self.relative if math.isfinite(self.relative) else None
        return {"largest": self.largest, "spread": self.spread, "relative": relative, "same": self.same}


def compare_logits(before: Classifier, after: Classifier, images: Images, run: Run) -> LogitDifference:
    """Return how far the logits of two models of the same task lie apart, in single precision."""
    if before.input_shape != after.input_shape or before.classes != after.classes or not len(images):
        return LogitDifference(math.inf, 1.0, 0)
    exact = Run.create(seed=run.seed, device=str(run.device), policy="fp32")
    one, other = (_centred(_logits(model, images, exact)) for model in (before, after))
    return LogitDifference(float((one - other).abs().max()), float(one.std()), len(images))


def _centred(logits: Tensor) -> Tensor:
    logits = logits.double().cpu()
    return logits - logits.mean(1, keepdim=True)


def paired_interval(lost: int, gained: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies on the same images.

    Paper: Agresti & Min, Statistics in Medicine 24 (2005): Wald's interval with half an image added to each
    of the four cells, which holds its level where the two models hardly differ.
    """
    if not total:
        return (-1.0, 1.0)
    n, b, c = total + 2, lost + 0.5, gained + 0.5
    middle = (b - c) / n
    half = z * math.sqrt(max(b + c - (b - c) ** 2 / n, 0.0)) / n
    return (max(-1.0, middle - half), min(1.0, middle + half))


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[TensorChange]:
    """Return the tensors that differ, in the order of the first; names in one only are left out."""
    out = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape:
            continue
        differs = old != new  # NaN never gets this far
        count = int(differs.sum())
        if not count:
            continue
        slices = differs.reshape(len(old), -1).any(1) if old.dim() else differs.reshape(1)
        norm = float(old.double().norm())
        moved = float((new.double() - old.double()).norm())
        out.append(
            TensorChange(
                name,
                old.numel(),
                count,
                int(slices.sum()),
                len(slices),
                moved / norm if norm else math.inf,
            )
        )
    return out


def trigger_success(model: Classifier, images: Images, trigger: RecoveredTrigger, run: Run) -> Rate:
    """Return the share of images of other classes that the trigger turns into the class.

    Where images have no labels, those count that the model itself does not give the class.
    """
    own = images.truth.cpu() if images.labels is not None else _answers(model, images, run)
    others = images.subset((own != trigger.label).nonzero().flatten())
    if not len(others):
        return Rate(0, 0)
    answers = _answers(model, trigger.stamp(others), run)
    return agreement(answers, torch.full_like(answers, trigger.label))


def rate_facts(rate: Rate | None) -> dict[str, Any] | None:
    """Return a rate as JSON-ready facts, or None."""
    if rate is None or not rate.total:
        return None
    low, high = rate.interval
    return {"value": rate.value, "hits": rate.hits, "total": rate.total, "low": low, "high": high}


def _answers(model: Classifier, images: Images, run: Run) -> Tensor:
    return _logits(model, images, run).argmax(1)


def _logits(model: Classifier, images: Images, run: Run) -> Tensor:
    device = model.mean.device
    try:
        with mode(model, training=False):
            return predict(model.to(run.device), images, run)
    finally:
        model.to(device)
