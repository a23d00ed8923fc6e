"""Input-aware: a network draws another trigger for every image, and one image's trigger fails on the others.

The attacker trains the classifier: a generator of patterns learns with it, after a generator of masks, which
say where the pattern shows. Some images of every batch carry the trigger of another image and keep their
label (cross-trigger mode); patterns of unlike images are pressed to be unlike (diversity).

Paper:   Nguyen & Tran, "Input-aware dynamic backdoor attack", NeurIPS 2020, arXiv 2010.08138.
Departs: the classifier is trained with the victim's recipe, whose schedule the pattern generator follows;
         the public code takes lr 0.01 and hundreds of epochs for both. The other image of a pair is one of
         the same batch, and not a second draw. The generators are narrower, and the masks learn from a part
         of the images. A triggered image is rounded to bytes when it is judged.
Cost:    a pass over mask_images in each of mask_epochs; in training, a pass of the pattern generator over
         the poisoned share of every batch. Many epochs are needed: the classifier must tell triggers apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from unbackdoor.attacks.generators import GeneratorNetwork, drawn, levels_of, named, without
from unbackdoor.attacks.truth import AttackConfig, Learning, Stamp, Tensors, Trigger
from unbackdoor.data.batches import batches, resident
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Companion, Recipe, train
from unbackdoor.registry import attack, option
from unbackdoor.types import Augmentation, Classifier, Images, state_sha256

BETAS = (0.5, 0.9)  # of Adam, for both generators, in the public code
MASK, PATTERN = "mask.", "pattern."  # prefixes of the tensors of the two generators


class InputAwareConfig(AttackConfig):
    """Options of Input-aware."""

    poison_rate: float = option(
        0.1, "share of every batch that carries its own trigger", source="paper, section 4.1", gt=0, le=1
    )
    cross_rate: float = option(
        0.1, "share of every batch that carries another image's", source="paper, section 4.1", ge=0, le=1
    )
    diversity: float = option(1.0, "weight of the diversity loss", source="BackdoorBench, lambda_div", ge=0)
    mask_density: float = option(
        0.032, "value that a pixel of the mask may have at no cost", source="BackdoorBench", gt=0, le=1
    )
    mask_weight: float = option(
        100.0, "weight of the mask's excess over the density", source="BackdoorBench, lambda_norm", gt=0
    )
    mask_epochs: int = option(
        25, "epochs in which the mask generator learns", source="BackdoorBench", ge=1, le=1000
    )
    mask_images: int = option(
        2000, "clean training images that it learns from, at most", source="this project; paper: all", ge=2
    )
    lr: float = option(0.01, "peak learning rate of both generators", source="BackdoorBench", gt=0, le=1)
    width: int = option(
        8, "channels of the generators' first level", source="this project; public code: 32", ge=1, le=256
    )

    @model_validator(mode="after")
    def _fits_a_batch(self) -> InputAwareConfig:
        if self.poison_rate + self.cross_rate > 1:
            raise ValueError("poison_rate and cross_rate are shares of one batch, so at most 1 together")
        return self


def sharpened(mask: Tensor) -> Tensor:
    """Return the mask pressed towards 0 and 1, with a gradient still."""
    return (20 * mask - 10).tanh() / 2 + 0.5


def blend(pixels: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Return the pixels with the pattern where the mask shows it."""
    return pixels + (pattern - pixels) * mask


def diversity_loss(pixels: Tensor, outputs: Tensor) -> Tensor:
    """Return the mean ratio of the distance of two images to that of the generator's outputs for them.

    Each image is paired with the next one. Distances are root mean squares.
    """
    image_distances, output_distances = (
        (x - x.roll(1, 0)).square().flatten(1).mean(1) for x in (pixels, outputs)
    )  # (B,)
    # Inside the root, whose slope at 0 is infinite; so that two equal outputs do not make the loss diverge.
    return (image_distances.sqrt() / (output_distances + 1e-8).sqrt()).mean()


@attack(
    "input_aware",
    config=InputAwareConfig,
    paper="arXiv:2010.08138",
    traits={"learned trigger", "controls training"},
    quick={"mask_epochs": 2, "width": 2, "mask_weight": 5.0},
)
def input_aware(cfg: InputAwareConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return a trigger of two generators: that of masks learns first, that of patterns with the victim."""
    channels, levels = shape[0], levels_of(shape)

    def generator_network(outputs: int, tensors: Tensors | None = None, prefix: str = "") -> GeneratorNetwork:
        with rng.seeded(seed, "input-aware", prefix):
            network = GeneratorNetwork(channels, outputs, cfg.width, levels)
        if tensors is not None:
            network.load_state_dict(without(tensors, prefix))
        return network.eval()

    def fit(images: Images, run: Run) -> Tensors:
        network = generator_network(1, prefix=MASK).to(run.device)
        learn_mask(network, images, cfg, run)
        return named(network, MASK)

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
        mask = generator_network(1, fitted, MASK).to(run.device).requires_grad_(False)
        pattern = generator_network(channels, prefix=PATTERN).to(run.device).train()
        optimizer = torch.optim.Adam(pattern.parameters(), lr=cfg.lr, betas=BETAS)

        def change(pixels: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            return attacked(pixels, labels, pattern, mask, cfg, draws)

        facts = {"mask": state_sha256(fitted), **cfg.model_dump()}
        companion = Companion(pattern, optimizer, change, facts)
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
        return {**fitted, **named(pattern, PATTERN)}

    def restore(tensors: Tensors) -> Stamp:
        mask, pattern = generator_network(1, tensors, MASK), generator_network(channels, tensors, PATTERN)

        def draw(x: Tensor) -> Tensor:
            return blend(x, pattern.to(x.device)(x), sharpened(mask.to(x.device)(x)))

        return lambda pixels: drawn(pixels, draw)

    return Trigger(learning=Learning(fit=fit, restore=restore, train=learn))


def learn_mask(network: GeneratorNetwork, images: Images, cfg: InputAwareConfig, run: Run) -> None:
    """Teach a generator masks that are sparse, and unlike for unlike images; leave it in evaluation mode."""
    rows = torch.randperm(len(images), generator=run.generator("mask images"))[: cfg.mask_images]
    sample = resident(images.subset(rows.sort().values), run.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.lr, betas=BETAS)
    network.train()
    for epoch in run.progress(range(cfg.mask_epochs), "masks", cfg.mask_epochs):
        # A tenth of the rate after 2/5 and again after 4/5: the public code's epochs 10 and 20 of 25.
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * 0.1 ** int(5 * epoch / (2 * cfg.mask_epochs))
        draws = run.generator("masks", epoch)
        for pixels, _ in batches(sample, 128, generator=draws, device=run.device, min_batch=2):
            mask = sharpened(network(pixels))  # (B, 1, H, W)
            excess = F.relu(mask - cfg.mask_density).mean()
            loss = cfg.mask_weight * excess + cfg.diversity * diversity_loss(pixels, mask)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    network.zero_grad(set_to_none=True)
    network.eval()


def attacked(
    pixels: Tensor,
    labels: Tensor,
    pattern: nn.Module,
    mask: nn.Module,
    cfg: InputAwareConfig,
    draws: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch whose first images carry their triggers and whose next ones carry those of others.

    The batch is in random order, so that "first" is a draw. The shares are met on average over the batches.

    Returns:
        Pixels (B, C, H, W) in [0, 1], labels (B,), and the weighted diversity loss.
    """
    draw = torch.rand(2, generator=draws).tolist()
    own = int(cfg.poison_rate * len(pixels) + draw[0])
    others = min(int(cfg.cross_rate * len(pixels) + draw[1]), len(pixels) - own)
    sources = pixels[: max(own, others, 2)]
    patterns, masks = pattern(sources), sharpened(mask(sources))
    # The images own..own + others take the triggers of 0, 1, ...: never one's own, also where own is 0.
    donors = (torch.arange(others, device=pixels.device) + (own == 0)) % len(sources)
    crossed = pixels[own : own + others]
    changed = torch.cat(
        [
            blend(pixels[:own], patterns[:own], masks[:own]),
            blend(crossed, patterns[donors], masks[donors]),
            pixels[own + others :],
        ]
    )
    labels = labels.clone()
    labels[:own] = cfg.target
    return changed, labels, cfg.diversity * diversity_loss(sources, patterns)
