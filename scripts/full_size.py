"""Audit networks of full size once each: 224 pixels, 1,000 classes, a budget of minutes.

    pip install ".[all,hf]" && python scripts/full_size.py [--only swin] [--budget 120]

Networks of transformers with random weights, as folders that the library itself writes: what is asked is
whether an audit opens them, keeps to its time and says what it left out. Nothing is planted, and nothing can
be found in weights that know nothing. Rows go to results/full-size.jsonl as they are made; those there are
not made again. scripts/results.py makes docs/results/full-size.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from unbackdoor.bench.code_version import script_version
from unbackdoor.bench.machine import describe_device
from unbackdoor.engine.run import Run
from unbackdoor.files import atomic_write

ROWS = Path(__file__).parents[1] / "results" / "full-size.jsonl"
SIDE, CLASSES, IMAGES = 224, 1000, 200
B0 = {"image_size": SIDE, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
# Prefix of the classes in transformers -> what its configuration says beside the defaults, which are the base
# or the tiny network of the paper.
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet": {}, "RegNet": {}, "Bit": {}, "EfficientNet": B0, "MobileNetV1": {}, "MobileNetV2": {},
    "ConvNext": {}, "ConvNextV2": {}, "ViT": {}, "DeiT": {}, "Beit": {}, "Swin": {}, "Swinv2": {},
    "Dinov2": {}, "PoolFormer": {}, "Levit": {},
}  # fmt: skip


def main() -> None:
    """Audit what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of each audit")
    arguments = parser.parse_args()
    for name in NETWORKS:
        done = {(row["network"], row["budget"]) for row in rows()}
        if arguments.only.lower() in name.lower() and (name, arguments.budget) not in done:
            add(audited(name, arguments.budget))


def audited(name: str, budget: float) -> dict[str, Any]:
    """Return the row of one network."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        parameters = write_network(name, folder / "model")
        write_images(folder / "images.npz")
        command = [sys.executable, "-m", "unbackdoor", "audit", folder / "model"]
        command += ["--data", folder / "images.npz", "--budget", f"{budget:g}s", "--json", "--quiet"]
        start = time.monotonic()
        with (folder / "out.json").open("wb") as out, (folder / "err.txt").open("wb") as err:
            process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        code = os.waitstatus_to_exitcode(status)
        said = json.loads((folder / "out.json").read_text(encoding="utf-8") or "{}")
    error = said.get("error")
    return {
        "network": name,
        "parameters": parameters,
        "side": SIDE,
        "classes": CLASSES,
        "images": IMAGES,
        "budget": budget,
        "seconds": round(seconds, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
        "exit_code": code,
        "verdict": said.get("verdict"),
        "checks_done": said.get("checks_done"),
        "checks_planned": said.get("checks_planned"),
        "steps": [{k: step[k] for k in ("step", "status", "seconds")} for step in said.get("steps", [])],
        "seconds_per_image": said.get("seconds_per_image"),
        "error": f"{error['type']}: {error['message']}" if error else None,
        "device": describe_device(Run.create()),
    }


def write_network(name: str, folder: Path) -> int:
    """Write a folder as the library does, and return the number of parameters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **NETWORKS[name])
    network = getattr(transformers, f"{name}ForImageClassification")(config)
    network.save_pretrained(folder)
    scale = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale), encoding="utf-8")
    return sum(parameter.numel() for parameter in network.parameters())


def write_images(file: Path) -> None:
    """Write smooth coloured pictures, of which every fifth class has one."""
    coarse = torch.rand(IMAGES, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    images = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(file, images=images, labels=np.arange(IMAGES) * (CLASSES // IMAGES))


def rows() -> list[dict[str, Any]]:
    """Return what was measured before."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines if line]


def add(row: dict[str, Any]) -> None:
    """Append a row; it is of the code of all checks."""
    row = {**row, "code": script_version(Path(__file__), {"what": "scan"})}
    with atomic_write(ROWS) as draft:
        draft.write_text("".join(json.dumps(r, allow_nan=False) + "\n" for r in [*rows(), row]), "utf-8")
    print(json.dumps({k: row[k] for k in ("network", "seconds", "verdict", "checks_done", "error")}))


if __name__ == "__main__":
    main()
