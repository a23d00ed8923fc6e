"""The steps of a cell, each run in a process of its own; tasks and answers are plain JSON.

The steps of methods and scanners are given a model, clean images and options. They alone run third-party
code, and they alone are confined; only the judge's step reads the truth. The steps that train a victim and
that scan one are in :mod:`unbackdoor.bench.train_step` and :mod:`unbackdoor.bench.scan_step`, so that no
repair depends on the code of either.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import Scores, judge
from unbackdoor.bench.machine import describe_device, peak_memory_mb
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import IntegrityError
from unbackdoor.files import atomic_write, write_json
from unbackdoor.metrics import Rate
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier, CleanData, Images, state_sha256
from unbackdoor.weights.source import open_source

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
        images_a_step: Training images of one item of a loop, 0 where that is unknown.
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
                # A plain overwrite: the reader accepts an incomplete file, and the file is not kept. A full
                # disk must not fail a step here.
                with suppress(OSError):
                    self._file.write_text(
                        json.dumps({"label": label, "done": done, "total": total}), encoding="utf-8"
                    )
            yield item


def data_of(task: Mapping[str, Any], *parts: Literal["train", "test"]) -> DataSet:
    """Load the data set of a task, and see that it is the one that its specification names by hashes.

    The code that reads data sets is therefore no part of the version of a cell (:mod:`.code_version`).

    Args:
        task: With ``spec`` and ``place``.
        parts: Those that will be used.

    Raises:
        IntegrityError: If a part, or what is said of all images, is not what the cell was planned with.
    """
    place, spec = task["place"], task["spec"]
    root = Path(place["data_root"]) if place.get("data_root") else None
    cache = Path(place["cache"]) if place.get("cache") else None
    data = load_dataset(str(spec["dataset"]), root=root, cache=cache)
    hashes = dict(zip(("train", "test"), spec["data_sha256"], strict=True))
    comparisons: dict[str, tuple[Any, Any]] = {
        part: (hashes[part], getattr(data, part).fingerprint()) for part in parts
    }
    facts = facts_of(data)
    comparisons |= {name: (spec[name], facts[name]) for name in facts if name in spec}
    for what, (expected, got) in comparisons.items():
        if expected != got:
            raise IntegrityError(
                f"the data set {data.name!r} is not the one that was planned with, judging by: {what}",
                expected=expected,
                got=got,
                where=root or cache,
                remedy="Give every worker the same data, and run the suite again",
            )
    return data


def facts_of(data: DataSet) -> dict[str, Any]:
    """Return what a specification says of a data set beside the hashes of its images, JSON-ready."""
    return {"augmentation": data.augmentation, "normalisation": [list(data.mean), list(data.std)]}


def model_of(path: Path) -> Classifier:
    """Load a model, and see that its tensors are those that were saved.

    The code that reads and writes models is therefore no part of the version of a cell.

    Raises:
        IntegrityError: If they are not.
    """
    source = open_source(path)
    model, card = load_model(source), source.card()
    own, stored = model.network.state_dict(), source.state()
    # Weights that are stored in half precision are computed with in single.
    widened = {name: tensor.to(own[name].dtype) for name, tensor in stored.items() if name in own}
    if (
        card is None
        or state_sha256(stored) != card.weights_sha256
        or state_sha256(widened) != model.sha256()
        or len(widened) != len(stored)
    ):
        raise IntegrityError(
            "the model that was loaded is not the one that was saved",
            expected=card.weights_sha256[:12] if card else "a card",
            got=model.sha256()[:12] if card else "none",
            where=path,
        )
    return model


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and its wall seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def run_of(task: Mapping[str, Any], folder: Path) -> Run:
    """Return the surroundings that a task asks for; progress is shown in a folder."""
    place, spec = task["place"], task["spec"]
    return Run.create(
        seed=int(spec["seed"]),
        device=place.get("device", "cpu"),
        policy=spec["precision"],
        progress=Reporter(folder, spec.get("recipe", {}).get("batch_size", 0)),
    )


def sample_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw a defender's clean images and write them, without anything that says where they are from."""
    spec, data = task["spec"], data_of(task, "train")
    _, pool = reserve(data.train)
    sample = draw_clean(pool, count=spec["clean_images"], seed=spec["seed"])
    facts = {"class_names": json.dumps(sample.class_names), "augmentation": data.augmentation}
    with atomic_write(folder / SAMPLE) as draft:
        save_file({"pixels": sample.pixels, "labels": sample.truth}, draft, metadata=facts)
    return {"images": len(sample)}


def hand_over(victim: Path, folder: Path) -> None:
    """Put the weights of a victim into a method's folder, without their history and their name."""
    model = model_of(victim / MODEL)
    model.origin = ""
    save_model(model, folder / MODEL)


def method_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a defense on the model and the clean images of its folder, and leave the repaired model there."""
    spec, run, clean = task["spec"], run_of(task, folder), clean_data_of(folder, task)
    repaired = call(
        spec["defense"],
        model_of(folder / MODEL),
        clean,
        options=spec["options"],
        seed=run.seed,
        device=run.device,
        precision=run.precision.name,
        progress=run.show,
    )
    save_model(repaired.model, folder / REPAIRED, history=[dict(repaired.method)])
    write_json(folder / EVIDENCE, dict(repaired.evidence))
    return cost_of(repaired.seconds, clean, run)


def clean_data_of(folder: Path, task: Mapping[str, Any]) -> CleanData:
    """Read the defender's images of a folder."""
    tensors = load_file(folder / SAMPLE)
    with safe_open(folder / SAMPLE, framework="pt") as file:
        facts = dict(file.metadata())
    images = Images(tensors["pixels"], tensors["labels"], tuple(json.loads(facts["class_names"])))
    return CleanData.split(images, augmentation=facts["augmentation"], seed=int(task["spec"]["seed"]))


def cost_of(seconds: float, clean: CleanData, run: Run) -> dict[str, Any]:
    """Return the columns of a method or a scanner that say what it cost."""
    return {
        "seconds": seconds,
        "peak_mb": peak_memory_mb(),
        "device": describe_device(run),
        "flags": ["selected on the fitting images"] if clean.select_is_fit else [],
    }


def judge_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure a repaired model with the truth of its victim."""
    run = run_of(task, folder)
    data, loading = timed(lambda: data_of(task, "test"))
    truth: AttackTruth = load_truth(Path(task["victim"]) / MODEL)
    model = model_of(folder / REPAIRED).to(run.device)
    scores, judging = timed(lambda: judge(model, truth, data.test, run))
    return {"scores": scores.to_json(), "timings": {"data": loading, "judge": judging}}


def scores_from(record: Mapping[str, Any]) -> Scores:
    """Make scores again from :meth:`Scores.to_json`."""
    return Scores(**{name: Rate(**counts) for name, counts in record["counts"].items()})


def best(tries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first of an oracle's tries with the highest DER, or accuracy where there was no attack."""
    return max(tries, key=lambda one: one["scores"]["acc"] if one["der"] is None else one["der"])
