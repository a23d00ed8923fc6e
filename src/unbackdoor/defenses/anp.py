"""Adversarial neuron pruning: cut the neurons that must be scaled down to stand perturbed neurons.

Where all neurons are disturbed within small bounds so that the loss rises, a network with a backdoor falls
to its target class. Masks on the neurons are learned that keep the clean task under such disturbances; the
neurons that learning switches off are cut in the original.

Paper:   Wu & Wang, "Adversarial neuron pruning purifies backdoored deep models", NeurIPS 2021,
         arXiv 2110.14430.
Needs:   clean images and labels.          Changes: batch-norm scales (else weights of units), set to zero.
Departs: the threshold is chosen on held-out clean images, where the public code tries thresholds on the true
         attack. As in the public code, and not in the paper, the noise is not projected back after its steps,
         so it may reach twice its bound. Preset ``backdoorbench`` has the learning rate of that benchmark.
         Without batch norms, weights and biases of units are disturbed alike.
Cost:    iterations x (steps + 2) x (1 forward + 1 backward) over a batch, plus the sweep.
Blind:   few images: the masks then learn what these few need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.channel_pruning import prune_by_scores
from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.inference import frozen, logits_of, mode
from unbackdoor.engine.masks import Masks, Site
from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class ANPConfig(Config):
    """Options of adversarial neuron pruning."""

    bound: float = option(
        0.4, "epsilon, bound of the relative noise on scales and shifts", source="reference code", gt=0, le=10
    )
    noise_steps: int = option(1, "sign steps of the noise", source="reference code", ge=1, le=100)
    clean_weight: float = option(
        0.2,
        "alpha, weight of the clean loss; the rest is that under noise",
        source="reference code",
        ge=0,
        le=1,
    )
    lr: float = option(0.2, "step on the masks", source="reference code", gt=0, le=10)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    iterations: int = option(2000, "steps on the masks", source="reference code", ge=1, le=1_000_000)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    batch_norm: Literal["batch", "frozen"] = option(
        "batch", "statistics that normalise: the batch's or the stored ones", source="reference code"
    )
    step: float = option(
        0.05, "distance of the thresholds that are tried", source="reference code", gt=0, le=1
    )
    highest: float = option(0.95, "highest threshold that is tried", source="reference code", gt=0, lt=1)
    tolerance: float = option(0.02, "largest loss of held-out accuracy", source="as rnp", ge=0, le=1)


@defense(
    "anp",
    config=ANPConfig,
    paper="arXiv:2110.14430",
    needs={"images", "labels"},
    presets={"backdoorbench": {"lr": 0.01}},
    quick={"iterations": 15, "batch_size": 32, "step": 0.2},
)
def purify(model: Classifier, data: CleanData, cfg: ANPConfig, *, run: Run) -> Purified:
    """Learn masks under adversarial noise, prune the original network by them."""
    sites = prunable_sites(model)
    scores = masks_under_noise(model, sites, data, cfg, run)
    levels = [0.0, *(float(level) for level in np.arange(cfg.step, cfg.highest + 1e-9, cfg.step))]
    return prune_by_scores(model, sites, scores, levels, data, run, tolerance=cfg.tolerance)


def masks_under_noise(
    model: Classifier, sites: list[Site], data: CleanData, cfg: ANPConfig, run: Run
) -> dict[str, Tensor]:
    """Return the learned mask (O,) of every neuron in [0, 1] by site."""
    network = model.copy()  # batch statistics move its stored ones
    scales, shifts = split_sites(network, sites)
    masks = Masks(network, scales)
    noisy = Masks(network, [*scales, *shifts])
    optimizer = torch.optim.SGD(masks.parameters(), lr=cfg.lr, momentum=cfg.momentum)
    stream = _endless(data, cfg, run)
    training, length = cfg.batch_norm == "batch", cfg.bound / cfg.noise_steps
    with frozen(network), mode(network, training=training), rng.seeded(run.seed, "anp dropout"):
        for iteration in run.progress(range(cfg.iterations), "ANP"):
            pixels, labels = next(stream)
            draws = run.generator("noise", iteration)
            noise = {
                site.name: ((2 * torch.rand(site.shape, generator=draws) - 1) * cfg.bound).to(run.device)
                for site in noisy.sites
            }
            for _ in range(cfg.noise_steps):
                # Ascent from random noise by steps of bound / steps; never projected, see above.
                for value in noise.values():
                    value.requires_grad_()
                noisy.values = _disturbed(masks, noise)
                loss = F.cross_entropy(logits_of(noisy, pixels, run), labels)
                gradients = torch.autograd.grad(loss, list(noise.values()), allow_unused=True)
                noise = {
                    # None of a layer that is never called.
                    name: value.detach() if gradient is None else value.detach() + length * gradient.sign()
                    for (name, value), gradient in zip(noise.items(), gradients, strict=True)
                }
            noisy.values = _disturbed(masks, noise)
            clean_loss = F.cross_entropy(logits_of(masks, pixels, run), labels)
            noisy_loss = F.cross_entropy(logits_of(noisy, pixels, run), labels)
            loss = cfg.clean_weight * clean_loss + (1 - cfg.clean_weight) * noisy_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            masks.clamp_()
    return {name: mask.detach() for name, mask in masks.values.items()}


def split_sites(model: Classifier, sites: list[Site]) -> tuple[list[Site], list[Site]]:
    """Return the sites with the first parameter of each, which masks scale, and sites of their biases."""
    there = dict(model.named_parameters())
    scales = [Site(site.name, site.parameters[:1], site.shape) for site in sites]
    shifts = [
        Site(f"{site.name}.bias", (f"{site.name}.bias",), site.shape)
        for site in sites
        if f"{site.name}.bias" in there
    ]
    return scales, shifts


def _disturbed(masks: Masks, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mask + noise for the scales, 1 + noise for the shifts."""
    return {name: masks.values.get(name, 1.0) + value for name, value in noise.items()}


def _endless(data: CleanData, cfg: ANPConfig, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        for pixels, labels in batches(
            data.fit,
            cfg.batch_size,
            generator=run.generator("epoch", epoch),
            device=run.device,
            augmentation=data.augmentation,
            min_batch=2,
        ):
            assert labels is not None  # registered as needing them
            yield pixels, labels
