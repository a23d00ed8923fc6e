"""Do one cell: the function that every engine runs, here or on another machine.

A job and its answer are plain JSON. Artefacts are written into a folder of the worker's own and moved to
their address in one rename, so a reader sees all of a cell or nothing, and two workers that race on the
same cell do each other no harm.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unbackdoor.bench import steps
from unbackdoor.bench.cells import address
from unbackdoor.bench.isolate import Limits, call, log_of
from unbackdoor.bench.judge import der, judge_scan
from unbackdoor.bench.repairs import running_commit
from unbackdoor.bench.steps import scores_from
from unbackdoor.bench.store import artefact_folder
from unbackdoor.bench.victims import load_truth
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
                do = {"victim": _victim, "repair": _repair, "scan": _scan}[job["kind"]]
                answer = {"result": {**do(job, store, folder, logs), "commit": running_commit()}}
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
    before = scores_from(job["victim"]["scores"])
    tries = []
    # One try, or one for each choice of an oracle, of which the judge then keeps the best.
    for options in spec.get("choices", [spec["options"]]):
        worked = _confined("method_step", {**spec, "options": options}, job, victim, folder, logs)
        judged = call(f"{_STEPS}:judge_step", {**_task(job), "victim": str(victim)}, folder, _limits(job))
        logs.append(log_of(folder))
        after = scores_from(judged["scores"])
        tries.append({**worked, "scores": judged["scores"], "der": der(before, after), "options": options})
        if _best(tries) is tries[-1]:
            for name in (steps.REPAIRED, steps.REPAIRED.replace(".safetensors", ".json"), steps.EVIDENCE):
                (folder / name).replace(folder / f"best-{name}")
    for file in sorted(folder.glob("best-*")):
        file.replace(folder / file.name.removeprefix("best-"))
    best = dict(_best(tries))
    if "choices" not in spec:
        del best["options"]
    _publish(folder, artefact_folder(store / "artefacts", job["key"]))
    return {**best, "seconds": sum(one["seconds"] for one in tries)}


def _best(tries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first of the tries with the highest DER, or accuracy where there was no attack."""
    return max(tries, key=lambda one: one["scores"]["acc"] if one["der"] is None else one["der"])


def _scan(job: dict[str, Any], store: Path, folder: Path, logs: list[str]) -> dict[str, Any]:
    victim = artefact_folder(store / "artefacts", job["spec"]["victim"])
    told = _confined("scan_step", job["spec"], job, victim, folder, logs)
    judged = judge_scan(told["verdict"], told["classes"], load_truth(victim / steps.MODEL))
    _publish(folder, artefact_folder(store / "artefacts", job["key"]))
    return {**told, **judged}


def _confined(
    step: str,
    spec: Mapping[str, Any],
    job: dict[str, Any],
    victim: Path,
    folder: Path,
    logs: list[str],
) -> dict[str, Any]:
    """Run a method or a scanner in a confined process that is given a model, clean images and options."""
    store = Path(job["place"]["store"])
    drawn = {name: spec[name] for name in ("dataset", "data_sha256", "clean_images", "seed")}
    sample = store / "samples" / f"{address(drawn)}.safetensors"
    if not sample.exists():
        with _folder(store, uuid.uuid4().hex) as aside:
            call(f"{_STEPS}:sample_step", {**_task(job), "sample": str(sample)}, aside, _limits(job))
    shutil.copyfile(sample, folder / steps.SAMPLE)
    steps.hand_over(victim, folder)
    # What the method's process is told: no victim, no attack, no path to either.
    names = ("defense", "scanner", "options", "seed", "precision")
    told = {
        "spec": {name: spec[name] for name in names if name in spec},
        "place": {"device": job["place"].get("device", "cpu")},
    }
    try:
        return call(f"{_STEPS}:{step}", told, folder, _limits(job), private=store)
    finally:
        logs.append(log_of(folder))
        for name in (steps.SAMPLE, steps.MODEL, steps.MODEL.replace(".safetensors", ".json")):
            (folder / name).unlink(missing_ok=True)


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
