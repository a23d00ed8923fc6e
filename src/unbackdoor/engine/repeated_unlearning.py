"""Repeated unlearning, with votes at several depths: what RNP's further uses have in common.

One ascent shows little: it sends clean images to some class whether or not there is a backdoor. Here it is
repeated on resampled images with its own random draws each time, and the votes of held-out images are
recorded at fixed depths, so that a use can test what stays the same. It runs once, and all uses share it.

Paper:   Li et al., ICML 2023, arXiv 2305.14876, further uses; Li et al. 2024, arXiv 2410.19427 (EBYD).
Departs: the public code reads the votes of one network at one depth.
Cost:    repeats x (unlearning + one forward over the held-out images for each depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearning import Unlearned, Watch, unlearn
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.registry import Config, option
from unbackdoor.types import Augmentation, Classifier, CleanData, Images, require_labels

# Shares of the clean accuracy above chance at which the votes are taken; the last is at the stop.
REMAINING = (0.75, 0.5, 0.25, 0.0)
HALF = 1  # its networks are kept: deeper ones send every image to one class, so that images differ no more


class UnlearningConfig(Config):
    """Options of the ascent; the same as those of ``rnp``, under the same names."""

    unlearn_lr: float = option(
        0.01, "step of the ascent", source="reference code, --unlearning_lr", gt=0, le=1
    )
    clip: float = option(20.0, "largest gradient norm of the ascent", source="reference code", gt=0)
    margin: float = option(
        0.1,
        "unlearn down to chance + margin",
        source="reference code, --clean_threshold 0.20 of 10 classes",
        gt=0,
        lt=1,
    )
    max_drop: float = option(0.15, "largest fall of accuracy in one step", source="this project", gt=0, le=1)
    max_steps: int = option(500, "steps after which unlearning is given up", source="this project", ge=1)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty of the ascent", source="reference code", ge=0, le=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    batch_norm: Literal["batch", "frozen"] = option(
        "batch", "statistics that normalise: the batch's or the stored ones", source="reference code"
    )


class ExposureConfig(UnlearningConfig):
    """Options of the repeated ascent."""

    repeats: int = option(
        8, "unlearnings, each with a resample and draws of its own", source="this project", ge=2, le=1000
    )


@dataclass(frozen=True)
class Exposure:
    """The votes and networks of a repeated unlearning: what it exposes of a model.

    Attributes:
        shares: (R, D, K) votes of the held-out images: share of the images of other classes that are sent
            to class k, every class counting the same. NaN where a repeat did not get to that depth.
        accuracies: (R, D) clean accuracy at each depth, NaN likewise.
        networks: The network of each repeat at half of its skill; None where it did not get there.
        start: Clean accuracy before the unlearning.
        failed: Why repeats ended early, in words.
        held_out: False where the votes come from the images that were unlearned, for lack of others.
    """

    shares: Tensor
    accuracies: Tensor
    networks: tuple[Classifier | None, ...]
    start: float
    failed: tuple[str, ...]
    held_out: bool

    def winners(self) -> Tensor:
        """Return the class (R, D) with most votes; -1 where two share the first place or none was reached."""
        best, winner = self.shares.nan_to_num(-1.0).max(2)  # (R, D)
        tied = (self.shares == best[..., None]).sum(2) > 1
        return winner.masked_fill(tied | (best <= 0), -1)

    def attraction(self) -> Tensor:
        """Return the mean share (K,) of each class over repeats and depths; what was not reached counts 0."""
        return self.shares.nan_to_num(0.0).mean((0, 1))

    def leader(self) -> int:
        """Return the class with the largest attraction."""
        return int(self.attraction().argmax())

    def half_unlearned(self) -> list[Classifier]:
        """Return the networks at half of their skill.

        Raises:
            MethodFailed: If there is none.
        """
        networks = [network for network in self.networks if network is not None]
        if not networks:
            raise MethodFailed("no repeat forgot half of the task", got="; ".join(self.failed[:1]) or None)
        return networks

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record; what was not reached is None."""
        return {
            "start_accuracy": self.start,
            "remaining": list(REMAINING),
            "accuracies": [[_number(a) for a in row] for row in self.accuracies.tolist()],
            "shares": [[[_number(s) for s in cell] for cell in row] for row in self.shares.tolist()],
            "winners": self.winners().tolist(),
            "failed": list(self.failed),
            "held_out": self.held_out,
        }


def options_of(config: Config, kind: type[Config]) -> dict[str, Any]:
    """Return those options of a config that another kind of config, which it extends, has as well."""
    return {name: value for name, value in config.model_dump().items() if name in kind.model_fields}


def unlearn_with(
    model: Classifier,
    images: Images,
    cfg: UnlearningConfig,
    run: Run,
    *,
    augmentation: Augmentation = "none",
    watch: Watch | None = None,
) -> Unlearned:
    """Unlearn with the options of a config; see :func:`unbackdoor.engine.unlearning.unlearn`."""
    return unlearn(
        model,
        images,
        run,
        lr=cfg.unlearn_lr,
        batch_size=cfg.batch_size,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        clip=cfg.clip,
        margin=cfg.margin,
        max_drop=cfg.max_drop,
        max_steps=cfg.max_steps,
        batch_norm=cfg.batch_norm,
        augmentation=augmentation,
        watch=watch,
    )


def expose(model: Classifier, data: CleanData, cfg: ExposureConfig, run: Run) -> Exposure:
    """Unlearn repeatedly and take the votes at each depth.

    Args:
        model: The classifier; not changed.
        data: Its fitting part is resampled within each class and unlearned, its selection part votes.
        cfg: See :class:`ExposureConfig`.
        run: Seed, device, precision and progress.

    Raises:
        InputError: If labels are missing or there is only one class.
        MethodFailed: If the model hardly classifies the images at the start, or no repeat forgot anything.
    """
    require_labels(data, "repeated unlearning")
    if len(torch.unique(data.all.truth)) < 2:
        raise InputError("the clean images are all of one class", expected="at least 2 classes", got=1)
    chance = 1 / model.classes
    start = accuracy(model, data.fit, run)
    if start <= chance + cfg.margin:
        raise MethodFailed(
            "the model hardly classifies the clean images, so there is nothing to unlearn",
            expected=f"clean accuracy above {chance + cfg.margin:.3f}",
            got=f"{start:.3f}",
            remedy="Check labels, class order and normalisation",
        )
    size = (cfg.repeats, len(REMAINING))
    shares = torch.full((*size, model.classes), torch.nan)  # (R, D, K)
    accuracies = torch.full(size, torch.nan)
    networks: list[Classifier | None] = []
    failed: list[str] = []
    levels = [chance + share * (start - chance) for share in REMAINING]
    for r in run.progress(range(cfg.repeats), "unlearning again and again"):
        own = Run(rng.derive_seed(run.seed, "repeat", r), run.device, run.precision)
        halves: list[Classifier] = []

        def read(network: Classifier, depth: int, now: float, r: int = r) -> None:
            with mode(network, training=False):
                shares[r, depth] = balanced_votes(predict(network, data.select, run).argmax(1), data.select)
            accuracies[r, depth] = now

        def watch(network: Classifier, now: float, r: int = r, halves: list[Classifier] = halves) -> None:
            for depth, level in enumerate(levels):
                if now <= level and accuracies[r, depth].isnan():
                    read(network, depth, now)
                    if depth == HALF:
                        halves.append(network.copy())

        try:
            end = unlearn_with(
                model,
                resampled(data.fit, own.generator("resample")),
                cfg,
                own,
                augmentation=data.augmentation,
                watch=watch,
            )
        except MethodFailed as error:
            failed.append(str(error))
        else:
            # Depths below the stop take their votes at the stop.
            for depth in accuracies[r].isnan().nonzero().flatten().tolist():
                read(end.model, depth, end.accuracy)
            halves = halves or [end.model]
        networks.append(halves[0] if halves else None)
    if bool(accuracies.isnan().all()):
        raise MethodFailed("no repeat of the unlearning forgot anything", got=failed[0] if failed else None)
    return Exposure(shares, accuracies, tuple(networks), start, tuple(failed), not data.select_is_fit)


def resampled(images: Images, draws: torch.Generator) -> Images:
    """Return a bootstrap sample within each class: as many images of each, drawn with replacement."""
    labels = images.truth.cpu()
    rows = []
    for k in labels.unique().tolist():
        own = (labels == k).nonzero().flatten()
        rows.append(own[torch.randint(len(own), (len(own),), generator=draws)])
    return images.subset(torch.cat(rows))


def balanced_votes(predicted: Tensor, images: Images) -> Tensor:
    """Return the share (K,) of images of other classes that go to each class, every class counting the same.

    A class' own images are left out: they belong there.
    """
    classes = images.classes
    counts = torch.zeros(classes, classes)  # (true, predicted)
    counts.index_put_((images.truth.cpu(), predicted.cpu()), torch.ones(len(predicted)), accumulate=True)
    present = counts.sum(1) > 0
    rates = counts[present] / counts[present].sum(1, keepdim=True)  # (classes present, K)
    foreign = present.nonzero() != torch.arange(classes)  # (classes present, K)
    return (rates * foreign).sum(0) / foreign.sum(0).clamp_min(1)


def _number(value: float) -> float | None:
    return None if value != value else value
