"""SAU: unlearn the perturbations that fool the network and its backdoored self into the same class.

A perturbation of each image is searched that sends both networks to one and the same wrong class; the network
then learns to leave that class, so that it no longer errs as the backdoored one does.

Paper:   Wei et al., "Shared adversarial unlearning", NeurIPS 2023, arXiv 2307.10562.
Needs:   clean images and labels.          Changes: all weights; stored batch statistics stay.
Departs: the clean predictions of the frozen network are computed once for all, which changes no result. The
         held-out images are trained on as well, since nothing is selected. A learning rate that destroys the
         network is lowered tenfold (engine/descent.py).
Cost:    rounds x (inner steps x 2 + 4) forward and (inner steps x 2 + 2) backward over the clean set.
Blind:   triggers that no perturbation within the bound resembles, and all-to-all attacks in part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.descent import Batch, BatchNorm, at_bearable_rate, descend
from unbackdoor.engine.inference import frozen, logits_of, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class SAUConfig(Config):
    """Options of SAU."""

    rounds: int = option(100, "passes over the clean images", source="BackdoorBench, sau", ge=1, le=10_000)
    bound: float = option(
        0.2, "largest change of a pixel, of its range", source="BackdoorBench, sau", gt=0, le=1
    )
    inner_steps: int = option(5, "steps of the search for perturbations", source="BackdoorBench, sau", ge=1)
    inner_lr: float = option(
        0.2, "length of such a step in each pixel", source="BackdoorBench, sau", gt=0, le=1
    )
    fooling_weight: float = option(
        0.01, "beta 1, weight of fooling either network", source="BackdoorBench, sau", ge=0
    )
    sharing_weight: float = option(
        1.0, "beta 2, weight of both saying the same", source="BackdoorBench, sau", ge=0
    )
    clean_weight: float = option(1.0, "lambda 1, weight of the clean loss", source="BackdoorBench, sau", ge=0)
    adversarial_weight: float = option(
        0.0, "lambda 2, weight of the true class on perturbed images", source="BackdoorBench, sau", ge=0
    )
    shared_weight: float = option(
        1.0, "lambda 3, weight of leaving the shared class", source="BackdoorBench, sau", ge=0
    )
    lr: float = option(1e-4, "learning rate of Adam", source="BackdoorBench, sau", gt=0, le=1)
    batch_size: int = option(256, "images a step", source="BackdoorBench, sau", ge=2)
    batch_norm: BatchNorm = option(
        "frozen",
        "whether the batch's statistics normalise in the outer step, or the stored ones, which keeps more "
        "accuracy and more of the backdoor",
        source="BackdoorBench, sau",
    )


@defense(
    "sau",
    config=SAUConfig,
    paper="arXiv:2307.10562",
    needs={"images", "labels"},
    quick={"rounds": 3, "inner_steps": 2},
)
def purify(model: Classifier, data: CleanData, cfg: SAUConfig, *, run: Run) -> Purified:
    """Alternate between shared adversarial perturbations and leaving the class that they share."""
    reference = model.copy().requires_grad_(False)
    answers = predict(reference, data.all, run).argmax(1).to(run.device)  # (N,)

    def tuned(lr: float) -> Classifier:
        out = model.copy()

        def loss(batch: Batch) -> Tensor:
            clean = answers[batch.rows]  # (B,)
            delta = shared_perturbation(out, reference, batch, clean, cfg, run)
            with torch.no_grad():
                shared = logits_of(reference, batch.pixels + delta, run).argmax(1)  # (B,)
            both = torch.cat([batch.pixels, batch.pixels + delta])  # (2B, C, H, W)
            logits, perturbed = logits_of(out, both, run).chunk(2)  # (B, K) each
            fooled = (shared != batch.labels) & (shared != clean)
            return (
                cfg.clean_weight * F.cross_entropy(logits, batch.labels)
                + cfg.adversarial_weight * F.cross_entropy(perturbed, batch.labels)
                + cfg.shared_weight * shared_risk(perturbed, shared, fooled)
            )

        recipe = Recipe(
            epochs=cfg.rounds, lr=lr, batch_size=cfg.batch_size, optimizer="adamw", weight_decay=0.0,
            schedule="constant",
        )  # fmt: skip
        # The released code changes no image: a perturbation is of the image as it is.
        descend(out, data.all, recipe, loss, run, label="SAU", batch_norm=cfg.batch_norm)
        return out

    return Purified(*at_bearable_rate(model, data.all, cfg.lr, tuned, run))


def shared_perturbation(
    model: Classifier, reference: Classifier, batch: Batch, clean: Tensor, cfg: SAUConfig, run: Run
) -> Tensor:
    """Return a perturbation (B, C, H, W) within the bound that sends both networks to one wrong class.

    It descends by the signs of the gradient on the divergence of the two predictions where they are not yet
    shared, and ascends a little on the cross-entropy of each network that is not yet fooled.

    Args:
        model: The network that learns.
        reference: The frozen one.
        batch: Images and labels.
        clean: (B,) what the frozen network answers on the images.
        cfg: Bound, steps and weights.
        run: Device and precision.
    """
    delta = torch.full_like(batch.pixels, cfg.bound)
    with mode(model, training=False), frozen(model):
        with torch.no_grad():
            before = [logits_of(model, batch.pixels, run).argmax(1), clean]
        for _ in range(cfg.inner_steps):
            delta.requires_grad_()
            logits = [logits_of(net, batch.pixels + delta, run) for net in (model, reference)]
            fooled = [out.argmax(1) != was for out, was in zip(logits, before, strict=True)]
            shared = fooled[0] & fooled[1] & (logits[0].argmax(1) == logits[1].argmax(1))
            resisting = sum(
                (F.cross_entropy(out, batch.labels, reduction="none") * ~moved).sum()
                for out, moved in zip(logits, fooled, strict=True)
            )
            apart = (divergence(*logits) * ~shared).sum()
            loss = (cfg.sharing_weight * apart - cfg.fooling_weight / 2 * resisting) / len(shared)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() - cfg.inner_lr * gradient.sign()).clamp(-cfg.bound, cfg.bound)
            if shared.all():
                break
    return delta


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (B,) of the predictions of logits (B, K), in nats."""
    p, q = (logits.softmax(1).clamp_min(1e-8) for logits in (one, other))
    middle = ((p + q) / 2).log()
    return (p * (p.log() - middle) + q * (q.log() - middle)).sum(1) / 2


def shared_risk(logits: Tensor, labels: Tensor, fooled: Tensor) -> Tensor:
    """Return the mean over all images of -log(1 - p(label)) where the frozen network was fooled, else 0.

    The logarithm is the mean of two equal forms that are clamped at different ends, because each of them
    loses its gradient at one end in fp32.

    Args:
        logits: (B, K) of the network that learns, on perturbed images.
        labels: (B,) classes that the frozen network gives them.
        fooled: (B,) bool.
    """
    probabilities = logits.softmax(1)
    there = probabilities.gather(1, labels[:, None])[:, 0]  # (B,)
    # Summed and not 1 - p, which is 0 in fp32 where p is nearly 1.
    elsewhere = probabilities.scatter(1, labels[:, None], 0.0).sum(1)  # (B,)
    risk = -(elsewhere.clamp_max(0.999) + 1e-6).log() - (1 + 1e-6 - there.clamp_min(0.001)).log()
    return (risk * fooled).sum() / 2 / len(labels)
