"""Repairs: one defense on one victim with one defender's sample, measured by the judge."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import Scores, der, judge
from unbackdoor.data.datasets import DataSet
from unbackdoor.engine.caller import run as call
from unbackdoor.engine.run import Run
from unbackdoor.errors import UnbackdoorError
from unbackdoor.types import Classifier, CleanData


def repair_and_judge(
    defense: str,
    model: Classifier,
    truth: AttackTruth,
    before: Scores,
    clean: CleanData,
    data: DataSet,
    run: Run,
    *,
    preset: str | None = None,
) -> dict[str, Any]:
    """Run a defense through the trusted caller and measure what came back.

    Returns:
        The measured columns of a row: ``acc``, ``asr``, ``ra``, ``der``, ``seconds``, ``flags``, ``error``.
        A defense that failed leaves the rates empty and fills ``error``.
    """
    flags = ("selected on the fitting images",) if clean.select_is_fit else ()
    try:
        repaired = call(
            defense,
            model,
            clean,
            preset=preset,
            seed=run.seed,
            device=run.device,
            precision=run.precision.name,
            progress=run.show,
        )
    except UnbackdoorError as error:
        return {"flags": flags, "error": f"{type(error).__name__}: {error}"}
    after = judge(repaired.model.to(run.device), truth, data.test, run)
    return {
        **after.rates(),
        "der": der(before, after),
        "seconds": round(repaired.seconds, 3),
        "flags": flags,
        "error": None,
    }


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 if sys.platform == "darwin" else 1024) / (1024 if sys.platform == "darwin" else 1), 1)


def describe_device(run: Run) -> str:
    """Return the device in words, with threads and precision."""
    import torch

    if run.device.type == "cuda":
        return f"{torch.cuda.get_device_name(run.device)}, {run.precision.name}"
    return f"{cpu_name()}, {torch.get_num_threads()} thread(s), {run.precision.name}"


def cpu_name() -> str:
    """Return the processor's name."""
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name")
    return str(name or platform.processor() or platform.machine())


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with ``+`` where files differ from it; empty outside of one."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
