"""What the head of a network reads: seen, and multiplied by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from unbackdoor.engine.heads import AffineHead
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier


@contextmanager
def at_head(head: AffineHead, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what the head reads inside the block; ``change`` may as well only look at it."""
    handle = head.module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def along_features(mask: Tensor, head: AffineHead) -> Tensor:
    """Return a mask (D,) in a shape that multiplies what the head reads."""
    return mask if isinstance(head.module, nn.Linear) else mask.view(-1, 1, 1)


def features_and_logits(
    model: Classifier, head: AffineHead, pixels: Tensor, run: Run
) -> tuple[Tensor, Tensor]:
    """Return what the head reads, and the logits (B, K)."""
    seen: list[Tensor] = []

    def look(features: Tensor) -> Tensor:
        seen.append(features.float())
        return features

    with at_head(head, look):
        logits = logits_of(model, pixels, run)
    return seen[-1], logits
