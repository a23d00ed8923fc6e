"""Screen images with every screener on backdoored networks, judge with their triggers, and recover triggers.

    python scripts/screening.py run [VICTIMS] [--images 500] [--clean 1000] [--triggered 100]
    python scripts/screening.py render

``run`` takes the networks of ``victims/cifar10-small-v1``. Each screener sees ``--clean`` clean test images
and ``--triggered`` of them with the trigger in one set, and the defender's clean images; screeners of
training sets see labels as well, the attacker's for triggered images. RNP's trigger recovery is tried
towards the class that its unlearned networks vote for, and judged by the success of the recovered trigger on
the whole test set. Rows go to results/screening.jsonl as they are made; those there are not made again.
``render`` writes docs/results/screening.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unbackdoor.attacks import AttackTruth
from unbackdoor.audit.unlearning import unlearn
from unbackdoor.bench.screening import judge_screening, resemblance
from unbackdoor.bench.victims import load_truth
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearned_inversion import success
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.registry import SCREENERS
from unbackdoor.report.words import duration, percent
from unbackdoor.types import Classifier, CleanData, Images

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "results" / "screening.jsonl", ROOT / "docs" / "results" / "screening.md"
RECOVERY = "trigger recovery"


def main() -> None:
    """Run or render."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = words.add_subparsers(dest="verb", required=True)
    work = verbs.add_parser("run")
    work.add_argument("victims", type=Path, nargs="?", default=ROOT / "victims" / "cifar10-small-v1")
    work.add_argument("--images", type=int, default=500)
    work.add_argument("--clean", type=int, default=1000)
    work.add_argument("--triggered", type=int, default=100)
    verbs.add_parser("render")
    told = words.parse_args()
    if told.verb == "run":
        run(told)
    render()


def run(told: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    data = load_dataset("cifar10")
    _, pool = reserve(data.train)
    clean = CleanData.split(
        draw_clean(pool, count=told.images, seed=0), augmentation=data.augmentation, seed=0
    )
    test = draw_clean(data.test, count=told.clean, seed=0)
    done = {(row["victim"], row["screener"]) for row in rows()}
    for file in sorted(told.victims.glob("*/model.safetensors")):
        folder = file.parent
        if load_truth(file).attack == "none":
            continue
        model, truth = load_model(file), load_truth(file)
        base = {"victim": folder.name, "attack": truth.attack, "target": truth.target, "images": told.images}
        for name in SCREENERS:
            if (folder.name, name) in done:
                continue
            labelled = "input labels" in SCREENERS[name].needs
            start, row = time.perf_counter(), {**base, "screener": name}

            def screened(images: Images, name: str = name, model: Classifier = model) -> Any:
                return caller.screen(name, model, clean, images, seed=0).scores

            try:
                scores = judge_screening(screened, truth, test, most=told.triggered, labelled=labelled)
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
    found = unlearned.recover_trigger().trigger
    seconds = time.perf_counter() - start
    rate = success(model, found, data.test, Run.create(seed=0))
    return {
        "voted": leader,
        "voted_target": leader == truth.target,
        "success": rate.value,
        "mask_l1": found.norms()["mask_l1"],
        **asdict(resemblance(found, truth, draw_clean(data.test, count=1000, seed=0))),
        "seconds": seconds,
    }


def rows() -> list[dict[str, Any]]:
    """Return the rows made so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines() if line]


def _add(row: dict[str, Any]) -> None:
    text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in [*rows(), row])
    with atomic_write(ROWS) as draft:
        draft.write_text(text, encoding="utf-8")
    print(json.dumps({k: row[k] for k in ("attack", "screener", "all", "success", "error") if k in row}))


def page() -> str:
    """Return the Markdown page."""
    made = sorted(rows(), key=lambda row: (row["attack"], row["screener"]))
    first = next(row for row in made if "triggered" in row)
    lines = [
        "# Screening images, and recovering triggers",
        "",
        "Made by `python scripts/screening.py render` from `results/screening.jsonl`; measured by `python "
        f"scripts/screening.py run`. The networks are those of `victims/cifar10-small-v1`; {first['images']} "
        f"clean images of the defender; {first['all']['clean']:,} clean test images and "
        f"{first['triggered']} triggered ones in one set. AUROC, average precision (AP), and TPR at 1 % FPR, "
        "against all clean images and, apart, against those of the target class, which are the hardest: they "
        "keep their class for good reasons. Rows without AP are older than it.",
        "",
        "| attack | screener | AUROC | AP | TPR at 1 % FPR | target class: AUROC | AP | TPR at 1 % FPR "
        "| time |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in made:
        if row["screener"] == RECOVERY:
            continue
        if "error" in row:
            lines.append(f"| {row['attack']} | {row['screener']} | {row['error']} | | | | | | |")
            continue
        cells = [row["attack"], row["screener"], *_cells(row["all"]), *_cells(row["target"])]
        lines.append("| " + " | ".join([*cells, duration(row["seconds"])]) + " |")
    lines += [
        "",
        "## Triggers recovered through unlearned networks",
        "",
        "Towards the class that the half-unlearned networks vote for, with the defender's images alone; "
        "success on the network itself, over test images of other classes. A mask of up to 1,024 pixels; "
        "its overlap (IoU) with the pixels that the attacker's trigger changes, and the cosine between the "
        "mean changes of an image by the two.",
        "",
        "| attack | voted class | is the target | success | mask (pixels) | IoU | cosine | time |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in made:
        if row["screener"] == RECOVERY:
            lines.append(
                f"| {row['attack']} | {row['voted']} | {'yes' if row['voted_target'] else 'no'} "
                f"| {percent(row['success'])} | {row['mask_l1']:.1f} | {_number(row, 'iou')} "
                f"| {_number(row, 'cosine')} | {duration(row['seconds'])} |"
            )
    return "\n".join(lines) + "\n"


def _cells(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["-", "-", "-"]
    return [f"{found['auroc']:.3f}", _number(found, "average_precision"), percent(found["tpr"])]


def _number(found: Mapping[str, float], name: str) -> str:
    return f"{found[name]:.3f}" if name in found else "-"


def render() -> None:
    """Write the page."""
    with atomic_write(PAGE) as draft:
        draft.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
