"""Gradient-based pruning: cut, one by one, the filter that a triggered image's right answer pulls at most.

Paper:   Dunnett, Arablouei, Miller, Dedeoglu & Jurdak, "Unlearning backdoor attacks through gradient-based
         model pruning", DSN workshops 2024, arXiv 2405.03918.
Needs:   clean images and labels.
Changes: units of layers and their norms, set to zero, then all weights; cut units stay cut.
Departs: the trigger is recovered from the network (engine/trigger_search.py); the public code uses the
         attacker's own triggered images. The held-out loss under the recovered trigger chooses the cut, among
         those that cost no more than ``tolerance`` of held-out accuracy. A learning rate that destroys the
         network is lowered (engine/fine_tuning.py). Preset ``blend`` looks for a blended image, not a patch.
Cost:    search for the first class, then rounds x (1 forward + 1 backward) over the images.
Blind:   triggers that differ from image to image, all-to-all attacks, and what of a trigger is not recovered:
         on small networks the attacker's own patch often works on where the recovered one fails.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine.channel_pruning import cut_evidence, filter_sites
from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.inference import accuracy, logits_of, mode, predict
from unbackdoor.engine.masks import Site, fold
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trigger_search import Form, TriggerSearchConfig, search_triggers, success
from unbackdoor.errors import ConfigError, MethodFailed, UnsupportedModel
from unbackdoor.registry import defense, option
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Images, Purified


class GradPruneConfig(TriggerSearchConfig):
    """Options of gradient-based pruning."""

    form: Form = option(
        "patch", "patch: mask and pattern; blend: something added to all pixels", source="as neural_cleanse"
    )
    target: int = option(
        -1, "class to repair; -1: the one that is reached first", source="as neural_cleanse", ge=-1
    )
    tolerance: float = option(
        0.1, "largest loss of held-out accuracy by pruning", source="reference code", ge=0, le=1
    )
    patience: int = option(
        10,
        "filters cut without a lower loss under the trigger, after which it ends",
        source="reference code",
        ge=1,
    )
    epochs: int = option(20, "passes of the fine-tuning; 0 for none", source="this project", ge=0, le=10_000)
    train_lr: float = option(
        1e-3, "peak learning rate of the fine-tuning", source="reference code", gt=0, le=1
    )
    batch_size: int = option(128, "images a step", source="this project", ge=2)


@defense(
    "grad_prune",
    config=GradPruneConfig,
    paper="arXiv:2405.03918",
    needs={"images", "labels"},
    presets={"blend": {"form": "blend"}},
    quick={"steps": 60, "images": 8, "epochs": 1, "patience": 3},
)
def purify(model: Classifier, data: CleanData, cfg: GradPruneConfig, *, run: Run) -> Purified:
    """Recover a trigger, cut the filters with the largest gradients under it, fine-tune."""
    if cfg.target >= model.classes:
        problem = f"target: expected 0..{model.classes - 1}, got {cfg.target}"
        raise ConfigError("the defense 'grad_prune'", [problem])
    sites = filter_sites(model)
    if not sites:
        raise UnsupportedModel(
            "the network has no filter besides the outputs of its head",
            where=model.architecture or type(model.network).__name__,
        )
    enough = None if cfg.target >= 0 else 1
    search = search_triggers(model, data.fit, cfg, run, form=cfg.form, enough=enough)
    if not bool(torch.isfinite(search.sizes).any()):
        raise MethodFailed("no change of the allowed sizes sends the images to any class")
    target = cfg.target if cfg.target >= 0 else int(search.sizes.argmin())
    trigger = search.triggers[target]
    masks, trace = pruned_by_gradient(model, sites, trigger, data, cfg, run)
    out = fold(model, sites, masks)
    evidence: dict[str, Any] = {"target": target, "trace": trace, **cut_evidence(sites, masks)}
    rate = success(out, trigger, data.select, run)
    evidence["recovered_trigger_after_pruning"] = rate.value if rate.total else None
    if cfg.epochs:
        recipe = Recipe(epochs=cfg.epochs, lr=cfg.train_lr, batch_size=cfg.batch_size, schedule="cosine")
        tuned = fine_tune(out, data.all, recipe, run, augmentation=data.augmentation)
        out, evidence["lr"] = fold(tuned.model, sites, masks), tuned.lr
    return Purified(out, evidence)


def pruned_by_gradient(
    model: Classifier,
    sites: list[Site],
    trigger: RecoveredTrigger,
    data: CleanData,
    cfg: GradPruneConfig,
    run: Run,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Return the masks with the lowest held-out loss under the trigger, and (loss, accuracy) of each cut."""
    fit, select = (with_trigger(images, trigger) for images in (data.fit, data.select))
    masks = {site.name: torch.ones(site.shape) for site in sites}
    best, best_loss = dict(masks), loss_of(model, select, run)
    lowest = accuracy(model, data.select, run) - cfg.tolerance - 1e-6  # the last term is for rounding
    trace, stalled = [[best_loss, accuracy(model, data.select, run)]], 0
    network = model
    total = sum(len(mask) for mask in masks.values())
    for _ in run.progress(range(total), "gradient pruning"):
        gradients = filter_gradients(network, sites, fit, cfg, run)
        left = {name: g.masked_fill(masks[name] == 0, -1.0) for name, g in gradients.items()}
        worst = max(left, key=lambda name: float(left[name].max()))
        masks = {**masks, worst: masks[worst].clone()}
        masks[worst][int(left[worst].argmax())] = 0.0
        network = fold(model, sites, masks)
        loss, right = loss_of(network, select, run), accuracy(network, data.select, run)
        trace.append([loss, right])
        if right < lowest:
            break
        stalled = 0 if loss < best_loss else stalled + 1
        if loss < best_loss:
            best, best_loss = masks, loss
        if stalled >= cfg.patience:
            break
    return best, trace


def with_trigger(images: Images, trigger: RecoveredTrigger) -> Images:
    """Return the images of other classes with the trigger, under their true labels; else all images."""
    others = (images.truth != trigger.label).nonzero().flatten()
    return trigger.stamp(images.subset(others) if len(others) else images)


def filter_gradients(
    model: Classifier, sites: list[Site], images: Images, cfg: GradPruneConfig, run: Run
) -> dict[str, Tensor]:
    """Return the mean |gradient| (O,) of the cross-entropy over the weights of each unit, by site."""
    own = dict(model.named_parameters())
    names = [name for site in sites for name in site.parameters]
    totals = {name: torch.zeros_like(own[name]) for name in names}
    with mode(model, training=False):
        for pixels, labels in batches(images, cfg.batch_size, device=run.device):
            assert labels is not None  # registered as needing them
            loss = F.cross_entropy(logits_of(model, pixels, run), labels, reduction="sum")
            found = torch.autograd.grad(loss, [own[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
    out = {}
    for site in sites:
        parts = [totals[name].abs().reshape(site.shape[0], -1) for name in site.parameters]
        out[site.name] = torch.cat(parts, 1).mean(1).cpu() / len(images)
    return out


def loss_of(model: Classifier, images: Images, run: Run) -> float:
    """Return the cross-entropy on labelled images."""
    with mode(model, training=False):
        return float(F.cross_entropy(predict(model, images, run), images.truth.cpu()))
