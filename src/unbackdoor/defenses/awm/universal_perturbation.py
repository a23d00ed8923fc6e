"""Universal perturbations: one addition to all images, in pixel space, that moves their labels.

A static additive trigger is one of them. A search without a target may as well find another one, so that a
result is a worst case and no recovered trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import EVALUATION_BATCH, Network, images_per_pass, logits_of
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Images

TRAVEL = 2.5  # radii that all steps of a margin search add up to, as in Madry et al. 2018
MIN_FOOLING_RATE = 0.01  # least share of the images that a perturbation must move
Objective = Literal["margin", "cross-entropy"]


@dataclass(frozen=True)
class Universal:
    """One perturbation for all images, or one towards each class.

    Attributes:
        values: (M, C, H, W); M = 1: away from the labels; M = K: towards class k.
    """

    values: Tensor

    @property
    def targeted(self) -> bool:
        """True where there is one for each class."""
        return len(self.values) > 1

    @property
    def norm(self) -> float:
        """L1 norm, the mean where there are several."""
        return float(self.values.abs().sum()) / len(self.values)

    def aims(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the perturbation (B,) that each image gets: the only one, or one towards another class."""
        if not self.targeted:
            return torch.zeros_like(labels)
        shift = torch.randint(1, len(self.values), labels.shape, generator=generator)
        return (labels + shift.to(labels.device)) % len(self.values)

    def applied(self, pixels: Tensor, aims: Tensor, *, clamp: bool = True) -> Tensor:
        """Return perturbed pixels (B, C, H, W), in [0, 1] if ``clamp``."""
        moved = pixels + self.values[aims]
        return moved.clamp(0, 1) if clamp else moved

    @torch.no_grad()
    def fooling(self, network: Network, images: Images, run: Run, generator: torch.Generator) -> float:
        """Return the share of images that leave their label, or reach the class drawn for them."""
        aims = self.aims(images.truth, generator)
        moved = 0
        size = min(EVALUATION_BATCH, images_per_pass(images.shape))
        for rows in torch.arange(len(images), device=aims.device).split(size):
            pixels = self.applied(to_float(images.pixels[rows], run.device), aims[rows])
            predicted = logits_of(network, pixels, run).argmax(1)
            hit = predicted == aims[rows] if self.targeted else predicted != images.truth[rows]
            moved += int(hit.sum())
        return moved / len(images)


def no_perturbation_error(fooling: float, norm: float, tau: float) -> MethodFailed:
    """Return the error of a search that moved no label, with the rate and norm that it reached."""
    return MethodFailed(
        "the search found no perturbation that moves a label",
        expected=f"a fooling rate of {MIN_FOOLING_RATE:g} within an L1 norm of {tau:.4g}",
        got=f"a fooling rate of {fooling:.3f} at a norm of {norm:.3g}",
        remedy="Check that the output of the model depends on its input, or raise tau",
    )


def search(
    network: Network,
    images: Images,
    batches: Sequence[Tensor],
    run: Run,
    generator: torch.Generator,
    *,
    tau: float,
    objective: Objective = "margin",
    lr: float = 10.0,
    targets: int = 1,
) -> Universal:
    """Climb from zero to a perturbation of L1 norm at most ``tau`` that moves the labels.

    Args:
        network: Frozen, and in evaluation mode.
        images: On the run's device; the perturbation must move them away from their labels.
        batches: Rows of the images for each step.
        run: Device and precision.
        generator: Draws the targets.
        tau: Radius of the L1 ball.
        objective: ``margin``: the logit margin, whose gradient is as large on a confident network; each step
            is of the same length and projected, and pixels stay in [0, 1]. ``cross-entropy``: as in AWM's and
            I-BAU's code, unbounded on the way and scaled down once at the end.
        lr: Rate of plain SGD, for ``cross-entropy``.
        targets: 1, or the number of classes for one perturbation towards each.
    """
    margin = objective == "margin"
    length = TRAVEL * tau / len(batches)
    values = torch.zeros(targets, *images.shape, device=run.device)  # (M, C, H, W)
    for rows in batches:
        delta = Universal(values.requires_grad_())
        labels = images.truth[rows]
        aims = delta.aims(labels, generator)
        pixels = delta.applied(to_float(images.pixels[rows], run.device), aims, clamp=margin)
        logits = logits_of(network, pixels, run)  # (B, K)
        gain = _gain(logits, aims if delta.targeted else labels, margin)
        gain = -gain if delta.targeted else gain
        (slope,) = torch.autograd.grad(gain, values)
        with torch.no_grad():
            if margin:
                # Where there is no slope there is no step; the smallest normal number avoids 0 / 0.
                size = slope.flatten(1).abs().sum(1).clamp_min(torch.finfo(slope.dtype).tiny)  # (M,)
                values = project_l1(values + length * slope / size.view(-1, 1, 1, 1), tau)
            else:
                values = values + lr * slope
    if not margin:
        size = values.flatten(1).abs().sum(1).clamp_min(tau)  # (M,)
        values = values * (tau / size).view(-1, 1, 1, 1)
    return Universal(values.detach())


def _gain(logits: Tensor, classes: Tensor, margin: bool) -> Tensor:
    """Return how far the classes (B,) are left: best other logit minus theirs, or the cross-entropy."""
    if not margin:
        return F.cross_entropy(logits, classes)
    own = logits.gather(1, classes[:, None])  # (B, 1)
    others = logits.scatter(1, classes[:, None], -torch.inf)
    return (others.amax(1) - own.squeeze(1)).mean()


def project_l1(values: Tensor, radius: float) -> Tensor:
    """Return the nearest points (M, ...) whose L1 norm is at most ``radius``, each row for itself.

    Paper: Duchi et al., "Efficient projections onto the l1-ball", ICML 2008, figure 1.
    """
    flat = values.flatten(1)  # (M, D)
    size = flat.abs()
    sums = size.sum(1, keepdim=True)  # (M, 1)
    if bool((sums <= radius).all()):
        return values
    sorted_, _ = size.sort(1, descending=True)
    excess = (sorted_.cumsum(1) - radius) / torch.arange(1, size.shape[1] + 1, device=size.device)
    count = (sorted_ > excess).sum(1, keepdim=True).clamp_min(1)  # (M, 1) entries that stay above zero
    shrink = torch.where(sums > radius, excess.gather(1, count - 1), 0.0)  # (M, 1)
    return (flat.sign() * (size - shrink).clamp_min(0)).view_as(values)
