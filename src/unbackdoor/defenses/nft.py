"""Neural fine-tuning: scale neurons down, a little in early layers and more in deep ones, on mixed images.

No weight learns, only one number for each neuron, so that a handful of images is enough; MixUp keeps them
from being learned by heart.

Paper:   Karim, Al Arafat, Khalid, Guo & Rahnavard, "Augmented neural fine-tuning for efficient backdoor
         purification", ECCV 2024, arXiv 2407.10052.
Needs:   clean images and labels.
Changes: scale and shift of batch norms (else weights and biases of units), times a number in (0, 1].
Departs: the stored statistics normalise while the masks learn, as they will afterwards. Layers are counted in
         the order of definition, from 0. The held-out images are learned as well, since nothing is chosen.
         Without batch norms, the units of convolutions and linear layers are scaled.
Cost:    epochs x (1 forward + 1 backward) over the images.
Blind:   backdoors in the first layers, which may lose a fifth of their strength and no more; in a network of
         four layers no neuron can be switched off, and there it hardly weakens a backdoor.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.inference import frozen, logits_of, mode
from unbackdoor.engine.masks import Masks, fold, norm_sites
from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class NFTConfig(Config):
    """Options of neural fine-tuning."""

    epochs: int = option(100, "passes over the images", source="reference code", ge=1, le=10_000)
    lr: float = option(0.1, "first step on the masks", source="reference code", gt=0, le=10)
    last_lr: float = option(
        0.02, "last step on the masks, at the end of a cosine", source="reference code", gt=0, le=10
    )
    momentum: float = option(0.95, "momentum of SGD", source="reference code", ge=0, lt=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    sparsity: float = option(
        1e-3,
        "eta: weight of the masks' distance from 1, divided by the images of a class",
        source="reference code",
        ge=0,
        le=1000,
    )
    floor: float = option(0.8, "alpha: smallest mask of the first layer", source="reference code", ge=0, le=1)
    decay: float = option(
        0.5,
        "beta: the smallest mask of layer l is alpha exp(-beta l)",
        source="reference code",
        ge=0,
        le=100,
    )
    mixup: float = option(
        1.0, "both parameters of the Beta law of the mixing share", source="reference code", gt=0, le=10
    )


@defense(
    "nft",
    config=NFTConfig,
    paper="arXiv:2407.10052",
    needs={"images", "labels"},
    quick={"epochs": 4, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: NFTConfig, *, run: Run) -> Purified:
    """Learn one bounded mask a neuron on mixed images, and multiply it in."""
    sites = norm_sites(model, with_bias=True) or prunable_sites(model)
    masks, images = Masks(model, sites), data.all
    lows = floors(len(sites), cfg)
    per_class = len(images) / len(images.truth.unique())
    optimizer = torch.optim.SGD(masks.parameters(), lr=cfg.lr, momentum=cfg.momentum)
    losses = []
    with frozen(model), mode(model, training=False):
        for epoch in run.progress(range(cfg.epochs), "NFT"):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch, cfg)
            draws = run.generator("epoch", epoch)
            shares = np.random.default_rng(rng.derive_seed(run.seed, "mixup", epoch))
            total, steps = 0.0, 0
            for pixels, labels in batches(
                images,
                cfg.batch_size,
                generator=draws,
                device=run.device,
                augmentation=data.augmentation,
            ):
                assert labels is not None  # registered as needing them
                order = torch.randperm(len(pixels), generator=draws).to(run.device)
                share = float(shares.beta(cfg.mixup, cfg.mixup))
                logits = logits_of(masks, share * pixels + (1 - share) * pixels[order], run)
                loss = share * F.cross_entropy(logits, labels)
                loss = loss + (1 - share) * F.cross_entropy(logits, labels[order])
                distance = torch.stack([(1 - mask).abs().sum() for mask in masks.parameters()]).sum()
                loss = loss + cfg.sparsity / per_class * distance
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                _clamp(masks.parameters(), lows)
                total, steps = total + float(loss.detach()), steps + 1
            losses.append(total / steps)
    values = {name: mask.detach() for name, mask in masks.values.items()}
    evidence = {
        "losses": losses,
        "neurons": sum(site.shape[0] for site in sites),
        "smallest": {name: float(mask.min()) for name, mask in values.items()},
        "scaled_below_half": int(sum(int((mask < 0.5).sum()) for mask in values.values())),
    }
    return Purified(fold(model, sites, values), evidence)


def floors(layers: int, cfg: NFTConfig) -> list[float]:
    """Return the smallest mask of each layer, alpha * exp(-beta * l): deep layers may change more."""
    return [cfg.floor * math.exp(-cfg.decay * layer) for layer in range(layers)]


def rate(epoch: int, cfg: NFTConfig) -> float:
    """Return the learning rate of an epoch, on a half cosine from the first to the last."""
    done = epoch / max(cfg.epochs - 1, 1)
    return cfg.last_lr + (cfg.lr - cfg.last_lr) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def _clamp(masks: list[Tensor], lows: list[float]) -> None:
    for mask, low in zip(masks, lows, strict=True):
        mask.clamp_(low, 1.0)
