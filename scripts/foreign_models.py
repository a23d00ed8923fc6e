"""Scan and repair backdoored models that other people published, and judge with their own triggers.

    python scripts/foreign_models.py CHECKPOINTS [--images 500] [--only ibau] [--methods rnp,ft]

Every model is opened from its file and the images alone, as ``unbackdoor scan`` does, scanned, and repaired
with every method; ACC, ASR and RA are measured with the trigger that its publisher describes, which only
the judge knows. Rows go to results/foreign-models.jsonl as they are made; those there are not made again.
scripts/results.py makes docs/results/foreign-models.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbackdoor.audit.json_records import audit_json
from unbackdoor.audit.scanning import scan
from unbackdoor.bench.code_version import script_version
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write
from unbackdoor.metrics import agreement, defense_effectiveness
from unbackdoor.opening.open_model import open_model
from unbackdoor.types import Classifier, CleanData, Images

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "results" / "foreign-models.jsonl"
METHODS = ("ft", "fp", "random_prune", "rnp", "awm", "ims", "tac", "neural_cleanse")
Stamp = Callable[[Tensor], Tensor]


def main() -> None:
    """Parse and run."""
    work = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    work.add_argument("folder", type=Path)
    work.add_argument("--data", default="cifar10")
    work.add_argument("--images", type=int, default=500)
    work.add_argument("--only", default="")
    work.add_argument("--methods", default=",".join(METHODS))
    work.add_argument("--budget", type=float, default=None)
    run(work.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    data = load_dataset(arguments.data)
    _, pool = reserve(data.train)
    images = draw_clean(pool, count=arguments.images, seed=0)
    done = {(r["model"], r["what"], r.get("method")) for r in rows()}
    context = Run.create(seed=0)
    for card_file in sorted(arguments.folder.glob("*/card.json")):
        name = card_file.parent.name
        if arguments.only not in name:
            continue
        card = json.loads(card_file.read_text(encoding="utf-8"))
        model, opened = _opened(card_file.parent / card["file"], images, context)
        if model is None:
            _add({"model": name, "what": "open", "error": opened})
            continue
        target, stamp = card["truth"]["target"], _stamp(card_file.parent, card["truth"]["trigger"])
        before = _judge(model, stamp, target, data.test, context)
        base = {
            "model": name,
            "target": target,
            "attack": card["truth"]["attack"],
            "images": arguments.images,
        }
        clean = CleanData.split(images, augmentation=data.augmentation, seed=0)
        if (name, "scan", None) not in done:
            audit = scan(model, clean, budget=arguments.budget)
            record = audit_json(audit, model.class_names)
            _add(
                {
                    **base,
                    "what": "scan",
                    "opened": opened,
                    **{f"{k}_before": v for k, v in before.items()},
                    "verdict": record["verdict"],
                    "classes": [c["index"] for c in record["classes"]],
                    "reasons": record["reasons"],
                    "checks": [
                        {
                            "check": c["check"],
                            "status": c["status"],
                            "p_value": c["p_value"],
                            "adjusted": c["adjusted_p_value"],
                            "strongest": [k["index"] for k in c["classes"]],
                            "seconds": c["seconds"],
                        }
                        for c in record["checks"]
                    ],
                    "triggers": record["triggers"],
                    "seconds": record["seconds"],
                }
            )
        for method in filter(None, arguments.methods.split(",")):
            if (name, "purify", method) in done:
                continue
            row = {
                **base,
                "what": "purify",
                "method": method,
                **{f"{k}_before": v for k, v in before.items()},
            }
            start = time.perf_counter()
            try:
                repaired = caller.run(method, model, clean, seed=0).model
                after = _judge(repaired, stamp, target, data.test, context)
                der = defense_effectiveness(
                    acc_before=before["acc"], acc=after["acc"], asr_before=before["asr"], asr=after["asr"]
                )
                row |= {**after, "der": der}
            except UnbackdoorError as error:
                row["error"] = str(error)
            _add({**row, "seconds": time.perf_counter() - start})


def _opened(path: Path, images: Images, surroundings: Run) -> tuple[Classifier | None, Any]:
    try:
        opened = open_model(path, images=images, run=surroundings)
    except UnbackdoorError as error:
        return None, str(error)
    return opened.model, opened.provenance.to_dict()


def _stamp(folder: Path, words: str) -> Stamp:
    """Return the trigger that a card describes, on pixels in [0, 1]."""
    if "white square at rows and columns 27..30" in words:

        def square(pixels: Tensor) -> Tensor:
            out = pixels.clone()
            out[..., 27:31, 27:31] = 1.0
            return out

        return square
    if "pasted at rows and columns 24..28" in words:
        with Image.open(folder / words.split()[0]) as picture:
            small = picture.convert("RGB").resize((5, 5), Image.Resampling.BILINEAR)
        patch = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255  # (3, 5, 5)

        def paste(pixels: Tensor) -> Tensor:
            out = pixels.clone()
            out[..., 24:29, 24:29] = patch
            return out

        return paste
    if words.startswith("clip(x + "):
        with Image.open(folder / words.removeprefix("clip(x + ").split(" ")[0]) as picture:
            mark = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        return lambda pixels: (pixels + mark).clamp(0, 1)
    raise SystemExit(f"the trigger is not known: {words}")


def _judge(model: Classifier, stamp: Stamp, target: int, test: Images, run: Run) -> dict[str, float]:
    def stamped(pixels: Tensor) -> Tensor:
        return (stamp(pixels.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8)

    acc = agreement(predict(model, test, run).argmax(1), test.truth)
    others = test.subset((test.truth != target).nonzero().flatten())
    predicted = predict(model, others, run, transform=stamped).argmax(1)
    asr, ra = agreement(predicted, torch.full_like(predicted, target)), agreement(predicted, others.truth)
    return {"acc": acc.value, "asr": asr.value, "ra": ra.value}


def rows() -> list[dict[str, Any]]:
    """Return the rows made so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines() if line]


def _add(row: dict[str, Any]) -> None:
    row = {**row, "code": script_version(Path(__file__), row)}
    existing = rows()
    with atomic_write(ROWS) as draft:
        draft.write_text(
            "".join(json.dumps(r, allow_nan=False) + "\n" for r in [*existing, row]), encoding="utf-8"
        )
    print(json.dumps({k: row.get(k) for k in ("model", "what", "method", "verdict", "acc", "asr", "error")}))


if __name__ == "__main__":
    main()
