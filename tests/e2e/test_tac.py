"""TAC against a planted backdoor on real digits: found, repaired by a margin that a no-op fails."""

from __future__ import annotations

from functools import cache

import pytest

from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.judge import judge
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.scanners.tac import TACScanConfig, scan
from unbackdoor.types import Classifier, CleanData, Images

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytest.importorskip("scipy", reason="the solver is SciPy's (extra: scan)")
pytestmark = pytest.mark.slow

RUN = Run.create(seed=0, policy="fp32")
FALL, COST = 0.5, 0.05  # what counts as a repair: as in test_digits


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before the policing starts: the first import of scikit-learn draws random numbers."""
    load_dataset("digits")


@cache
def victim(attack: str) -> tuple[Classifier, AttackTruth, CleanData, Images]:
    data = load_dataset("digits")
    _, pool = reserve(data.train, fraction=0.1, seed=0)
    clean = CleanData.split(draw_clean(pool, count=100, seed=0), augmentation=data.augmentation)
    spec = VictimSpec("digits", "small_cnn[width=64]", Recipe(epochs=15), attack=attack)
    model, truth = train_victim(spec, data, RUN)
    return model, truth, clean, data.test


def test_the_target_is_found() -> None:
    model, _, clean, _ = victim("badnets")
    report = scan(model, clean, TACScanConfig(), run=RUN)
    assert report.verdict == "backdoor found"
    assert report.findings[0].classes == (0,)  # the target of the attack's defaults


def test_a_repair_works_and_a_no_op_does_not() -> None:
    model, truth, clean, test = victim("badnets")
    before = judge(model, truth, test, RUN)
    works = {}
    for method in ("none", "tac"):
        after = judge(call(method, model, clean, precision="fp32").model, truth, test, RUN)
        fell = after.asr.value <= before.asr.value - FALL
        works[method] = fell and after.acc.value >= before.acc.value - COST
    assert works == {"none": False, "tac": True}


def test_a_clean_model_passes_and_is_left_alone_where_asked() -> None:
    # One clean model says that the test can keep silent; how often it does is tested by simulation.
    model, _, clean, _ = victim("none")
    assert scan(model, clean, TACScanConfig(), run=RUN).verdict == "no evidence found"
    out = call("tac", model, clean, preset="reference", precision="fp32")
    assert out.model.sha256() == model.sha256()
