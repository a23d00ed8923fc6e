"""I-BAU: learn to withstand one perturbation of all images, with the gradient of the whole minimax.

One perturbation that is added to all images is searched, and the weights learn to classify some images with
it. That perturbation depends on the weights; the implicit function theorem adds how it would change, by a few
products with second derivatives.

Paper:   Zeng et al., "Adversarial unlearning of backdoors via implicit hypergradient", ICLR 2022,
         arXiv 2110.03735.
Needs:   clean images and labels.          Changes: all weights; stored batch statistics stay.
Departs: the inner problem of a step is posed on the images of that step; the released code takes its first
         batch for all of them. At least one image of a step has the perturbation, where the code has a
         hundredth, which is none in small batches. A learning rate that destroys the network is lowered
         tenfold (engine/descent.py). The held-out images are trained on as well, since nothing is selected.
         ``backdoorbench`` has the milder rate and the larger batches of BackdoorBench.
Cost:    rounds x (1 forward and backward, and inner products + 3 backward passes of second order) over the
         clean set.
Blind:   triggers that no single perturbation stands for; with few images the accuracy is unsteady, as
         nothing holds the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor.data.batches import batches
from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.inference import frozen, logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


class IBAUConfig(Config):
    """Options of I-BAU."""

    rounds: int = option(
        5,
        "rounds: a perturbation, then a pass over the clean images",
        source="reference code",
        ge=1,
        le=10_000,
    )
    inner_lr: float = option(
        10.0, "rate of SGD on the perturbation, one step a batch", source="reference code", gt=0
    )
    norm_weight: float = option(
        1e-3, "weight of the squared L2 norm of the perturbation", source="reference code", ge=0
    )
    products: int = option(
        5, "K, iterations of the implicit gradient", source="reference code", ge=1, le=1000
    )
    map_lr: float = option(
        0.1, "rate of the inner map that the implicit gradient unrolls", source="reference code", gt=0
    )
    share: float = option(
        0.01,
        "share of the images of a step that the perturbation is added to",
        source="reference code",
        gt=0,
        le=1,
    )
    lr: float = option(1e-3, "learning rate of Adam", source="reference code", gt=0, le=1)
    batch_size: int = option(100, "images a step", source="reference code", ge=2)


@defense(
    "i_bau",
    config=IBAUConfig,
    paper="arXiv:2110.03735",
    needs={"images", "labels"},
    presets={"backdoorbench": {"lr": 1e-4, "batch_size": 256}},
    quick={"rounds": 2, "products": 2},
)
def purify(model: Classifier, data: CleanData, cfg: IBAUConfig, *, run: Run) -> Purified:
    """Alternate between a universal perturbation and hypergradient steps on all weights."""

    def tuned(lr: float) -> Classifier:
        out = model.copy()
        deltas: dict[int, Tensor] = {}  # by round

        def loss(batch: Batch) -> Tensor:
            # Attention has a second derivative in its plain form only.
            with mode(out, training=False), sdpa_kernel(SDPBackend.MATH):
                if batch.epoch not in deltas:
                    deltas[batch.epoch] = universal(out, data.all, cfg, run)
                chosen = patched(len(batch.labels), cfg.share, run.generator("patched", batch.step))
                return minimax(out, batch, deltas[batch.epoch], chosen.to(run.device), cfg, run)

        recipe = Recipe(
            epochs=cfg.rounds, lr=lr, batch_size=cfg.batch_size, optimizer="adamw", weight_decay=0.0,
            schedule="constant",
        )  # fmt: skip
        # As in the released code no image is augmented: the perturbation is one of the images as they are.
        descend(out, data.all, recipe, loss, run, label="I-BAU", batch_norm="frozen")
        return out

    return Purified(*at_bearable_rate(model, data.all, cfg.lr, tuned, run))


def universal(model: Classifier, images: Images, cfg: IBAUConfig, run: Run) -> Tensor:
    """Return one perturbation (1, C, H, W) that raises the loss of the network's own answers."""
    delta = torch.zeros(1, *model.input_shape, device=run.device)
    with frozen(model):
        for pixels, _ in batches(images, cfg.batch_size, device=run.device):
            delta = delta.detach().requires_grad_()
            with torch.no_grad():
                own = logits_of(model, pixels, run).argmax(1)
            loss = inner_loss(model, pixels, own, delta, cfg, run)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = delta - cfg.inner_lr * gradient
    return delta.detach()


def inner_loss(
    model: Classifier, pixels: Tensor, labels: Tensor, delta: Tensor, cfg: IBAUConfig, run: Run
) -> Tensor:
    """Return what the perturbation descends on: minus the cross-entropy, plus its squared norm."""
    logits = logits_of(model, pixels + delta, run)
    return cfg.norm_weight * delta.square().sum() - F.cross_entropy(logits, labels)


def patched(count: int, share: float, draws: torch.Generator) -> Tensor:
    """Return which images (B,) of a step have the perturbation: a share of them, one at the least."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=draws)[: max(1, int(share * count))]] = True
    return chosen


def minimax(
    model: Classifier, batch: Batch, delta: Tensor, chosen: Tensor, cfg: IBAUConfig, run: Run
) -> Tensor:
    """Return a scalar with the value of the outer loss and the hypergradient as its gradient.

    The outer loss L(d, w) is the cross-entropy with the perturbation d on the chosen images. With the inner
    map F(d, w) = d - r dl/dd, of which d is taken to be the fixed point, the gradient by the weights is
    dL/dw + (dF/dw)' v, where v = dL/dd + (dF/dd)' v is iterated from 0.
    """
    delta = delta.detach().requires_grad_()
    patch = delta * chosen[:, None, None, None]  # (B, C, H, W)
    outer = F.cross_entropy(logits_of(model, batch.pixels + patch, run), batch.labels)
    (direct,) = torch.autograd.grad(outer, delta, retain_graph=True)
    inner = inner_loss(model, batch.pixels, batch.labels, delta, cfg, run)
    (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    v = direct
    for _ in range(cfg.products - 1):
        (curved,) = torch.autograd.grad(slope, delta, grad_outputs=v, retain_graph=True)
        v = v - cfg.map_lr * curved + direct
    implicit = -cfg.map_lr * (slope * v.detach()).sum()
    return outer + implicit - implicit.detach()
