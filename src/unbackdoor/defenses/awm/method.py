"""Adversarial weight masking: scale weights down until no universal perturbation moves the labels.

Round after round a perturbation that is added to all images alike is searched against the network, and then
soft masks on single weights learn to classify the images with and without it. A trigger is such a
perturbation; the search may as well find a generic one, so nothing is claimed about what it found.

Paper:   Chai & Chen, "One-shot neural backdoor erasing via adversarial weight masking", NeurIPS 2022,
         arXiv 2207.04497.
Needs:   clean images and labels, one of each class at the least.
Changes: convolution weights (linear ones if asked for), multiplied by masks in [0, 1].
Departs: the default (``robust``) mends what stalls in the released code (preset ``reference``, and with its
         settings for one image a class ``reference-one-shot``): the search climbs a
         margin of logits in steps of fixed length, where a cross-entropy vanishes on a confident network;
         the L1 bound holds at every step; few images still make several steps; when the rounds end, and how
         strongly the masks act, is chosen on clean images they were not learned on. In all presets the L1
         bound grows with the image (equal at 3 x 32 x 32), few images get views that their domain allows (the
         code: crops), and a search that moves no label is an error (the code goes on in silence). The search
         leaves the masked network's own labels, as in the code (option ``search_labels``: the true ones, as
         in the paper). Preset ``targeted`` searches one perturbation towards each class.
Cost:    rounds x N x (passes x (3 forward + 3 backward) + 2 forward), and by default the rounds end early;
         thrice with nothing held out.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import resident, to_float
from unbackdoor.defenses.awm.few_images import enlarged, shuffled, with_replacement
from unbackdoor.defenses.awm.mask_strength import EarlyStopping, learned_within
from unbackdoor.defenses.awm.universal_perturbation import (
    MIN_FOOLING_RATE,
    Universal,
    no_perturbation_error,
    search,
)
from unbackdoor.defenses.awm.weight_masks import WeightMasks, maskable_weights
from unbackdoor.engine.inference import labelled_by_model, logits_of
from unbackdoor.engine.masks import Site, fold
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import ONE_A_CLASS, Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified

Learned = tuple[dict[str, Tensor], list[dict[str, Any]]]  # masks by site, and a record of each round
UNIT = 3 * 32 * 32  # entries of the images that the L1 bounds of paper and code are meant for


class AWMConfig(Config):
    """Options of AWM."""

    rounds: int = option(20, "search-then-mask rounds at most", source="reference code", ge=1, le=10_000)
    passes: int = option(5, "passes over the images in each phase of a round", source="reference code", ge=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=1)
    sampling: Literal["shuffled", "replacement"] = option(
        "shuffled",
        "shuffled: each image once a pass, in 4 batches at least; replacement: N / batch_size steps a pass",
        source="this project; the reference code draws with replacement",
    )
    clean_weight: float = option(0.9, "alpha, weight of the clean loss", source="reference code", ge=0)
    robust_weight: float = option(0.1, "beta, weight of the perturbed loss", source="1 - alpha", ge=0)
    lr: float = option(0.01, "step of Adam on the masks", source="reference code", gt=0, le=1)
    lr_decay: float = option(0.9, "factor on lr after a round", source="first reference code", gt=0, le=1)
    sparsity: float = option(1e-8, "gamma, L1 weight on the masks", source="reference code", ge=0, le=1)
    adam_eps: float = option(1e-12, "epsilon of Adam; 1e-8 halves the L1 step", source="this project", gt=0)
    attack: Literal["margin", "cross-entropy"] = option(
        "margin",
        "what the search climbs: a margin of logits, in projected steps, or the loss, by SGD rescaled",
        source="this project; the reference code climbs the cross-entropy",
    )
    search_labels: Literal["model", "true"] = option(
        "model",
        "labels that the search leaves: the masked network's own, or the true ones",
        source="reference code",
    )
    attack_lr: float = option(10.0, "rate of the SGD, for cross-entropy", source="reference code", gt=0)
    tau: float = option(100.0, "largest L1 norm, on 3x32x32", source="reference code, one-shot", gt=0)
    targeted: bool = option(False, "one perturbation towards each class", source="off in paper")
    enlarge_to: int = option(
        100, "images that augmented views enlarge a set to; 0: none", source="reference code, one-shot", ge=0
    )
    include_linear: bool = option(False, "mask linear layers as well, but the head", source="off in paper")
    tolerance: float = option(
        0.08,
        "largest share of held-out predictions that may change, which ends the rounds and then softens the "
        "masks; 1: all rounds, and masks act in full",
        source="this project: with 500 images it costs a clean CIFAR-10 network less than a point",
        ge=0,
        le=1,
    )


_REFERENCE = {
    "sampling": "replacement", "attack": "cross-entropy", "adam_eps": 1e-8, "tau": 1000.0,
    "lr_decay": 1.0, "enlarge_to": 0, "tolerance": 1.0,
}  # fmt: skip
_ONE_SHOT = {
    "batch_size": 32, "clean_weight": 0.99, "robust_weight": 0.01, "tau": 100.0, "enlarge_to": 100
}  # fmt: skip


@defense(
    "awm",
    config=AWMConfig,
    paper="arXiv:2207.04497",
    needs={"images", "labels", ONE_A_CLASS},
    presets={
        "robust": {},
        "reference": _REFERENCE,
        "reference-one-shot": {**_REFERENCE, **_ONE_SHOT},
        "targeted": {"targeted": True},
    },
    quick={"rounds": 3, "passes": 2, "tau": 3000.0},
)
def purify(model: Classifier, data: CleanData, cfg: AWMConfig, *, run: Run) -> Purified:
    """Alternate between a universal perturbation and soft weight masks; return the masked weights."""
    sites = maskable_weights(model, linear=cfg.include_linear)

    def learn(images: Images, label: str, held_out: Images | None, rounds: int) -> Learned:
        views = enlarged(images, cfg.enlarge_to, data.augmentation, run.generator("views", label))
        return masked(model, sites, resident(views, run.device), cfg, run, label, held_out, rounds)

    evidence: dict[str, Any] = {}
    if cfg.tolerance < 1:
        values, trace, strength = learned_within(
            *(model, sites, data, learn, run),
            rounds=cfg.rounds, views=cfg.enlarge_to, tolerance=cfg.tolerance,
        )  # fmt: skip
        evidence["strength"] = strength.evidence()
    else:
        values, trace = learn(data.all, "all", None, cfg.rounds)
    evidence |= {"rounds": trace, "stalled": sum(record["stalled"] for record in trace)}
    evidence["masks"] = {
        name: {"mean": float(m.mean()), "gone": float((m < 0.01).float().mean())}
        for name, m in values.items()
    }
    return Purified(fold(model, sites, values), evidence)


def masked(
    model: Classifier,
    sites: list[Site],
    fit: Images,
    cfg: AWMConfig,
    run: Run,
    label: str,
    held_out: Images | None,
    rounds: int,
) -> Learned:
    """Learn masks on images until held-out ones end the rounds; return them by site, and each round's record.

    What removes a backdoor happens in the first rounds; later ones fit the few images.

    Raises:
        MethodFailed: If no search moves a label, or a loss is not finite.
    """
    tau = cfg.tau * math.prod(model.input_shape) / UNIT
    masks = WeightMasks(model, sites, lr=cfg.lr, eps=cfg.adam_eps, sparsity=cfg.sparsity)
    early_stopping = EarlyStopping(masks.network, held_out, run, cfg.tolerance)
    trace: list[dict[str, Any]] = []
    for number in run.progress(range(1, rounds + 1), "AWM"):
        draws = run.generator("round", label, number)
        delta, record = attack(masks.network, fit, tau, cfg, run, draws)
        # A margin does not vanish, so what the first round does not find the later ones do not either.
        if number == 1 and cfg.attack == "margin" and record["fooling"] < MIN_FOOLING_RATE:
            raise no_perturbation_error(record["fooling"], record["norm"], tau)
        record |= mask(masks, fit, delta, cfg, run, draws)
        if not math.isfinite(record["clean_loss"] + record["robust_loss"]):
            raise MethodFailed("the loss is not finite", where=f"round {number}", remedy="Lower lr")
        masks.decay(cfg.lr_decay)
        trace.append({"images": len(fit), "tau": tau, **record, **early_stopping.end_round(masks.values)})
        if early_stopping.stopped:
            break
    if max(record["fooling"] for record in trace) < MIN_FOOLING_RATE:
        raise no_perturbation_error(trace[-1]["fooling"], trace[-1]["norm"], tau)
    return dict(zip([site.name for site in sites], early_stopping.values, strict=True)), trace


def attack(
    network: Classifier, fit: Images, tau: float, cfg: AWMConfig, run: Run, draws: torch.Generator
) -> tuple[Universal, dict[str, Any]]:
    """Search the perturbation of a round against the masked network, and measure what it does."""
    own = resident(labelled_by_model(network, fit, run), run.device)  # once: the masks rest in this phase
    images = own if cfg.search_labels == "model" else fit
    delta = search(
        *(network, images, step_rows(fit, cfg, draws), run, draws),
        tau=tau, objective=cfg.attack, lr=cfg.attack_lr, targets=network.classes if cfg.targeted else 1,
    )  # fmt: skip
    norm, fooling = delta.norm, delta.fooling(network, own, run, draws)
    return delta, {
        "norm": norm,
        "fooling": fooling,
        "stalled": fooling < MIN_FOOLING_RATE and norm < tau / 100,
    }


def mask(
    masks: WeightMasks, fit: Images, delta: Universal, cfg: AWMConfig, run: Run, draws: torch.Generator
) -> dict[str, Any]:
    """Let the masks learn to classify the images with and without the perturbation."""
    totals = torch.zeros(2, device=run.device)
    steps = step_rows(fit, cfg, draws)
    with masks.learning():
        for rows in steps:
            labels = fit.truth[rows]
            clean = to_float(fit.pixels[rows], run.device)
            moved = delta.applied(clean, delta.aims(labels, draws))
            logits = logits_of(masks.network, torch.cat([clean, moved]), run)  # (2 B, K)
            losses = torch.stack([F.cross_entropy(half, labels) for half in logits.chunk(2)])  # (2,)
            (cfg.clean_weight * losses[0] + cfg.robust_weight * losses[1]).backward()
            masks.step()
            totals += losses.detach()
    clean_loss, robust_loss = (totals / len(steps)).tolist()
    mean = sum(float(m.sum()) for m in masks.values) / sum(m.numel() for m in masks.values)
    record = {"steps": len(steps), "clean_loss": clean_loss, "robust_loss": robust_loss}
    return record | {"mask_mean": mean, "mask_min": min(float(m.min()) for m in masks.values)}


def step_rows(fit: Images, cfg: AWMConfig, generator: torch.Generator) -> list[Tensor]:
    """Return the rows of each step of one phase."""
    draw = shuffled if cfg.sampling == "shuffled" else with_replacement
    return draw(len(fit), cfg.batch_size, cfg.passes, generator)
