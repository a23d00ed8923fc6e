"""Repairs by fine-tuning take a planted backdoor away, at a margin that a no-op and a random prune fail."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tiny import tiny_data
from unbackdoor.attacks import AttackTruth, poison
from unbackdoor.bench.judge import judge
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.networks import build
from unbackdoor.types import Classifier, CleanData

RUN = Run.create(seed=0, policy="fp32")
DATA = CleanData.split(tiny_data(120, seed=1))
TEST = tiny_data(200, seed=7)
EFFECTIVE: dict[str, dict[str, Any]] = {"fst": {}, "d3": {}}


@cache
def victim() -> tuple[Classifier, AttackTruth]:
    """Four white pixels in a corner call for class 0."""
    images, truth = poison(tiny_data(320), "badnets", {"size": 2, "poison_rate": 0.2}, seed=0)
    model = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=images.class_names, seed=0)
    train(model, images, Recipe(epochs=16, batch_size=32, optimizer="adamw", lr=0.003), RUN)
    return model, truth


def effective(method: str, options: dict[str, Any]) -> bool:
    """Half of the attack's success gone, at no more than 5 points of accuracy."""
    model, truth = victim()
    before = judge(model, truth, TEST, RUN)
    assert before.asr.value > 0.9 and before.acc.value > 0.95
    out = call(method, model, DATA, options=options, precision="fp32")
    after = judge(out.model, truth, TEST, RUN)
    return after.asr.value <= before.asr.value - 0.5 and after.acc.value >= before.acc.value - 0.05


@pytest.mark.parametrize("method", EFFECTIVE)
def test_the_backdoor_falls(method: str) -> None:
    assert effective(method, EFFECTIVE[method])


@pytest.mark.parametrize("method", ["none", "random_prune", "ft"])
def test_a_control_does_not_pass_for_a_repair(method: str) -> None:
    assert not effective(method, {})
