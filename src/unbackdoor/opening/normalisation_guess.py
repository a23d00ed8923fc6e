"""Which normalisation, and which of several variants of a network, is meant: judged by clean accuracy.

A bare state dict does not say how pixels were scaled before the network, and some choices (an activation, a
pooling) leave no trace in its tensors. All usual normalisations are tried on clean images: first on a few
images, then the better ones on more. The normalisation with the most correct predictions leads. It is better
than another one only by an exact one-sided sign test, at 5 %, on the images on which the two disagree; all
others count as equal to it. Among the equal ones, that of the architecture's own library is taken; else the
one with the lowest cross-entropy; and among those of data sets whose losses do not differ clearly (a paired
test, 1 %) the one nearest to the statistics of these images, because most normalisations are such statistics.
Without labels, or with images of one class only, which a constant prediction gets right too, only weak
evidence is left: the mutual information of images and predictions.

While a budget holds, the guess gets a quarter of what is left of it when it begins: it starts on a few
images, and goes on to more where another round fits. So a large network leaves time for what it was opened
for.

Rule of the warning: clean accuracy looks too low where the upper end of its 95 % interval lies under 60 %, or
under three times chance where that is more, but never above 90 %.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unbackdoor.confinement import deadline, now
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.metrics import Interval, wilson
from unbackdoor.types import Images

# (images, how many of the best go on to the next round). Every round adds images to those of the last.
ROUNDS = ((32, 24), (64, 12), (128, 6), (256, 4), (500, 4))
# Comes before them where there are hundreds of trials: a few images rule out most of them.
_FIRST_ROUND = (8, 96)
_SHARE = 0.25  # of the time that is left
_PROBE = 2  # images of the pass that is timed first, where time is short
_LARGE, _LARGE_ROUNDS = 96 * 96, 3  # pixels of an image beyond which fewer rounds must do
LEVEL = 0.05  # of the sign test that compares two trials
_Z = 2.326  # normal quantile of the test of losses, 1 %, because several are compared with the lowest
_LOW, _TIMES_CHANCE, _NEVER_ABOVE = 0.6, 3, 0.9
_BATCH_PIXELS = 1 << 23  # values of one batch of float images, 32 MiB
_LISTED = 20
_LONGEST = 2000  # characters of a list of names in a sentence
_NEARLY = 0.9  # of the hits of the best assignment, from which on a sorted order is the likelier reason
_AGREEING = 0.75  # share of the classes whose most frequent answer is the one they are assigned
_PER_CLASS = 5  # images of a class from which on an agreement counts
_MIN_IMAGES = 30  # images, below which an accuracy says little


@dataclass(frozen=True)
class Normalisation:
    """A way to scale pixels in [0, 1] before they meet a network: ``(pixels - mean) / std``.

    Attributes:
        name: What it is called.
        mean: Per-channel mean, in the network's order of channels; empty for no normalisation.
        std: Per-channel deviation, likewise.
        bgr: Whether the network takes blue first.
    """

    name: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    bgr: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return scaled pixels (B, C, H, W) of RGB images."""
        pixels = pixels.flip(1) if self.bgr else pixels
        if not self.mean:
            return pixels
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))  # (C, 1, 1)
        return (pixels - mean) / std

    def blue_first(self) -> tuple[Normalisation, ...]:
        """Return the same for a network that takes blue first: its numbers turned around, or as they are."""
        name = f"{self.name}, blue first (BGR)"
        turned = Normalisation(name, self.mean[::-1], self.std[::-1], True)
        return (turned, replace(turned, mean=self.mean, std=self.std))[: 1 + (turned.mean != self.mean)]


_RGB = (
    Normalisation("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    Normalisation(
        "CIFAR-10, deviation of the image means", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ),
    Normalisation("CIFAR-100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    Normalisation("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Normalisation("Tiny ImageNet", (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    Normalisation("GTSRB", (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    Normalisation("SVHN", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
)
_CAFFE = Normalisation(  # its networks take blue first
    "pixels in [0, 255] less the mean of ImageNet, blue first (BGR)",
    (103.939 / 255, 116.779 / 255, 123.68 / 255),
    (1 / 255,) * 3,
    bgr=True,
)
_GREY = (Normalisation("MNIST", (0.1307,), (0.3081,)), Normalisation("Fashion-MNIST", (0.2860,), (0.3530,)))


def usual_normalisations(channels: int) -> tuple[Normalisation, ...]:
    """Return the usual normalisations for images of C channels."""
    general = (
        Normalisation("none, pixels in [0, 1]"),
        Normalisation("pixels in [-1, 1]", (0.5,) * channels, (0.5,) * channels),
        Normalisation("pixels in [0, 255]", (0.0,) * channels, (1 / 255,) * channels),
    )
    return general[:1] + {3: _RGB, 1: _GREY}.get(channels, ()) + general[1:]


@dataclass(frozen=True)
class Trial:
    """What one variant of a network does under one normalisation.

    Attributes:
        variant: Name of the variant.
        normalisation: How the pixels are scaled.
        total: Images tried.
        hits: Images classified as labelled; None without labels.
        loss: Mean cross-entropy in nats; NaN without labels.
        information: Mutual information of image and prediction, in nats.
    """

    variant: str
    normalisation: Normalisation
    total: int
    hits: int | None
    loss: float
    information: float

    @property
    def accuracy(self) -> float:
        """Share of images classified as labelled; NaN without labels."""
        return math.nan if self.hits is None else self.hits / self.total

    def facts(self) -> dict[str, Any]:
        """Return the trial as a JSON object."""
        return {
            "variant": self.variant,
            "convention": self.normalisation.name,
            "mean": list(self.normalisation.mean),
            "std": list(self.normalisation.std),
            "channels": "BGR" if self.normalisation.bgr else "as they are",
            "images": self.total,
            "accuracy": None if self.hits is None else self.hits / self.total,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "information": self.information if math.isfinite(self.information) else None,
        }


@dataclass(frozen=True)
class InferredNormalisation:
    """The variant and the normalisation that were chosen, and how certain the choice is.

    Attributes:
        best: The trial that was taken.
        trials: All trials, best first; those tried on few images only come last.
        interval: 95 % interval of the clean accuracy; the whole unit interval without labels.
        by_labels: Whether clean accuracy decided; otherwise only the mutual information did.
        alternatives: Other variants or normalisations that are as good as the best on these images.
        warning: Why the result should not be trusted; empty if there is no reason.
        notes: Further observations, in words.
        class_order: Names in the order of the outputs, with which the model seems to be right far more often;
            empty where there is none.
    """

    best: Trial
    trials: tuple[Trial, ...]
    interval: Interval
    by_labels: bool
    alternatives: tuple[Trial, ...] = ()
    warning: str = ""
    notes: tuple[str, ...] = ()
    class_order: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return {
            "judged_by": "clean accuracy" if self.by_labels else "information of the predictions (weak)",
            "best": self.best.facts(),
            "interval": list(self.interval) if self.by_labels else None,
            "not_told_apart": [trial.facts() for trial in self.alternatives],
            "tried": [trial.facts() for trial in self.trials[:_LISTED]],
            "tried_in_all": len(self.trials),
            "warning": self.warning,
            "notes": list(self.notes),
            "class_order": list(self.class_order) or None,
        }


def infer_normalisation(
    variants: Mapping[str, nn.Module],
    images: Images,
    run: Run,
    *,
    normalisations: Sequence[Normalisation] | None = None,
    prefer: Normalisation | None = None,
    channels_known: bool = False,
) -> InferredNormalisation:
    """Find the variant and the normalisation under which clean images are classified best.

    Args:
        variants: Bare networks by name, the more usual first; they take scaled pixels.
        images: Clean images in the networks' input size, at best with labels.
        run: Device, precision, and the draw of the images.
        normalisations: What to try; None is :func:`usual_normalisations`.
        prefer: One of the normalisations; taken where it is among the equally good ones.
        channels_known: Whether the order of the channels is no question; else a network of colour images for
            which blue first is clearly better gets them so.

    Raises:
        InputError: If there is no image or no variant.
    """
    candidates = (
        tuple(normalisations) if normalisations is not None else usual_normalisations(images.shape[0])
    )
    if not len(images) or not variants or not candidates:
        raise InputError("there is nothing to judge by", expected="images, variants and normalisations")
    rows = _rows_in_turns(images, run)
    classes = 0 if images.labels is None else len(images.truth.unique())
    judged = images if classes > 1 else replace(images, labels=None)
    alive = [(name, normalisation) for name in variants for normalisation in candidates]
    logits: dict[tuple[str, Normalisation], Tensor] = {}
    out: list[Trial] = []
    done = 0
    trials: dict[tuple[str, Normalisation], Trial] = {}
    close = [normalisation for normalisation in candidates if normalisation in _RGB + _GREY]
    favourite = prefer or (min(close, key=lambda c: _distance(c, images)) if close else None)
    small = images.shape[1] * images.shape[2] <= _LARGE
    rounds = ROUNDS if small else ROUNDS[:_LARGE_ROUNDS]
    if len(alive) > _FIRST_ROUND[1]:
        rounds = (_FIRST_ROUND, *rounds)
    clock, untried = _Clock(), 0
    if clock.end is not None:
        probe = judged.subset(rows[:_PROBE])
        _logits(variants[alive[0][0]], alive[0][1], probe, run)
        clock.note(len(probe))
        # The first round is never left out: it gets as many images as there is time for, or fewer trials.
        first = min(_FIRST_ROUND[0], max(_PROBE, clock.passes_left() // len(alive)))
        alive.sort(key=lambda pair: pair[1] != favourite)
        untried = len(alive) - max(1, clock.passes_left() // first)
        alive = alive[: len(alive) - max(0, untried)]
        rounds = ((first, _FIRST_ROUND[1]), *(one for one in rounds if one[0] > first))
    for size, survivors in rounds:
        if done and not clock.allows(len(alive) * (min(size, len(rows)) - done)):
            break
        part, seen = judged.subset(rows[done:size]), judged.subset(rows[:size])
        for pair in run.progress(alive, f"trying normalisations on {len(seen)} images"):
            new = _logits(variants[pair[0]], pair[1], part, run)
            logits[pair] = torch.cat([logits[pair], new]) if done else new
            trials[pair] = _trial(pair, logits[pair], seen)
        clock.note(len(alive) * len(part))
        alive.sort(key=lambda pair: _rank(trials[pair]), reverse=True)
        done = len(seen)
        if done == len(rows):
            break
        # Always retained, because among equals it will be taken.
        preferred = [pair for pair in alive if pair[1] == favourite][:1]
        preferred = [pair for pair in preferred if pair in alive[survivors:]]
        out = [trials[pair] for pair in alive[survivors:] if pair not in preferred] + out
        alive = alive[:survivors] + preferred
    used = judged.subset(rows[:done])
    top = alive[0]
    ties = [top]
    if used.labels is not None:
        correct = {pair: _correct(logits[pair], used) for pair in alive}
        ties = [pair for pair in alive if not _clearly_better(correct[top], correct[pair])]
    ties.sort(key=lambda pair: (prefer is not None and pair[1] != prefer, _finite(trials[pair].loss)))
    best = ties[0]
    if used.labels is not None and best[1] != prefer and best[1] in _RGB + _GREY:
        losses = {p: functional.cross_entropy(logits[p], used.truth, reduction="none") for p in ties}
        even = [p for p in ties if p[0] == best[0] and p[1] in _RGB + _GREY]
        even = [p for p in even if not _clearly_worse(losses[p], losses[best])]
        best = min(even, key=lambda p: _distance(p[1], used))
    ties = [best, *(pair for pair in ties if pair != best)]
    trial = trials[best]
    ranked = (trial, *(trials[pair] for pair in alive if pair != best), *out)
    others = tuple(trials[pair] for pair in ties[1:])
    if trial.hits is None:
        several = len(candidates) * len(variants) > 1
        return InferredNormalisation(
            trial, ranked, Interval(0.0, 1.0), False, warning=_UNJUDGED[classes] if several else ""
        )
    interval = wilson(trial.hits, trial.total)
    notes = _observations(trial.total)
    if clock.cut or untried > 0:
        fewer = f", and {untried} ways to read the images were not tried" if untried > 0 else ""
        notes += (f"for lack of time the normalisation was judged on {trial.total} images{fewer}",)
    warning = _accuracy_warning(trial, interval, images.classes, len(candidates) * len(variants))
    if images.shape[0] == 3 and not any(candidate.bgr for candidate in candidates):
        # Where nothing is convincing, the best with red first says nothing about the scale with blue first.
        tried = candidates if warning else (best[1],)
        turned = [one for candidate in tried for one in candidate.blue_first()]
        turned += [_CAFFE] if warning and len(candidates) > 1 else []
        networks = variants if warning else {best[0]: variants[best[0]]}
        swapped = None
        if clock.allows(len(networks) * len(turned) * min(_FIRST_ROUND[0], len(rows))):
            swapped = infer_normalisation(networks, images, run, normalisations=turned)
        else:
            notes += ("for lack of time it was not tried whether the model takes blue first",)
        if swapped is not None and swapped.interval.low > interval.high:
            accuracies = f"{swapped.best.accuracy:.1%} instead of {trial.accuracy:.1%}"
            text = f"with blue first the accuracy is {accuracies}: the model "
            if not channels_known:
                return replace(swapped, notes=(*swapped.notes, text + "takes BGR images, and gets them so"))
            notes += (text + "seems to take BGR images, which must be given that way",)
    if warning:
        # With misleading labels accuracy says nothing; the trial with the most informative predictions does.
        variant, normalisation = max(trials, key=lambda pair: trials[pair].information)
        informative = _logits(variants[variant], normalisation, used, run)
    else:
        informative = logits[best]  # two classes that are exchanged leave the accuracy high
    order, text = _class_order(informative, used, interval)
    notes += (text,) * bool(text)
    return InferredNormalisation(trial, ranked, interval, True, others, warning, notes, order)


_GUESSED = (
    "the normalisation was guessed from how decided the predictions are, which is a weak sign. Give labelled "
    "images of several classes, or the mean and the deviation"
)
_UNJUDGED = (f"The images have no labels: {_GUESSED}", f"All images are of one class: {_GUESSED}")


def lowest_plausible(classes: int) -> float:
    """Return the clean accuracy under which images and model do not seem to belong together."""
    return min(_NEVER_ABOVE, max(_LOW, _TIMES_CHANCE / classes))


def _accuracy_warning(trial: Trial, interval: Interval, classes: int, tried: int) -> str:
    limit = lowest_plausible(classes)
    if interval.high >= limit:
        return ""
    best_of = f", under the best of {tried} ways to read the images" if tried > 1 else ""
    return (
        f"Clean accuracy is only {trial.accuracy:.1%} (95 % interval {interval.low:.1%} to "
        f"{interval.high:.1%}, {trial.total} images){best_of}; {limit:.0%} or more was to be expected. The "
        "images do not belong to this model, their labels are in another order, or architecture, "
        "normalisation or size are wrong. Whatever is computed from here on means little"
    )


def _observations(total: int) -> tuple[str, ...]:
    """Return what else should be known of the accuracy."""
    few = f"only {total} images were at hand, so that the accuracy is known roughly"
    return (few,) if total < _MIN_IMAGES else ()


def _class_order(logits: Tensor, images: Images, here: Interval) -> tuple[tuple[str, ...], str]:
    """Return the names in an order in which far more images are right, and a sentence; empty without one.

    The orders that programs sort folders in are tried, in both directions, as either the model or the labels
    may have been sorted; then the best assignment of classes to outputs.
    """
    names, total = images.class_names, len(images)
    predicted, truth = logits.argmax(1), images.truth.cpu()
    if logits.shape[1] != len(names):
        return (), ""
    best: tuple[int, tuple[int, ...], str] = (0, (), "")
    for words, ordered in _sorted_orders(names):
        there = tuple(names.index(name) for name in ordered)
        back = tuple(there.index(k) for k in range(len(names)))
        for order in (there, back):
            hits = int((torch.tensor(order)[predicted] == truth).sum())
            if hits > best[0]:
                best = (hits, order, f"as {words} ({', '.join(ordered[:5])}, ...)")
    assigned = _best_assignment(predicted, truth, len(names))
    if best[0] < _NEARLY * assigned[0]:
        best = assigned
    hits, order, words = best
    if not order or wilson(hits, total).low <= here.high:
        return (), ""
    class_order = tuple(names[k] for k in order)
    listed = ",".join(class_order)
    if len(listed) > _LONGEST or any("," in name for name in names):
        listed = "FILE with one name on each line; the order stands in the record under class_order"
    return class_order, (
        f"{hits / total:.1%} of the images would be right if the classes were in another order, {words}: "
        f"pass --class-names {listed}"
    )


def _sorted_orders(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the orders that programs put names in, other than the one that they are in."""

    def natural(name: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"([0-9]{1,18})", name)
        return [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]

    orders = [
        ("texts are sorted", sorted(names)),
        ("texts are sorted whatever their case", sorted(names, key=str.casefold)),
        ("numbers are sorted", sorted(names, key=natural)),
        ("the other way round", list(names)[::-1]),
    ]
    return [(words, order) for words, order in orders if order != list(names)]


def _best_assignment(predicted: Tensor, truth: Tensor, classes: int) -> tuple[int, tuple[int, ...], str]:
    """Return the hits and the class of each output in the best assignment; nothing where it says little."""
    table = torch.zeros(classes, classes)  # (class, output)
    table.index_put_((truth, predicted), torch.ones(len(predicted)), accumulate=True)
    # With a few images a class, or without any of some, the assignment is made up.
    if int(table.sum(1).min()) < _PER_CLASS:
        return 0, (), ""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        outputs = table.argmax(1)
    else:
        outputs = torch.from_numpy(linear_sum_assignment(table.numpy(), maximize=True)[1])
    if len(outputs.unique()) < classes or float((outputs == table.argmax(1)).float().mean()) < _AGREEING:
        return 0, (), ""
    hits = int(table[torch.arange(classes), outputs].sum())
    return hits, tuple(outputs.argsort().tolist()), "that of the outputs that each class is answered with"


# ---------------------------------------------------------------------------------------------------


class _Clock:
    """Whether another round fits into the share of the budget that the guess may take."""

    def __init__(self) -> None:
        whole, self._begun = deadline.get(), now()
        self.end = None if whole is None else self._begun + _SHARE * (whole - self._begun)
        self.cut = False
        self._passes = 0

    def note(self, passes: int) -> None:
        """Count passes of an image that were made."""
        self._passes += passes

    def passes_left(self) -> int:
        """Return how many further passes of an image fit, by those that were counted."""
        if self.end is None or not self._passes:
            return 1 << 62
        each = max(now() - self._begun, 1e-9) / self._passes
        return max(0, int((self.end - now()) / each))

    def allows(self, passes: int) -> bool:
        """Return whether so many further passes of an image fit."""
        fits = passes <= self.passes_left()
        self.cut = self.cut or not fits
        return fits


def _trial(pair: tuple[str, Normalisation], logits: Tensor, images: Images) -> Trial:
    probabilities = logits.softmax(1).clamp_min(1e-12)
    mean = probabilities.mean(0)
    information = float(-(mean * mean.log()).sum() + (probabilities * probabilities.log()).sum(1).mean())
    if images.labels is None:
        return Trial(*pair, len(images), None, math.nan, information)
    loss = float(functional.cross_entropy(logits, images.labels))
    return Trial(*pair, len(images), int(_correct(logits, images).sum()), loss, information)


def _correct(logits: Tensor, images: Images) -> Tensor:
    return logits.argmax(1) == images.truth  # (N,)


@torch.inference_mode()
def _logits(network: nn.Module, normalisation: Normalisation, images: Images, run: Run) -> Tensor:
    batch = max(1, _BATCH_PIXELS // math.prod(images.shape))
    out = []
    with mode(network, training=False):
        for start in range(0, len(images), batch):
            pixels = normalisation(to_float(images.pixels[start : start + batch], run.device))  # (B, C, H, W)
            # A wrong normalisation may overflow; such a trial is simply a bad one.
            out.append(logits_of(network, pixels, run).cpu().nan_to_num(0.0, 1e4, -1e4))
    logits = torch.cat(out)  # (N, K)
    if images.labels is not None and logits.shape[1] < images.classes:
        raise InputError(
            "the labels do not fit the model",
            expected=f"labels in 0..{logits.shape[1] - 1}",
            got=f"{images.classes} classes",
            where=images.name,
        )
    return logits


def _rank(trial: Trial) -> tuple[float, float]:
    if trial.hits is None:
        return (trial.information, 0.0)
    return (trial.hits, -_finite(trial.loss))


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _clearly_better(best: Tensor, other: Tensor) -> bool:
    """Tell whether the first is right clearly more often, by an exact sign test on their disagreements."""
    wins, losses = int((best & ~other).sum()), int((other & ~best).sum())
    trials = wins + losses
    tail: float = sum(math.comb(trials, k) for k in range(wins, trials + 1)) / 2**trials
    return tail <= LEVEL


def _clearly_worse(loss: Tensor, than: Tensor) -> bool:
    """Tell whether losses (N,) are clearly the higher ones, by a paired one-sided z-test."""
    gap = loss - than
    return bool(gap.mean() > _Z * gap.std() / math.sqrt(len(gap)))


def _distance(normalisation: Normalisation, images: Images) -> float:
    """Return how far a normalisation's numbers are from the statistics of the images."""
    pixels = images.pixels.float().div(255).transpose(0, 1).flatten(1)  # (C, N H W)
    own = torch.cat([pixels.mean(1), pixels.std(1, correction=0)]).cpu()
    return float((own - torch.tensor([*normalisation.mean, *normalisation.std])).norm())


def _rows_in_turns(images: Images, run: Run) -> Tensor:
    """Return the rows in a random order that takes the classes in turns."""
    shuffled = torch.randperm(len(images), generator=run.generator("convention"))
    if images.labels is None:
        return shuffled[: ROUNDS[-1][0]]
    labels = images.labels.cpu()[shuffled]
    turn = torch.zeros(len(images), dtype=torch.int64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        turn[rows] = torch.arange(len(rows))
    return shuffled[turn.argsort(stable=True)][: ROUNDS[-1][0]]
