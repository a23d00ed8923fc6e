"""How little of a change sends images to each class: all classes at once, under a budget that rises.

A change is one for all images: a patch (1 - m) x + m p with a mask m (H, W) and a pattern p (C, H, W), or a
blend clip(x + d) with a perturbation d (C, H, W). The size of a patch is the sum of its mask, that of a blend
the length of d. Every class gets a change of its own, and all of them the same budget, which rises by a
constant factor each step. What a class needs is the budget at which its change first sends the wanted share
of the images there. It then leaves the batch. On the way, at one small budget that is fixed beforehand, the
losses of the classes are compared. When enough classes have been reached, the rest are given up.
What they need is not known, but it is more than the last budget. That is a statement which a test for small
outliers can use: the order of the classes that were reached is exact, and only how far the others lie beyond
is missing. Of many classes, those that are farthest from being reached are given up before.

Paper:   the patch: Wang et al., "Neural Cleanse", S&P 2019.
Departs: there the budget is a penalty whose weight is steered for each class by itself, so that a class has
         no size before it ends, and none can be given up. The labels of the images are not used: those
         that the model sends to the class anyway are left out.
Cost:    at most steps x classes x (1 forward + 1 backward of `images` images).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import Config, option
from unbackdoor.triggers import RecoveredTrigger, added, mixed
from unbackdoor.types import Classifier, Images, require_fit

Form = Literal["patch", "blend"]
# Smallest and largest budget. A patch: share of the image that the mask covers. A blend: root of the mean
# square of d. The smallest is a pixel of a 32 x 32 image, or less than a step of an 8-bit pixel.
_RANGE: dict[Form, tuple[float, float]] = {"patch": (1 / 1024, 0.5), "blend": (1 / 1024, 0.5)}


class TriggerSearchConfig(Config):
    """Options of the search."""

    steps: int = option(
        240, "steps in which the budget rises from its smallest to its largest", source="this project", ge=20
    )
    images: int = option(32, "images for each class", source="Neural Cleanse, public code: a batch", ge=1)
    wanted: float = option(
        0.9,
        "share of its images that a change must send to the class",
        source="this project: with few images, none by itself must decide",
        gt=0,
        le=1,
    )
    lr: float = option(0.1, "step size of Adam", source="Neural Cleanse, public code", gt=0, le=10)


@dataclass(frozen=True)
class TriggerSearch:
    """The outcome of a search: the size of the change that every class needs.

    Attributes:
        sizes: (K,) size of the change that reached the class; infinite where it was given up.
        limit: Size at which the others were given up, which is a lower bound of theirs.
        losses: (K,) mean loss at the fixed small budget; of classes that were given up before, the last.
        compared: (K,) bool, which classes came as far as the fixed budget.
        triggers: One for each class: the one that reached it, else the last.
        trigger_sizes: (K,) sizes of these: sum of the mask, or length of the perturbation.
        hits: (K,) images of its own that the change sends to the class, at its size.
        images: Images that each class had.
        steps: Steps that were taken.
    """

    sizes: Tensor
    limit: float
    losses: Tensor
    compared: Tensor
    triggers: tuple[RecoveredTrigger, ...]
    trigger_sizes: Tensor
    hits: Tensor
    images: int
    steps: int


def search_triggers(
    model: Classifier,
    images: Images,
    cfg: TriggerSearchConfig,
    run: Run,
    *,
    form: Form = "patch",
    enough: int | None = None,
    fixed: float = 0.0,
    restart: int = 0,
) -> TriggerSearch:
    """Find how little of a change sends images to each class.

    Args:
        model: The classifier; not changed.
        images: Clean images of any classes; labels are not used.
        cfg: See :class:`TriggerSearchConfig`.
        run: Seed, device, precision and progress.
        form: See above.
        enough: Classes that are reached before the others are given up; all by default.
        fixed: Budget, as a share of the image or a root mean square, at which the losses are compared; no
            class that was reached leaves the batch before.
        restart: Which start and which choice of images this is.

    Raises:
        InputError: If there is no image.
        MethodFailed: If the model sends all images to one class, or a loss is not finite.
    """
    require_fit(model, images)
    rows = _rows(model, images, cfg, run, restart)  # (K, B)
    classes, per_class = rows.shape
    enough = classes if enough is None else min(enough, classes)
    pixels = to_float(images.pixels, run.device, channels_last=False)  # (N, C, H, W)
    unit, start = _FORMS[form].unit(model.input_shape), _start(model, form, run, restart)
    lowest, highest = _RANGE[form]
    growth = math.log(highest / lowest)
    compare = math.ceil(cfg.steps * math.log(max(fixed, lowest) / lowest) / growth - 1e-9)
    # Classes that may stay, from a step on: twice as many as are waited for, then half as many again.
    max_active = {compare // 2: 2 * enough, compare: math.ceil(1.5 * enough)} if compare else {}
    raw = start.to(run.device)
    optimizer, change = RowAdam(raw, cfg.lr), _FORMS[form].change
    hits_needed = math.ceil(cfg.wanted * per_class - 1e-9)
    sizes = torch.full((classes,), torch.inf, dtype=torch.float64)
    losses, hits = torch.zeros(classes), torch.zeros(classes, dtype=torch.int64)
    latest, latest_size = raw.clone(), torch.zeros(classes, dtype=torch.float64)
    active, budget, step = torch.arange(classes), lowest, 0
    compared = torch.zeros(classes, dtype=torch.bool)
    with frozen(model), mode(model, training=False):
        for step in run.progress(range(cfg.steps + 1), "how far each class is"):
            budget = lowest * math.exp(growth * step / cfg.steps)
            gradient, loss, count = _evaluate(model, pixels, rows, raw, active, budget * unit, change, run)
            if not bool(torch.isfinite(loss).all()):
                raise MethodFailed("the search for a trigger gave a loss that is not finite")
            if step <= compare:
                losses[active] = loss
                compared[active] = step == compare
            unreached = ~torch.isfinite(sizes[active])  # not reached before this step
            # The latest attempt stands for a class until it is reached.
            pending = active[unreached]
            latest[pending], latest_size[pending] = raw[pending], budget * unit
            hits[pending] = count[unreached]
            sizes[active[unreached & (count >= hits_needed)]] = budget * unit
            reached = torch.isfinite(sizes)
            if step >= compare and int(reached.sum()) >= enough:
                break
            optimizer.step(active, gradient)
            stay = ~reached[active] if step >= compare else torch.ones_like(unreached)
            if step in max_active and len(active) > max_active[step]:
                ranks = loss.argsort(stable=True).argsort()
                stay &= ranks < max_active[step]
            active = active[stay]
            if not len(active):
                break
    with torch.no_grad():
        triggers = [_FORMS[form].trigger(k, latest[k : k + 1], float(latest_size[k])) for k in range(classes)]
    return TriggerSearch(
        sizes, budget * unit, losses, compared, tuple(triggers), latest_size, hits, per_class, step
    )


def success(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> Rate:
    """Return how many of the images that the model does not send to the class the trigger sends there."""
    with mode(model, training=False):
        before = predict(model, images, run).argmax(1)
        after = predict(model, images, run, transform=trigger.apply_bytes).argmax(1)
    movable = before != trigger.label
    return Rate(int(((after == trigger.label) & movable).sum()), int(movable.sum()))


# ---------------------------------------------------------------------------------------------------
# One step


def _evaluate(
    model: Classifier,
    pixels: Tensor,
    rows: Tensor,
    raw: Tensor,
    active: Tensor,
    size: float,
    change: Callable[[Tensor, Tensor, float], Tensor],
    run: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients (A, ...), mean losses (A,) and hits (A,) of the active classes."""
    per_class = rows.shape[1]
    gradients, losses, hits = [], [], []
    for part in active.split(max(1, images_per_pass(model.input_shape) // per_class)):
        own = raw[part].requires_grad_()  # (G, ...)
        x = pixels[rows[part].to(pixels.device)]  # (G, B, C, H, W)
        logits = logits_of(model, change(x, own, size).flatten(0, 1), run).unflatten(0, (len(part), -1))
        targets = part.to(logits.device)[:, None].expand(-1, per_class)  # (G, B)
        loss = F.cross_entropy(logits.movedim(2, 1), targets, reduction="none").mean(1)  # (G,)
        (gradient,) = torch.autograd.grad(loss.sum(), own)
        gradients.append(gradient)
        losses.append(loss.detach().cpu())
        hits.append((logits.argmax(2) == targets).sum(1).cpu())
    return torch.cat(gradients), torch.cat(losses), torch.cat(hits)


@dataclass(frozen=True)
class _Form:
    unit: Callable[[tuple[int, int, int]], float]
    change: Callable[[Tensor, Tensor, float], Tensor]
    trigger: Callable[[int, Tensor, float], RecoveredTrigger]


def _mask(raw: Tensor, size: float) -> Tensor:
    """Return masks (G, H, W) in [0, 1] whose sum is the size."""
    heights = raw.flatten(1).softmax(1)  # (G, H * W)
    full = torch.zeros_like(heights, dtype=torch.bool)
    mask = size * heights
    for _ in range(8):  # what is cut off at 1 goes to the others; each round settles some pixels
        over = mask.detach() > 1
        if not bool((over & ~full).any()):
            break
        full = full | over
        left = (size - full.sum(1, keepdim=True)).clamp_min(0)
        rest = heights * ~full
        mask = torch.where(full, 1.0, left * rest / rest.sum(1, keepdim=True).clamp_min(1e-20))
    return mask.clamp_max(1).view_as(raw)


def _patched(x: Tensor, raw: Tensor, size: float) -> Tensor:
    mask = _mask(raw[:, 0], size)[:, None, None]  # (G, 1, 1, H, W)
    pattern = raw[:, None, 1:].sigmoid()  # (G, 1, C, H, W)
    return mixed(x, pattern, mask)  # (G, B, C, H, W)


def _patch(label: int, raw: Tensor, size: float) -> RecoveredTrigger:
    return RecoveredTrigger(label, raw[0, 1:].sigmoid().cpu(), _mask(raw[:, 0], size)[0].cpu())


def _perturbation(raw: Tensor, size: float) -> Tensor:
    length = raw.flatten(1).norm(dim=1).clamp_min(1e-20)  # (G,)
    scaled: Tensor = raw * (size / length)[:, None, None, None]  # (G, C, H, W)
    return scaled


def _blended(x: Tensor, raw: Tensor, size: float) -> Tensor:
    return added(x, _perturbation(raw, size)[:, None])  # (G, B, C, H, W)


def _blend(label: int, raw: Tensor, size: float) -> RecoveredTrigger:
    return RecoveredTrigger(label, _perturbation(raw, size)[0].cpu(), None)


_FORMS: dict[Form, _Form] = {
    "patch": _Form(lambda shape: float(shape[1] * shape[2]), _patched, _patch),
    "blend": _Form(lambda shape: math.sqrt(math.prod(shape)), _blended, _blend),
}


def _start(model: Classifier, form: Form, run: Run, restart: int) -> Tensor:
    """Return the first parameters (K, C or 1 + C, H, W), drawn for each class by itself."""
    channels, height, width = model.input_shape
    shape = (channels + (form == "patch"), height, width)
    draws = [
        torch.randn(shape, generator=run.generator("reach", form, restart, k)) for k in range(model.classes)
    ]
    return 0.1 * torch.stack(draws)


def _rows(model: Classifier, images: Images, cfg: TriggerSearchConfig, run: Run, restart: int) -> Tensor:
    """Return for each class the images (K, B) it is sought with: equally many that are not there already."""
    if not len(images):
        raise InputError("there is no image to look for a trigger with", where=images.name)
    with mode(model, training=False):
        logits = predict(model, images, run)  # (N, K)
    if not bool(torch.isfinite(logits).all()):
        raise MethodFailed("the model gives clean images logits that are not finite")
    predicted = logits.argmax(1)  # (N,)
    order = torch.randperm(len(images), generator=run.generator("reach images", restart))
    usable: Sequence[Tensor] = [order[predicted[order] != k] for k in range(model.classes)]
    count = min(cfg.images, *(len(rows) for rows in usable))
    if not count:
        k = min(range(model.classes), key=lambda k: len(usable[k]))
        raise MethodFailed(
            "the model sends all images to one class without any trigger, so that none can be found",
            where=f"label {k}",
            remedy="Add images of other classes",
        )
    return torch.stack([rows[:count] for rows in usable])
