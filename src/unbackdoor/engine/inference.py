"""Forward passes over image sets, and the model states they run in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.types import Classifier, Images

Network = Callable[[Tensor], Tensor]
EVALUATION_BATCH = 500  # images; large enough to fill a processor
_MAX_IMAGES = 512  # images in one pass; a processor gains nothing from more
_MAX_NUMBERS = _MAX_IMAGES * 3 * 32 * 32  # numbers in them; a layer makes many times as many


def images_per_pass(input_shape: tuple[int, int, int]) -> int:
    """Return how many images (C, H, W) go through a network at once, so that memory stays bounded."""
    return max(1, min(_MAX_IMAGES, _MAX_NUMBERS // math.prod(input_shape)))


def require_learner(model: nn.Module) -> None:
    """Raise UnsupportedModel unless the model has a weight that can learn."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        network = getattr(model, "network", model)
        raise UnsupportedModel("the network has no weight that could learn", where=type(network).__name__)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module into training or evaluation mode inside the block, and back after it."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take ``requires_grad`` off all parameters inside the block.

    Where only masks or inputs learn, the backward pass then skips every weight gradient.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)


def logits_of(network: Network, pixels: Tensor, run: Run) -> Tensor:
    """Return fp32 logits (B, K) for pixels (B, C, H, W), computed in the run's precision."""
    with run.precision.autocast():
        out = network(pixels)
    return out.float()


@torch.no_grad()
def settle_layout(model: Classifier, run: Run) -> None:
    """Let a classifier notice which memory layout its network takes, before anybody hooks its layers.

    Where it fails on channels innermost, the first part of the network runs twice.
    """
    pixels = torch.zeros(2, *model.input_shape, dtype=torch.uint8)
    with mode(model, training=False), torch.random.fork_rng():
        logits_of(model, to_float(pixels, run.device), run)


@torch.inference_mode()
def predict(
    network: Network,
    images: Images,
    run: Run,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    label: str | None = None,
) -> Tensor:
    """Return fp32 logits (N, K) on the CPU, in the order of the images.

    Args:
        network: Takes pixels in [0, 1]; the caller has put it into the mode that is meant.
        images: The images.
        run: Device and precision.
        transform: Applied to each batch of uint8 pixels first, such as a trigger.
        label: Shows a progress bar under this name.
    """
    size = min(EVALUATION_BATCH, images_per_pass(images.shape))
    starts = range(0, len(images), size)
    out: list[Tensor] = []
    for start in starts if label is None else run.progress(starts, label):
        pixels = images.pixels[start : start + size]  # (B, C, H, W)
        pixels = pixels if transform is None else transform(pixels)
        out.append(logits_of(network, to_float(pixels, run.device), run).cpu())
    return torch.cat(out)  # (N, K)


def accuracy(model: nn.Module, images: Images, run: Run, network: Network | None = None) -> float:
    """Return the share of images classified as labelled, in evaluation mode.

    Args:
        model: Whose mode is set.
        images: Labelled images.
        run: Device and precision.
        network: What is called instead of ``model``, such as a masked form of it.
    """
    with mode(model, training=False):
        predicted = predict(network or model, images, run).argmax(1)
    return float((predicted == images.truth).float().mean())


def require_several_classes(logits: Tensor) -> Tensor:
    """Return the logits (N, K) as they are.

    Raises:
        MethodFailed: If every image is of one class to the model, so that whatever is learned from its
            predictions would hold for that class alone.
    """
    seen = logits.argmax(1).unique()
    # Logits that are not finite have no largest one; a later computation reports them.
    if len(seen) < 2 and bool(torch.isfinite(logits).all()):
        raise MethodFailed(
            "the model gives every clean image to one class",
            expected="images of 2 classes or more",
            got=f"class {int(seen[0])} for all {len(logits)}",
            remedy="Give clean images of several classes, and check normalisation and weights",
        )
    return logits


def correctly_classified(model: nn.Module, images: Images, run: Run) -> Images:
    """Return the images that the model classifies rightly.

    Raises:
        MethodFailed: If there is none.
    """
    right = labelled_by_model(model, images, run).truth.cpu() == images.truth.cpu()
    if not right.any():
        raise MethodFailed("the model knows none of the held-out images", where=images.name)
    return images.subset(right.nonzero().flatten())


def labelled_by_model(model: nn.Module, images: Images, run: Run) -> Images:
    """Return the images labelled as the model classifies them.

    Accuracy against these labels is agreement with the model. On few images it shows damage earlier
    than accuracy against the true labels, where wrong answers that become right hide some of it.
    """
    with mode(model, training=False):
        return replace(images, labels=predict(model, images, run).argmax(1))
