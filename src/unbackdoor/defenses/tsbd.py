"""Two-stage backdoor defense: zero what unlearning moves most, then fine-tune away from large gradients.

Unlearning clean images moves the neurons of a backdoor most. In these neurons the weights that moved most are
zeroed in the original network, and fine-tuning prefers steps along which the gradient stays small, because
backdoor neurons have large ones.

Paper:   Lin, Liu, Wei, Li & Xiong, "Unveiling and mitigating backdoor vulnerabilities based on unlearning
         weight changes and backdoor activeness", NeurIPS 2024, arXiv 2405.20291.
Needs:   clean images and labels.          Changes: weights of units set to zero, then all weights.
Departs: how many neurons are treated is the largest share that costs no more than ``tolerance`` of held-out
         accuracy after the fine-tuning; the public code reports all shares with the success of the attack.
         Unlearning stops in a band above chance whatever the classes, and doubles a rate that forgets nothing
         (engine/unlearning.py). Units of linear layers besides the head are neurons too.
Cost:    unlearning, then shares tried x epochs x (2 forward + 2 backward) over the images.
Blind:   where no share keeps the accuracy, which few images cannot bring back, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.channels import Scores, places, weight_changes
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import logits_of, mode
from unbackdoor.engine.masks import Site, unit_sites
from unbackdoor.engine.repeated_unlearning import UnlearningConfig, unlearn_with
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import ONE_A_CLASS, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

FEWEST = 0.01  # smallest share of the neurons; the public code begins there, goes on at 0.05


class TSBDConfig(UnlearningConfig):
    """Options of TSBD."""

    unlearn_lr: float = option(
        1e-4,
        "first step of the ascent; doubles where nothing is forgotten",
        source="reference code",
        gt=0,
        le=1,
    )
    step: float = option(
        0.05, "distance of the shares of neurons that are tried", source="reference code", gt=0, le=1
    )
    highest: float = option(0.9, "largest share that is tried", source="reference code", gt=0, le=1)
    zeroed: float = option(
        0.7,
        "share of a neuron's weights that is zeroed, most changed first",
        source="reference code",
        gt=0,
        le=1,
    )
    epochs: int = option(20, "passes of the fine-tuning", source="reference code", ge=1, le=10_000)
    lr: float = option(0.01, "step of the fine-tuning", source="reference code", gt=0, le=1)
    radius: float = option(
        0.05, "r, length of the step up the gradient", source="reference code", gt=0, le=10
    )
    mix: float = option(0.7, "alpha, weight of the gradient found there", source="reference code", ge=0, le=1)
    tolerance: float = option(
        0.05, "largest loss of held-out accuracy after the fine-tuning", source="as tac", ge=0, le=1
    )


@defense(
    "tsbd",
    config=TSBDConfig,
    paper="arXiv:2405.20291",
    needs={"images", "labels", ONE_A_CLASS},
    quick={"batch_size": 32, "step": 0.4, "max_steps": 40, "unlearn_lr": 0.1, "epochs": 1, "lr": 0.002},
)
def purify(model: Classifier, data: CleanData, cfg: TSBDConfig, *, run: Run) -> Purified:
    """Unlearn, zero what moved most in ever more neurons and fine-tune, while the held-out accuracy holds."""
    head = head_name(model)
    sites = unit_sites(model, skip=(head,))
    if not sites:
        raise UnsupportedModel("the network has no neuron besides the outputs of its head", where=head)
    unlearned = unlearn_with(model, data.fit, cfg, run, augmentation=data.augmentation)
    order = places(weight_changes(model, unlearned.model, sites))

    def treated(share: float) -> Classifier:
        out = model.copy()
        zero_most_changed(out, unlearned.model, sites, order, share, cfg.zeroed)
        tune(out, data, cfg, run)
        return out

    shares = [FEWEST, *(float(s) for s in np.arange(cfg.step, cfg.highest + 1e-9, cfg.step) if s > FEWEST)]
    choice = harshest_within(model, shares, treated, data, run, tolerance=cfg.tolerance)
    neurons = torch.cat(list(order.values()))
    evidence: dict[str, Any] = {
        "unlearning": unlearned.evidence(),
        "choice": choice.evidence(),
        "neurons": len(neurons),
        "treated": int((neurons <= (choice.level or 0.0)).sum()),
    }
    return Purified(choice.model.copy(), evidence)


@torch.no_grad()
def zero_most_changed(
    model: Classifier,
    unlearned: Classifier,
    sites: list[Site],
    order: Mapping[str, Tensor] | Scores,
    share: float,
    zeroed: float,
) -> None:
    """Zero, in place, the most changed weights of the neurons whose place is within the share."""
    after = dict(unlearned.named_parameters())
    own = dict(model.named_parameters())
    for site in sites:
        weight = own[f"{site.name}.weight"]  # (O, ...)
        rows = (order[site.name] <= share).nonzero().flatten().to(weight.device)
        count = round(zeroed * weight[0].numel())
        if len(rows) and count:
            changes = (after[f"{site.name}.weight"] - weight).abs()[rows].flatten(1)  # (R, D)
            picked = weight[rows].flatten(1).scatter(1, changes.topk(count, 1).indices, 0.0)
            weight[rows] = picked.view_as(weight[rows])


def tune(model: Classifier, data: CleanData, cfg: TSBDConfig, run: Run) -> None:
    """Fine-tune in place: (1 - alpha) g(w) + alpha g(w + r g / |g|), so that large gradients are avoided."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)

    def gradients(pixels: Tensor, labels: Tensor) -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits_of(model, pixels, run), labels).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]

    with mode(model, training=True), rng.seeded(run.seed, "tsbd dropout"):
        for epoch in run.progress(range(cfg.epochs), "fine-tuning"):
            for pixels, labels in batches(
                data.fit,
                cfg.batch_size,
                generator=run.generator("tuning epoch", epoch),
                device=run.device,
                augmentation=data.augmentation,
                min_batch=2,
            ):
                assert labels is not None  # registered as needing them
                here = gradients(pixels, labels)
                length = torch.stack([g.norm() for g in here]).norm().clamp_min(1e-12)
                before = [p.detach().clone() for p in parameters]
                with torch.no_grad():
                    for p, g in zip(parameters, here, strict=True):
                        p.add_(cfg.radius / length * g)
                there = gradients(pixels, labels)
                with torch.no_grad():
                    for p, was, g, far in zip(parameters, before, here, there, strict=True):
                        p.copy_(was)
                        p.grad = (1 - cfg.mix) * g + cfg.mix * far
                optimizer.step()
    model.zero_grad(set_to_none=True)
