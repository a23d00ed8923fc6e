"""False alarms and finds of the check `self_reference` on networks with two to five classes.

    python scripts/few_classes.py [--data digits,gtsrb32] [--part tune] [--seeds 40]

Each network is trained for it on a few classes of a data set, which its seed draws. Networks of even seeds
are the tuning part, on which the rules were developed; those of odd seeds are for a frozen version. The
defender has images of the test set that are not among those the network is judged on. Rows go to
results/few-classes.jsonl as they are made; those of the present code are not made again. scripts/results.py
makes docs/results/few-classes.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unbackdoor.attacks import AttackTruth, prepare, spread
from unbackdoor.bench.code_version import script_version
from unbackdoor.bench.judge import judge
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.canonical_form import form_for_checks
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import initialise, recipe_named, train
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write
from unbackdoor.networks import build
from unbackdoor.scanners import self_reference
from unbackdoor.types import Classifier, CleanData, Images

ROWS = Path(__file__).parents[1] / "results" / "few-classes.jsonl"
CHECK = self_reference.__name__.rpartition(".")[2]  # imported, so that a row is of its code
# Architecture, recipe with what differs from it, and images of each class that the defender has.
SETTINGS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "digits": ("small_cnn[width=32]", "plain", {"epochs": 15, "augmentation": "none"}, 25),
    "gtsrb32": ("small_cnn[width=16]", "plain", {"epochs": 30, "augmentation": "none"}, 50),
    "cifar10": ("airbench[width=32,expansion=2]", "fast", {}, 100),
}
FEWEST_IMAGES = 300  # of a class; rarer traffic signs are left out
# Of every eight seeds of a part: four clean networks, and four with a backdoor.
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("badnets", {"poison_rate": 0.1}),
    ("none", {}),
    ("blended", {"poison_rate": 0.1}),
    ("none", {}),
    ("badnets", {"poison_rate": 0.03}),
    ("none", {}),
    ("wanet", {"poison_rate": 0.2}),
)


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=",".join(SETTINGS))
    parser.add_argument("--part", choices=("tune", "test"), default="tune")
    parser.add_argument("--seeds", type=int, default=40, help="networks of each data set and part")
    parser.add_argument("--rows", type=Path, default=ROWS)
    arguments = parser.parse_args()
    for number in range(arguments.seeds):
        for name in arguments.data.split(","):
            seed = 2 * number + (arguments.part == "test")
            done = {(row["data"], row["seed"]) for row in rows(arguments.rows) if row["code"] == code()}
            if (name, seed) not in done:
                row = {"part": arguments.part, **judged(name, seed)}
                add(arguments.rows, row)
                print(json.dumps(row), flush=True)


def judged(name: str, seed: int) -> dict[str, Any]:
    """Train a network and return its row."""
    data, pool = few_classes(name, seed)
    run = Run.create(seed=seed, policy="fp32")
    model, truth = victim(name, data, seed, run)
    scores = judge(model, truth, data.test, run)
    images = draw_clean(pool, per_class=SETTINGS[name][3], seed=seed)
    clean = CleanData.split(images, augmentation=data.augmentation, seed=0)
    start = time.process_time()
    row: dict[str, Any] = {
        "data": name,
        "seed": seed,
        "classes": data.train.classes,
        "attack": truth.attack,
        "target": truth.target if truth.attack != "none" else None,
        "acc": scores.acc.value,
        "asr": scores.asr.value if scores.asr.total else None,
        "images": len(images),
        "code": code(),
    }
    try:
        form = form_for_checks(model, clean, replace(run, seed=0))
        report = scan(CHECK, model, clean, form=form, options={}, seed=0, device=run.device, precision="fp32")
    except UnbackdoorError as error:
        return {**row, "error": str(error), "seconds": time.process_time() - start}
    finding = report.findings[0] if report.findings else None
    return {
        **row,
        "verdict": report.verdict,
        "skipped": dict(report.skipped),
        "named": list(finding.classes) if finding else [],
        "statistic": finding.statistic if finding else "",
        "value": finding.value if finding else None,
        "p_value": finding.p_value if finding else None,
        "per_class": list(finding.per_class) if finding else [],
        "class_p_values": list(finding.class_p_values) if finding else [],
        "seconds": time.process_time() - start,
    }


def few_classes(name: str, seed: int) -> tuple[DataSet, Images]:
    """Return two to five classes of a data set, and the pool that a defender draws from."""
    whole = load_dataset(name)
    draws = torch.Generator().manual_seed(seed)
    counts = torch.bincount(whole.train.truth, minlength=whole.train.classes)
    number = seed // 2
    count = 2 + (number + number // len(ATTACKS)) % 4  # every attack meets every count
    candidates = (counts >= min(FEWEST_IMAGES, int(counts.max()) // 2)).nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=draws)[:count]].tolist()
    train, test = (_of_classes(part, chosen) for part in (whole.train, whole.test))
    judged_on, pool = reserve(test, fraction=0.5, seed=seed)
    return replace(whole, name=f"{name}-{seed}", train=train, test=judged_on), pool


def _of_classes(images: Images, chosen: list[int]) -> Images:
    rows = torch.isin(images.truth, torch.tensor(chosen)).nonzero().flatten()
    place = torch.full((images.classes,), -1)
    place[torch.tensor(chosen)] = torch.arange(len(chosen))
    names = tuple(images.class_names[k] for k in chosen)
    return Images(images.pixels[rows], place[images.truth[rows]], names, images.name)


def victim(name: str, data: DataSet, seed: int, run: Run) -> tuple[Classifier, AttackTruth]:
    """Train the network of a seed."""
    architecture, recipe, changes, _ = SETTINGS[name]
    attack, options = ATTACKS[seed // 2 % len(ATTACKS)]
    if attack != "none":
        options = {**options, "target": seed // 2 // len(ATTACKS) % data.train.classes}
    training = data.train
    truth = prepare(training, attack, options, seed=seed)
    model = build(
        architecture,
        input_shape=training.shape,
        class_names=training.class_names,
        mean=data.mean,
        std=data.std,
        seed=seed,
    )
    initialise(model, training)
    poisoned, truth = spread(training, truth)
    train(model, poisoned, recipe_named(recipe, **changes), run, augmentation=data.augmentation)
    return model.eval(), truth


def code() -> str:
    """Return the version of all code that a row depends on."""
    return script_version(Path(__file__), {})


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add(path: Path, row: dict[str, Any]) -> None:
    """Write a row in the place of an older one of the same network."""
    kept = [r for r in rows(path) if (r["data"], r["seed"]) != (row["data"], row["seed"])]
    with atomic_write(path) as draft:
        draft.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]))


if __name__ == "__main__":
    main()
