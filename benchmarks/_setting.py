"""What the benchmarks of whole methods share: a victim, the defender's images, and the plain evaluation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _data import Pictures, add_data_option, find_data
from unbackdoor.attacks import AttackTruth, poison
from unbackdoor.attacks.poison import stamped
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import POOL_FRACTION, draw_clean, reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.networks import build
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.types import Classifier, CleanData, Images

TEST_BATCH = 128  # images an evaluation step, as in training: what public code does
Loader = DataLoader[tuple[Tensor, int]]


@dataclass(frozen=True)
class Setting:
    """What a method meets.

    Attributes:
        data: The data set.
        run: Seed, device and precision of ours.
        model: The victim.
        truth: Its attack.
        drawn: All of the defender's images.
        clean: The same, split into those that are fitted and those that are held out.
        test: Clean test images.
    """

    data: DataSet
    run: Run
    model: Classifier
    truth: AttackTruth
    drawn: Images
    clean: CleanData
    test: Images

    @property
    def subject(self) -> str:
        """In one line."""
        whom = f"{self.model.architecture}, {self.data.name}, {self.truth.attack}"
        return f"{whom}, {len(self.drawn)} clean images, ours in {self.run.precision.name}"

    def facts(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Return the sizes for the record."""
        return {
            "architecture": self.model.architecture,
            "data": self.data.name,
            "attack": self.truth.attack,
            "victim": "given" if arguments.victim else f"{arguments.victim_steps} steps",
            "clean_images": len(self.drawn),
            "test_images": len(self.test),
            "precision": self.run.precision.name,
            "quick": arguments.quick,
        }


def add_setting_options(options: argparse.ArgumentParser, *, test_images: int = 10_000) -> None:
    """Add what is the same for every method."""
    options.add_argument("--victim", type=Path, metavar="FILE", help="saved victim with its truth beside it")
    options.add_argument(
        "--victim-steps", type=int, default=200, help="training steps where no victim is given"
    )
    options.add_argument("--width", type=int, default=16, help="of the victim where none is given")
    options.add_argument("--clean", type=int, default=500, help="the defender's images")
    options.add_argument("--test-images", type=int, default=test_images, help="clean test images")
    options.add_argument("--num-workers", type=int, default=0, help="workers of the plain test loaders")
    options.add_argument("--seed", type=int, default=0)
    add_data_option(options)


def shrink(arguments: argparse.Namespace, *, clean: int, victim_steps: int) -> None:
    """Make everything tiny and made up, for ``--quick``."""
    arguments.width, arguments.victim_steps, arguments.pairs = 4, victim_steps, 1
    arguments.clean, arguments.test_images, arguments.num_workers = clean, 60, 0
    arguments.data, arguments.victim = "made-up", None


def prepare(arguments: argparse.Namespace, *, augmented: bool = True) -> Setting:
    """Read or make the images and the victim.

    Args:
        arguments: See :func:`add_setting_options`.
        augmented: Whether ours may augment the defender's images as the data set allows.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # of the plain version's draws
    # The defender's pool, a share of the training set, must hold the clean images.
    needed = max(math.ceil(arguments.clean / POOL_FRACTION), 2_000)
    size = 16 if arguments.quick else 32
    data = find_data(arguments.data, train=needed, test=arguments.test_images, size=size)
    run = Run.create(seed=arguments.seed)
    model, truth = find_victim(arguments, data, run)
    _, pool = reserve(data.train)
    drawn = draw_clean(pool, count=arguments.clean, seed=arguments.seed)
    given = {"augmentation": data.augmentation} if augmented else {}
    clean = CleanData.split(drawn, seed=arguments.seed, **given)
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    test = data.test.subset(order[: arguments.test_images])
    return Setting(data, run, model, truth, drawn, clean, test)


def find_victim(arguments: argparse.Namespace, data: DataSet, run: Run) -> tuple[Classifier, AttackTruth]:
    """Load the victim that is given, or train one for as many steps as it takes to know its task somewhat."""
    if arguments.victim is not None:
        return load_model(arguments.victim), load_truth(arguments.victim)
    training, _ = reserve(data.train)
    poisoned, truth = poison(training, "badnets", seed=0)
    # A tiny network on a tiny set needs more and smaller steps before it knows anything.
    batch = 32 if arguments.quick else 128
    rows = torch.randperm(len(poisoned), generator=run.generator("victim"))[: arguments.victim_steps * batch]
    model = build(
        f"preact_resnet18[width={arguments.width}]",
        input_shape=data.train.shape,
        class_names=data.train.class_names,
        mean=data.mean,
        std=data.std,
    )
    train(
        model,
        poisoned.subset(rows),
        Recipe(epochs=max(1, arguments.victim_steps * batch // len(rows)), batch_size=batch),
        run,
        augmentation=data.augmentation,
    )
    return model, truth


def triggered(test: Images, truth: AttackTruth) -> Images:
    """Return the test images outside the target class, triggered and labelled as the attacker wants."""
    eligible = truth.eligible(test)
    if not len(eligible):
        raise SystemExit("the victim carries no attack; the plain version needs a triggered test set")
    return Images(
        stamped(eligible.pixels, truth), truth.target_labels(eligible.truth), test.class_names, "triggered"
    )


def test_loaders(
    setting: Setting, mean: Sequence[float], std: Sequence[float], workers: int
) -> tuple[Loader, Loader]:
    """Return loaders of the clean and of the triggered test images, one picture at a time."""
    clean, bad = (
        DataLoader(
            Pictures(images, mean, std, augmented=False),
            TEST_BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        for images in (setting.test, triggered(setting.test, setting.truth))
    )
    return clean, bad


@torch.no_grad()
def evaluate(network: nn.Module, tests: Sequence[Loader]) -> tuple[float, float]:
    """Return ACC on all clean test images and ASR on all triggered ones, as public code reads them."""
    network.eval()
    rates = []
    for loader in tests:
        total, correct, seen = 0.0, 0, 0
        for pixels, labels in loader:
            logits = network(pixels)
            total += F.cross_entropy(logits, labels).item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum().item())
            seen += len(labels)
        rates.append(correct / seen)
    return rates[0], rates[1]
