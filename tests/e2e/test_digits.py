"""From poisoned training to a judged repair, on real digits, beside the controls."""

from __future__ import annotations

from functools import cache
from statistics import mean

import pytest

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import Scores, der, judge
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.types import Classifier, CleanData, Images

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = pytest.mark.slow

# Another processor rounds otherwise, which is another draw of every training: what is claimed is claimed of
# the mean of several victims and seeds.
VICTIMS = (0, 1)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before the policing starts: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


@cache
def parts() -> tuple[Images, Images]:
    """Images to judge on, and the defender's, which no victim was trained on either."""
    return reserve(load_dataset("digits").test, fraction=0.25)


@cache
def victim(attack: str, seed: int = 0) -> tuple[Classifier, AttackTruth, Scores]:
    data, run = load_dataset("digits"), Run.create(seed=seed, policy="fp32")
    spec = VictimSpec("digits", "small_cnn[width=64]", Recipe(epochs=12), attack=attack, seed=seed)
    model, truth = train_victim(spec, data, run)
    return model, truth, judge(model, truth, parts()[0], run)


@cache
def repaired(attack: str, defense: str, seed: int = 0, draw: int = 0, preset: str = "default") -> Scores:
    model, truth, _ = victim(attack, seed)
    clean = CleanData.split(parts()[1], augmentation=load_dataset("digits").augmentation)
    out = call(defense, model, clean, preset=preset, seed=draw, precision="fp32")
    return judge(out.model, truth, parts()[0], Run.create(seed=seed, policy="fp32"))


def effective(defense: str) -> bool:
    """The margin that counts as a repair: half of the attack's success gone at no more than 5 points."""
    before = [victim("badnets", seed)[2] for seed in VICTIMS]
    after = [repaired("badnets", defense, seed) for seed in VICTIMS]
    gone = mean(b.asr.value - a.asr.value for b, a in zip(before, after, strict=True))
    lost = mean(b.acc.value - a.acc.value for b, a in zip(before, after, strict=True))
    return gone >= 0.5 and lost <= 0.05


def quality(defense: str) -> float:
    """The mean defense effectiveness rating."""
    ratings = [der(victim("badnets", seed)[2], repaired("badnets", defense, seed)) for seed in VICTIMS]
    return mean(rating for rating in ratings if rating is not None)


@pytest.mark.parametrize("seed", VICTIMS)
def test_the_backdoor_is_there(seed: int) -> None:
    scores = victim("badnets", seed)[2]
    assert scores.acc.value > 0.95
    assert scores.asr.value > 0.95
    assert scores.ra.value < 0.05


def test_a_repair_works_and_the_controls_do_not() -> None:
    assert effective("fp")
    assert not effective("none")
    assert not effective("random_prune")
    assert quality("none") == 0.5
    assert quality("fp") > quality("random_prune") + 0.2


def test_rnp_finds_more_than_chance_does() -> None:
    # On these narrow networks RNP weakens the backdoor without removing it: docs/results/foundation.md. The
    # preset is the one for few images: by default not one of the 40 held-out images may be lost, so that RNP
    # often prunes next to nothing.
    draws = [(seed, draw) for seed in VICTIMS for draw in (0, 1)]
    before = mean(victim("badnets", seed)[2].asr.value for seed, _ in draws)
    accuracy = mean(victim("badnets", seed)[2].acc.value for seed, _ in draws)
    after = [repaired("badnets", "rnp", *draw, preset="robust") for draw in draws]
    chance = mean(repaired("badnets", "random_prune", *draw).asr.value for draw in draws)
    assert mean(scores.acc.value for scores in after) >= accuracy - 0.05
    assert mean(scores.asr.value for scores in after) < min(before, chance) - 0.1


@pytest.mark.parametrize("defense", ["awm", "ft", "fp", "random_prune", "rnp"])
def test_a_clean_model_stays_good(defense: str) -> None:
    before, after = victim("none")[2], repaired("none", defense)
    assert after.acc.value >= before.acc.value - 0.05
