"""Do one cell: the function that every engine runs, here or on another machine.

A job and its answer are plain JSON. Artefacts are written into a folder of the worker's own and moved to
their address in one rename, so a reader sees all of a cell or nothing, and two workers that race on the
same cell do each other no harm.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unbackdoor.bench import steps
from unbackdoor.bench.cells import address
from unbackdoor.bench.isolate import Limits, call, log_of
from unbackdoor.bench.judge import der
from unbackdoor.bench.steps import scores_from
from unbackdoor.bench.store import artefact_folder
from unbackdoor.errors import UnbackdoorError

_STEPS = "unbackdoor.bench.steps"


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Do a cell and return ``{"result": ...}`` or ``{"error": ...}``, with seconds and the end of its log.

    Args:
        job: ``key``, ``kind``, ``spec``, ``victim`` (the result of the parent, or None), ``work`` (name of
            the folder to work in) and ``place``: the store's folder, data root, cache, device and limits.
    """
    start = time.perf_counter()
    store = Path(job["place"]["store"])
    logs: list[str] = []
    answer: dict[str, Any]
    try:
        with _folder(store, job["work"]) as folder:
            try:
                do = _victim if job["kind"] == "victim" else _repair
                answer = {"result": do(job, store, folder, logs)}
            finally:
                logs.append(log_of(folder))
    except (UnbackdoorError, OSError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    return {**answer, "seconds": time.perf_counter() - start, "log": "\n".join(filter(None, logs))[-20_000:]}


def _victim(job: dict[str, Any], store: Path, folder: Path, logs: list[str]) -> dict[str, Any]:
    checkpoint = store / "checkpoints" / job["key"]
    task = {**_task(job), "checkpoint": str(checkpoint)}
    result = call(f"{_STEPS}:train_step", task, folder, _limits(job))
    logs.append(log_of(folder))
    _publish(folder, artefact_folder(store / "artefacts", job["key"]))
    return result


def _repair(job: dict[str, Any], store: Path, folder: Path, logs: list[str]) -> dict[str, Any]:
    spec = job["spec"]
    victim = artefact_folder(store / "artefacts", spec["victim"])
    drawn = {name: spec[name] for name in ("dataset", "data_sha256", "clean_images", "seed")}
    sample = store / "samples" / f"{address(drawn)}.safetensors"
    if not sample.exists():
        with _folder(store, uuid.uuid4().hex) as aside:
            call(f"{_STEPS}:sample_step", {**_task(job), "sample": str(sample)}, aside, _limits(job))
    shutil.copyfile(sample, folder / steps.SAMPLE)
    steps.hand_over(victim, folder)
    # What the method's process is told: no victim, no attack, no path to either.
    told = {
        "spec": {name: spec[name] for name in ("defense", "options", "seed", "precision")},
        "place": {"device": job["place"].get("device", "cpu")},
    }
    worked = call(f"{_STEPS}:method_step", told, folder, _limits(job), private=store)
    logs.append(log_of(folder))
    task = {**_task(job), "victim": str(victim)}
    judged = call(f"{_STEPS}:judge_step", task, folder, _limits(job))
    before, after = scores_from(job["victim"]["scores"]), scores_from(judged["scores"])
    logs.append(log_of(folder))
    (folder / steps.SAMPLE).unlink()
    for name in (steps.MODEL, steps.MODEL.replace(".safetensors", ".json")):
        (folder / name).unlink()
    _publish(folder, artefact_folder(store / "artefacts", job["key"]))
    return {**worked, "scores": judged["scores"], "der": der(before, after)}


def _task(job: dict[str, Any]) -> dict[str, Any]:
    return {"spec": job["spec"], "place": job["place"]}


def _limits(job: dict[str, Any]) -> Limits:
    return Limits(**job["place"]["limits"])


@contextmanager
def _folder(store: Path, name: str) -> Iterator[Path]:
    """Yield a new folder inside the store, and remove it at the end if it is still there."""
    folder = store / "work" / name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try that was pre-empted
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Move what a cell leaves to its address; the first of two equal cells wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in ("task.json", "result.json", steps.PROGRESS):
        (folder / name).unlink(missing_ok=True)
    if target.exists():
        return
    with suppress(FileExistsError):
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():
                raise
