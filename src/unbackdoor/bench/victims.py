"""Victims: networks trained on poisoned data, the patients of every experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor.attacks import AttackTruth, poison
from unbackdoor.bench.judge import Scores, judge
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import InputError
from unbackdoor.files import write_json
from unbackdoor.models import build, load_model, save_model
from unbackdoor.types import Classifier

TRUTH_SUFFIX = ".truth.json"
ATTACK_TOOK = 0.8  # below this ASR there is no backdoor to remove, and the row is flagged


@dataclass(frozen=True)
class VictimSpec:
    """All that a victim depends on, besides the code.

    Attributes:
        dataset: Name of the data set.
        architecture: Such as ``preact_resnet18[width=16]``.
        recipe: How it is trained.
        recipe_name: What the recipe is called in tables.
        attack: Registered name.
        options: Options of the attack.
        seed: Seed of the initial weights, the trigger, the poisoned rows and the order of the images.
    """

    dataset: str
    architecture: str
    recipe: Recipe = field(default_factory=Recipe)
    recipe_name: str = "plain"
    attack: str = "badnets"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def train_victim(
    spec: VictimSpec, data: DataSet, run: Run, *, checkpoint: Path | None = None, label: str = "training"
) -> tuple[Classifier, AttackTruth]:
    """Train a victim from scratch on the poisoned training part of a data set.

    Args:
        spec: See :class:`VictimSpec`.
        data: The data set that the spec names.
        run: Device, precision and progress; its seed is the spec's.
        checkpoint: See :func:`unbackdoor.engine.training.train`.
        label: Name in the progress display.
    """
    training, _ = reserve(data.train)
    poisoned, truth = poison(training, spec.attack, spec.options, seed=spec.seed)
    model = build(
        spec.architecture,
        input_shape=data.train.shape,
        class_names=data.train.class_names,
        mean=data.mean,
        std=data.std,
        seed=spec.seed,
        origin=f"trained on {data.name}",
    ).to(run.device)
    train(
        model, poisoned, spec.recipe, run, augmentation=data.augmentation, checkpoint=checkpoint, label=label
    )
    return model, truth


def save_victim(model: Classifier, truth: AttackTruth, path: Path, *, history: list[dict[str, Any]]) -> None:
    """Write the weights with their card, and the truth into a file of its own that no defender is given."""
    save_model(model.cpu(), path, history=history)
    write_json(path.with_suffix(TRUTH_SUFFIX), truth.spec())


def load_truth(path: Path) -> AttackTruth:
    """Read the truth beside a model, or a truth file.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    file = path if path.name.endswith(TRUTH_SUFFIX) else path.with_suffix(TRUTH_SUFFIX)
    if not file.exists():
        raise InputError(
            "there is no record of the attack",
            where=file,
            remedy="Only a model that was trained here can be judged; for others use a scan",
        )
    try:
        return AttackTruth.from_spec(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("the record of the attack cannot be read", got=str(error), where=file) from error


def load_victim(path: Path, data: DataSet, run: Run) -> tuple[Classifier, AttackTruth, Scores]:
    """Read a saved victim and measure it."""
    model, truth = load_model(path), load_truth(path)
    return model, truth, judge(model.to(run.device), truth, data.test, run)
