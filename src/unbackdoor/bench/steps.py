"""The steps of a cell, each run in a process of its own; tasks and answers are plain JSON.

The method's step is handed a model, clean images and options. It is the only step that runs a method, and
the only one that is confined; the truth is read by the two others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import Scores, judge
from unbackdoor.bench.repairs import describe_device, peak_memory_mb
from unbackdoor.bench.victims import (
    VictimSpec,
    load_truth,
    save_victim,
    train_victim,
)
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.files import atomic_write, finite, write_json
from unbackdoor.metrics import Rate
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import CleanData, Images

T = TypeVar("T")
MODEL, SAMPLE, REPAIRED, PROGRESS = (
    "model.safetensors",
    "clean.safetensors",
    "repaired.safetensors",
    "progress.json",
)
EVIDENCE, ARTEFACTS = "evidence.json", "artefacts.safetensors"
_REPORT_SECONDS = 2.0


class Reporter:
    """Writes how far a step has come into its folder, for the driver's live table.

    Args:
        folder: Of the step.
        images_a_step: Training images of one item of a loop, 0 where that is not known.
    """

    def __init__(self, folder: Path, images_a_step: int = 0) -> None:
        self._file = folder / PROGRESS
        self._images = images_a_step
        self._last = 0.0

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield the items and report now and then."""
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - self._last > _REPORT_SECONDS:
                self._last = now
                # A plain overwrite: the reader forgives half a file, and nothing is kept. Nor does a step
                # fail because there is no room to say how far it is.
                with suppress(OSError):
                    self._file.write_text(
                        json.dumps({"label": label, "done": done, "total": total}), encoding="utf-8"
                    )
            yield item


def _data(task: Mapping[str, Any]) -> DataSet:
    place = task["place"]
    root = Path(place["data_root"]) if place.get("data_root") else None
    cache = Path(place["cache"]) if place.get("cache") else None
    return load_dataset(str(task["spec"]["dataset"]), root=root, cache=cache)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and its wall seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _run(task: Mapping[str, Any], folder: Path) -> Run:
    place, spec = task["place"], task["spec"]
    return Run.create(
        seed=int(spec["seed"]),
        device=place.get("device", "cpu"),
        policy=spec["precision"],
        progress=Reporter(folder, spec.get("recipe", {}).get("batch_size", 0)),
    )


def train_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a victim, measure it, and leave its weights, card and truth in the folder."""
    spec, run = task["spec"], _run(task, folder)
    data, loading = _timed(lambda: _data(task))
    wanted = VictimSpec(
        dataset=data.name,
        architecture=spec["architecture"],
        recipe=Recipe.parse(spec["recipe"], subject="the recipe"),
        attack=spec["attack"],
        options=spec["options"],
        seed=spec["seed"],
    )
    (model, truth), seconds = _timed(
        lambda: train_victim(
            wanted,
            data,
            run,
            checkpoint=Path(task["checkpoint"]),
            bases=Path(task["place"]["store"]) / "bases",
        )
    )
    scores, judging = _timed(lambda: judge(model, truth, data.test, run))
    save_victim(model, truth, folder / MODEL, history=[{"step": "trained", "recipe": spec["recipe"]}])
    return {
        "scores": scores.to_json(),
        "timings": {"data": loading, "train": seconds, "judge": judging},
        "seconds": seconds,
        "peak_mb": peak_memory_mb(),
        "device": describe_device(run),
    }


def sample_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw a defender's clean images and write them, without anything that says where they are from."""
    spec, data = task["spec"], _data(task)
    _, pool = reserve(data.train)
    drawn = draw_clean(pool, count=spec["clean_images"], seed=spec["seed"])
    facts = {"class_names": json.dumps(drawn.class_names), "augmentation": data.augmentation}
    with atomic_write(folder / SAMPLE) as draft:
        save_file({"pixels": drawn.pixels, "labels": drawn.truth}, draft, metadata=facts)
    return {"images": len(drawn)}


def hand_over(victim: Path, folder: Path) -> None:
    """Put the weights of a victim into a method's folder, without their history and their name."""
    model = load_model(victim / MODEL)
    model.origin = ""
    save_model(model, folder / MODEL)


def method_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a defense on the model and the clean images of its folder, and leave the repaired model there."""
    spec, run, clean = task["spec"], _run(task, folder), _owned(folder, task)
    repaired = call(
        spec["defense"],
        load_model(folder / MODEL),
        clean,
        options=spec["options"],
        seed=run.seed,
        device=run.device,
        precision=run.precision.name,
        progress=run.show,
    )
    save_model(repaired.model, folder / REPAIRED, history=[dict(repaired.method)])
    write_json(folder / EVIDENCE, dict(repaired.evidence))
    return _cost(repaired.seconds, clean, run)


def scan_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a scanner on the model and the clean images of its folder, and leave its findings there."""
    spec, run, clean = task["spec"], _run(task, folder), _owned(folder, task)
    report = scan(
        spec["scanner"],
        load_model(folder / MODEL),
        clean,
        options=spec["options"],
        seed=run.seed,
        device=run.device,
        precision=run.precision.name,
        progress=run.show,
    )
    findings = [asdict(replace(one, artefacts={})) for one in report.findings]
    facts = {"findings": findings, "errors": dict(report.errors), "skipped": dict(report.skipped)}
    write_json(folder / EVIDENCE, finite(facts))
    tensors = {
        f"{n}.{name}": value.contiguous()
        for n, one in enumerate(report.findings)
        for name, value in one.artefacts.items()
    }
    if tensors:
        with atomic_write(folder / ARTEFACTS) as draft:
            save_file(tensors, draft)
    strongest = report.findings[0] if report.findings else None
    return {
        "verdict": report.verdict,
        "classes": sorted(strongest.classes) if strongest else [],
        "statistic": strongest.statistic if strongest else "",
        "value": strongest.value if strongest and math.isfinite(strongest.value) else None,
        "p_value": strongest.p_value if strongest else None,
        **_cost(report.seconds, clean, run),
    }


def _owned(folder: Path, task: Mapping[str, Any]) -> CleanData:
    """Read the defender's images of a folder."""
    tensors = load_file(folder / SAMPLE)
    with safe_open(folder / SAMPLE, framework="pt") as file:
        facts = dict(file.metadata())
    images = Images(tensors["pixels"], tensors["labels"], tuple(json.loads(facts["class_names"])))
    return CleanData.split(images, augmentation=facts["augmentation"], seed=int(task["spec"]["seed"]))


def _cost(seconds: float, clean: CleanData, run: Run) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_mb": peak_memory_mb(),
        "device": describe_device(run),
        "flags": ["selected on the fitting images"] if clean.select_is_fit else [],
    }


def judge_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure a repaired model with the truth of its victim."""
    run = _run(task, folder)
    data, loading = _timed(lambda: _data(task))
    truth: AttackTruth = load_truth(Path(task["victim"]) / MODEL)
    model = load_model(folder / REPAIRED).to(run.device)
    scores, judging = _timed(lambda: judge(model, truth, data.test, run))
    return {"scores": scores.to_json(), "timings": {"data": loading, "judge": judging}}


def scores_from(record: Mapping[str, Any]) -> Scores:
    """Make scores again from :meth:`Scores.to_json`."""
    return Scores(**{name: Rate(**counts) for name, counts in record["counts"].items()})
