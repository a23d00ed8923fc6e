"""Teach a network to ignore some changes, with its own answers on the unchanged images as the targets.

Half of the clean images are mixed (mixup or CutMix), because what must stay is what the network says between
its images as well; the weights of the last steps are averaged. Batch statistics stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import augment, to_float
from unbackdoor.engine.inference import logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.universal_changes import GivenChange, UniversalChange
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Augmentation, Classifier, Images

_OLD = 0.4  # weight of all changes that were taught before, beside 1 for all new ones
_LEAST = 0.2  # weight of a new change, at the least
_TAUGHT = 3  # changes in a step


Change = UniversalChange | GivenChange


@dataclass(frozen=True)
class Lesson:
    """How the network is taught.

    Attributes:
        steps: Steps of SGD.
        lr: Peak learning rate.
        clean: Clean images of a step.
        changed: Changed images of a step.
        mixed: Whether half of the clean images are mixed.
        averaging: Decay of the average of the weights; 0 takes the last ones.
        soft: Whether the targets are the network's answers, and not the labels.
    """

    steps: int = 160
    lr: float = 0.005
    clean: int = 40
    changed: int = 24
    mixed: bool = True
    averaging: float = 0.97
    soft: bool = True


def teach(
    model: Classifier,
    teacher: Classifier,
    images: Images,
    fresh: Sequence[tuple[Change, float]],
    old: Sequence[Change],
    lesson: Lesson,
    run: Run,
    *,
    augmentation: Augmentation,
    number: int,
) -> Classifier:
    """Return a copy that gives the teacher's answers whether or not the changes are made.

    Args:
        model: The network as it is now.
        teacher: The network as it was received; only its answers on unchanged images are used.
        images: Clean images; labels are read where the targets are not soft.
        fresh: Changes that still move ``model``, and by how much more than is natural.
        old: Changes taught before, which are recalled now and then.
        lesson: See :class:`Lesson`.
        run: Seed, device, precision and progress.
        augmentation: What may be done to an image without changing its class.
        number: Number of the round; names the draws.

    Raises:
        MethodFailed: If the loss stops being finite.
    """
    out = model.copy().to(run.device).to(memory_format=torch.channels_last)
    teacher = teacher.copy().to(run.device).to(memory_format=torch.channels_last)
    changes = [*(change for change, _ in fresh), *old]
    shares = [max(_LEAST, excess) for _, excess in fresh]
    weights = torch.tensor(shares + [_OLD * sum(shares) / max(1, len(old))] * len(old))
    draws = run.generator("teaching", number)
    learning = [p for p in out.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=lesson.lr, momentum=0.9)
    average = [p.detach().clone() for p in learning]
    first_averaged = lesson.steps // 4
    with mode(out, training=False), mode(teacher, training=False):
        for step in run.progress(range(lesson.steps), f"teaching, round {number + 1}"):
            rows = torch.randint(len(images), (lesson.clean + lesson.changed,), generator=draws)
            pixels = to_float(augment(images.pixels[rows], augmentation, draws), run.device)
            if lesson.mixed:
                pixels = _mixed(pixels, lesson.clean // 2, draws)
            with torch.no_grad():
                targets = logits_of(teacher, pixels, run).softmax(1)  # (B, K)
            if not lesson.soft:
                labels = images.truth[rows].to(run.device)
                hard = F.one_hot(labels, model.classes).to(targets)
                first = lesson.clean // 2 if lesson.mixed else 0
                targets = torch.cat([targets[:first], hard[first:]])
            pixels = _changed(pixels, lesson.clean, changes, weights, draws)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(logits_of(out, pixels, run), targets)
            if not bool(torch.isfinite(loss)):
                raise MethodFailed("teaching diverged", where=f"round {number + 1}, step {step}")
            for group in optimizer.param_groups:
                group["lr"] = lesson.lr * _rate(step, lesson.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 5.0)
            optimizer.step()
            with torch.no_grad():
                for mean, value in zip(average, learning, strict=True):
                    if lesson.averaging and step > first_averaged:
                        mean.lerp_(value, 1 - lesson.averaging)
                    else:
                        mean.copy_(value)
    with torch.no_grad():
        for mean, value in zip(average, learning, strict=True):
            value.copy_(mean)
    out.zero_grad(set_to_none=True)
    return out.to(memory_format=torch.contiguous_format).eval()


def _rate(step: int, steps: int, warmup: int = 10) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _mixed(pixels: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Mix the first images with one another: a quarter of them by mixup, the rest by CutMix."""
    out = pixels.clone()
    partner = torch.randperm(count, generator=draws)
    share = float(torch.rand((), generator=draws))
    half = count // 2
    out[:half] = share * pixels[:half] + (1 - share) * pixels[partner[:half]]
    height, width = pixels.shape[2:]
    side = math.sqrt(share)
    tall, wide = round(side * height), round(side * width)
    top = int(torch.randint(height - tall + 1, (), generator=draws))
    left = int(torch.randint(width - wide + 1, (), generator=draws))
    box = (slice(half, count), slice(None), slice(top, top + tall), slice(left, left + wide))
    out[box] = pixels[partner[half:]][:, :, top : top + tall, left : left + wide]
    return out


@torch.no_grad()
def _changed(
    pixels: Tensor, first: int, changes: Sequence[Change], weights: Tensor, draws: torch.Generator
) -> Tensor:
    """Apply a few changes, drawn by weight, to a part each of the images from ``first`` on."""
    chosen = torch.multinomial(weights, min(_TAUGHT, len(changes)), generator=draws).tolist()
    parts = [pixels[:first]]
    rest = pixels[first:].tensor_split(len(chosen))
    parts += [changes[i].apply(part) for i, part in zip(chosen, rest, strict=True)]
    return torch.cat(parts)
