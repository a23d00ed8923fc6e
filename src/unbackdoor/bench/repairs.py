"""Repairs: one defense on one victim with one defender's sample, measured by the judge."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from unbackdoor import __version__
from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import Scores, der, judge
from unbackdoor.data.datasets import DataSet
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import run as call
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


@cache
def running_commit() -> str:
    """Return the commit of the code that runs; where no commit can be determined, the version of the package.

    It is never empty, so that a result without one can only be of a time before results carried theirs.
    """
    return commit_of(Path(__file__).parent, tracked=Path(__file__)) or f"v{__version__}"


def commit_of(folder: Path, *, tracked: Path | None = None) -> str:
    """Return the commit of a checkout, with ``+`` where its source differs from it; empty outside of one.

    Args:
        folder: Inside the checkout.
        tracked: A file that must belong to it, because an installed package may lie in somebody's checkout.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], check=True, cwd=folder, capture_output=True, text=True, timeout=120
        )
        return done.stdout.strip()

    try:
        if tracked is not None:
            git("ls-files", "--error-unmatch", str(tracked))
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ":(top)src") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""
