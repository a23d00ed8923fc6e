"""LIRA: a generator of faint changes and the classifier learn together; then the generator stays as it is.

Paper:   Doan, Lao, Zhao & Li, "LIRA: learnable, imperceptible and robust backdoor attacks", ICCV 2021.
Departs: generator and classifier take their steps on the same batches and losses, a share of each batch being
         triggered, where the paper alternates; both stages are parts of one training by the victim's recipe.
         What the generator draws is rounded to bytes in training too, so that the judge sees the same.
Cost:    in training, passes of the generator over the poisoned share of every batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from unbackdoor.attacks.generators import GeneratorNetwork, drawn, levels_of, named, without
from unbackdoor.attacks.truth import Learning, MappedConfig, Stamp, Tensors, Trigger
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Companion, Recipe, train
from unbackdoor.registry import attack, option
from unbackdoor.types import Augmentation, Classifier, Images

GENERATOR = "generator."


class LIRAConfig(MappedConfig):
    """Options of LIRA."""

    poison_rate: float = option(
        0.1, "share of every batch that is triggered", source="BackdoorBench, 10 %", gt=0, le=1
    )
    epsilon: float = option(
        8.0,
        "largest change of a pixel in grey levels",
        source="this project; paper: 2.55, of which rounding leaves little",
        ge=1,
        le=255,
    )
    learning: float = option(
        0.5, "share of the training in which the generator learns", source="this project", gt=0, le=1
    )
    lr: float = option(0.001, "peak learning rate of the generator", source="this project", gt=0, le=1)
    width: int = option(8, "channels of the generator's first level", source="this project", ge=1, le=256)


class Drawer(nn.Module):
    """The generator, which learns until so many images were seen.

    Args:
        network: Images (B, C, H, W) to values of the same form in 0..1.
        epsilon: Largest change in grey levels.
        images: Images in whose sight it learns.
    """

    seen: Tensor

    def __init__(self, network: nn.Module, epsilon: float, images: int) -> None:
        super().__init__()
        self.network, self.epsilon, self.images = network, epsilon, images
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # part of the checkpoint

    def forward(self, x: Tensor) -> Tensor:
        """Return triggered images (B, C, H, W) in [0, 1]."""
        # Pressed towards its bounds: a small change rounds to none, and then there is nothing to learn from.
        change = (8 * (self.network(x) - 0.5)).tanh()
        out: Tensor = (x + self.epsilon / 255 * change).clamp(0, 1)
        return out + ((out * 255).round() / 255 - out).detach()  # rounded, with the gradient of the unrounded

    def during(self, x: Tensor, count: int) -> Tensor:
        """Return triggered images in a step over ``count`` images; without a gradient once it has learned."""
        learns = int(self.seen) < self.images
        self.seen += count
        self.network.train(learns)
        with torch.set_grad_enabled(learns):
            out: Tensor = self(x)
        return out


@attack(
    "lira",
    config=LIRAConfig,
    paper="ICCV 2021",
    traits={"learned trigger", "controls training"},
    quick={"width": 2},
)
def lira(cfg: LIRAConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the generator's change, which learns with the victim."""

    def drawer(images: int = 0) -> Drawer:
        with rng.seeded(seed, "lira"):
            network = GeneratorNetwork(shape[0], shape[0], cfg.width, levels_of(shape))
        return Drawer(network, cfg.epsilon, images)

    def fit(images: Images, run: Run) -> Tensors:
        return {}  # it learns with the victim

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
        generator = drawer(round(cfg.learning * recipe.epochs * len(images))).to(run.device)

        def change(pixels: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            # Met on average over the batches; the batch is in random order, so that "first" is a draw.
            count = int(cfg.poison_rate * len(pixels) + torch.rand(1, generator=draws).item())
            labels = labels.clone()
            wanted = torch.full_like(labels, cfg.target) if cfg.mapping == "all-to-one" else labels + 1
            labels[:count] = wanted[:count] % classes
            # Two images at least: batch normalisation has no variance in one.
            triggered = generator.during(pixels[: max(count, 2)], len(pixels))[:count]
            return torch.cat([triggered, pixels[count:]]), labels, torch.zeros((), device=pixels.device)

        optimizer = torch.optim.Adam(generator.parameters(), lr=cfg.lr)
        companion = Companion(generator, optimizer, change, {"attack": "lira", **cfg.model_dump()})
        train(
            model,
            images,
            recipe,
            run,
            augmentation=augmentation,
            checkpoint=checkpoint,
            label=label,
            companion=companion,
        )
        return named(generator.network, GENERATOR)

    def restore(tensors: Tensors) -> Stamp:
        generator = drawer()
        generator.network.load_state_dict(without(tensors, GENERATOR))
        generator.eval()
        return lambda pixels: drawn(pixels, lambda x: generator.to(x.device)(x))

    return Trigger(mapping=cfg.mapping, learning=Learning(fit=fit, restore=restore, train=learn))
