"""The first table: five victims on CIFAR-10, every foundation defense, 500 clean images, two samples.

    python scripts/foundation.py run [--only badnets] [--runs runs/foundation]
    python scripts/foundation.py render

``train`` trains the victims that are missing, ``run`` also repairs what is missing. Both can be killed and
started again at any time; several processes may share the work, one attack each. ``render`` collects the
rows into ``results/foundation.jsonl`` and writes ``docs/results/foundation.md`` from them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from unbackdoor.bench.machine import describe_device, peak_memory_mb
from unbackdoor.bench.repairs import commit_of, repair_and_judge
from unbackdoor.bench.results import WEAK, summarise
from unbackdoor.bench.rows import Row, read_rows, write_rows
from unbackdoor.bench.victims import (
    ATTACK_TOOK,
    VictimSpec,
    load_victim,
    save_victim,
    train_victim,
)
from unbackdoor.cli.progress import Display
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import RECIPES
from unbackdoor.types import CleanData

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "foundation.jsonl"
PAGE = ROOT / "docs" / "results" / "foundation.md"
ATTACKS = ("badnets", "blended", "wanet", "sig", "none")
DEFENSES = (
    ("none", "default"),
    ("ft", "default"),
    ("random_prune", "default"),
    ("fp", "default"),
    ("rnp", "default"),
    ("rnp", "reference"),
)
ARCHITECTURE, WIDTH, RECIPE = "preact_resnet18", 16, "plain"
CLEAN_IMAGES, DEFENDER_SEEDS, VICTIM_SEED = 500, (0, 1), 0


def train_attack(attack: str, runs: Path, threads: int) -> Path:
    """Train one victim if it is missing and return its file."""
    torch.set_num_threads(threads)
    file = runs / f"{attack}.safetensors"
    if not file.with_suffix(".truth.json").exists():
        with Display() as display:
            run = Run.create(seed=VICTIM_SEED, progress=display)
            data = load_dataset("cifar10", progress=display)
            recipe = RECIPES[RECIPE]
            spec = VictimSpec(
                "cifar10", f"{ARCHITECTURE}[width={WIDTH}]", recipe, RECIPE, attack, seed=VICTIM_SEED
            )
            start = time.perf_counter()
            checkpoint = file.with_suffix(".checkpoint")
            model, truth = train_victim(spec, data, run, checkpoint=checkpoint, label=f"training {attack}")
            seconds = round(time.perf_counter() - start, 1)
            history: list[dict[str, Any]] = [
                {
                    "step": "trained",
                    "recipe": RECIPE,
                    **recipe.model_dump(),
                    "seconds": seconds,
                    "seed": VICTIM_SEED,
                }
            ]
            save_victim(model, truth, file, history=history)
    return file


def run_attack(attack: str, runs: Path, threads: int) -> None:
    """Train one victim if it is missing, then fill in its missing rows."""
    file = train_attack(attack, runs, threads)
    with Display() as display:
        run = Run.create(seed=VICTIM_SEED, progress=display)
        data = load_dataset("cifar10", progress=display)
        model, truth, before = load_victim(file, data, run)
        _, pool = reserve(data.train)
        rows_file = runs / f"{attack}.jsonl"
        rows = read_rows(rows_file)
        for seed in DEFENDER_SEEDS:
            clean = CleanData.split(
                draw_clean(pool, count=CLEAN_IMAGES, seed=seed), augmentation=data.augmentation, seed=seed
            )
            for defense, preset in DEFENSES:
                row = Row(
                    suite="foundation",
                    dataset=data.name,
                    architecture=ARCHITECTURE,
                    width=WIDTH,
                    recipe=RECIPE,
                    attack=attack,
                    poison_rate=float(truth.options["poison_rate"]),
                    target=truth.target,
                    victim_seed=VICTIM_SEED,
                    defense=defense,
                    preset=preset,
                    clean_images=CLEAN_IMAGES,
                    defender_seed=seed,
                    acc_before=before.rates()["acc"],
                    asr_before=before.rates()["asr"],
                    ra_before=before.rates()["ra"],
                    device=describe_device(run),
                    commit=commit_of(ROOT),
                )
                if row.key() in {done.key() for done in rows}:
                    continue
                repair_run = Run.create(seed=seed, progress=display)
                measured = repair_and_judge(
                    defense, model, truth, before, clean, data, repair_run, preset=preset
                )
                if before.asr.total and before.asr.value < ATTACK_TOOK:
                    measured["flags"] = (*measured["flags"], WEAK)
                rows.append(row.model_copy(update={**measured, "peak_mb": peak_memory_mb()}))
                write_rows(rows_file, rows)
                print(f"{attack} {defense} {preset} seed {seed}: {measured}")


def collect(runs: Path) -> list[Row]:
    """Put the rows of all attacks into one file, in the order of the tables above."""
    rows = [row for attack in ATTACKS for row in read_rows(runs / f"{attack}.jsonl")]
    if rows:
        write_rows(RESULTS, rows)
    return read_rows(RESULTS)


def render(rows: list[Row]) -> str:
    """Return the page that shows every row, failed ones included."""
    lines = [
        "# The foundation table",
        "",
        *wrap(
            "Made from `results/foundation.jsonl` by `python scripts/foundation.py render`; made again from "
            "nothing by `python scripts/foundation.py run` (CIFAR-10 under the data root). Do not edit.",
            width=110,
        ),
        "",
        *wrap(
            f"CIFAR-10, {ARCHITECTURE} of width {WIDTH}, recipe `{RECIPE}` ({_recipe_words()}), poison rate "
            f"10 %, target 0, {CLEAN_IMAGES} clean images that no victim was trained on, two samples. "
            "ACC on the 10,000 test images; ASR and RA on the 9,000 of other classes than the target, "
            "triggered. DER is 0.5 where nothing was gained or lost. Numbers in percent, DER apart; one line "
            "for each sample of the defender, nothing left out.",
            width=110,
        ),
        "",
    ]
    for attack in ATTACKS:
        own = [row for row in rows if row.attack == attack]
        if not own:
            continue
        first = own[0]
        before = f"ACC {_percent(first.acc_before)}"
        if first.asr_before is not None:
            before += f", ASR {_percent(first.asr_before)}, RA {_percent(first.ra_before)}"
        lines += [f"## {attack}", "", f"Before: {before}.", ""]
        lines += ["| defense | preset | seed | ACC | ASR | RA | DER | seconds | flags, error |"]
        lines += ["|---|---|---|---:|---:|---:|---:|---:|---|"]
        for row in own:
            notes = "; ".join([*row.flags, *([row.error] if row.error else [])])
            der = "" if row.der is None else f"{row.der:.3f}"
            seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
            cells = [row.defense, row.preset, str(row.defender_seed), _percent(row.acc), _percent(row.asr)]
            lines.append("| " + " | ".join([*cells, _percent(row.ra), der, seconds, notes]) + " |")
        lines.append("")
    lines += _means(rows)
    devices, commits = sorted({row.device for row in rows}), sorted({row.commit for row in rows})
    lines += [f"Measured on: {'; '.join(devices)}. Commit: {', '.join(commits)}.", ""]
    return "\n".join(lines)


def _means(rows: list[Row]) -> list[str]:
    """Return the table of means over the attacks that took, and the accuracy that the clean model lost."""
    lines = [
        "## Over all attacks that took",
        "",
        "Mean and worst case over attacks and samples; the last column is the mean loss on the clean model.",
        "",
        "| defense | preset | rows | ACC lost | ASR | worst ASR | RA | DER | ACC lost, clean model |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {summary.defense: summary for summary in summarise(rows)}
    for defense, preset in DEFENSES:
        summary = found.get(defense if preset == "default" else f"{defense}:{preset}")
        if summary is None or not summary.asr.n:
            continue
        clean = summary.acc_lost_clean
        cells = [
            defense,
            preset,
            str(summary.asr.n),
            _percent(summary.acc_lost.value),
            _percent(summary.asr.value),
            _percent(summary.asr.worst),
            _percent(summary.ra.value),
            f"{summary.der.value:.3f}",
            _percent(clean.value) if clean.n else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _recipe_words() -> str:
    recipe = RECIPES[RECIPE]
    return (
        f"{recipe.epochs} epochs, {recipe.schedule}, lr {recipe.lr}, batch {recipe.batch_size}, "
        f"weight decay {recipe.weight_decay}, plain cross-entropy"
    )


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f}"


def main() -> None:
    """Parse the arguments and do the work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "run", "render"))
    parser.add_argument("--only", action="append", choices=ATTACKS, help="an attack; may be repeated")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "foundation", help="folder of the victims"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    for attack in arguments.only or ATTACKS:
        if arguments.action == "train":
            train_attack(attack, arguments.runs, arguments.threads)
        elif arguments.action == "run":
            run_attack(attack, arguments.runs, arguments.threads)
    rows = collect(arguments.runs)
    if arguments.action != "train" and rows:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(render(rows), encoding="utf-8")
        print(f"wrote {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
