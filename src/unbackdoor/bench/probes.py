"""Probes of a repair, by the judge: what a low ASR can hide.

Three questions to one network, each with the truth: how fast does the backdoor come back when a handful of
poisoned images is trained on, is the way into the class still open for another trigger, and what becomes of
triggered images that are not sent to the attacker's class any more. None has an answer by itself. The same is
asked of the victim, and of a network that was trained clean, from the same first weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks import AttackTruth, stamped
from unbackdoor.data.batches import to_float
from unbackdoor.engine.descent import Batch, descend
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.metrics import agreement
from unbackdoor.registry import Config, option
from unbackdoor.types import Classifier, Images

RELEARN_STEPS = (0, 5, 10, 20, 40)  # after which a row has the ASR
HALF = 0.5  # ASR at which a backdoor counts as back


class ProbeConfig(Config):
    """How the probes are made; one setting for all rows."""

    poisoned: int = option(
        50,
        "triggered training images, with the attacker's labels, that the network is fine-tuned on",
        source="this project; a handful, as in the retuning attack of arXiv:2410.09838",
        ge=1,
    )
    clean: int = option(450, "clean training images beside them", source="this project", ge=1)
    batch_size: int = option(
        100, "images a step, of re-learning and of the search", source="this project", ge=2
    )
    lr: float = option(0.01, "learning rate of SGD, constant", source="common fine-tuning practice", gt=0)
    momentum: float = option(0.9, "momentum of SGD", source="He et al. 2016", ge=0, lt=1)
    judged: int = option(
        500, "test images that ASR is measured on after each step", source="this project", ge=1
    )
    radius: int = option(
        8,
        "largest change of a pixel by the alternative trigger, in grey levels of 255",
        source="Madry et al. 2018, arXiv:1706.06083, on CIFAR-10",
        ge=1,
        le=255,
    )
    search_images: int = option(
        256, "clean training images that the alternative trigger is searched on", source="this project", ge=1
    )
    search_steps: int = option(60, "signed gradient steps of the search", source="this project", ge=1)
    direction_weight: float = option(
        1.0,
        "factor on the cosine between the change of the features and the one that the trigger makes",
        source="arXiv:2603.09772 adds the two; the factor: this project",
        ge=0,
    )


@dataclass(frozen=True)
class Probed:
    """What the probes say of one network; all rates are in 0..1.

    Attributes:
        pacc: Triggered test images of all classes that are classified as what they show.
        moved: The largest share of all triggered test images that goes into one class which is neither what
            they show nor what the attacker wants.
        moved_class: That class.
        relearned: ASR after each of ``RELEARN_STEPS``.
        steps_to_half: Steps until ASR is at least one half; None if that takes more than the last of them.
        alternative: Success of the alternative trigger.
    """

    pacc: float
    moved: float
    moved_class: int
    relearned: tuple[float, ...]
    steps_to_half: int | None
    alternative: float

    def columns(self, suffix: str = "") -> dict[str, Any]:
        """Return the columns of a row, their names with a suffix."""
        return {f"{name}{suffix}": value for name, value in vars(self).items()}


def probe(
    model: Classifier,
    truth: AttackTruth,
    training: Images,
    test: Images,
    run: Run,
    *,
    config: ProbeConfig | None = None,
) -> Probed | None:
    """Ask a network all three questions.

    Args:
        model: Not changed.
        truth: The attack, of this network or of another one.
        training: The attacker's clean training images, labelled.
        test: Labelled test images.
        run: Seed of all draws, device, precision and progress. Networks that are compared need the same seed.
        config: See :class:`ProbeConfig`.

    Returns:
        None where the attack sends no test image anywhere, as the clean control.

    Raises:
        UnsupportedModel: If the network has no weight that learns, or no layer that makes the logits.
        MethodFailed: If re-learning diverges.
    """
    if not len(truth.eligible(test)) or not len(truth.eligible(training)):
        return None
    cfg = config or ProbeConfig()
    model = model.copy().to(run.device).eval()
    pacc, moved, moved_class = triggered_accuracy(model, truth, test, run)
    curve = relearning(model, truth, training, test, cfg, run)
    return Probed(
        pacc,
        moved,
        moved_class,
        tuple(curve[step] for step in RELEARN_STEPS),
        next((step for step, asr in enumerate(curve) if asr >= HALF), None),
        alternative_trigger(model, truth, training, test, cfg, run),
    )


def triggered_accuracy(
    model: Classifier, truth: AttackTruth, test: Images, run: Run
) -> tuple[float, float, int]:
    """Return ``pacc``, ``moved`` and ``moved_class`` of :class:`Probed`.

    Images of the attacker's own class count too: where a repair sends the trigger elsewhere, they go with it,
    and neither ASR nor RA looks at them.
    """
    label = "triggered images"
    logits = predict(model, test, run, transform=lambda pixels: stamped(pixels, truth), label=label)
    predicted = logits.argmax(1)  # (N,)
    stray = (predicted != test.truth) & (predicted != truth.targets_of(test))
    counts = predicted[stray].bincount(minlength=model.classes)  # (K,)
    most = int(counts.argmax())
    return agreement(predicted, test.truth).value, int(counts[most]) / len(test), most


def relearning(
    model: Classifier, truth: AttackTruth, training: Images, test: Images, cfg: ProbeConfig, run: Run
) -> list[float]:
    """Return the ASR before fine-tuning on a few poisoned images, and after each of its steps.

    Paper:   Min et al., "Uncovering, explaining, and mitigating the superficial safety of backdoor defense",
             NeurIPS 2024, arXiv 2410.09838.
    Departs: the steps are counted one by one and held against a clean network; the paper compares the ASR at
             the end between repairs.

    Args:
        model: On the run's device; not changed.
        truth: The attack.
        training: Clean training images of the attacker, labelled.
        test: Labelled test images.
        cfg: See :class:`ProbeConfig`.
        run: See :func:`probe`.

    Returns:
        One rate for each of 0 .. the last of ``RELEARN_STEPS``, on one sample of test images.
    """
    judged = _triggered(_draw(truth.eligible(test), cfg.judged, run, "judged images"), truth)
    lesson = _lesson(training, truth, cfg, run)
    pupil = model.copy()
    steps = max(RELEARN_STEPS)
    recipe = Recipe(
        epochs=-(-steps // max(1, len(lesson) // cfg.batch_size)),
        batch_size=cfg.batch_size,
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=0,
        schedule="constant",
        augmentation="none",
    )

    def asr() -> float:
        with mode(pupil, training=False):
            return agreement(predict(pupil, judged, run).argmax(1), judged.truth).value

    curve = [asr()]

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(logits_of(pupil, batch.pixels, run), batch.labels)

    def measure() -> None:
        if len(curve) <= steps:  # the last epoch may have a few steps more
            curve.append(asr())

    descend(pupil, lesson, recipe, loss, run, label="re-learning", after_step=measure)
    return curve


def alternative_trigger(
    model: Classifier, truth: AttackTruth, training: Images, test: Images, cfg: ProbeConfig, run: Run
) -> float:
    """Return the success on test images of a faint pattern that is searched from the attack's own trigger.

    It is one pattern for all images, bounded in each pixel, and is added to clean images. It begins as the
    mean change that the trigger makes and descends on the cross-entropy towards the attacker's class, while
    it is held to the direction in which the trigger moves the features of this very network.

    Paper:   Abad et al., "Removing the trigger, not the backdoor: alternative triggers and latent backdoors",
             arXiv 2603.09772; the bounded universal pattern: Moosavi-Dezfooli et al., CVPR 2017.
    Departs: signed steps that shrink to zero; the form of the pattern and all sizes are this project's.

    Args:
        model: On the run's device and in evaluation mode; not changed.
        truth: The attack.
        training: Clean training images of the attacker, labelled.
        test: Labelled test images.
        cfg: See :class:`ProbeConfig`.
        run: See :func:`probe`.
    """
    images = _draw(truth.eligible(training), cfg.search_images, run, "search images")
    goals = truth.targets_of(images).to(run.device)
    clean = to_float(images.pixels, run.device)  # (N, C, H, W)
    triggered = to_float(stamped(images.pixels, truth), run.device)
    limit = cfg.radius / 255
    pattern = (triggered - clean).mean(0, keepdim=True).clamp(-limit, limit)  # (1, C, H, W)
    size = max(2, min(cfg.batch_size, images_per_pass(images.shape)))
    with frozen(model), mode(model, training=False), _features(model) as seen:

        def features(pixels: Tensor) -> Tensor:
            out = []
            with torch.no_grad():
                for part in pixels.split(size):
                    logits_of(model, part, run)
                    out.append(seen.pop())
            return torch.cat(out)  # (N, D)

        start = features(clean)
        direction = (features(triggered) - start).mean(0, keepdim=True)  # (1, D)
        for step in run.progress(range(cfg.search_steps), "alternative trigger"):
            order = torch.randperm(len(images), generator=run.generator("search", step))
            rows = order[:size].to(run.device)
            pattern.requires_grad_()
            logits = logits_of(model, (clean[rows] + pattern).clamp(0, 1), run)  # (B, K)
            along = F.cosine_similarity(seen.pop() - start[rows], direction).mean()
            loss = F.cross_entropy(logits, goals[rows]) - cfg.direction_weight * along
            (slope,) = torch.autograd.grad(loss, pattern)
            reach = limit / 4 * (1 - step / cfg.search_steps)
            pattern = (pattern.detach() - reach * slope.sign()).clamp(-limit, limit)
    # Judged in whole grey levels, as an image file would hold it.
    shift = (pattern * 255).round().to("cpu", torch.int16)
    eligible = truth.eligible(test)
    logits = predict(
        model, eligible, run, transform=lambda pixels: (pixels + shift).clamp(0, 255).to(torch.uint8)
    )
    return agreement(logits.argmax(1), truth.targets_of(eligible)).value


def _lesson(training: Images, truth: AttackTruth, cfg: ProbeConfig, run: Run) -> Images:
    """Return a few poisoned images, and clean ones."""
    poisoned = _triggered(_draw(truth.eligible(training), cfg.poisoned, run, "poisoned images"), truth)
    clean = _draw(training, cfg.clean, run, "clean images")
    pixels = torch.cat([poisoned.pixels, clean.pixels])
    return replace(training, pixels=pixels, labels=torch.cat([poisoned.truth, clean.truth]))


def _triggered(images: Images, truth: AttackTruth) -> Images:
    """Return images with the trigger and the attacker's labels."""
    return replace(images, pixels=stamped(images.pixels, truth), labels=truth.targets_of(images))


def _draw(images: Images, count: int, run: Run, label: str) -> Images:
    order = torch.randperm(len(images), generator=run.generator(label))
    return images.subset(order[:count].sort().values)


@contextmanager
def _features(model: Classifier) -> Iterator[list[Tensor]]:
    """Yield a list to which every pass of the network adds its features (B, D), what its last layer reads."""
    seen: list[Tensor] = []
    head = model.get_submodule(head_name(model))
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().flatten(1)))
    try:
        yield seen
    finally:
        handle.remove()
