"""TAC: harden the network against the shortest latent shift to the class that it gives away.

The class whose boundary the features of all clean images reach by the shortest shift s is the suspected
target (engine/latent.py). Fine-tuning then asks for the right labels with s added to the features, so that
whatever a trigger adds along s no longer decides.

Paper:   Iwahana, Yamasaki, Ito, Miura & Shibahara, arXiv 2511.08944. Loss, outlier test and settings are
         our reading: the formulas of the paper were not at hand, and no code is public.
Needs:   clean images and labels.          Changes: all weights but the head's (``train=all``: all).
Departs: the default searches: stored batch statistics are kept, because a few hundred images move them to
         worse ones; images of the class itself stay in the second term, unshifted, because leaving them out
         makes the network give the class up, which removes the backdoor and the class with it; the weight
         beta climbs a ladder while held-out accuracy and the class's own accuracy hold. Preset
         ``reference`` does none of these three, and repairs only what the test has found.
Cost:    detection, then epochs x (1 forward + 1 backward) over the clean set for each rung of the ladder.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch

from unbackdoor.engine.latent import Latent, latent_shifts, shifted_loss, still_moved
from unbackdoor.engine.outliers import Outlier, smallest_outlier
from unbackdoor.engine.passes import accuracy, frozen
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import ConfigError, MethodFailed
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified

LADDER = (0.3, 1.0, 3.0, 10.0)  # betas, mildest first; at 10 the clean term has a weight of 1/11


class TACConfig(Config):
    """Options of TAC."""

    rule: Literal["grubbs", "mad"] = option(
        "grubbs", "outlier test on the norms", source="as the scanner tac"
    )
    level: float = option(0.05, "largest p-value that counts as a finding", source="convention", gt=0, lt=1)
    target: int = option(
        -1, "class to repair; -1: the one with the smallest norm", source="this project", ge=-1
    )
    when_undecided: Literal["repair", "leave"] = option(
        "repair",
        "without a finding: repair the class of the smallest norm anyway, or leave the model unchanged",
        source="this project: at low poison rates that class was right and the test silent",
    )
    targets: Literal["one", "every"] = option(
        "one", "every (experimental): each image is shifted to another class drawn for it", source="the paper"
    )
    train: Literal["backbone", "all"] = option(
        "backbone", "what learns; the head alone would only hide the shift", source="this project, measured"
    )
    search: bool = option(
        True, "climb the ladder of beta; else take beta and lr as given", source="this project"
    )
    balanced: bool = option(
        True, "keep images of the class itself in the second term, unshifted", source="this project, measured"
    )
    beta: float = option(
        1.0, "weight of the shifted term without a search", source="this project", ge=0, le=1e3
    )
    batch_norm: Literal["frozen", "batch"] = option(
        "frozen", "statistics that normalise while training: stored or the batch's", source="this project"
    )
    epochs: int = option(20, "passes of each fine-tuning", source="this project", ge=1, le=10_000)
    lr: float = option(0.003, "peak learning rate of the cosine schedule", source="this project", gt=0, le=1)
    batch_size: int = option(64, "images a step", source="this project", ge=2)
    momentum: float = option(0.9, "momentum of SGD", source="common practice", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty", source="common practice", ge=0, le=1)
    tolerance: float = option(
        0.05,
        "largest loss of held-out accuracy",
        source="this project: what its tests call a repair",
        ge=0,
        le=1,
    )
    class_tolerance: float = option(
        0.25, "largest loss of the repaired class's own accuracy", source="this project", ge=0, le=1
    )
    retries: int = option(
        2, "times that lr is divided by 3 if no rung holds", source="this project", ge=0, le=10
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
            "when_undecided": "leave",
        },
    },
)
def purify(model: Classifier, data: CleanData, cfg: TACConfig, *, run: Run) -> Purified:
    """Find the suspected class, then fine-tune against the shift to it."""
    if cfg.target >= model.classes:
        raise ConfigError(
            "the defense 'tac'", [f"target: the model has classes 0..{model.classes - 1}, got {cfg.target}"]
        )
    latent = latent_shifts(model, data.all, run, quantile=cfg.quantile, head=cfg.head or None)
    outlier = smallest_outlier(latent.norms, rule=cfg.rule, level=cfg.level)
    target = outlier.index if cfg.target < 0 else cfg.target
    evidence = _said(latent, outlier, target)
    if cfg.target < 0 and not outlier.positions and cfg.when_undecided == "leave":
        return Purified(model, {**evidence, "repaired": False})
    if not torch.isfinite(latent.norms[target]):
        raise MethodFailed("no shift of the features reaches the class", where=f"class {target}")
    out, told = (_search if cfg.search else _once)(model, latent, target, data, cfg, run)
    return Purified(out, {**evidence, **told})


def _once(
    model: Classifier, latent: Latent, target: int, data: CleanData, cfg: TACConfig, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    out, losses = _tuned(model, latent, target, data.all, data, cfg, run, beta=cfg.beta, lr=cfg.lr)
    return out, {"repaired": True, "beta": cfg.beta, "lr": cfg.lr, "losses": losses}


def _search(
    model: Classifier, latent: Latent, target: int, data: CleanData, cfg: TACConfig, run: Run
) -> tuple[Classifier, dict[str, Any]]:
    """Return the model of the largest beta before the clean task first suffers.

    The share of shifted held-out images that still reach the class is recorded and decides nothing: it was
    near 0 for models whose backdoor was intact.
    """
    floor = accuracy(model, data.select, run) - cfg.tolerance - 1e-6  # the last term is for rounding
    own = data.all.subset((data.all.truth == target).nonzero().flatten())
    own_floor = accuracy(model, own, run) - cfg.class_tolerance - 1e-6 if len(own) else 0.0
    # Without images held out nothing can be chosen, and the accuracy on fitted ones permits anything.
    ladder = LADDER[:1] if data.select_is_fit else LADDER
    trace: list[dict[str, Any]] = []
    for attempt in range(cfg.retries + 1):
        lr = cfg.lr / 3**attempt
        best: tuple[Classifier, float] | None = None
        for beta in ladder:
            trace.append({"beta": beta, "lr": lr})
            try:
                out, _ = _tuned(model, latent, target, data.fit, data, cfg, run, beta=beta, lr=lr)
            except MethodFailed as error:  # it diverged; a milder one may not
                trace[-1]["failed"] = error.problem
                break
            held = accuracy(out, data.select, run)
            held_own = accuracy(out, own, run) if len(own) else 0.0
            still = still_moved(out, latent, target, data.select, run)
            trace[-1] |= {"held_out": held, "own_class": held_own, "still_moved": still}
            if held < floor or held_own < own_floor:
                break
            best = (out, beta)
        if best is not None:
            return best[0], {"repaired": True, "beta": best[1], "lr": lr, "trace": trace}
    return model, {"repaired": False, "trace": trace}


def _tuned(
    model: Classifier,
    latent: Latent,
    target: int,
    images: Images,
    data: CleanData,
    cfg: TACConfig,
    run: Run,
    *,
    beta: float,
    lr: float,
) -> tuple[Classifier, list[float]]:
    out = model.copy()
    head = latent.head.of(out)
    aim = target if cfg.targets == "one" else None
    recipe = Recipe(
        epochs=cfg.epochs,
        lr=lr,
        batch_size=cfg.batch_size,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        schedule="cosine",
    )
    with frozen(head.module) if cfg.train == "backbone" else nullcontext():
        trained = train(
            out,
            images,
            recipe,
            run,
            augmentation=data.augmentation,
            label=f"hardening, beta {beta:g}",
            objective=shifted_loss(head, latent.shifts, aim, run, beta=beta, balanced=cfg.balanced),
            batch_norm=cfg.batch_norm,
        )
    return out, list(trained.losses)


def _said(latent: Latent, outlier: Outlier, target: int) -> dict[str, Any]:
    norms = [norm if norm != float("inf") else None for norm in latent.norms.tolist()]
    verdict = "undecided" if outlier.p_value is None else "found" if outlier.positions else "no evidence"
    return {
        "target": target,
        "verdict": verdict,
        "p_value": outlier.p_value,
        "statistic": outlier.statistic,
        "mad_index": outlier.mad_index,
        "smallest_over_median": outlier.ratio,
        "norms": norms,
        "head": latent.head.name,
    }
