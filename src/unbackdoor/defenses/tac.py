"""TAC: harden the network against the shortest latent shift to the class that it gives away.

The class whose boundary the features of all clean images reach by the shortest shift s is the suspected
target (engine/latent_shift.py), if an outlier test supports it. Fine-tuning then asks for the right labels
with s added to the features, so that whatever a trigger adds along s no longer decides. A class that was
suspected before (``run.suspicion``) is repaired where the test is silent; where the test supports another
class instead, and where nothing supports any, the model stays as it is.

Paper:   Iwahana, Yamasaki, Ito, Miura & Shibahara, arXiv 2511.08944. Loss, outlier test and settings are
         our reading: the formulas of the paper were not at hand, and no code is public.
Needs:   clean images and labels.          Changes: all weights but the head's (``train=all``: all).
Departs: in the default (``robust``), stored batch statistics normalise, because a few hundred images move
         them to worse ones; images of the class itself stay in the second term, unshifted, because without
         them the network gives the class up, and the backdoor goes with the class; the weight beta climbs a
         ladder while held-out accuracy and the class's own accuracy hold. Preset ``reference`` does none of
         these three.
Cost:    detection, then epochs x (1 forward + 1 backward) over the clean set for each rung of the ladder.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch

from unbackdoor.engine.inference import accuracy, frozen
from unbackdoor.engine.latent_shift import Latent, latent_shifts, shifted_loss, still_moved
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import Outlier, smallest_outlier
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import ConfigError, MethodFailed, UnsupportedModel
from unbackdoor.registry import SUSPICION, Config, defense, option
from unbackdoor.triggers import Suspicion
from unbackdoor.types import Classifier, CleanData, Images, Purified

Arm = Literal["frozen", "batch"]
LADDER = (0.3, 1.0, 3.0, 10.0)  # betas, mildest first; at 10 the clean term has a weight of 1/11
# How the search trains: statistics and factor on lr. The next is tried where no beta of one before it held.
ARMS: tuple[tuple[Arm, float], ...] = (("frozen", 1), ("frozen", 1 / 3), ("batch", 3), ("batch", 1))

MOST = 0.5  # share of the held-out images that still obey the shift, above which a repair achieved little


class TACConfig(Config):
    """Options of TAC."""

    rule: Literal["grubbs", "mad"] = option(
        "grubbs", "outlier test on the norms", source="as the scanner tac"
    )
    level: float = option(0.05, "largest p-value that counts as a finding", source="convention", gt=0, lt=1)
    target: int = option(
        -1, "class to repair; -1: the one of the smallest norm", source="this project", ge=-1
    )
    when_undecided: Literal["repair", "leave"] = option(
        "leave",
        "where nothing supports a class: leave the model, or repair the class of the smallest norm anyway",
        source="the paper; a class that nothing supported was the wrong one, and its repair cost accuracy",
    )
    targets: Literal["one", "every"] = option(
        "one", "every (experimental): each image is shifted to another class drawn for it", source="the paper"
    )
    train: Literal["backbone", "all"] = option(
        "backbone", "what learns; the head alone would only hide the shift", source="this project"
    )
    search: bool = option(
        True, "climb the ladder of beta; else take beta and lr as given", source="this project"
    )
    balanced: bool = option(
        True, "keep images of the class itself in the second term, unshifted", source="this project, measured"
    )
    beta: float = option(
        1.0, "weight of the shifted term without search", source="this project", ge=0, le=1e3
    )
    batch_norm: Literal["auto", "frozen", "batch"] = option(
        "auto",
        "what normalises while training: stored statistics, the batch's; or the first, then the second",
        source="this project: stored ones left less of the backdoor at the same accuracy",
    )
    epochs: int = option(20, "passes of each fine-tuning", source="this project", ge=1, le=10_000)
    lr: float = option(0.003, "peak of the cosine schedule", source="this project", gt=0, le=0.3)
    batch_size: int = option(
        32, "images a step; small, because a few hundred images make few steps", source="this project", ge=2
    )
    tolerance: float = option(
        0.05,
        "largest loss of held-out accuracy",
        source="this project: what the tests call a repair",
        ge=0,
        le=1,
    )
    class_tolerance: float = option(
        0.25, "largest loss of the repaired class's own accuracy", source="this project", ge=0, le=1
    )
    quantile: float = option(1.0, "share of the images a shift must win", source="the paper", gt=0.5, le=1)
    head: str = option("", "name of the last linear layer; empty: it is searched for", source="this project")


@defense(
    "tac",
    config=TACConfig,
    paper="arXiv:2511.08944",
    needs={"images", "labels"},
    presets={
        "robust": {},
        "reference": {
            "search": False,
            "balanced": False,
            "batch_norm": "batch",
            "lr": 0.01,
            "batch_size": 64,
            "when_undecided": "leave",
        },
    },
    traits={SUSPICION},
    version=2,
    quick={"epochs": 2, "when_undecided": "repair"},
)
def purify(model: Classifier, data: CleanData, cfg: TACConfig, *, run: Run) -> Purified:
    """Find the class to repair, then fine-tune against the shift to it."""
    if cfg.target >= model.classes:
        raise ConfigError("the defense 'tac'", [f"target: expected 0..{model.classes - 1}, got {cfg.target}"])
    latent = latent_shifts(model, data.all, run, quantile=cfg.quantile, head=cfg.head or None)
    outlier = smallest_outlier(latent.norms, rule=cfg.rule, level=cfg.level)
    target, reason = _target(outlier, cfg, run.suspicion)
    evidence = {**_detection_evidence(latent, outlier), "target": target}
    if target is None:
        return Purified(model, {**evidence, "repaired": False, "remarks": [reason]})
    if cfg.train == "backbone" and not {*model.parameters()} - {*latent.head.module.parameters()}:
        raise UnsupportedModel("no layer but the head can learn", where=latent.head.name)
    if not torch.isfinite(latent.norms[target]):
        raise MethodFailed("no shift of the features reaches the class", where=f"class {target}")
    out, repair_evidence = (_search if cfg.search else _once)(model, latent, target, data, cfg, run)
    moved = still_moved(out, latent, target, data.select, run)
    remarks = [reason, *_warnings(repair_evidence, target, moved)]
    return Purified(out, {**evidence, **repair_evidence, "still_moved": moved, "remarks": remarks})


def _target(outlier: Outlier, cfg: TACConfig, suspicion: Suspicion | None) -> tuple[int | None, str]:
    """Return the class to repair, None where there is nothing to go by, and why."""
    supported = ", ".join(map(str, outlier.positions))
    if cfg.target >= 0:
        return cfg.target, f"Class {cfg.target} was asked for."
    if suspicion is not None:
        suspected = ", ".join(map(str, suspicion.classes))
        both = [k for k in suspicion.classes if k in outlier.positions]
        if both:
            return both[0], f"Class {both[0]} was suspected, and the test of the method supports it."
        if outlier.positions:
            return None, (
                f"Class {suspected} was suspected, and the test of the method supports class {supported} "
                "instead; nothing was changed."
            )
        first = suspicion.classes[0]
        return first, f"Class {first} was suspected; the test of the method supports no class by itself."
    if outlier.positions:
        return outlier.index, f"The test of the method supports class {outlier.index}."
    if cfg.when_undecided == "repair":
        return outlier.index, (
            f"Nothing supports class {outlier.index}, which the shortest shift reaches; it was repaired "
            "because that was asked for."
        )
    return None, "The test of the method supports no class, and none was suspected; nothing was changed."


def _warnings(evidence: Mapping[str, Any], target: int, moved: float) -> list[str]:
    if not evidence["repaired"]:
        return ["No strength of the repair kept the held-out accuracy; nothing was changed."]
    if moved > MOST:
        return [
            f"After the repair the shift still sends {100 * moved:.0f} % of the held-out images to class "
            f"{target}, so that little was achieved."
        ]
    return []


def _once(
    model: Classifier, latent: Latent, target: int, data: CleanData, cfg: TACConfig, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    arm: Arm = "batch" if cfg.batch_norm == "batch" else "frozen"
    out, losses = _tuned(model, latent, target, data.all, data, cfg, run, cfg.beta, cfg.lr, arm)
    return out, {"repaired": True, "beta": cfg.beta, "lr": cfg.lr, "losses": losses}


def _search(
    model: Classifier, latent: Latent, target: int, data: CleanData, cfg: TACConfig, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    """Return the model of the largest beta before the clean task first suffers.

    The share of shifted held-out images that still reach the class is recorded and decides nothing: it was
    near 0 where backdoors were intact.
    """
    floor = accuracy(model, data.select, run) - cfg.tolerance - 1e-6  # the last term is for rounding
    own = data.all.subset((data.all.truth == target).nonzero().flatten())
    own_floor = accuracy(model, own, run) - cfg.class_tolerance - 1e-6 if len(own) else 0.0
    # Without images held out nothing can be chosen, and the accuracy on fitted ones permits anything.
    ladder = LADDER[:1] if data.select_is_fit else LADDER
    trace: list[dict[str, Any]] = []
    best: tuple[Classifier, dict[str, Any]] | None = None
    for arm, factor in ARMS:
        if best is not None or cfg.batch_norm not in ("auto", arm):
            continue
        for beta in ladder:
            rung: dict[str, Any] = {"batch_norm": arm, "beta": beta, "lr": cfg.lr * factor, "held": False}
            trace.append(rung)
            try:
                out, _ = _tuned(model, latent, target, data.fit, data, cfg, run, beta, cfg.lr * factor, arm)
            except MethodFailed as error:  # it diverged; a smaller rate may not
                rung["failed"] = error.problem
                break
            held_out = accuracy(out, data.select, run)
            own_class = accuracy(out, own, run) if len(own) else 0.0
            moved = still_moved(out, latent, target, data.select, run)
            rung |= {"held_out": held_out, "own_class": own_class, "still_moved": moved}
            if held_out < floor or own_class < own_floor:
                break
            rung["held"] = True
            best = (out, rung)
    if best is None:
        return model, {"repaired": False, "trace": trace}
    return best[0], {"repaired": True, **best[1], "trace": trace}


def _tuned(
    model: Classifier,
    latent: Latent,
    target: int,
    images: Images,
    data: CleanData,
    cfg: TACConfig,
    run: Run,
    beta: float,
    lr: float,
    batch_norm: Arm,
) -> tuple[Classifier, list[float]]:
    out = model.copy()
    head = latent.head.of(out)
    aim = target if cfg.targets == "one" else None
    recipe = Recipe(epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, schedule="cosine")
    with frozen(head.module) if cfg.train == "backbone" else nullcontext():
        trained = train(
            out,
            images,
            recipe,
            run,
            augmentation=data.augmentation,
            label=f"hardening, beta {beta:g}",
            objective=shifted_loss(head, latent.shifts, aim, run, beta=beta, balanced=cfg.balanced),
            batch_norm=batch_norm,
        )
    return out, list(trained.losses)


def _detection_evidence(latent: Latent, outlier: Outlier) -> dict[str, Any]:
    return {
        "nearest": outlier.index,
        "verdict": outlier.verdict,
        "p_value": outlier.p_value,
        "mad_index": outlier.mad_index,
        "smallest_over_median": outlier.ratio,
        "norms": [norm if norm != float("inf") else None for norm in latent.norms.tolist()],
        "head": latent.head.name,
    }
