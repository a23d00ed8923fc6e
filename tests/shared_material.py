"""Where the development material lies; tests that need it are skipped where it is absent."""

from __future__ import annotations

import os
from pathlib import Path


def shared_datasets() -> Path | None:
    """Return the folder of the data sets: UNBACKDOOR_DATA, else beside the repository; None if absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "datasets"
    for candidate in (os.environ.get("UNBACKDOOR_DATA"), beside):
        if candidate and (Path(candidate) / "cifar10" / "train.parquet").is_file():
            return Path(candidate)
    return None


def shared_checkpoints() -> list[Path]:
    """Return other people's checkpoints of the development material; empty where it is absent."""
    datasets = shared_datasets()
    return sorted(datasets.parent.glob("checkpoints/*/*.pth")) if datasets else []
