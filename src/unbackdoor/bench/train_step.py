"""The step that trains a victim, in a process of its own; see :mod:`unbackdoor.bench.steps`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from unbackdoor.bench.judge import judge
from unbackdoor.bench.machine import describe_device, peak_memory_mb
from unbackdoor.bench.steps import MODEL, data_of, run_of, timed
from unbackdoor.bench.victims import VictimSpec, save_victim, train_victim
from unbackdoor.engine.training import Recipe


def train_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a victim, measure it, and leave its weights, card and truth in the folder."""
    spec, run = task["spec"], run_of(task, folder)
    data, loading = timed(lambda: data_of(task, "train", "test"))
    victim = VictimSpec(
        dataset=data.name,
        architecture=spec["architecture"],
        recipe=Recipe.parse(spec["recipe"], subject="the recipe"),
        attack=spec["attack"],
        options=spec["options"],
        seed=spec["seed"],
    )
    before = time.process_time()
    (model, truth), seconds = timed(
        lambda: train_victim(
            victim,
            data,
            run,
            checkpoint=Path(task["checkpoint"]),
            bases=Path(task["place"]["store"]) / "bases",
        )
    )
    processor_seconds = time.process_time() - before
    scores, judging = timed(lambda: judge(model, truth, data.test, run))
    save_victim(model, truth, folder / MODEL, history=[{"step": "trained", "recipe": spec["recipe"]}])
    return {
        "scores": scores.to_json(),
        "timings": {"data": loading, "train": seconds, "judge": judging},
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "peak_mb": peak_memory_mb(),
        "device": describe_device(run),
    }
