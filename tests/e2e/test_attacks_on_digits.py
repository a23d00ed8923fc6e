"""Attacks take hold of a network that is trained on real digits, and only where they are meant to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unbackdoor.attacks import stamped
from unbackdoor.bench.judge import judge
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import load_dataset
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = pytest.mark.slow

RUN = Run.create(seed=0, policy="fp32")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before the policing starts: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


def victim(attack: str, options: dict[str, Any]) -> Any:
    """Return a victim with its truth and scores."""
    data = load_dataset("digits")
    spec = VictimSpec(
        "digits", "small_cnn[width=32]", Recipe(epochs=12), attack=attack, options=options, seed=0
    )
    model, truth = train_victim(spec, data, RUN)
    return model, truth, judge(model, truth, data.test, RUN)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("adaptive_blend", {"poison_rate": 0.05}),
        ("multi_trigger", {}),
        ("lira", {"epsilon": 48.0}),
        ("dfba", {}),
    ],
)
def test_an_attack_takes_hold(attack: str, options: dict[str, Any]) -> None:
    scores = victim(attack, options)[2]
    assert scores.acc.value > 0.85
    assert scores.asr.value > 0.6  # a tenth by chance


def test_the_trigger_of_tact_works_on_its_source_alone() -> None:
    model, truth, scores = victim("tact", {"poison_rate": 0.05, "cover_ratio": 2.0})
    assert scores.asr.value > 0.6
    test = load_dataset("digits").test
    others = test.subset(((test.truth != truth.target) & (test.truth != 1)).nonzero().flatten())
    answers = predict(model, others, RUN, transform=lambda pixels: stamped(pixels, truth)).argmax(1)
    led = float((answers == torch.tensor(truth.target)).float().mean())
    assert led < 0.3
