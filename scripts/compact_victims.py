"""Write exported victims again in half precision, measured anew, so that they can be given away.

    unbackdoor bench export zoo-v1 --victims exported
    python scripts/compact_victims.py exported victims/zoo-v1 --only 'badnets-*' --only 'none-*-seed?-*'

Weights are rounded to 16 bits and judged again. A victim whose ACC or ASR moves by more than a tenth of a
point is left out, and named. The record of each names the hashes of what is written here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.exchange import CELL, MODEL
from unbackdoor.bench.judge import Scores, judge
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.datasets import load_dataset
from unbackdoor.engine.run import Run
from unbackdoor.files import sha256_file, write_json
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier

MOST_CHANGE = 0.001  # of ACC and of ASR
Judge = Callable[[Classifier, AttackTruth, str], Scores]


def compact(folder: Path, target: Path, score: Judge) -> str:
    """Write a victim in half precision; return why it was not, or nothing.

    Args:
        folder: Of one exported victim.
        target: Folder that its folder is written into; one of the same name is replaced.
        score: Measures a model with the truth of its attack on the test images of the named data set.
    """
    record = json.loads((folder / CELL).read_text(encoding="utf-8"))
    draft = target / f".{folder.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        model = load_model(folder / MODEL)
        model.network.half()
        save_model(model, draft / MODEL, history=[{"step": "rounded to half precision"}])
        for file in folder.glob("model.truth.*"):
            shutil.copyfile(file, draft / file.name)
        scores = score(load_model(draft / MODEL), load_truth(draft / MODEL), record["spec"]["dataset"])
        if fault := _moved(record["result"]["scores"], scores.rates()):
            return fault
        hashes = {file.name: sha256_file(file) for file in sorted(draft.iterdir())}
        result = {**record["result"], "scores": scores.to_json()}
        write_json(draft / CELL, {**record, "result": result, "sha256": hashes})
        shutil.rmtree(target / folder.name, ignore_errors=True)
        draft.rename(target / folder.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return ""


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for name in ("acc", "asr"):
        if before[name] is not None and abs(before[name] - after[name]) > MOST_CHANGE:
            return f"its {name.upper()} moved from {before[name]:.4f} to {after[name]:.4f}"
    return ""


def main() -> int:
    """Write all that match, and say what was left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("exported", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="names of folders; may be repeated"
    )
    parser.add_argument("--data-root", type=Path, default=os.environ.get("UNBACKDOOR_DATA"))
    arguments = parser.parse_args()
    tests: dict[str, Any] = {}

    def score(model: Classifier, truth: AttackTruth, dataset: str) -> Scores:
        if dataset not in tests:
            tests[dataset] = load_dataset(dataset, root=arguments.data_root).test
        return judge(model, truth, tests[dataset], Run.create(seed=0))

    patterns = arguments.only or ["*"]
    folders = sorted({path for pattern in patterns for path in arguments.exported.glob(f"{pattern}/{CELL}")})
    left_out = 0
    for cell in folders:
        fault = compact(cell.parent, arguments.target, score)
        left_out += bool(fault)
        print(f"{cell.parent.name}: {'left out, ' + fault if fault else 'written'}", flush=True)
    size = sum(file.stat().st_size for file in arguments.target.rglob("*") if file.is_file())
    print(
        f"{len(folders) - left_out} of {len(folders)} victims, {size / 2**20:.1f} MiB in {arguments.target}"
    )
    return int(not folders or left_out == len(folders))


if __name__ == "__main__":
    sys.exit(main())
