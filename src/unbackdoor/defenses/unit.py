"""UNIT: bound every channel as tightly as clean images allow, which leaves a backdoor's activations no room.

Upper bounds on what the channels give begin well above what clean images need and are lowered together, as
long as held-out accuracy bears it. A trigger works by activations beyond them.

Paper:   Cheng et al., "UNIT: Backdoor mitigation via automated neural distribution tightening", ECCV 2024,
         arXiv 2407.11372.
Needs:   clean images and labels.          Changes: all weights; stored batch statistics stay.
Departs: the paper puts the bounds into the network. No weight stands for a bound, and a repaired network
         here is an ordinary one of the same form, so that the weights are taught to answer as the bounded
         network does: on clean images, and on the same ones pushed towards other classes, where the two
         differ. What is bounded is the output of batch norms, else of convolutions and linear layers but the
         head; before an activation that rises, that bounds the activation. There is one bound for a channel,
         not one for each of its places, and not all images are in one batch. The bounds that are kept are
         those whose accuracy was measured, not those of the step before. Where none bears the tolerance,
         nothing is changed. A learning rate that destroys the network is lowered tenfold
         (engine/descent.py).
Cost:    steps x (1 forward + 1 backward, and the held-out images forward), then
         epochs x (attack steps + 3) x (1 forward + 1 backward) over the clean set.
Blind:   triggers whose activations are no larger than those of clean images, and what the teaching does not
         carry over: on how many pushed images network and bounded network differ is in the evidence. Of small
         networks, bounds tight enough to stop a patch cost some accuracy too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import batches
from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.inference import accuracy, frozen, logits_of, mode, predict, settle_layout
from unbackdoor.engine.masks import Site
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified

Bounds = dict[str, Tensor]  # (O,) by site

BETAS = (0.5, 0.9)  # of Adam, as in the reference code
UP, DOWN = 2.0, 2.0**1.5  # factors on the cost of the bounds, likewise
HIGHEST = 1e12  # of that cost: the bounds alone count long before, and Adam squares its gradients


class UNITConfig(Config):
    """Options of UNIT."""

    deviations: float = option(
        4.0,
        "standard deviations above its mean activation at which a channel's bound begins",
        source="reference code",
        gt=0,
        le=1000,
    )
    steps: int = option(300, "steps that lower the bounds", source="reference code", ge=1, le=100_000)
    lr: float = option(1e-3, "learning rate of Adam on the bounds", source="reference code", gt=0, le=10)
    cost: float = option(
        1e-3,
        "weight of the mean bounds in the loss, to begin with",
        source="reference code",
        gt=0,
        le=1e6,
    )
    patience: int = option(
        5, "steps of one kind after which that weight is doubled or lowered", source="reference code", ge=1
    )
    tolerance: float = option(
        0.03, "largest loss of held-out accuracy by the bounds", source="reference code", ge=0, le=1
    )
    batch_size: int = option(128, "images a step", source="this project", ge=2)
    epochs: int = option(
        20, "passes that teach the weights what the bounds do", source="this project", ge=1, le=10_000
    )
    train_lr: float = option(0.01, "first step of their cosine schedule", source="this project", gt=0, le=1)
    radius: float = option(
        3.0,
        "L2 norm of the pushes, in pixels of 0..1; of a 32 x 32 colour image, others in proportion",
        source="as npd",
        gt=0,
        le=100,
    )
    attack_steps: int = option(5, "steps of a push", source="this project", ge=1, le=100)


@defense(
    "unit",
    config=UNITConfig,
    paper="arXiv:2407.11372",
    needs={"images", "labels"},
    quick={"steps": 12, "lr": 0.02, "batch_size": 32, "epochs": 2, "attack_steps": 2},
)
def purify(model: Classifier, data: CleanData, cfg: UNITConfig, *, run: Run) -> Purified:
    """Lower the bounds as far as held-out images allow, and teach the weights to keep them."""
    sites = prunable_sites(model)
    settle_layout(model, run)
    tightening = tightened(model, sites, data, cfg, run)
    evidence: dict[str, Any] = {"bounded": sum(site.shape[0] for site in sites), **tightening.evidence()}
    if tightening.bounds is None:
        remark = "No bounds held the accuracy on the held-out images; nothing was changed."
        return Purified(model, {**evidence, "remarks": [remark]})
    teacher = model.copy()
    radius = cfg.radius * (torch.Size(model.input_shape).numel() / (3 * 32 * 32)) ** 0.5
    with bounded(teacher, tightening.bounds), frozen(teacher):
        out, record = taught(model, teacher, data, radius, cfg, run)
        before, after = (differing(one, teacher, data.select, radius, cfg, run) for one in (model, out))
    return Purified(out, {**evidence, **record, "differing_before": before, "differing_after": after})


@contextmanager
def bounded(model: nn.Module, bounds: Mapping[str, Tensor]) -> Iterator[None]:
    """Bound the outputs of modules from above, channel by channel, inside the block; below 0 counts as 0."""

    def limit(bound: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def apply(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            highest = bound.clamp_min(0).to(out.dtype)
            if not channels_last(module, out):
                highest = highest.view(-1, *[1] * (out.dim() - 2))  # (O,) -> (O, 1, ...)
            return torch.minimum(out, highest)

        return apply

    handles = [model.get_submodule(name).register_forward_hook(limit(b)) for name, b in bounds.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channels_last(module: nn.Module, out: Tensor) -> bool:
    """Tell whether the channels of a module's output are last, as those of a linear layer, or second."""
    return isinstance(module, nn.Linear) or out.dim() == 2


def first_bounds(
    model: Classifier, sites: Sequence[Site], images: Images, cfg: UNITConfig, run: Run
) -> Bounds:
    """Return mean + ``deviations`` standard deviations of each channel's positive part, over all places."""
    sums = {site.name: torch.zeros(3, *site.shape, dtype=torch.float64) for site in sites}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            flat = out.detach().double().clamp_min(0).movedim(-1 if channels_last(module, out) else 1, 0)
            flat = flat.flatten(1)  # (O, B * places)
            moments = [torch.full_like(flat[:, 0], flat.shape[1]), flat.sum(1), flat.square().sum(1)]
            sums[name] += torch.stack(moments).cpu()

        return hook

    handles = [model.get_submodule(site.name).register_forward_hook(add(site.name)) for site in sites]
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        for handle in handles:
            handle.remove()
    bounds = {}
    for name, (count, total, squares) in sums.items():
        # A layer that is not called, such as an auxiliary head, has no activation.
        mean = total / count.clamp_min(1)
        spread = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        bounds[name] = (mean + cfg.deviations * spread).float().to(run.device)
    return bounds


@dataclass(frozen=True)
class Tightening:
    """The tightest bounds that held.

    Attributes:
        bounds: By site; None where none held.
        base: Accuracy on the held-out images without bounds, in 0..1.
        held_out: Accuracy with the bounds; without, where none held.
        first: Sum over the sites of the mean bound to begin with.
        size: The same of the bounds that held.
        step: Step after which they held, 0 before any.
        cost: Weight of the bounds at the end.
    """

    bounds: Bounds | None
    base: float
    held_out: float
    first: float
    size: float
    step: int
    cost: float

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record."""
        sizes = {"first_bounds": self.first, "bounds": self.size, "step": self.step, "cost": self.cost}
        return {"base_accuracy": self.base, "held_out": self.held_out, **sizes}


class Cost:
    """The weight of the bounds: doubled while accuracy holds, lowered faster while it does not."""

    def __init__(self, first: float, patience: int) -> None:
        self.first, self.patience, self.value = first, patience, first
        self.again = self.up = self.down = 0

    def update(self, held: bool) -> None:
        """Count a step after which the accuracy held, or did not."""
        self.again = self.again + 1 if held and self.value < self.first else 0
        if self.again >= self.patience:
            self.value, self.up, self.down = self.first, 0, 0
        self.up, self.down = (self.up + 1, 0) if held else (0, self.down + 1)
        if self.up >= self.patience:
            self.value, self.up = min(self.value * UP, HIGHEST), 0
        if self.down >= self.patience:
            self.value, self.down = self.value / DOWN, 0


def tightened(
    model: Classifier, sites: Sequence[Site], data: CleanData, cfg: UNITConfig, run: Run
) -> Tightening:
    """Lower the bounds on the fitting images and keep the tightest that the held-out ones allow."""
    base = accuracy(model, data.select, run)
    lowest = base - cfg.tolerance - 1e-6  # the last term is for rounding
    bounds = first_bounds(model, sites, data.fit, cfg, run)
    for bound in bounds.values():
        bound.requires_grad_()
    optimizer = torch.optim.Adam(bounds.values(), lr=cfg.lr, betas=BETAS)
    cost, stream = Cost(cfg.cost, cfg.patience), _endless(data, cfg, run)
    first = float(_size(bounds).detach())
    best: tuple[Bounds | None, float, float, int] = (None, base, first, 0)
    with frozen(model), mode(model, training=False), bounded(model, bounds):
        for step in run.progress(range(cfg.steps + 1), "tightening"):
            if step:
                pixels, labels = next(stream)
                loss = F.cross_entropy(logits_of(model, pixels, run), labels) + cost.value * _size(bounds)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            held_out, size = accuracy(model, data.select, run), float(_size(bounds).detach())
            held = held_out >= lowest
            if held and (best[0] is None or size < best[2]):
                kept = {name: bound.detach().clamp_min(0).clone() for name, bound in bounds.items()}
                best = kept, held_out, size, step
            if step:
                cost.update(held)
    return Tightening(best[0], base, best[1], first, best[2], best[3], cost.value)


def _size(bounds: Bounds) -> Tensor:
    return torch.stack([bound.clamp_min(0).mean() for bound in bounds.values()]).sum()


def _endless(data: CleanData, cfg: UNITConfig, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        draws = run.generator("tightening", epoch)
        for pixels, labels in batches(
            data.fit, cfg.batch_size, generator=draws, device=run.device, augmentation=data.augmentation
        ):
            assert labels is not None  # registered as needing them
            yield pixels, labels
        epoch += 1


def taught(
    model: Classifier, teacher: Classifier, data: CleanData, radius: float, cfg: UNITConfig, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    """Return a copy that learned the teacher's answers on clean and on pushed images."""

    def tuned(lr: float) -> Classifier:
        out = model.copy()

        def loss(batch: Batch) -> Tensor:
            targets = other_classes(batch.labels, model.classes, run.generator("targets", batch.step))
            moved = pushed(out, batch.pixels, targets, radius, cfg.attack_steps, run)
            pixels = torch.cat([batch.pixels, moved])  # (2 B, C, H, W)
            with torch.no_grad():
                wanted = logits_of(teacher, pixels, run).log_softmax(1)
            answers = logits_of(out, pixels, run).log_softmax(1)
            return F.kl_div(answers, wanted, log_target=True, reduction="batchmean")

        recipe = Recipe(
            epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, schedule="cosine", weight_decay=0
        )
        descend(
            *(out, data.all, recipe, loss, run),
            augmentation=data.augmentation,
            label="teaching the bounds",
            batch_norm="frozen",
        )
        return out

    return at_bearable_rate(model, data.all, cfg.train_lr, tuned, run)


def other_classes(labels: Tensor, classes: int, draws: torch.Generator) -> Tensor:
    """Return for each label (B,) another class, drawn evenly."""
    steps = torch.randint(1, classes, labels.shape, generator=draws).to(labels.device)
    return (labels + steps) % classes


def pushed(model: Classifier, pixels: Tensor, targets: Tensor, radius: float, steps: int, run: Run) -> Tensor:
    """Return pixels (B, C, H, W) in [0, 1] moved towards classes (B,), at most by an L2 length."""
    delta = torch.zeros_like(pixels)
    with frozen(model):
        for _ in range(steps):
            delta.requires_grad_()
            loss = F.cross_entropy(logits_of(model, pixels + delta, run), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            delta = delta.detach() - 2 * radius / steps * gradient / length
            length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            delta = delta * (radius / length).clamp_max(1.0)
            delta = (pixels + delta).clamp(0, 1) - pixels
    return (pixels + delta).detach()


def differing(
    model: Classifier, teacher: Classifier, images: Images, radius: float, cfg: UNITConfig, run: Run
) -> float:
    """Return the share of images, pushed on a model, that it and the bounded network call differently."""
    unlike, draws = 0, run.generator("differing")
    with mode(model, training=False):
        for pixels, labels in batches(images, cfg.batch_size, device=run.device):
            assert labels is not None  # registered as needing them
            targets = other_classes(labels, model.classes, draws)
            moved = pushed(model, pixels, targets, radius, cfg.attack_steps, run)
            with torch.no_grad():
                answers = [logits_of(one, moved, run).argmax(1) for one in (model, teacher)]
            unlike += int((answers[0] != answers[1]).sum())
    return unlike / len(images)
