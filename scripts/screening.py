"""Screen images with every screener on backdoored networks, judge with their triggers, and recover triggers.

    python scripts/screening.py [VICTIMS] [--images 500] [--clean 1000] [--triggered 100]

It takes the networks of ``victims/cifar10-small-v1``. Each screener sees ``--clean`` clean test images
and ``--triggered`` of them with the trigger in one set, and the defender's clean images; screeners of
training sets see labels as well, the attacker's for triggered images. RNP's trigger recovery is tried
towards the class that its unlearned networks vote for, and judged by the success of the recovered trigger on
the whole test set. Rows go to results/screening.jsonl as they are made; those there are not made again.
scripts/results.py makes docs/results/screening.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unbackdoor.attacks import AttackTruth
from unbackdoor.audit.unlearning import unlearn
from unbackdoor.bench.code_version import script_version
from unbackdoor.bench.screening import judge_screening, resemblance
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearned_inversion import success
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.registry import SCREENERS
from unbackdoor.types import Classifier, CleanData, Images

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "screening.jsonl"
RECOVERY = "trigger recovery"


def main() -> None:
    """Parse and run."""
    work = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    work.add_argument("victims", type=Path, nargs="?", default=ROOT / "victims" / "cifar10-small-v1")
    work.add_argument("--images", type=int, default=500)
    work.add_argument("--clean", type=int, default=1000)
    work.add_argument("--triggered", type=int, default=100)
    run(work.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    data = load_dataset("cifar10")
    _, pool = reserve(data.train)
    clean = CleanData.split(
        draw_clean(pool, count=arguments.images, seed=0), augmentation=data.augmentation, seed=0
    )
    test = draw_clean(data.test, count=arguments.clean, seed=0)
    done = {(row["victim"], row["screener"]) for row in rows()}
    for file in sorted(arguments.victims.glob("*/model.safetensors")):
        folder = file.parent
        if load_truth(file).attack == "none":
            continue
        model, truth = load_model(file), load_truth(file)
        base = {
            "victim": folder.name,
            "attack": truth.attack,
            "target": truth.target,
            "images": arguments.images,
        }
        for name in SCREENERS:
            if (folder.name, name) in done:
                continue
            labelled = "input labels" in SCREENERS[name].needs
            start, row = time.perf_counter(), {**base, "screener": name}

            def screened(images: Images, name: str = name, model: Classifier = model) -> Any:
                return caller.screen(name, model, clean, images, seed=0).scores

            try:
                scores = judge_screening(screened, truth, test, most=arguments.triggered, labelled=labelled)
                row |= scores.to_json()
            except UnbackdoorError as error:
                row["error"] = str(error)
            _add({**row, "seconds": time.perf_counter() - start})
        if (folder.name, RECOVERY) not in done and truth.target is not None:
            _add({**base, "screener": RECOVERY, **_recovered(model, clean, data, truth)})


def _recovered(model: Classifier, clean: CleanData, data: DataSet, truth: AttackTruth) -> dict[str, Any]:
    start = time.perf_counter()
    unlearned = unlearn(model, clean, seed=0)
    leader = unlearned.exposure.leader()
    trigger = unlearned.recover_trigger().trigger
    seconds = time.perf_counter() - start
    rate = success(model, trigger, data.test, Run.create(seed=0))
    return {
        "voted": leader,
        "voted_target": leader == truth.target,
        "success": rate.value,
        "mask_l1": trigger.norms()["mask_l1"],
        **asdict(resemblance(trigger, truth, draw_clean(data.test, count=1000, seed=0))),
        "seconds": seconds,
    }


def rows() -> list[dict[str, Any]]:
    """Return the rows made so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines() if line]


def _add(row: dict[str, Any]) -> None:
    row = {**row, "code": script_version(Path(__file__), row)}
    text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in [*rows(), row])
    with atomic_write(ROWS) as draft:
        draft.write_text(text, encoding="utf-8")
    print(json.dumps({k: row[k] for k in ("attack", "screener", "all", "success", "error") if k in row}))


if __name__ == "__main__":
    main()
