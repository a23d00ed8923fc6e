"""Victims: networks trained on poisoned data, which every experiment repairs or scans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbackdoor.attacks import AttackTruth, Learning, prepare, spread
from unbackdoor.bench.judge import Scores, judge
from unbackdoor.bench.truth_files import load_truth, save_truth
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import RECIPES, Recipe, initialise, recipe_named, train
from unbackdoor.errors import ConfigError
from unbackdoor.files import atomic_write
from unbackdoor.networks import build
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier, Images

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
    spec: VictimSpec,
    data: DataSet,
    run: Run,
    *,
    checkpoint: Path | None = None,
    bases: Path | None = None,
    label: str = "training",
) -> tuple[Classifier, AttackTruth]:
    """Train a victim from scratch on the poisoned training part of a data set.

    Args:
        spec: See :class:`VictimSpec`.
        data: The data set that the spec names.
        run: Device, precision and progress; its seed is the spec's.
        checkpoint: See :func:`unbackdoor.engine.training.train`. What a trigger learns before the training is
            kept beside it, in a file that ends in ``.trigger``.
        bases: Folder in which clean networks are kept that several victims are made of; by default that of
            the checkpoint.
        label: Name in the progress display.
    """
    training, _ = reserve(data.train)
    truth = prepare(training, spec.attack, spec.options, seed=spec.seed)
    model = build(
        spec.architecture,
        input_shape=data.train.shape,
        class_names=data.train.class_names,
        mean=data.mean,
        std=data.std,
        seed=spec.seed,
        origin=f"trained on {data.name}",
    ).to(run.device)
    how: dict[str, Any] = {"augmentation": data.augmentation, "checkpoint": checkpoint, "label": label}
    initialise(model, training)
    folder = bases or (checkpoint.parent if checkpoint else None)
    if spec.recipe.base:
        _train_clean(model, training, _base_recipe(spec.recipe), data, run, folder)
    elif truth.trigger.mapping == "none" and any(
        r.base and _base_recipe(r) == spec.recipe for r in RECIPES.values()
    ):
        # It may be a base already, and may become one.
        _train_clean(model, training, spec.recipe, data, run, folder, checkpoint, label)
        return model, truth
    learning, trigger_file = truth.trigger.learning, None
    fitted: Mapping[str, Tensor] = {}
    if learning is not None:
        trigger_file = checkpoint and checkpoint.with_name(f"{checkpoint.name}.trigger")
        fitted = _fitted(learning, truth, training, run, trigger_file)
    if learning is not None and learning.train is not None:
        truth = truth.learned(learning.train(model, training, fitted, spec.recipe, run, **how))
    else:
        poisoned, truth = spread(training, truth.learned(fitted) if learning is not None else truth)
        train(model, poisoned, spec.recipe, run, **how)
    if trigger_file is not None:
        trigger_file.unlink(missing_ok=True)
    return model, truth


def _base_recipe(recipe: Recipe) -> Recipe:
    base = recipe_named(recipe.base)
    if base.base:
        raise ConfigError("the recipe", [f"base: {recipe.base!r} has a base of its own"])
    return base


def _train_clean(
    model: Classifier,
    images: Images,
    recipe: Recipe,
    data: DataSet,
    run: Run,
    folder: Path | None,
    checkpoint: Path | None = None,
    label: str = "clean network",
) -> None:
    """Train a clean network that backdoors are put into, or take it from the folder where it is kept."""
    facts = {
        "start": model.sha256(),
        "images": images.fingerprint(),
        "recipe": recipe.model_dump(),
        "seed": run.seed,
        "precision": run.precision.name,
        "augmentation": data.augmentation,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    kept = None if folder is None else folder / f"{key[:32]}.base.safetensors"
    if kept is not None and kept.exists():
        model.network.load_state_dict(load_file(kept))
        return
    if checkpoint is None and kept is not None:
        checkpoint = kept.with_suffix(".checkpoint")
    train(model, images, recipe, run, augmentation=data.augmentation, checkpoint=checkpoint, label=label)
    if kept is not None:
        state = {
            name: t.detach().cpu().contiguous().clone() for name, t in model.network.state_dict().items()
        }
        with atomic_write(kept) as draft:
            save_file(state, draft)


def _fitted(
    learning: Learning, truth: AttackTruth, images: Images, run: Run, trigger_file: Path | None
) -> Mapping[str, Tensor]:
    """Return what the trigger learns before the training, from the file where that was done already.

    A resumed training needs exactly the same trigger, and another number of threads would round sums
    differently and so make another one.
    """
    if trigger_file is None:
        return learning.fit(images, run)
    facts = json.dumps([truth.spec(), images.fingerprint()], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()
    if trigger_file.exists():
        with safe_open(trigger_file, framework="pt") as file:
            same = (file.metadata() or {}).get("key") == key
        if same:
            return load_file(trigger_file)
    tensors = dict(learning.fit(images, run))
    with atomic_write(trigger_file) as draft:
        save_file(tensors, draft, metadata={"key": key})
    return tensors


def save_victim(model: Classifier, truth: AttackTruth, path: Path, *, history: list[dict[str, Any]]) -> None:
    """Write the weights with their card, and the truth into files of its own that no defender is given."""
    save_model(model.cpu(), path, history=history)
    save_truth(truth, path)


def load_victim(path: Path, data: DataSet, run: Run) -> tuple[Classifier, AttackTruth, Scores]:
    """Read a saved victim and measure it."""
    model, truth = load_model(path), load_truth(path)
    return model, truth, judge(model.to(run.device), truth, data.test, run)
