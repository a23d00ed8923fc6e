"""Mode connectivity repair: a network on a curve of low loss between the suspect and a fine-tuned copy.

Both ends of the curve classify clean images alike, and so does all that lies on it once its bend is trained;
the backdoor, which no clean image holds, is lost on the way.

Paper:   Zhao, Chen, Das, Ramamurthy & Lin, "Bridging mode connectivity in loss landscapes and adversarial
         robustness", ICLR 2020, arXiv 2005.00060.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the second end is a fine-tuned copy, as in BackdoorBench; the paper has two suspects. The place on
         the curve is the furthest up to ``furthest`` that costs no more than ``tolerance`` of held-out
         accuracy; preset ``backdoorbench`` takes that benchmark's place and rate.
Cost:    end_epochs + epochs times 1 forward + 1 backward over the images, plus 2 forwards a place.
Blind:   backdoors that the fine-tuned end keeps, which then lie all along the curve (so it is with a patch on
         small networks); few images, on which alone the loss of the bend is low.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.inference import Network, logits_of, mode, require_learner
from unbackdoor.engine.masks import NORMS
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

Weights = Mapping[str, Tensor]


class MCRConfig(Config):
    """Options of mode connectivity repair."""

    end_epochs: int = option(
        100,
        "passes of the fine-tuning that makes the other end",
        source="BackdoorBench, mcr",
        ge=1,
        le=10_000,
    )
    end_lr: float = option(0.01, "peak learning rate of it", source="BackdoorBench, ft", gt=0, le=1)
    epochs: int = option(100, "passes that train the bend", source="BackdoorBench, mcr", ge=1, le=10_000)
    lr: float = option(0.01, "first step of the bend, down a cosine", source="as the other end", gt=0, le=1)
    momentum: float = option(0.9, "momentum of SGD", source="BackdoorBench, ft", ge=0, lt=1)
    batch_size: int = option(128, "images a step", source="BackdoorBench, mcr", ge=2)
    step: float = option(0.1, "distance of the places that are tried", source="this project", gt=0, le=1)
    furthest: float = option(
        0.5,
        "furthest place, of 0 (the suspect) to 1 (the fine-tuned copy)",
        source="this project",
        gt=0,
        le=1,
    )
    tolerance: float = option(0.02, "largest loss of held-out accuracy", source="as rnp", ge=0, le=1)


@defense(
    "mcr",
    config=MCRConfig,
    paper="arXiv:2005.00060",
    needs={"images", "labels"},
    presets={"backdoorbench": {"lr": 3e-5, "furthest": 0.1}},
    quick={"end_epochs": 1, "epochs": 2, "end_lr": 0.001, "lr": 0.001, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: MCRConfig, *, run: Run) -> Purified:
    """Fine-tune the other end, train the bend, and go along the curve while the held-out accuracy holds."""
    require_learner(model)
    recipe = Recipe(epochs=cfg.end_epochs, lr=cfg.end_lr, batch_size=cfg.batch_size, schedule="cosine")
    tuned = fine_tune(model, data.fit, recipe, run, augmentation=data.augmentation)
    first, last = (dict(m.named_parameters()) for m in (model, tuned.model))
    bend, losses = trained_bend(model, first, last, data, cfg, run)

    def at(place: float) -> Classifier:
        out = model.copy()
        with torch.no_grad():
            for name, parameter in out.named_parameters():
                parameter.copy_(point(first, bend, last, place)[name])
        renew_statistics(out, data, cfg, run)
        return out

    places = [float(place) for place in np.arange(cfg.step, cfg.furthest + 1e-9, cfg.step)]
    choice = harshest_within(model, places, at, data, run, tolerance=cfg.tolerance)
    return Purified(choice.model.copy(), {"choice": choice.evidence(), "lr": tuned.lr, "losses": losses})


def point(first: Weights, bend: Weights, last: Weights, place: float) -> dict[str, Tensor]:
    """Return the weights at a place of the quadratic Bezier curve: (1-t)^2 a + 2t(1-t) b + t^2 c."""
    a, b, c = (1 - place) ** 2, 2 * place * (1 - place), place**2
    return {name: a * first[name].detach() + b * bend[name] + c * last[name].detach() for name in first}


def trained_bend(
    model: Classifier, first: Weights, last: Weights, data: CleanData, cfg: MCRConfig, run: Run
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the middle weights for which random places on the curve classify the images, and the losses."""
    network = model.copy()  # batch statistics move its stored ones
    bend = {name: ((first[name] + last[name]) / 2).detach().requires_grad_() for name in first}
    optimizer = torch.optim.SGD(list(bend.values()), lr=cfg.lr, momentum=cfg.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs)
    losses = []
    with mode(network, training=True), rng.seeded(run.seed, "mcr dropout"):
        for epoch in run.progress(range(cfg.epochs), "MCR"):
            draws, total, steps = run.generator("curve epoch", epoch), 0.0, 0
            for pixels, labels in batches(
                data.fit,
                cfg.batch_size,
                generator=draws,
                device=run.device,
                augmentation=data.augmentation,
                min_batch=2,
            ):
                assert labels is not None  # registered as needing them
                weights = point(first, bend, last, float(torch.rand((), generator=draws)))
                logits = logits_of(_with_weights(network, weights), pixels, run)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, steps = total + float(loss.detach()), steps + 1
            schedule.step()
            losses.append(total / steps)
    return {name: value.detach() for name, value in bend.items()}, losses


def _with_weights(network: Classifier, weights: dict[str, Tensor]) -> Network:
    return lambda pixels: functional_call(network, weights, (pixels,))


@torch.no_grad()
def renew_statistics(model: Classifier, data: CleanData, cfg: MCRConfig, run: Run) -> None:
    """Take the stored batch statistics anew, in place: their mean over one pass."""
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    if norms:
        with mode(model, training=True), rng.seeded(run.seed, "statistics dropout"):
            for pixels, _ in batches(data.fit, cfg.batch_size, device=run.device, min_batch=2):
                logits_of(model, pixels, run)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
