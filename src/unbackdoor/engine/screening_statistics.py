"""What screeners share: latent features, p-values over clean images, and the result made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.engine.heads import find_affine_head
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import Config, option
from unbackdoor.types import Classifier, Images, Screening

_FEWEST = 20  # clean images of a class, below which their deviation is too uncertain to be a unit
_CONSISTENT = 1.4826  # makes the median absolute deviation estimate the deviation of a normal variable


class ScreenerConfig(Config):
    """Options that all screeners have."""

    alpha: float = option(
        0.01, "accepted share of clean images that are called suspicious", source="convention", gt=0, lt=1
    )


def classes_of(
    model: Classifier, images: Images, run: Run, transform: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the classes (N,) that the model gives, in evaluation mode.

    Raises:
        MethodFailed: If a logit is not finite, because the largest of such is nothing.
    """
    with mode(model, training=False):
        logits = predict(model, images, run, transform=transform)
    if not bool(torch.isfinite(logits).all()):
        raise MethodFailed("the model gives images logits that are not finite", where=images.name)
    return logits.argmax(1)


def features(model: Classifier, images: Images, run: Run) -> tuple[Tensor, Tensor]:
    """Return the inputs (N, D) of the head, averaged over places, and the logits (N, K).

    Raises:
        UnsupportedModel: If no layer acts on the logits linearly.
    """
    head = find_affine_head(model)
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        # A convolution has places behind the channels, a linear layer on tokens has them before.
        x = (
            x.flatten(2).mean(2)
            if isinstance(module, nn.Conv2d)
            else x.flatten(1, -2).mean(1)
            if x.dim() > 2
            else x
        )
        caught.append(x.cpu())

    handle = head.module.register_forward_pre_hook(catch)
    try:
        with mode(model, training=False):
            logits = predict(model, images, run)
    finally:
        handle.remove()
    return torch.cat(caught), logits


def conformal_p_values(scores: Tensor, clean_scores: Tensor) -> Tensor:
    """Return for each score (N,) the share of clean scores (M,) that are as large, itself counted.

    If an image is exchangeable with the clean ones, its p-value is at most a with probability at most a. None
    is below 1 / (M + 1).
    """
    above: Tensor = len(clean_scores) - torch.searchsorted(
        clean_scores.sort().values, scores.contiguous()
    )  # (N,)
    return (1 + above) / (len(clean_scores) + 1)


def normal_p_values(scores: Tensor) -> Tensor:
    """Return upper tails (N,) of the normal law for scores that are standardised."""
    tail: Tensor = 0.5 * torch.special.erfc(scores.double() / 2**0.5)
    return tail.float()


def centre_and_spread(values: Tensor) -> tuple[float, float]:
    """Return the median and the deviation that the median absolute deviation stands for; at least 1e-12."""
    middle = float(values.median())
    return middle, max(_CONSISTENT * float((values - middle).abs().median()), 1e-12)


def standardised(own: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores of a class and of its clean images in robust deviations, so that classes compare.

    The deviations are those of the clean images where there are enough, because a third of poisoned images
    widens those of the class itself.

    Args:
        own: (n,) scores of the images of unknown origin.
        clean: (m,) scores of the clean images of the class, possibly none.
    """
    middle, spread = centre_and_spread(clean if len(clean) >= _FEWEST else own)
    return ((own - middle) / spread).float(), ((clean - middle) / spread).float()


def judged(
    scores: Tensor, p_values: Tensor, predicted: Tensor, alpha: float, clean: int, **evidence: Any
) -> Screening:
    """Return the screening that calls everything suspicious whose p-value is at most alpha.

    Args:
        scores: (N,).
        p_values: (N,).
        predicted: (N,).
        alpha: Limit.
        clean: Clean images that the p-values rest on; 0 where they rest on a law.
        **evidence: Further facts.
    """
    suspicious = p_values <= alpha
    facts: dict[str, Any] = {
        "images": len(scores),
        "suspicious": int(suspicious.sum()),
        "smallest_p_value": float(p_values.min()),
        "clean_images": clean,
        **evidence,
    }
    if clean and 1 / (clean + 1) > alpha:
        facts["note"] = f"{clean} clean images cannot give a p-value of {alpha:g}; nothing can be suspicious"
    return Screening(scores, p_values, predicted, suspicious, facts)
