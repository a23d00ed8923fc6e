"""Trigger inversion: the smallest change, one for all images, that sends them to a class.

A universal trigger is a mask m (H, W) and a pattern p (C, H, W), both in [0, 1] and in pixel space; an image
x becomes (1 - m) x + m p. Several classes are inverted in one batch: their losses are summed, and no gradient
of one reaches the trigger of another.

Paper:   Wang et al., "Neural Cleanse", S&P 2019, section IV; on unlearned networks: arXiv 2305.14876.
Departs: a class is sought with images of the other classes only, and of these only with those that the
         network does not send to it anyway. In a network that has unlearned its task most images go to one
         class without any trigger, and the smallest mask would be the empty one.
Cost:    steps x classes x (1 forward + 1 backward of a batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches, resident
from unbackdoor.engine.inference import frozen, logits_of, mode, predict
from unbackdoor.engine.repeated_unlearning import Exposure
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import Config, option
from unbackdoor.triggers import RecoveredTrigger, mixed
from unbackdoor.types import Classifier, CleanData, Images, require_fit, require_labels


class InversionConfig(Config):
    """Options of the inversion."""

    steps: int = option(300, "steps of the optimiser", source="this project", ge=1, le=100_000)
    lr: float = option(0.1, "step size of Adam", source="Neural Cleanse, public code", gt=0, le=10)
    batch_size: int = option(32, "images a step", source="Neural Cleanse, public code", ge=1)
    mask_weight: float = option(
        1e-3, "first weight of the mask's L1 norm", source="Neural Cleanse, public code", gt=0
    )
    factor: float = option(
        1.5, "factor that the weight is changed by", source="Neural Cleanse, public code", gt=1, le=100
    )
    patience: int = option(5, "checks in a row before it is", source="Neural Cleanse, public code", ge=1)
    wanted: float = option(
        0.99, "success on the fitting images that is kept up", source="Neural Cleanse", gt=0, le=1
    )
    check: int = option(10, "steps between two checks", source="this project", ge=1)


def invert(
    model: Classifier, images: Images, classes: Sequence[int], cfg: InversionConfig, run: Run
) -> list[tuple[RecoveredTrigger, Rate]]:
    """Return the smallest trigger found towards each class, and its success on the images that a step used.

    Of all checks at which the wanted success was reached, the one with the smallest mask counts; where it
    never was, the last one, so that the returned success must be checked.

    Args:
        model: The classifier, possibly unlearned; not changed.
        images: Labelled clean images to optimise on.
        classes: Labels, each once.
        cfg: See :class:`InversionConfig`.
        run: Seed, device, precision and progress.

    Raises:
        InputError: If a class is out of range or stands twice, or no image is of another class.
        MethodFailed: If the model sends all images to a class without any trigger, or a loss is not finite.
    """
    require_fit(model, images)
    labels = _checked(model, images, classes, run)  # (G,)
    channels, height, width = model.input_shape
    groups = len(labels)
    # Drawn for each class by itself: a class gets the same trigger alone and among others.
    shape = (channels + 1, height, width)
    starts = [torch.randn(shape, generator=run.generator("inversion start", k)) for k in classes]
    start = 0.1 * torch.stack(starts)  # (G, 1 + C, H, W)
    start[:, :1] -= 2.0  # after the sigmoid: faint masks, grey patterns
    raw = start.to(run.device).requires_grad_()  # (G, 1 + C, H, W): mask, pattern
    optimizer = torch.optim.Adam([raw], lr=cfg.lr, betas=(0.5, 0.9))
    weight = torch.full((groups,), cfg.mask_weight, device=run.device)
    judge = _Schedule(groups, cfg)
    hits, attempts = torch.zeros(groups), torch.zeros(groups)
    stream = _endless(images, cfg.batch_size, run)
    with frozen(model), mode(model, training=False):
        for step in run.progress(range(1, cfg.steps + 1), "inverting a trigger"):
            pixels, truth = next(stream)
            with torch.no_grad():
                untouched = logits_of(model, pixels, run).argmax(1)  # (B,)
            usable = (truth != labels[:, None]) & (untouched != labels[:, None])  # (G, B)
            mask, pattern = raw.sigmoid().split([1, channels], 1)  # (G, 1, H, W), (G, C, H, W)
            stamped = mixed(pixels, pattern[:, None], mask[:, None])  # (G, B, C, H, W)
            logits = logits_of(model, stamped.flatten(0, 1), run).unflatten(0, (groups, -1))  # (G, B, K)
            targets = labels[:, None].expand(usable.shape)
            losses = F.cross_entropy(logits.movedim(2, 1), targets, reduction="none")  # (G, B)
            fit = (losses * usable).sum(1) / usable.sum(1).clamp_min(1)  # (G,)
            sizes = mask.flatten(1).sum(1)  # (G,)
            loss = (fit + weight * sizes).sum()
            if not bool(torch.isfinite(loss)):
                raise MethodFailed("the inversion gave a loss that is not finite", got=float(loss.detach()))
            hits += ((logits.argmax(2) == targets) & usable).sum(1).cpu()
            attempts += usable.sum(1).cpu()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if step % cfg.check == 0 or step == cfg.steps:
                # Before the step, so that the trigger that was measured is the one that is saved; and after
                # the backward pass, which needs the old weights.
                judge.update(raw.detach(), sizes.detach(), hits, attempts, weight)
                hits.zero_()
                attempts.zero_()
            optimizer.step()
    best = judge.best.sigmoid().cpu()
    out = []
    for g, k in enumerate(labels.tolist()):
        trigger = RecoveredTrigger(k, best[g, 1:].clone(), best[g, 0].clone())
        out.append((trigger, success(model, trigger, images, run)))
    return out


def success(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> Rate:
    """Return how many images of other classes, not sent to the class untouched, the trigger sends there."""
    others = images.subset((images.truth.cpu() != trigger.label).nonzero().flatten())
    if not len(others):
        return Rate(0, 0)
    with mode(model, training=False):
        before = predict(model, others, run).argmax(1)
        after = predict(model, others, run, transform=trigger.apply_bytes).argmax(1)
    movable = before != trigger.label
    return Rate(int(((after == trigger.label) & movable).sum()), int(movable.sum()))


@dataclass(frozen=True)
class ExposedTrigger:
    """A trigger that was recovered on an unlearned network and tried on the model itself.

    Attributes:
        trigger: The trigger.
        fitted: Images that a step could be taken on and that it sends to the class, in the unlearned network.
        success: Held-out images of other classes that it sends to the class, in the model itself.
        share_before: Share of the images of other classes that the unlearned network sent there untouched.
        held_out: False where there were too few images to hold any out.
    """

    trigger: RecoveredTrigger
    fitted: Rate
    success: Rate
    share_before: float
    held_out: bool

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record without the tensors."""
        return {
            "class": self.trigger.label,
            **self.trigger.norms(),
            "fitted": {"hits": self.fitted.hits, "total": self.fitted.total},
            "success": {"hits": self.success.hits, "total": self.success.total},
            "share_before": self.share_before,
            "held_out": self.held_out,
        }


def invert_exposed(
    model: Classifier, data: CleanData, exposure: Exposure, label: int, cfg: InversionConfig, run: Run
) -> ExposedTrigger:
    """Recover a trigger towards a class on a half-unlearned network, and try it on the model itself.

    Of the unlearned networks the one is taken that sends the fewest images to the class by itself, because
    there the trigger has most to do. A small mask on an unlearned network alone proves nothing.

    Args:
        model: The suspicious classifier; not changed.
        data: The trigger is fitted to its fitting part and tried on its selection part.
        exposure: Unlearned networks.
        label: The class, such as the one they vote for.
        cfg: See :class:`InversionConfig`.
        run: Seed, device, precision and progress.

    Raises:
        InputError: If the class is out of range.
        MethodFailed: If every unlearned network sends all images to the class untouched.
    """
    require_labels(data, "trigger recovery")
    if not 0 <= label < model.classes:
        raise InputError("there is no such class", expected=f"0..{model.classes - 1}", got=label)
    others = data.fit.subset((data.fit.truth.cpu() != label).nonzero().flatten())
    if not len(others):
        raise InputError("no image is of another class", where=f"{data.fit.name}, label {label}")

    def share(network: Classifier) -> float:
        with mode(network, training=False):
            return float((predict(network, others, run).argmax(1) == label).float().mean())

    shares = [share(network) for network in exposure.half_unlearned()]
    chosen = min(range(len(shares)), key=lambda i: shares[i])
    ((trigger, fitted),) = invert(exposure.half_unlearned()[chosen], data.fit, [label], cfg, run)
    tried = success(model, trigger, data.select, run)
    trigger = replace(trigger, success=tried.value if tried.total else None)
    return ExposedTrigger(trigger, fitted, tried, shares[chosen], not data.select_is_fit)


class _Schedule:
    """Keeps the best trigger of each class and adapts the weight of its mask, as Neural Cleanse does."""

    def __init__(self, groups: int, cfg: InversionConfig) -> None:
        self.cfg = cfg
        self.best = torch.zeros(0)
        self.smallest = torch.full((groups,), torch.inf)
        self.up, self.down = torch.zeros(groups), torch.zeros(groups)

    def update(self, raw: Tensor, sizes: Tensor, hits: Tensor, attempts: Tensor, weight: Tensor) -> None:
        if not len(self.best):
            self.best = raw.clone()
        good = (hits >= self.cfg.wanted * attempts) & (attempts > 0)  # (G,)
        sizes = sizes.cpu()
        # Without success so far the latest attempt stands in for the best.
        take = (good & (sizes < self.smallest)) | ~torch.isfinite(self.smallest)
        self.best[take.to(raw.device)] = raw[take.to(raw.device)]
        self.smallest = torch.where(good & (sizes < self.smallest), sizes, self.smallest)
        self.up = torch.where(good, self.up + 1, 0.0)
        self.down = torch.where(good, 0.0, self.down + 1)
        raise_, lower = self.up >= self.cfg.patience, self.down >= self.cfg.patience
        weight[raise_.to(weight.device)] *= self.cfg.factor
        weight[lower.to(weight.device)] /= self.cfg.factor**1.5  # as there: faster down than up
        self.up[raise_] = 0.0
        self.down[lower] = 0.0


def _checked(model: Classifier, images: Images, classes: Sequence[int], run: Run) -> Tensor:
    if not classes or len(set(classes)) < len(classes) or not all(0 <= k < model.classes for k in classes):
        raise InputError(
            "the classes to invert do not fit",
            expected=f"labels in 0..{model.classes - 1}, each once",
            got=list(classes),
        )
    with mode(model, training=False):
        untouched = predict(model, images, run).argmax(1)
    truth = images.truth.cpu()
    for k in classes:
        if not bool((truth != k).any()):
            raise InputError("no image is of another class", where=f"{images.name}, label {k}")
        if not bool(((truth != k) & (untouched != k)).any()):
            raise MethodFailed(
                "the model sends all images to the class without any trigger, so that none can be found",
                where=f"label {k}",
                remedy="Unlearn less deeply",
            )
    return torch.tensor(list(classes), device=run.device)


def _endless(images: Images, batch_size: int, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    images, epoch = resident(images, run.device), 0
    while True:
        for pixels, labels in batches(
            images, batch_size, generator=run.generator("inversion epoch", epoch), device=run.device
        ):
            assert labels is not None  # the caller has asked for them
            yield pixels, labels
        epoch += 1
