"""Gradient descent on a classifier's weights: the trainer of victims and the fine-tuning of defenses.

A recipe is a named, recorded part of a victim, because it decides what can be detected later. The default
is what the field uses: plain cross-entropy, SGD with momentum and weight decay 5e-4.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import augment, batches, resident
from unbackdoor.engine import rng
from unbackdoor.engine.inference import logits_of, mode, require_learner
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, IntegrityError, MethodFailed
from unbackdoor.files import atomic_write
from unbackdoor.registry import Config, near_match, option
from unbackdoor.types import Augmentation, Classifier, Images, state_sha256

Objective = Callable[[Tensor, Tensor, int], Tensor]  # logits (B, K), labels (B,), step -> scalar loss


class Recipe(Config):
    """How weights are trained."""

    epochs: int = option(15, "passes over the training images", source="this project", ge=1, le=10_000)
    batch_size: int = option(128, "images a step", source="common CIFAR-10 practice", ge=2, le=65_536)
    lr: float = option(0.1, "peak learning rate", source="He et al. 2016, section 4.2", gt=0, le=10)
    optimizer: Literal["sgd", "adamw"] = option(
        "sgd", "rule of the steps; adamw for transformers, with lr near 0.001", source="common practice"
    )
    momentum: float = option(0.9, "momentum of SGD", source="He et al. 2016", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty", source="Zagoruyko & Komodakis 2016", ge=0, le=1)
    schedule: Literal["one-cycle", "cosine", "constant"] = option(
        "one-cycle", "course of the learning rate", source="Smith & Topin 2018"
    )
    warmup: float = option(
        0.25, "share of the steps that lr rises in one-cycle", source="this project", ge=0, lt=1
    )
    label_smoothing: float = option(
        0.0, "mass moved off the true label", source="off: it hides margins", ge=0, lt=1
    )
    mixup: float = option(
        0.0, "alpha of the Beta distribution; 0 is off", source="Zhang et al. 2018", ge=0, le=10
    )
    augmentation: Literal["auto", "none", "crop", "crop+flip"] = option(
        "auto", "random changes of the training images; auto takes the data set's own", source="this project"
    )


RECIPES: Mapping[str, Recipe] = {
    "plain": Recipe(),
    "short": Recipe(epochs=8),
    "long": Recipe(epochs=100),
    "label-smoothing": Recipe(label_smoothing=0.1),
    "mixup": Recipe(mixup=0.2),
    "transformer": Recipe(epochs=60, optimizer="adamw", lr=1e-3, weight_decay=0.05),
}


def recipe_named(name: str, **changes: Any) -> Recipe:
    """Return a named recipe with some options changed.

    Raises:
        ConfigError: If the name or an option is unknown; near matches are given.
    """
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ConfigError(
            "the recipe", [f"unknown name {name!r}{near_match(name, RECIPES)}; there are: {known}"]
        )
    return Recipe.parse({**RECIPES[name].model_dump(), **changes}, subject=f"the recipe {name!r}")


@dataclass(frozen=True)
class Trained:
    """What a training run has to tell.

    Attributes:
        losses: Mean training loss of each epoch.
        images_seen: Images that went forward and backward in this process.
        resumed_from: Epoch that was taken up from a checkpoint, 0 for a fresh start.
    """

    losses: tuple[float, ...]
    images_seen: int
    resumed_from: int = 0


@dataclass(frozen=True)
class Companion:
    """A network that learns beside the classifier and has a hand in every batch.

    Attributes:
        network: On the run's device, in the mode in which it is to learn.
        optimizer: Of the network. Its learning rate is the peak of the recipe's schedule.
        change: Pixels (B, C, H, W) in [0, 1] and labels before augmentation, and the generator of the epoch's
            draws -> the pixels and the labels to train on, and a term that is added to the loss.
        facts: JSON-ready; all else that ``change`` depends on, so that no checkpoint of another one is used.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    change: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    facts: Mapping[str, Any] = field(default_factory=dict)


def train(
    model: Classifier,
    images: Images,
    recipe: Recipe,
    run: Run,
    *,
    augmentation: Augmentation = "none",
    checkpoint: Path | None = None,
    label: str = "training",
    companion: Companion | None = None,
    objective: Objective | None = None,
    batch_norm: Literal["batch", "frozen"] = "batch",
) -> Trained:
    """Train all weights of a classifier in place; it is left in evaluation mode.

    A run that was killed and is started again with the same arguments continues at the last whole epoch and
    ends with the same weights, because every epoch draws from its own seed.

    Args:
        model: On the run's device.
        images: Labelled training images.
        recipe: See :class:`Recipe`.
        run: Seed, device, precision and progress.
        augmentation: What ``auto`` in the recipe stands for.
        checkpoint: File written after every epoch and removed at the end.
        label: Name in the progress display.
        companion: See :class:`Companion`.
        objective: What is minimised instead of the recipe's cross-entropy; takes no checkpoint and no mixup,
            because a function has no fingerprint.
        batch_norm: Whether the batch's statistics normalise, and move the stored ones, or the stored ones do.

    Raises:
        UnsupportedModel: If the network has no weights.
        MethodFailed: If the loss stops being finite.
        IntegrityError: If the checkpoint belongs to another training run.
    """
    images.truth  # noqa: B018  raises where there are no labels
    require_learner(model)
    assert objective is None or (checkpoint is None and not recipe.mixup)
    images = resident(images, run.device)
    epochs, steps = recipe.epochs, _steps(len(images), recipe.batch_size)
    kind = augmentation if recipe.augmentation == "auto" else recipe.augmentation
    optimizer = _optimizer(model, recipe)
    learners = [(optimizer, recipe.lr)]
    parts: dict[str, Any] = {"model": model.network, "optimizer": optimizer}
    if companion is not None:
        learners.append((companion.optimizer, float(companion.optimizer.defaults["lr"])))
        parts |= {"companion": companion.network, "companion optimizer": companion.optimizer}
    key = _key(recipe, images, model, run, kind, companion, batch_norm) if checkpoint else ""
    losses = _resume(checkpoint, key, parts) if checkpoint else []
    first = len(losses)

    def one_pass(epoch: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        draws = run.generator("epoch", epoch)
        stream = batches(
            images,
            recipe.batch_size,
            generator=draws,
            device=run.device,
            augmentation=kind if companion is None else "none",
            min_batch=2,
        )
        for step, (pixels, labels) in enumerate(stream):
            assert labels is not None  # train() asked for the labels above
            extra = None
            if companion is not None:
                pixels, labels, extra = companion.change(pixels, labels, draws)
                pixels = augment(pixels, kind, draws).contiguous(memory_format=torch.channels_last)
            yield epoch * steps + step, pixels, labels, extra

    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ticks = iter(run.progress(range(first * steps, epochs * steps), label, (epochs - first) * steps))
    with mode(model, training=True):
        for module in model.modules():
            if batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for epoch in range(first, epochs):
            total = torch.zeros((), device=run.device)
            with rng.seeded(run.seed, "dropout", epoch):
                for step, pixels, labels, extra in one_pass(epoch):
                    next(ticks, None)
                    if objective is None:
                        loss = _loss(model, pixels, labels, recipe, run, step)
                    else:
                        loss = objective(logits_of(model, pixels, run), labels, step)
                    if extra is not None:
                        loss = loss + extra
                    for learner, _ in learners:
                        learner.zero_grad(set_to_none=True)
                    loss.backward()
                    for learner, peak in learners:
                        for group in learner.param_groups:
                            group["lr"] = peak * _rate(recipe, step / (epochs * steps))
                        learner.step()
                    total += loss.detach()
            losses.append(float(total) / steps)
            if not math.isfinite(losses[-1]):
                raise MethodFailed(
                    "training diverged",
                    expected="a finite loss",
                    got=losses[-1],
                    where=f"epoch {epoch + 1}",
                    remedy="Lower the learning rate",
                )
            if checkpoint and epoch + 1 < epochs:
                _save(checkpoint, key, parts, losses)
    next(ticks, None)  # lets the progress display close its bar
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.zero_grad(set_to_none=True)
    model.eval()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return Trained(tuple(losses), (epochs - first) * len(images), first)


def _steps(count: int, batch_size: int) -> int:
    # A last batch of one image is dropped: batch normalisation has no variance to train on there.
    full, rest = divmod(count, batch_size)
    return full + (rest >= 2 or full == 0)


def _optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(learning, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(learning, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def _rate(recipe: Recipe, done: float) -> float:
    """Return the factor on the peak learning rate after a share ``done`` of all steps."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if done < recipe.warmup:
        return max(0.04, done / recipe.warmup)
    return max(0.001, (1 - done) / (1 - recipe.warmup))


def _loss(model: Classifier, pixels: Tensor, labels: Tensor, recipe: Recipe, run: Run, step: int) -> Tensor:
    if not recipe.mixup:
        return F.cross_entropy(logits_of(model, pixels, run), labels, label_smoothing=recipe.label_smoothing)
    draws = run.generator("mixup", step)
    pair = torch.randperm(len(pixels), generator=draws).to(pixels.device)
    # A Beta(a, a) draw as the ratio of two Gamma draws, which is the one that takes a generator.
    gammas = torch._standard_gamma(torch.full((2,), recipe.mixup), generator=draws)
    share = float(gammas[0] / gammas.sum().clamp_min(1e-12))
    out = logits_of(model, share * pixels + (1 - share) * pixels[pair], run)  # (B, K)
    smooth = recipe.label_smoothing
    one = F.cross_entropy(out, labels, label_smoothing=smooth)
    return share * one + (1 - share) * F.cross_entropy(out, labels[pair], label_smoothing=smooth)


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def _key(
    recipe: Recipe,
    images: Images,
    model: Classifier,
    run: Run,
    augmentation: str,
    companion: Companion | None,
    batch_norm: str,
) -> str:
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "data": images.fingerprint(),
        "start": model.sha256(),
        "seed": run.seed,
        "augmentation": augmentation,
        "precision": run.precision.name,
    }
    if companion is not None:
        facts["companion"] = [state_sha256(companion.network.state_dict()), dict(companion.facts)]
    if batch_norm != "batch":
        facts["batch_norm"] = batch_norm
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _save(path: Path, key: str, parts: Mapping[str, Any], losses: list[float]) -> None:
    """Write the state of everything that learns, by name."""
    state = {"key": key, "losses": losses} | {name: part.state_dict() for name, part in parts.items()}
    # Through memory: torch's own writer does not tell a full disk from any other failure.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _resume(path: Path, key: str, parts: Mapping[str, Any]) -> list[float]:
    if not path.exists():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("key") != key:
        raise IntegrityError(
            "the checkpoint belongs to another training run",
            where=path,
            remedy="Delete it, or start with the options it was made with",
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    losses: list[float] = state["losses"]
    return losses
