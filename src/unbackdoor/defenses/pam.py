"""Path-aware minimisation: unlearn a recovered trigger with gradients taken on the way back to the suspect.

A network that was repaired nearby learns its backdoor again in a few steps. Here every gradient is taken at
weights that were moved a fixed length from the present ones towards those of the suspect, and applied to the
present ones, so that the backdoor must be gone on the whole way. Clean images are learned, some of them with
the recovered trigger and their true labels. Triggers that were recovered before (``run.suspicion``) take the
place of the first search, if they work on held-out images.

Paper:   Min, Qin, Zhang, Shen & Cheng, "Uncovering, explaining, and mitigating the superficial safety of
         backdoor defense", NeurIPS 2024, arXiv 2410.09838.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the trigger is a patch, or with preset ``blend`` something that is added to all pixels
         (engine/trigger_search.py); the paper's comes of the generator of BTI-DBF. It stops when another
         class is the easiest, or none is reached. Stored batch statistics are those of the weights that are
         kept, not of the moved ones. A learning rate that destroys the network is lowered tenfold
         (engine/descent.py). The held-out images are trained on as well, since nothing is selected.
Cost:    rounds x (search for the first class + epochs x (2 forward + 2 backward) over the clean set).
Blind:   triggers that differ from image to image, all-to-all attacks, and what of a trigger is not recovered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trigger_search import (
    Form,
    TriggerSearch,
    TriggerSearchConfig,
    search_triggers,
    success,
)
from unbackdoor.errors import ConfigError, MethodFailed
from unbackdoor.registry import SUSPICION, defense, option
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Images, Purified

# Success on held-out images from which a trigger of an earlier search is taken in the place of a new one.
WORKS = 0.5


class PAMConfig(TriggerSearchConfig):
    """Options of path-aware minimisation."""

    form: Form = option(
        "patch", "patch: mask and pattern; blend: something added to all pixels", source="as neural_cleanse"
    )
    target: int = option(
        -1, "class to repair; -1: what is suspected, else the one reached first", source="this project", ge=-1
    )
    rounds: int = option(
        3,
        "searches, each on the network as mended so far",
        source="reference code, its command",
        ge=1,
        le=1000,
    )
    rho: float = option(
        0.5, "length of the move towards the suspect", source="reference code, its command", gt=0, le=1000
    )
    share: float = option(
        0.2, "share of the images of a step that have a trigger", source="reference code", gt=0, le=1
    )
    epochs: int = option(
        30, "passes over the images in a round", source="reference code, its command", ge=1, le=10_000
    )
    train_lr: float = option(0.01, "learning rate of the training", source="reference code", gt=0, le=1)
    momentum: float = option(0.1, "momentum of SGD", source="reference code", ge=0, lt=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)


@defense(
    "pam",
    config=PAMConfig,
    paper="arXiv:2410.09838",
    needs={"images", "labels"},
    presets={"blend": {"form": "blend"}},
    traits={SUSPICION},
    quick={"steps": 24, "starts": 4, "images": 8, "rounds": 2, "epochs": 2},
)
def purify(model: Classifier, data: CleanData, cfg: PAMConfig, *, run: Run) -> Purified:
    """Recover triggers and unlearn them with path-aware steps, round by round."""
    if cfg.target >= model.classes:
        problem = f"target: expected 0..{model.classes - 1}, got {cfg.target}"
        raise ConfigError("the defense 'pam'", [problem])
    suspect, rounds = model, []
    triggers, remarks = first_triggers(model, data, cfg, run)
    targets = list(dict.fromkeys(trigger.label for trigger in triggers))
    held_out = [_success_rate(model, trigger, data.select, run) for trigger in triggers]
    for number in range(cfg.rounds):
        if number:
            search = search_triggers(model, data.fit, cfg, run, form=cfg.form, enough=1, restart=number)
            easiest = reached_first(search)
            if easiest not in targets:
                break  # another class is as easy now, as in any clean network
            triggers = [search.triggers[easiest]]
        model, record = unlearned(model, suspect, triggers, data, cfg, run, number)
        rounds.append({"classes": [trigger.label for trigger in triggers], **record})
    successes = [rate for rate in held_out if rate is not None]
    evidence = {"targets": targets, "form": cfg.form, "rounds": rounds, "held_out_success": successes}
    return Purified(model, {**evidence, "remarks": remarks})


def first_triggers(
    model: Classifier, data: CleanData, cfg: PAMConfig, run: Run
) -> tuple[list[RecoveredTrigger], list[str]]:
    """Return the triggers of the first round and what they come of: those brought along, else new ones.

    Raises:
        MethodFailed: If no change of the allowed sizes sends the images to any class.
    """
    suspicion, remarks = run.suspicion, []
    classes = [cfg.target] if cfg.target >= 0 else []
    if suspicion is not None and not classes:
        classes = list(suspicion.classes)
        remarks.append(f"Class {', '.join(map(str, classes))} was suspected, and is what is repaired.")
    brought = [] if suspicion is None else [t for t in suspicion.triggers if t.label in classes]
    rates = [_success_rate(model, trigger, data.select, run) for trigger in brought]
    triggers = [t for t, rate in zip(brought, rates, strict=True) if rate is None or rate >= WORKS]
    if triggers:
        remarks.append("The first round began with a trigger that was recovered before.")
    elif brought:
        remarks.append(
            f"No trigger that was recovered before works on {100 * WORKS:.0f} % of the held-out images, so "
            "that the first round searched anew."
        )
    missing = [k for k in classes if all(trigger.label != k for trigger in triggers)]
    if missing or not classes:
        # A class that was asked for or suspected is waited for, however late it is reached.
        enough = None if missing else 1
        search = search_triggers(model, data.fit, cfg, run, form=cfg.form, enough=enough)
        easiest = reached_first(search)
        if easiest is None:
            raise MethodFailed("no change of the allowed sizes sends the images to any class")
        triggers += [search.triggers[k] for k in missing or [easiest]]
    return triggers, remarks


def reached_first(search: TriggerSearch) -> int | None:
    """Return the class that the smallest change reaches; None where none is reached."""
    return int(search.sizes.argmin()) if bool(torch.isfinite(search.sizes).any()) else None


def unlearned(
    model: Classifier,
    suspect: Classifier,
    triggers: Sequence[RecoveredTrigger],
    data: CleanData,
    cfg: PAMConfig,
    run: Run,
    number: int,
) -> tuple[Classifier, dict[str, Any]]:
    """Return a copy that learned triggered images with their labels, by path-aware steps."""

    def tuned(lr: float) -> Classifier:
        out = model.copy()
        origin = dict(zip(out.parameters(), suspect.parameters(), strict=True))

        def loss(batch: Batch) -> Tensor:
            pixels = with_triggers(batch, triggers, cfg.share, run.generator("stamped", number, batch.step))
            return F.cross_entropy(logits_of(out, pixels, run), batch.labels)

        recipe = Recipe(
            epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, momentum=cfg.momentum, weight_decay=0.0,
            schedule="constant",
        )  # fmt: skip
        descend(
            *(out, data.all, recipe, loss, run),
            augmentation=data.augmentation,
            label=f"path-aware unlearning {number + 1}",
            displace=lambda weights: way_back(weights, [origin[w] for w in weights], cfg.rho),
        )
        return out

    return at_bearable_rate(model, data.all, cfg.train_lr, tuned, run)


def with_triggers(
    batch: Batch, triggers: Sequence[RecoveredTrigger], share: float, draws: torch.Generator
) -> Tensor:
    """Return the pixels (B, C, H, W) of a step, a drawn share of which have the triggers, in turn.

    The same draws give the same images in both passes of a step.
    """
    count = min(len(batch.labels), int(share * len(batch.labels)) + 1)  # the reference code's rounding
    rows = torch.randperm(len(batch.labels), generator=draws)[:count].to(batch.pixels.device)
    pixels = batch.pixels.clone()
    for i, trigger in enumerate(triggers):
        own = rows[i :: len(triggers)]
        pixels[own] = trigger.apply(pixels[own])
    return pixels


def way_back(weights: Sequence[nn.Parameter], origin: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return the moves rho (v - w) / ||v - w|| of weights w towards v, the norm over all weights.

    At the very first step both are the same, and nothing moves.
    """
    ways = [v.detach() - w.detach() for w, v in zip(weights, origin, strict=True)]
    length = torch.stack([way.norm() for way in ways]).norm() + 1e-12
    return [rho * way / length for way in ways]


def _success_rate(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> float | None:
    rate = success(model, trigger, images, run)
    return rate.value if rate.total else None
