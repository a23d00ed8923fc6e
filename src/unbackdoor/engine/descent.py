"""Gradient descent on a loss of a method's own.

:func:`unbackdoor.engine.training.train` carries losses of logits and labels. Here the loss sees the batch
itself, and which images are in it; weights may be changed after every step, and gradients may be taken at
displaced weights. With plain cross-entropy the weights come out the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbackdoor.data.batches import augment, resident, to_float
from unbackdoor.engine import rng
from unbackdoor.engine.fine_tuning import LOWER, TOLERANCE, TRIES
from unbackdoor.engine.inference import accuracy, mode, require_learner
from unbackdoor.engine.run import Run

# Private there, because the version of every trained victim is a hash over that module.
from unbackdoor.engine.training import OwnRates, Recipe, _optimizer, _rate, _steps
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Augmentation, Classifier, Images

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Batch:
    """Images of one step.

    Attributes:
        pixels: (B, C, H, W) in [0, 1], augmented, on the run's device.
        labels: (B,).
        rows: (B,) positions of the images in their set.
        step: Number of the step, from 0.
        epoch: Number of the pass, from 0.
    """

    pixels: Tensor
    labels: Tensor
    rows: Tensor
    step: int
    epoch: int


BatchNorm = Literal["batch", "frozen"]
Loss = Callable[[Batch], Tensor]
Displace = Callable[[Sequence[nn.Parameter]], Sequence[Tensor]]


def descend(
    model: Classifier,
    images: Images,
    recipe: Recipe,
    loss: Loss,
    run: Run,
    *,
    augmentation: Augmentation = "none",
    label: str = "fine-tuning",
    batch_norm: BatchNorm = "batch",
    clip: float = math.inf,
    displace: Displace | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[float, ...]:
    """Train all weights of a classifier in place on a loss; it is left in evaluation mode.

    Args:
        model: On the run's device.
        images: Labelled.
        recipe: Epochs, batch size and the rule of the steps; what it says of a loss is not used.
        loss: Batch -> scalar; it calls the model, which is in training mode.
        run: Seed, device, precision and progress.
        augmentation: What is done to the images.
        label: Name in the progress display.
        batch_norm: Whether the batch's statistics normalise, and move the stored ones, or the stored ones do.
        clip: Largest norm of the gradient over all weights.
        displace: Parameters with their gradients -> a displacement of each. The step is taken from the
            weights as they were, with the gradient at the displaced ones, as in sharpness-aware
            minimisation; stored batch statistics do not move in that second pass.
        after_step: Called after every step.

    Returns:
        Mean loss of each epoch; with ``displace``, at the weights that were not displaced.

    Raises:
        UnsupportedModel: If the network has no weights.
        MethodFailed: If the loss stops being finite.
    """
    images.truth  # noqa: B018  raises where there are no labels
    require_learner(model)
    images = resident(images, run.device)
    steps = _steps(len(images), recipe.batch_size)
    optimizer = _optimizer(model, recipe)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    model.to(memory_format=torch.channels_last)
    ticks = iter(run.progress(range(steps * recipe.epochs), label, steps * recipe.epochs))
    with mode(model, training=True):
        for module in model.modules():
            if batch_norm == "frozen" and isinstance(module, BATCH_NORMS):
                module.eval()
        for epoch in range(recipe.epochs):
            total = torch.zeros((), device=run.device)
            rates = model.network.learning_rates(epoch) if isinstance(model.network, OwnRates) else {}
            with rng.seeded(run.seed, "dropout", epoch):
                for batch in _batches(images, recipe, augmentation, run, epoch, steps):
                    next(ticks, None)
                    optimizer.zero_grad(set_to_none=True)
                    value = loss(batch)
                    value.backward()
                    if displace is not None:
                        with _displaced(model, parameters, displace):
                            optimizer.zero_grad(set_to_none=True)
                            loss(batch).backward()
                    if math.isfinite(clip):
                        nn.utils.clip_grad_norm_(parameters, clip)
                    factor = _rate(recipe, batch.step / (recipe.epochs * steps))
                    for group in optimizer.param_groups:
                        group["lr"] = rates.get(group.get("parameter", ""), 1.0) * recipe.lr * factor
                    optimizer.step()
                    if after_step is not None:
                        after_step()
                    total += value.detach()
            losses.append(float(total) / steps)
            if not math.isfinite(losses[-1]):
                raise MethodFailed(
                    "training diverged",
                    expected="a finite loss",
                    got=losses[-1],
                    where=f"epoch {epoch + 1}",
                    remedy="Lower the learning rate",
                )
    next(ticks, None)  # lets the progress display close its bar
    model.to(memory_format=torch.contiguous_format)
    model.zero_grad(set_to_none=True)
    model.eval()
    return tuple(losses)


def _batches(
    images: Images, recipe: Recipe, augmentation: Augmentation, run: Run, epoch: int, steps: int
) -> Iterator[Batch]:
    """Yield one pass in the order, and with the changes, that the trainer draws."""
    draws = run.generator("epoch", epoch)
    order = torch.randperm(len(images), generator=draws).to(images.pixels.device)
    for step in range(steps):
        rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        pixels = augment(images.pixels[rows], augmentation, draws)
        yield Batch(to_float(pixels, run.device), images.truth[rows], rows, epoch * steps + step, epoch)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the stored statistics of batch normalisation inside the block; those of a batch normalise it."""
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, BATCH_NORMS)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


@contextmanager
def _displaced(model: Classifier, parameters: Sequence[nn.Parameter], displace: Displace) -> Iterator[None]:
    """Put the weights elsewhere inside the block, where batches move no stored statistics."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, shift in zip(parameters, displace(parameters), strict=True):
                parameter.add_(shift)
        with still_statistics(model):
            yield
    finally:
        with torch.no_grad():
            # Copied back and not subtracted again, which would round.
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def enough_passes(count: int, batch_size: int, epochs: int, min_steps: int) -> int:
    """Return the number of passes over so many images that makes some passes and some steps at the least."""
    return max(epochs, math.ceil(min_steps / _steps(count, batch_size)))


def at_bearable_rate(
    model: Classifier, images: Images, lr: float, tuned: Callable[[float], Classifier], run: Run
) -> tuple[Classifier, dict[str, Any]]:
    """Fine-tune, and start again at a tenth of the learning rate where that destroyed the network.

    Destroyed means as in :func:`unbackdoor.engine.fine_tuning.fine_tune`. Some methods cost more accuracy
    than that at any rate; the network of the rate that costs least is then returned.

    Args:
        model: The network before.
        images: Labelled, those that are trained on; no others decide.
        lr: Rate that is tried first.
        tuned: Learning rate -> a copy that was trained with it.
        run: Device and precision.

    Returns:
        The copy, and as evidence its rate and its accuracy on the images in 0..1.

    Raises:
        MethodFailed: If the loss stops being finite at every rate.
    """
    enough = accuracy(model, images, run) - TOLERANCE - 1e-6  # the last term is for rounding
    best: tuple[float, float, Classifier] | None = None  # accuracy, rate, network
    failure: MethodFailed | None = None
    for attempt in range(TRIES):
        rate = lr * LOWER**attempt
        try:
            out = tuned(rate)
        except MethodFailed as error:
            failure = error
            continue
        reached = accuracy(out, images, run)
        if best is None or reached > best[0]:
            best = reached, rate, out
        if reached >= enough:
            break
    if best is None:
        assert failure is not None
        raise failure
    return best[2], {"lr": best[1], "fitted_accuracy": best[0]}
