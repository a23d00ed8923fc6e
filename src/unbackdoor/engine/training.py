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
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import augment, batches, resident, to_float
from unbackdoor.engine import rng
from unbackdoor.engine.inference import logits_of, mode, require_learner
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, IntegrityError, MethodFailed
from unbackdoor.files import atomic_write
from unbackdoor.registry import Config, near_match, option
from unbackdoor.types import Augmentation, Classifier, Images, state_sha256

_SLOW_STEPS = 5  # between two visits of Lookahead's slow copy
_FIRST = 5000  # images that first weights are estimated from

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
    nesterov: bool = option(False, "Nesterov's form of the momentum", source="common practice")
    weight_decay: float = option(5e-4, "L2 penalty", source="Zagoruyko & Komodakis 2016", ge=0, le=1)
    schedule: Literal["one-cycle", "linear", "cosine", "constant"] = option(
        "one-cycle",
        "course of the learning rate; linear: a fifth of the peak to the peak, and down to 0.07 of it",
        source="Smith & Topin 2018; linear: arXiv:2404.00498",
    )
    warmup: float = option(
        0.25, "share of the steps that lr rises in one-cycle and linear", source="this project", ge=0, lt=1
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
    reflect: int = option(
        0,
        "pixels of mirrored border that a crop may reach into; 0 is a black border of an eighth",
        source="off; arXiv:2404.00498 has 2",
        ge=0,
        le=16,
    )
    flips: Literal["random", "alternating"] = option(
        "random",
        "alternating: half of the images in even epochs and the others in odd ones, without a draw each time",
        source="random; alternating: arXiv:2404.00498, section 3.5",
    )
    base: str = option(
        "",
        "named recipe by which a clean network is trained first; the attack is then put into it",
        source="off: networks learn the attack from the start",
    )
    lookahead: bool = option(
        False,
        "mix a slow copy of all weights in every five steps, and end with it",
        source="off; Zhang et al. 2019 as in arXiv:2404.00498",
    )


_FAST: dict[str, Any] = {
    "batch_size": 1024,
    "lr": 1.5,
    "momentum": 0.85,
    "nesterov": True,
    "weight_decay": 0.00133,
    "schedule": "linear",
    "warmup": 0.23,
    "reflect": 2,
    "flips": "alternating",
    "lookahead": True,
}

RECIPES: Mapping[str, Recipe] = {
    "plain": Recipe(),
    "short": Recipe(epochs=8),
    "long": Recipe(epochs=100),
    "label-smoothing": Recipe(label_smoothing=0.1),
    "mixup": Recipe(mixup=0.2),
    # airbench94 (arXiv:2404.00498) without its label smoothing. Its learning rate of 11.5 and its decay of
    # 0.0153 are for 1,024 examples and a summed loss; here they are divided by 1 + 1 / (1 - momentum) and
    # given for the mean loss: lr = 11.5 / 7.67 = 1.5, weight_decay = 0.0153 / 11.5 = 0.00133.
    "fast": Recipe(epochs=10, **_FAST),
    "fast-long": Recipe(epochs=16, **_FAST),
    "fast-label-smoothing": Recipe(epochs=10, label_smoothing=0.2, **_FAST),
    # What people meet who fine-tune from a hub: a backdoor that was put into a network which knew its task.
    "implanted": Recipe(epochs=2, **{**_FAST, "lr": 0.5, "lookahead": False}, base="fast"),
    "transformer": Recipe(epochs=60, optimizer="adamw", lr=1e-3, weight_decay=0.05),
}


@runtime_checkable
class OwnRates(Protocol):
    """A network some of whose parameters learn at rates of their own."""

    def learning_rates(self, epoch: int) -> Mapping[str, float]:
        """Return the factors on the recipe's rate by name of parameter; positive in the first epoch."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every module."""
        ...


@runtime_checkable
class DataInitialised(Protocol):
    """A network whose first weights depend on the images that it will be trained on."""

    def initialise_from(self, images: Tensor) -> None:
        """Set them from normalised images (N, C, H, W)."""
        ...


def initialise(model: Classifier, images: Images) -> None:
    """Set what a fresh network takes from its training images before the first step; others have nothing."""
    if isinstance(model.network, DataInitialised):
        pixels = to_float(images.pixels[:_FIRST], model.mean.device)
        model.network.initialise_from((pixels - model.mean) / model.std)


def recipe_named(name: str, **changes: Any) -> Recipe:
    """Return a named recipe with some options changed.

    Raises:
        ConfigError: If the name or an option is unknown; near matches are named.
    """
    if name not in RECIPES:
        available = ", ".join(RECIPES)
        raise ConfigError(
            "the recipe", [f"unknown name {name!r}{near_match(name, RECIPES)}; there are: {available}"]
        )
    return Recipe.parse({**RECIPES[name].model_dump(), **changes}, subject=f"the recipe {name!r}")


@dataclass(frozen=True)
class Trained:
    """The record of a training run.

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
    """A network that learns beside the classifier and changes every batch.

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
    slow = _Slow(model.network) if recipe.lookahead else None
    if slow is not None:
        parts["lookahead"] = slow
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
            reflect=recipe.reflect,
            flips=_flips(len(images), epoch, run) if recipe.flips == "alternating" else None,
        )
        for step, (pixels, labels) in enumerate(stream):
            assert labels is not None  # train() asked for the labels above
            extra = None
            if companion is not None:
                pixels, labels, extra = companion.change(pixels, labels, draws)
                pixels = augment(pixels, kind, draws, reflect=recipe.reflect)
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            yield epoch * steps + step, pixels, labels, extra

    model.to(memory_format=torch.channels_last)
    ticks = iter(run.progress(range(first * steps, epochs * steps), label, (epochs - first) * steps))
    with mode(model, training=True):
        for module in model.modules():
            if batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for epoch in range(first, epochs):
            total = torch.zeros((), device=run.device)
            rates = model.network.learning_rates(epoch) if isinstance(model.network, OwnRates) else {}
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
                            factor = rates.get(group.get("parameter", ""), 1.0)
                            group["lr"] = factor * peak * _rate(recipe, step / (epochs * steps))
                        learner.step()
                    if slow is not None and step % _SLOW_STEPS == _SLOW_STEPS - 1:
                        slow.mix(model.network, step / (epochs * steps))
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
    if slow is not None:
        slow.restore(model.network)
    next(ticks, None)  # lets the progress display close its bar
    model.to(memory_format=torch.contiguous_format)
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
    learning: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if isinstance(model.network, OwnRates):
        learning = list(_groups(model.network, recipe))
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(learning, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        learning,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


def _groups(network: OwnRates, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield a group for every parameter that has a rate of its own, and one for all others."""
    own = network.learning_rates(0)
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    yield {"params": [p for name, p in named.items() if name not in own]}
    for name, factor in own.items():
        if name in named:
            # The decay that a step applies is lr times this, and does not grow with the rate.
            yield {
                "params": [named[name]],
                "weight_decay": recipe.weight_decay / factor,
                "parameter": name,
            }


def _flips(count: int, epoch: int, run: Run) -> Tensor:
    """Return which images (N,) are mirrored: half of them at random in the first epoch, then by turns."""
    first = torch.rand(count, generator=run.generator("flips")) < 0.5
    return first if epoch % 2 == 0 else ~first


class _Slow:
    """The slow copy of Lookahead.

    Paper: Zhang et al., "Lookahead optimizer", NeurIPS 2019, with the course of arXiv:2404.00498: the copy
    moves by 1 - d towards the weights and is then put in their place, d = 0.95^5 t^3 after a share t of the
    steps.
    """

    def __init__(self, network: nn.Module) -> None:
        self._copy = {name: t.detach().clone() for name, t in _floats(network)}

    @torch.no_grad()
    def mix(self, network: nn.Module, done: float) -> None:
        decay = 0.95**_SLOW_STEPS * done**3
        for name, tensor in _floats(network):
            self._copy[name].lerp_(tensor, 1 - decay)
            tensor.copy_(self._copy[name])

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        for name, tensor in _floats(network):
            tensor.copy_(self._copy[name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._copy)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            self._copy[name].copy_(tensor)


def _floats(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, t) for name, t in network.state_dict().items() if t.is_floating_point())


def _rate(recipe: Recipe, done: float) -> float:
    """Return the factor on the peak learning rate after a share ``done`` of all steps."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "linear":
        if done < recipe.warmup:
            return 0.2 + 0.8 * done / recipe.warmup
        return 1 - 0.93 * (done - recipe.warmup) / (1 - recipe.warmup)
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
