"""SAM-trained: a patch learned in a flat minimum, so that fine-tuning leads the network out of it less.

Every step descends by the gradient at the worst weights close by, on the poisoned images.

Paper:   Pham, Ta, Tran & Doan, "Flatness-aware sequential learning generates resilient backdoors", ECCV 2024,
         arXiv 2407.14738: its first stage; Foret et al., "Sharpness-aware minimization", ICLR 2021,
         arXiv 2010.01412.
Departs: the second stage, continued learning on clean images, is left out. The step towards the worst
         weights is found on the batch before its augmentation, and weight decay is of those weights.
Cost:    two forwards and backwards a step in place of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.attacks.patches import corner, lay, noise_patch, scaled_side
from unbackdoor.attacks.poison import impossible, spread
from unbackdoor.attacks.truth import AttackTruth, Learning, MappedConfig, Stamp, Tensors, Trigger
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Companion, Recipe, train
from unbackdoor.errors import ConfigError
from unbackdoor.registry import attack, option
from unbackdoor.types import Augmentation, Classifier, Images


class SAMTrainedConfig(MappedConfig):
    """Options of the SAM-trained backdoor."""

    rho: float = option(
        0.05, "length of the step towards the worst weights, L2", source="arXiv:2010.01412", ge=0, le=10
    )
    size: int = option(3, "side of the patch on images of 32 pixels; it scales", source="BadNets", ge=1)
    margin: int = option(
        2,
        "distance to the edges on images of 32 pixels; it scales",
        source="this project: a crop by two leaves the patch whole",
        ge=0,
        le=8,
    )


class Ascent(torch.optim.Optimizer):
    """Moves weights towards the worst ones close by, and back where an optimizer makes its step.

    Args:
        model: Whose weights move.
        rho: Length of the move.
    """

    def __init__(self, model: nn.Module, rho: float) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 1.0})
        self.rho = rho
        self.moves: list[Tensor] = []

    @property
    def weights(self) -> list[Tensor]:
        """The weights that learn."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def rise(self, loss: Tensor) -> None:
        """Move the weights by rho along the gradient of the loss."""
        slopes = torch.autograd.grad(loss, self.weights, allow_unused=True)
        norm = torch.stack([s.norm() for s in slopes if s is not None]).norm()
        self.moves = []
        for weight, slope in zip(self.weights, slopes, strict=True):
            self.moves.append(torch.zeros(()) if slope is None else self.rho * slope / (norm + 1e-12))
            weight.add_(self.moves[-1].to(weight.device))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it computes no loss
        """Move the weights back; the optimizer of the weights has made its step."""
        for weight, move in zip(self.weights, self.moves, strict=True):
            weight.sub_(move.to(weight.device))
        self.moves = []


@attack(
    "sam_trained",
    config=SAMTrainedConfig,
    paper="arXiv:2407.14738",
    traits={"learned trigger", "controls training"},
)
def sam_trained(cfg: SAMTrainedConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return a patch of noise; the victim learns it by sharpness-aware steps."""
    side = scaled_side(cfg.size, shape)

    def fit(images: Images, run: Run) -> Tensors:
        return {"patch": noise_patch(shape[0], side, seed, "sam_trained")}

    def restore(tensors: Tensors) -> Stamp:
        return lambda pixels: lay(pixels, tensors["patch"], corner(0, side, shape, cfg.margin))

    def learn(
        model: Classifier,
        images: Images,
        fitted: Tensors,
        recipe: Recipe,
        run: Run,
        *,
        augmentation: Augmentation,
        checkpoint: Path | None,
        label: str,
    ) -> Tensors:
        trigger = Trigger(stamp=restore(fitted), mapping=cfg.mapping)
        truth = AttackTruth("sam_trained", cfg.model_dump(), shape, classes, seed, trigger)
        if faults := impossible(images, truth):
            raise ConfigError("the attack 'sam_trained'", faults)
        ascent = Ascent(model, cfg.rho)

        def change(pixels: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            with statistics_kept(model):
                ascent.rise(F.cross_entropy(logits_of(model, pixels, run), labels))
            return pixels, labels, torch.zeros((), device=pixels.device)

        companion = Companion(nn.Identity(), ascent, change, {"attack": "sam_trained", **cfg.model_dump()})
        train(
            model,
            spread(images, truth)[0],
            recipe,
            run,
            augmentation=augmentation,
            checkpoint=checkpoint,
            label=label,
            companion=companion,
        )
        return fitted

    return Trigger(mapping=cfg.mapping, learning=Learning(fit=fit, restore=restore, train=learn))


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms inside the block, though they normalise by the batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m for m in norms if m.track_running_stats and m.training]
    try:
        for norm in kept:
            norm.track_running_stats = False
        yield
    finally:
        for norm in kept:
            norm.track_running_stats = True
