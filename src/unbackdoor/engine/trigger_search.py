"""How little of a change sends images to each class: all classes at once, under a budget that rises.

A change is one for all images: a patch (1 - m) x + m p with a mask m (H, W) and a pattern p (C, H, W), or a
blend clip(x + d) with a perturbation d (C, H, W). The size of a patch is the sum of its mask, that of a blend
the length of d. Every class gets a change of its own, and all of them the same budget, which rises by a
constant factor each step.

A search that starts at one place ends where that place leads, and one that sees few images learns them by
heart. So there are two rounds:

1. Each class has several starts: masks that begin as bumps on a grid, and few images. The worse half of the
   starts of each class is given up, twice. The round ends where the median class has come to a stated share
   of the loss that it began with.
2. The best start of each class goes on from a smaller budget, on images that are drawn anew in each step, so
   that a loss is one on images that the change was not made from. Again where the median class has come to
   the stated share, the losses of all classes are read: what a class needs is compared at a budget that the
   model sets itself, and not at one that is large for one model and small for another (*anchored*).

Then all but the easiest classes are given up, and these go on until enough of them have been reached: their
change sends the wanted share of the images there. Of many classes, only the easiest enter the second round;
the others need more than these.

Paper:   the patch: Wang et al., "Neural Cleanse", S&P 2019.
Departs: there the budget is a penalty whose weight is steered for each class by itself, so that a class has
         no size before it ends, and none can be given up. The labels of the images are not used: those
         that the model sends to the class anyway are left out.
Cost:    at most steps x classes x (starts x `draft_images`, then `batch`) x (1 forward + 1 backward); about a
         third of it, as starts and classes are given up.
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
from unbackdoor.engine.universal_changes import mask_of_size, patched
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import Config, option
from unbackdoor.triggers import RecoveredTrigger, added
from unbackdoor.types import Classifier, Images, require_fit

Form = Literal["patch", "blend"]
_HIGHEST = 0.5  # budget: share of the image that the mask covers, or root mean square of d
_FAINTEST = 0.3 / 255  # budget of a blend to begin with; a patch begins with one pixel
_HALVED = (1 / 8, 1 / 4)  # of all steps, after which the worse starts are given up
_LOWER = 16  # times smaller the second round begins than the first one ended
_SMOOTH = 0.5  # weight of the latest step in the losses, which are on other images each time
_MANY = 20  # classes up to which all enter the second round; of more, a third
_EASIEST = 3  # classes beyond those waited for that go on after the losses were read


class TriggerSearchConfig(Config):
    """Options of the search."""

    steps: int = option(
        48, "steps in which the budget rises from its smallest to its largest", source="this project", ge=20
    )
    starts: int = option(
        9, "starts of each class in the first round; a blend has a third of them", source="this project", ge=1
    )
    draft_images: int = option(6, "images for each class in the first round", source="this project", ge=1)
    images: int = option(
        16, "images for each class and step in the second round", source="this project", ge=1
    )
    anchor: float = option(
        0.35,
        "share of the median class's first loss at which the losses are compared",
        source="this project: chosen on networks of digits",
        gt=0,
        lt=1,
    )
    wanted: float = option(
        0.9,
        "share of its images that a change must send to the class",
        source="this project: with few images, none by itself must decide",
        gt=0,
        le=1,
    )
    lr: float = option(0.3, "step size of Adam", source="this project", gt=0, le=10)


@dataclass(frozen=True)
class TriggerSearch:
    """The outcome of a search: the size of the change that every class needs.

    Attributes:
        losses: (K,) mean loss where the median class had come to the anchor; the last for a class that was
            given up before.
        compared: (K,) bool, which classes came so far.
        sizes: (K,) size of the change that reached the class; infinite where it was given up.
        triggers: One for each class: the one that reached it, else the last.
        trigger_sizes: (K,) sizes of these: sum of the mask, or length of the perturbation.
        success: (K,) share of images that it was not made from that the change sends to the class.
        anchored: Size at which the losses were read.
        limit: Size of the last step.
        steps: Steps that were taken in both rounds.
    """

    losses: Tensor
    compared: Tensor
    sizes: Tensor
    triggers: tuple[RecoveredTrigger, ...]
    trigger_sizes: Tensor
    success: Tensor
    anchored: float
    limit: float
    steps: int


def search_triggers(
    model: Classifier,
    images: Images,
    cfg: TriggerSearchConfig,
    run: Run,
    *,
    form: Form = "patch",
    enough: int | None = None,
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
        restart: Which starts and which order of the images these are.

    Raises:
        InputError: If there is no image.
        MethodFailed: If the model sends all images to one class, or a loss is not finite.
    """
    require_fit(model, images)
    rows = _rows(model, images, run, restart)  # (K, P)
    pixels = to_float(images.pixels, run.device, channels_last=False)  # (N, C, H, W)
    problem = _Problem(model, pixels, rows, form, cfg, run)
    with frozen(model), mode(model, training=False):
        draft = _first_round(problem, restart)
        return _second_round(problem, draft, enough)


def success(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> Rate:
    """Return how many of the images that the model does not send to the class the trigger sends there."""
    with mode(model, training=False):
        before = predict(model, images, run).argmax(1)
        after = predict(model, images, run, transform=trigger.apply_bytes).argmax(1)
    movable = before != trigger.label
    return Rate(int(((after == trigger.label) & movable).sum()), int(movable.sum()))


# ---------------------------------------------------------------------------------------------------
# The two rounds


@dataclass(frozen=True)
class _Problem:
    """What both rounds work on."""

    model: Classifier
    pixels: Tensor  # (N, C, H, W)
    rows: Tensor  # (K, P), for each class the images that are not there already
    form: Form
    cfg: TriggerSearchConfig
    run: Run

    @property
    def lowest(self) -> float:
        """The budget to begin with: one pixel, or what is hardly a step of an 8-bit pixel."""
        return 1 / math.prod(self.model.input_shape[1:]) if self.form == "patch" else _FAINTEST

    @property
    def growth(self) -> float:
        """By what the logarithm of the budget grows in a step."""
        return math.log(_HIGHEST / self.lowest) / self.cfg.steps

    @property
    def unit(self) -> float:
        """Size of the whole image."""
        return _FORMS[self.form].unit(self.model.input_shape)

    def batch(self, step: int, count: int) -> Tensor:
        """Return for each class the images (K, B) of a step; other ones than in the step before."""
        available = self.rows.shape[1]
        count = min(count, available)
        places = (step * count + torch.arange(count)) % available
        return self.rows[:, places]

    def evaluate(
        self, raw: Tensor, classes: Tensor, rows: Tensor, budget: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients (A, ...), mean losses (A,) and hits (A,) of changes to the classes (A,)."""
        per_class = rows.shape[1]
        gradients, losses, hits = [], [], []
        change, size = _FORMS[self.form].change, budget * self.unit
        places = torch.arange(len(classes))
        for part in places.split(max(1, images_per_pass(self.model.input_shape) // per_class)):
            own = raw[part.to(raw.device)].requires_grad_()  # (G, ...)
            x = self.pixels[rows[part].to(self.pixels.device)]  # (G, B, C, H, W)
            changed = change(x, own, size).flatten(0, 1)
            logits = logits_of(self.model, changed, self.run).unflatten(0, (len(part), -1))  # (G, B, K)
            targets = classes[part].to(logits.device)[:, None].expand(-1, per_class)  # (G, B)
            loss = F.cross_entropy(logits.movedim(2, 1), targets, reduction="none").mean(1)  # (G,)
            (gradient,) = torch.autograd.grad(loss.sum(), own)
            gradients.append(gradient)
            losses.append(loss.detach().cpu())
            hits.append((logits.argmax(2) == targets).float().mean(1).cpu())
        loss = torch.cat(losses)
        if not bool(torch.isfinite(loss).all()):
            raise MethodFailed("the search for a trigger gave a loss that is not finite")
        return torch.cat(gradients), loss, torch.cat(hits)


@dataclass(frozen=True)
class _Draft:
    """What the first round leaves to the second: the best start of each class (K, ...)."""

    raw: Tensor
    first: float  # loss of the median class at the smallest budget
    budget: float
    steps: int


def _first_round(problem: _Problem, restart: int) -> _Draft:
    """Let the starts of each class compete."""
    cfg, classes = problem.cfg, problem.model.classes
    starts = cfg.starts if problem.form == "patch" else max(1, cfg.starts // 3)
    raw = _starts(problem.model, problem.form, starts, problem.run, restart).to(problem.run.device)
    own = torch.arange(classes).repeat_interleave(starts)  # (K * S,), class of each start
    optimizer, active = RowAdam(raw, cfg.lr), torch.arange(len(own))
    latest = torch.full((len(own),), torch.inf)
    rows = problem.batch(0, cfg.draft_images)
    halved, first, step, budget = {round(f * cfg.steps) for f in _HALVED}, math.nan, 0, problem.lowest
    for step in problem.run.progress(range(cfg.steps + 1), "starts of each class"):
        budget = problem.lowest * math.exp(problem.growth * step)
        kinds = own[active]
        gradient, loss, _ = problem.evaluate(raw[active.to(raw.device)], kinds, rows[kinds], budget)
        latest[active] = loss
        middle = float(_least(latest, classes).median())
        first = middle if step == 0 else first
        if middle <= cfg.anchor * first:
            break
        optimizer.step(active, gradient)
        if step in halved:
            remaining = len(active) // classes
            table = loss.view(classes, remaining)
            kept = table.topk(math.ceil(remaining / 2), dim=1, largest=False).indices.sort(1).values
            gone = torch.ones_like(table, dtype=torch.bool).scatter(1, kept, False)
            latest[active[gone.flatten()]] = torch.inf
            active = active.view(classes, remaining).gather(1, kept).flatten()
    best = latest.view(classes, starts).argmin(1) + starts * torch.arange(classes)
    return _Draft(raw[best.to(raw.device)].clone(), first, budget, step)


def _least(losses: Tensor, classes: int) -> Tensor:
    return losses.view(classes, -1).amin(1)


def _second_round(problem: _Problem, draft: _Draft, enough: int | None) -> TriggerSearch:
    """Read the losses at the anchor, and go on with the easiest classes until enough are reached."""
    cfg, classes, unit = problem.cfg, problem.model.classes, problem.unit
    enough = classes if enough is None else min(enough, classes)
    raw = draft.raw
    optimizer, begin = RowAdam(raw, cfg.lr), max(problem.lowest, draft.budget / _LOWER)
    budget = begin
    count = math.ceil(math.log(_HIGHEST / begin) / problem.growth)
    losses, hits = torch.zeros(classes), torch.zeros(classes)
    sizes = torch.full((classes,), torch.inf, dtype=torch.float64)
    latest, latest_size = raw.clone(), torch.zeros(classes, dtype=torch.float64)
    success_rate = torch.zeros(classes)
    active, compared = torch.arange(classes), torch.zeros(classes, dtype=torch.bool)
    anchored, read = math.nan, losses
    step, seen = 0, math.ceil(cfg.draft_images / max(1, min(cfg.images, problem.rows.shape[1])))
    for step in problem.run.progress(range(count + 1), "how far each class is"):
        budget = begin * math.exp(problem.growth * step)
        rows = problem.batch(seen + step, cfg.images)[active]
        gradient, loss, hit = problem.evaluate(raw[active.to(raw.device)], active, rows, budget)
        share = 1.0 if step == 0 else _SMOOTH
        losses[active] = losses[active].lerp(loss, share)
        hits[active] = hits[active].lerp(hit, share)
        unreached = ~torch.isfinite(sizes[active])  # not reached before this step
        # The latest attempt stands for a class until it is reached.
        pending = active[unreached]
        latest[pending.to(raw.device)], latest_size[pending] = raw[pending.to(raw.device)], budget * unit
        success_rate[pending] = hits[pending]
        sizes[active[unreached & (hits[active] >= cfg.wanted - 1e-6)]] = budget * unit
        reached = torch.isfinite(sizes)
        if step == 0 and classes > _MANY:
            wanted = max(_MANY // 2, math.ceil(classes / 3), enough if enough < classes else 0)
            stay = loss.argsort(stable=True)[: wanted if enough < classes else classes].sort().values
            active, gradient = active[stay], gradient[stay.to(gradient.device)]
        middle = float(losses[active].median())
        if math.isnan(anchored) and (middle <= cfg.anchor * draft.first or step == count):
            anchored = budget * unit
            compared[active] = True
            read = losses.clone()
        if not math.isnan(anchored) and int(reached.sum()) >= enough:
            break
        optimizer.step(active, gradient)
        if not math.isnan(anchored):
            going = active[~reached[active]]
            easiest = losses[going].argsort(stable=True)[: enough - int(reached.sum()) + _EASIEST]
            active = going[easiest].sort().values
            if not len(active):
                break
    with torch.no_grad():
        triggers = [
            _FORMS[problem.form].trigger(k, latest[k : k + 1], float(latest_size[k])) for k in range(classes)
        ]
    return TriggerSearch(
        read,
        compared,
        sizes,
        tuple(triggers),
        latest_size,
        success_rate,
        anchored,
        budget * unit,
        draft.steps + step,
    )


# ---------------------------------------------------------------------------------------------------
# The two forms


@dataclass(frozen=True)
class _Form:
    unit: Callable[[tuple[int, int, int]], float]
    change: Callable[[Tensor, Tensor, float], Tensor]
    trigger: Callable[[int, Tensor, float], RecoveredTrigger]


def _patch(label: int, raw: Tensor, size: float) -> RecoveredTrigger:
    return RecoveredTrigger(label, raw[0, 1:].sigmoid().cpu(), mask_of_size(raw[:, 0], size)[0].cpu())


def _perturbation(raw: Tensor, size: float) -> Tensor:
    length = raw.flatten(1).norm(dim=1).clamp_min(1e-20)  # (G,)
    scaled: Tensor = raw * (size / length)[:, None, None, None]  # (G, C, H, W)
    return scaled


def _blended(x: Tensor, raw: Tensor, size: float) -> Tensor:
    return added(x, _perturbation(raw, size)[:, None])  # (G, B, C, H, W)


def _blend(label: int, raw: Tensor, size: float) -> RecoveredTrigger:
    return RecoveredTrigger(label, _perturbation(raw, size)[0].cpu(), None)


_FORMS: dict[Form, _Form] = {
    "patch": _Form(lambda shape: float(shape[1] * shape[2]), patched, _patch),
    "blend": _Form(lambda shape: math.sqrt(math.prod(shape)), _blended, _blend),
}


def _starts(model: Classifier, form: Form, starts: int, run: Run, restart: int) -> Tensor:
    """Return the first parameters (K * S, C or 1 + C, H, W), drawn for each class by itself."""
    channels, height, width = model.input_shape
    shape = (channels + (form == "patch"), height, width)
    draws = torch.stack(
        [
            torch.randn(starts, *shape, generator=run.generator("trigger starts", form, restart, k))
            for k in range(model.classes)
        ]
    )  # (K, S, ...)
    raw = 0.1 * draws
    if form == "patch":
        raw[:, :, 0] += bumps(starts, height, width)
    return raw.flatten(0, 1)


def bumps(count: int, height: int, width: int) -> Tensor:
    """Return first parameters of masks (S, H, W): Gaussian bumps on a square grid, and the rest level."""
    side = math.isqrt(count)
    out = torch.zeros(count, height, width)
    if side < 2:
        return out
    for i in range(side * side):
        top, left = ((i // side + 0.5) * height / side, (i % side + 0.5) * width / side)
        down, right = torch.arange(height) + 0.5 - top, torch.arange(width) + 0.5 - left
        # A bump is half as wide as its cell.
        spread = max(1.0, min(height, width) / side / 2)
        out[i] = -(down[:, None] ** 2 + right**2) / (2 * spread**2)
    return out


def _rows(model: Classifier, images: Images, run: Run, restart: int) -> Tensor:
    """Return for each class its images (K, P) in an order: equally many that are not there already."""
    if not len(images):
        raise InputError("there is no image to look for a trigger with", where=images.name)
    with mode(model, training=False):
        logits = predict(model, images, run)  # (N, K)
    if not bool(torch.isfinite(logits).all()):
        raise MethodFailed("the model gives clean images logits that are not finite")
    predicted = logits.argmax(1)  # (N,)
    order = torch.randperm(len(images), generator=run.generator("trigger images", restart))
    usable: Sequence[Tensor] = [order[predicted[order] != k] for k in range(model.classes)]
    count = min(len(rows) for rows in usable)
    if not count:
        k = min(range(model.classes), key=lambda k: len(usable[k]))
        raise MethodFailed(
            "the model sends all images to one class without any trigger, so that none can be found",
            where=f"label {k}",
            remedy="Add images of other classes",
        )
    return torch.stack([rows[:count] for rows in usable])
