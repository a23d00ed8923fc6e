"""Learn the head of a network anew, and away from the old one, so that the features have to move.

A backdoor lives in features that the old head reads. A head that starts at random, keeps the size of the old
one and is pushed away from it cannot read them as before, and the clean images teach it all else again.

Paper:   Min et al., "Towards stable backdoor purification through feature shift tuning" (FST), NeurIPS 2023,
         arXiv 2310.01875; the distance in the place of the inner product: "Backdoor mitigation by
         distance-driven detoxification" (D3), ICCV 2025, arXiv 2411.09585.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine import rng
from unbackdoor.engine.descent import BATCH_NORMS, Batch, BatchNorm, descend, enough_passes
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import EVALUATION_BATCH, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Augmentation, Classifier, Images

HeadLayer = nn.Linear | nn.Conv2d
Term = Literal["inner-product", "distance"]
Initial = Literal["random", "opposite", "prototypes", "least-squares"]
Layers = Literal["last", "all"]
Bias = Literal["zero", "keep"]
_RIDGE = 0.1  # of the mean squared feature: what keeps least squares solvable with fewer images than features


@dataclass(frozen=True, kw_only=True)
class HeadRelearning:
    """How a head is learned anew. The defaults are those of FST, with a minimum of steps.

    Attributes:
        epochs: Passes over the images.
        min_steps: Steps at the least: with few images there are more passes.
        batch_size: Images a step.
        lr: Peak learning rate of SGD with a cosine schedule.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        clip: Largest norm of the gradient; infinite for none.
        strength: Factor on the term that pushes the head away from the old one.
        relative: Divide ``strength`` by the squared norm of the old head, so that it means the same in every
            network; it is then about 12 in FST's own.
        term: ``inner-product`` adds the sum of W * W0, ``distance`` takes off ||W - W0||.
        clean_weight: Factor on the mean cross-entropy.
        hinge: Cross-entropy of an image that counts as none; only what is above it is learned.
        layers: The last layer only, or all fully connected ones behind the features.
        initial: First weights, brought to the norm of the old ones: ``random`` (uniform), ``opposite`` (-W0),
            ``prototypes`` (mean features of the classes) or ``least-squares``. The latter two are for the
            last layer; others in front of it start at random.
        bias: Whether the biases of the layers start at zero or as they were.
        batch_norm: Whether the batch's statistics normalise, and move the stored ones, or the stored ones do.
        fresh_statistics: Estimate the stored statistics from the images anew when all is learned.
    """

    epochs: int = 15
    min_steps: int = 200
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float = math.inf
    strength: float = 0.2
    relative: bool = False
    term: Term = "inner-product"
    clean_weight: float = 1.0
    hinge: float = 0.0
    layers: Layers = "last"
    initial: Initial = "random"
    bias: Bias = "zero"
    batch_norm: BatchNorm = "batch"
    fresh_statistics: bool = False

    def recipe(self, count: int) -> Recipe:
        """Return the recipe for a number of images."""
        return Recipe(
            epochs=enough_passes(count, self.batch_size, self.epochs, self.min_steps),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
        )


def relearn_head(
    model: Classifier,
    images: Images,
    settings: HeadRelearning,
    run: Run,
    *,
    targets: Tensor | None = None,
    augmentation: Augmentation = "none",
    label: str = "relearning the head",
) -> Classifier:
    """Return a copy of a classifier whose head was learned anew, together with all other weights.

    After every step each layer of the head has the Frobenius norm that it had at first. That keeps the inner
    product bounded, and its pull comparable with the loss.

    Args:
        model: On the run's device; not changed.
        images: Labelled.
        settings: See :class:`HeadRelearning`.
        run: Seed, device, precision and progress.
        targets: (N, K) probabilities that are learned; None: the labels.
        augmentation: What is done to the images.
        label: Name in the progress display.

    Raises:
        UnsupportedModel: If the network has no head, or one that cannot learn.
        MethodFailed: If the loss stops being finite.
    """
    out = model.copy()
    layers = head_layers(out, settings.layers)
    wanted = F.one_hot(images.truth, out.classes).float() if targets is None else targets.float()
    wanted = wanted.to(run.device)  # (N, K)
    old = [layer.weight.detach().clone() for layer in layers]
    norms = [float(weight.norm()) for weight in old]
    restart(out, layers, images, wanted, settings, run)

    def loss(batch: Batch) -> Tensor:
        log_probabilities = F.log_softmax(logits_of(out, batch.pixels, run), dim=1)
        clean = -(wanted[batch.rows] * log_probabilities).sum(1)  # (B,)
        if settings.hinge:
            clean = (clean - settings.hinge).clamp_min(0)  # each image by itself, before the mean
        return settings.clean_weight * clean.mean() + sum(
            push(layer.weight, start, settings) for layer, start in zip(layers, old, strict=True)
        )

    descend(
        *(out, images, settings.recipe(len(images)), loss, run),
        augmentation=augmentation, label=label, batch_norm=settings.batch_norm, clip=settings.clip,
        after_step=lambda: project(layers, norms),
    )  # fmt: skip
    if settings.fresh_statistics:
        estimate_statistics(out, images, run)
    return out


def push(weight: Tensor, old: Tensor, settings: HeadRelearning) -> Tensor:
    """Return the term that is smaller the further a layer's weights are from the old ones."""
    strength = settings.strength
    if settings.relative:
        strength /= max(float(old.square().sum()), 1e-12)
    value: Tensor = (weight * old).sum() if settings.term == "inner-product" else -(weight - old).norm()
    return strength * value


@torch.no_grad()
def project(layers: Sequence[HeadLayer], norms: Sequence[float]) -> None:
    """Scale the weights of each layer, in place, to a Frobenius norm; zeros stay zeros."""
    for layer, norm in zip(layers, norms, strict=True):
        layer.weight.mul_(norm / max(float(layer.weight.norm()), 1e-12))


def head_layers(model: Classifier, which: Layers = "last") -> list[HeadLayer]:
    """Return the layers that count as the head, the one that makes the logits last.

    ``all`` takes the linear layers in front of it too, back to the first module of another kind that has
    weights. A network of nothing but linear layers has no features without them, and gets its last one.

    Raises:
        UnsupportedModel: If there is no head, or its weights cannot learn.
    """
    name = head_name(model)
    names = [name]
    if which == "all":
        before: list[str] = []
        for other, vectors in _weighted(model):
            if other == name:
                break
            before = [*before, other] if vectors else [""]  # the empty name stands for a layer of features
        if before[:1] == [""]:
            names = [*before[1:], name]
    layers = [cast("HeadLayer", model.get_submodule(name)) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if not isinstance(layer.weight, nn.Parameter) or not layer.weight.requires_grad:
            raise UnsupportedModel(
                "the weights of the head cannot learn",
                expected="a weight of its own that takes gradients",
                got=type(layer).__name__,
                where=name,
            )
    return layers


def _weighted(model: Classifier) -> list[tuple[str, bool]]:
    """Return the modules with weights of their own in call order, and whether they map vectors linearly."""
    calls: list[tuple[str, bool]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((name, isinstance(module, nn.Linear) and inputs[0].dim() == 2))

    handles = [
        module.register_forward_pre_hook(lambda m, inputs, name=name: note(name, m, inputs))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            model(torch.full((1, *model.input_shape), 0.5, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def restart(
    model: Classifier,
    layers: Sequence[HeadLayer],
    images: Images,
    targets: Tensor,
    settings: HeadRelearning,
    run: Run,
) -> None:
    """Give the layers their first weights, in place; their norms stay.

    Args:
        model: Whose last layers they are.
        layers: See :func:`head_layers`.
        images: What prototypes and least squares are made of.
        targets: (N, K) probabilities.
        settings: Says which weights and biases.
        run: Seed, device and precision.
    """
    for number, layer in enumerate(layers):
        weight, last = layer.weight, number == len(layers) - 1
        norm = float(weight.norm())
        if settings.initial == "opposite":
            first = -weight
        elif settings.initial == "random" or not last:
            draws = run.generator("head", number)
            first = torch.rand(weight.shape, generator=draws).to(weight) - 0.5
        else:
            features = _features(model, layer, images, run).to(weight)  # (N, D)
            features = features - features.mean(0)
            centred = targets.to(weight) - targets.to(weight).mean(0)  # (N, K)
            first = centred.T @ features  # (K, D) sums of the features of each class
            if settings.initial == "prototypes":
                first = first / targets.to(weight).sum(0).clamp_min(1e-6)[:, None]
            else:
                first = _least_squares(features, centred)
            first = first.view(weight.shape)
        weight.copy_(first)
        project([layer], [norm])
        if settings.bias == "zero" and layer.bias is not None:
            layer.bias.zero_()


def _least_squares(features: Tensor, targets: Tensor) -> Tensor:
    """Return W (K, D) that makes targets (N, K) of features (N, D), with a small penalty on its size."""
    # In the smaller of the two forms: X'(XX' + c)^-1 T = (X'X + c)^-1 X'T.
    count, width = features.shape
    x, t = features.double(), targets.double()
    ridge = _RIDGE * float(x.square().sum()) / min(count, width) + 1e-12
    if count < width:
        dual: Tensor = torch.linalg.solve(x @ x.T + ridge * torch.eye(count).to(x), t)  # (N, K)
        return (dual.T @ x).to(features)
    primal: Tensor = torch.linalg.solve(x.T @ x + ridge * torch.eye(width).to(x), x.T @ t)  # (D, K)
    return primal.T.to(features)


def _features(model: Classifier, layer: HeadLayer, images: Images, run: Run) -> Tensor:
    """Return the mean input (N, D) of a layer over all places or tokens."""
    parts: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x  # channels last, as tokens have them
        parts.append(x.reshape(len(x), -1, x.shape[-1]).mean(1))

    handle = layer.register_forward_pre_hook(note)
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        handle.remove()
    return torch.cat(parts)


@torch.no_grad()
def estimate_statistics(model: Classifier, images: Images, run: Run) -> None:
    """Replace the stored statistics of batch normalisation by those of the images, in place."""
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    try:
        with mode(model, training=False), rng.seeded(run.seed, "statistics"):
            for norm in norms:
                norm.train()
            # Parts of like size, because each counts alike in the mean.
            size = min(EVALUATION_BATCH, images_per_pass(images.shape))
            for pixels in images.pixels.tensor_split(math.ceil(len(images) / size)):
                logits_of(model, to_float(pixels, run.device), run)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
