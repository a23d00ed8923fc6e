"""BTI-DBF (U): invert the trigger by leaving the benign features alone, and unlearn it.

A mask on the features is learned that keeps what classifies clean images; a generator then changes images so
that the other features move and the masked ones do not. Its images are learned with their true labels. The
change differs from image to image, as those of dynamic attacks do.

Paper:   Xu et al., "Towards reliable and efficient backdoor trigger inversion via decoupling benign
         features", ICLR 2024 (openreview Tw9wemV6cb), its unlearning.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the generator adds to the image and its last layer starts at zero, so that it begins as the identity,
         which the released code trains it to be in 50 passes; its size grows with the image. Features are
         what the head reads; in the code a map in front of it. Bounds are in pixels of [0, 1]: 0.3 of the
         code is in normalised ones. It stops, as the code does with an option, when the generator calls
         another class than in the first round. A learning rate that destroys the network is lowered tenfold
         (engine/descent.py). The held-out images are trained on as well, since nothing is selected.
Cost:    rounds x (mask epochs x 2 + generator epochs x 2 + epochs x 2) x (1 forward + 1 backward) over the
         clean set, and the generator's own passes.
Blind:   backdoors in the very features that classify; all-to-all attacks, as one class is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.heads import AffineHead, find_affine_head
from unbackdoor.engine.inference import frozen, logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class BTIDBFConfig(Config):
    """Options of BTI-DBF (U)."""

    rounds: int = option(
        5, "inversions, each on the network as mended so far", source="reference code", ge=1, le=1000
    )
    mask_epochs: int = option(20, "passes that learn the mask", source="reference code", ge=1, le=10_000)
    mask_lr: float = option(0.01, "learning rate of Adam on the mask", source="reference code", gt=0, le=1)
    generator_epochs: int = option(
        30, "passes that train the generator", source="reference code", ge=1, le=10_000
    )
    generator_lr: float = option(
        1e-3, "learning rate of Adam on the generator", source="reference code", gt=0, le=1
    )
    generator_width: int = option(
        32, "channels of the generator's first layer", source="reference code", ge=1, le=512
    )
    pixel_bound: float = option(
        0.012, "largest mean squared change of a pixel of [0, 1]", source="reference code: 0.3 x 0.2^2", gt=0
    )
    feature_bound: float = option(
        5.0, "largest mean squared change of a benign feature", source="reference code", gt=0
    )
    epochs: int = option(30, "passes that unlearn, in a round", source="reference code", ge=1, le=10_000)
    share: float = option(
        0.1, "share of the images of a step that the generator changes", source="reference code", gt=0, le=1
    )
    lr: float = option(1e-4, "learning rate of Adam on the network", source="reference code", gt=0, le=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)


@defense(
    "bti_dbf",
    config=BTIDBFConfig,
    paper="openreview:Tw9wemV6cb",
    needs={"images", "labels"},
    quick={"rounds": 2, "mask_epochs": 2, "generator_epochs": 3, "generator_width": 4, "epochs": 2},
)
def purify(model: Classifier, data: CleanData, cfg: BTIDBFConfig, *, run: Run) -> Purified:
    """Invert a trigger by a generator and unlearn it, round by round."""
    head = find_affine_head(model)
    with rng.seeded(run.seed, "generator"):
        generator = Generator(model.input_shape[0], cfg.generator_width).to(run.device)
    target, rounds = -1, []
    for number in range(cfg.rounds):
        mask = benign_mask(model, head, data, cfg, run, number)  # (D,)
        train_generator(generator, model, head, mask, target, data, cfg, run, number)
        called = most_called(generator, model, data, cfg, run, number)
        if number and called != target:
            break
        target = called

        model, record = unlearned(generator, model, head, data, cfg, run, number)
        head = head.of(model)
        rounds.append({"called": called, "benign": float(mask.mean()), **record})
    return Purified(model, {"target": target, "rounds": rounds})


class Generator(nn.Module):
    """A U-Net of three scales whose output is added to its input; the identity at first.

    Args:
        channels: C of the images.
        width: Channels at full size; twice and four times as many below.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_block(channels, width), _block(width, 2 * width), _block(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([_block(3 * width, width), _block(6 * width, 2 * width)])
        self.last = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return changed images of the same shape (B, C, H, W); not clamped, as in the released code."""
        x, levels = pixels, []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.avg_pool2d(x, 2, ceil_mode=True))
            levels.append(x)
        for block, level in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = F.interpolate(x, size=level.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, level], 1))
        out: Tensor = pixels + self.last(x)
        return out


def _block(inputs: int, outputs: int) -> nn.Module:
    # Normalised for each image by itself: few images make no statistics.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.ReLU(),
    )  # fmt: skip


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


def benign_mask(
    model: Classifier, head: AffineHead, data: CleanData, cfg: BTIDBFConfig, run: Run, number: int
) -> Tensor:
    """Return a mask (D,) in (0, 1): with it clean images are classified, with its complement they are not."""
    raw = torch.randn(head.features, generator=run.generator("mask", number)).to(run.device)
    raw.requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=cfg.mask_lr)
    with mode(model, training=False), frozen(model):
        for epoch in run.progress(range(cfg.mask_epochs), "benign features"):
            for pixels, labels in _pass(data, cfg, run, "mask", number, epoch):
                losses = []
                for mask in (raw.tanh() / 2 + 0.5, 0.5 - raw.tanh() / 2):
                    with at_head(head, lambda x, mask=mask: x * along_features(mask, head)):  # type: ignore[misc]
                        losses.append(F.cross_entropy(logits_of(model, pixels, run), labels))
                optimizer.zero_grad(set_to_none=True)
                (losses[0] - losses[1]).backward()
                optimizer.step()
    return (raw.tanh() / 2 + 0.5).detach()


def train_generator(
    generator: Generator,
    model: Classifier,
    head: AffineHead,
    mask: Tensor,
    target: int,
    data: CleanData,
    cfg: BTIDBFConfig,
    run: Run,
    number: int,
) -> None:
    """Train the generator to move the features that are not benign; towards a class once one was called."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=cfg.generator_lr)
    benign = along_features(mask, head)
    with mode(model, training=False), frozen(model):
        for epoch in run.progress(range(cfg.generator_epochs), "inverting the trigger"):
            for pixels, labels in _pass(data, cfg, run, "generator", number, epoch):
                changed = generator(pixels)
                with torch.no_grad():
                    before, _ = features_and_logits(model, head, pixels, run)
                after, logits = features_and_logits(model, head, changed, run)
                kept = (benign * (before - after)).square().mean()
                moved = ((1 - benign) * (before - after)).square().mean()
                size = (pixels - changed).square().mean()
                if float(size.detach()) > cfg.pixel_bound or float(kept.detach()) > cfg.feature_bound:
                    loss = size
                else:
                    loss = 0.01 * kept - moved
                if target >= 0:
                    loss = loss + F.cross_entropy(logits, torch.full_like(labels, target))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


@torch.no_grad()
def most_called(
    generator: Generator, model: Classifier, data: CleanData, cfg: BTIDBFConfig, run: Run, number: int
) -> int:
    """Return the class that most changed images are given, with a little noise in them as in the code."""
    counts = torch.zeros(model.classes, dtype=torch.int64)
    with mode(model, training=False):
        for pixels, _ in _pass(data, cfg, run, "called", number, 0):
            draws = run.generator("noise", number, int(counts.sum()))
            noise = 0.006 * torch.randn(pixels.shape, generator=draws).to(run.device)
            called = logits_of(model, generator(pixels + noise), run).argmax(1).cpu()
            counts += called.bincount(minlength=model.classes)
    return int(counts.argmax())


def unlearned(
    generator: Generator,
    model: Classifier,
    head: AffineHead,
    data: CleanData,
    cfg: BTIDBFConfig,
    run: Run,
    number: int,
) -> tuple[Classifier, dict[str, Any]]:
    """Return a copy that learned changed images with their labels, and to read them as the clean ones."""

    def tuned(lr: float) -> Classifier:
        out = model.copy()
        own_head = head.of(out)

        def loss(batch: Batch) -> Tensor:
            count = min(len(batch.labels), int(cfg.share * len(batch.labels)) + 1)
            draws = run.generator("changed", number, batch.step)
            rows = torch.randperm(len(batch.labels), generator=draws)[:count].to(run.device)
            pixels = batch.pixels.clone()
            with torch.no_grad():
                pixels[rows] = generator(pixels[rows])
            clean, _ = features_and_logits(out, own_head, batch.pixels, run)
            changed, logits = features_and_logits(out, own_head, pixels, run)
            return F.cross_entropy(logits, batch.labels) + F.mse_loss(clean, changed)

        recipe = Recipe(
            epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, optimizer="adamw", weight_decay=0.0,
            schedule="constant",
        )  # fmt: skip
        descend(out, data.all, recipe, loss, run, augmentation=data.augmentation, label="unlearning")
        return out

    return at_bearable_rate(model, data.all, cfg.lr, tuned, run)


def _pass(data: CleanData, cfg: BTIDBFConfig, run: Run, *labels: Any) -> Iterator[tuple[Tensor, Tensor]]:
    stream = batches(
        data.all,
        cfg.batch_size,
        generator=run.generator(*labels),
        device=run.device,
        augmentation=data.augmentation,
    )
    for pixels, truth in stream:
        assert truth is not None  # registered as needing labels
        yield pixels, truth
