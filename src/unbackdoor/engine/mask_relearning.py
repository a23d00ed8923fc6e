"""Relearning by channel masks alone: which channels stand in the way of the clean task.

Paper:   Li et al., "Reconstructive neuron pruning", ICML 2023, arXiv 2305.14876, equation (R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy, frozen, logits_of, mode
from unbackdoor.engine.masks import Masks, Site
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, CleanData


def recover(
    unlearned: Classifier,
    sites: Sequence[Site],
    data: CleanData,
    run: Run,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    momentum: float = 0.9,
    averaged: bool = True,
    batch_norm: Literal["batch", "frozen"] = "batch",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Learn masks in [0, 1] that bring the clean task back into an unlearned network.

    Args:
        unlearned: The network after unlearning; not changed.
        sites: What is masked.
        data: Its fitting part is learned.
        run: Seed, device, precision and progress.
        lr: Step on the masks.
        epochs: Passes over the fitting part.
        batch_size: Images a step.
        momentum: Momentum of SGD.
        averaged: Score by the mean of the mask over all steps, not by the last mask.
        batch_norm: Whether batch statistics or the stored ones normalise.

    Returns:
        The score of every channel in [0, 1] by site, low for what stood in the way; and the losses and the
        final accuracy as evidence.
    """
    # A copy, because batch statistics would move the stored ones of the unlearned network.
    network = unlearned.copy()
    masks = Masks(network, sites)
    sums = {name: torch.zeros_like(mask) for name, mask in masks.values.items()}
    optimizer = torch.optim.SGD(masks.parameters(), lr=lr, momentum=momentum)
    losses, steps = [], 0
    with frozen(network):
        for epoch in run.progress(range(epochs), "recovering"):
            first, total = steps, 0.0
            with (
                mode(network, training=batch_norm == "batch"),
                rng.seeded(run.seed, "recovery dropout", epoch),
            ):
                for pixels, labels in batches(
                    data.fit,
                    batch_size,
                    generator=run.generator("recovery epoch", epoch),
                    device=run.device,
                    augmentation=data.augmentation,
                    min_batch=2,
                ):
                    assert labels is not None  # methods that call this are registered as needing labels
                    loss = F.cross_entropy(logits_of(masks, pixels, run), labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    masks.clamp_()
                    for name, mask in masks.values.items():
                        sums[name] += mask.detach()
                    total, steps = total + float(loss.detach()), steps + 1
            losses.append(total / (steps - first))
        final_accuracy = accuracy(network, data.fit, run, network=masks)
    last = {name: mask.detach() for name, mask in masks.values.items()}
    scores = {name: value / steps for name, value in sums.items()} if averaged else last
    return scores, {"losses": losses, "steps": steps, "accuracy": final_accuracy}
