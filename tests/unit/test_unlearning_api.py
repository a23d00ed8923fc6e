"""One shared unlearning answers what its parts answer, leaves the model alone, and unlearns once."""

from __future__ import annotations

from dataclasses import replace

import pytest

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.engine import repeated_unlearning as exposure
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.types import CleanData, Purified

DATA = CleanData.split(tiny_data(80, seed=1))
QUICK = {"repeats": 2, "batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1}


def test_the_four_questions_share_one_unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    ascent = exposure.unlearn

    def counted(*words: object, **more: object) -> object:
        made.append(1)
        return ascent(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(exposure, "unlearn", counted)
    model = tiny_classifier("conv-bn")
    before = model.sha256()
    unlearned = unbackdoor.unlearn(model, DATA, options=QUICK, precision="fp32")
    report = unlearned.detect()
    trigger = unlearned.recover_trigger(1)
    seen = unlearned.screen(tiny_data(12, seed=3), centred=True)
    repaired = unlearned.prune("lipschitz")
    assert len(made) == QUICK["repeats"]
    assert report.verdict == "undecided"  # two repeats cannot say more
    assert trigger.trigger.label == 1
    assert seen.scores.shape == seen.p_values.shape == (12,)
    assert isinstance(repaired, Purified) and repaired.evidence["channels"] > 0
    assert model.sha256() == before


@pytest.mark.parametrize("ranking", ["change", "activation", "recovery"])
def test_every_ranking_prunes_within_the_held_out_accuracy(ranking: str) -> None:
    model = tiny_classifier("conv-bn")
    unlearned = unbackdoor.unlearn(model, DATA, options=QUICK, precision="fp32")
    first, again = unlearned.prune(ranking), unlearned.prune(ranking)  # type: ignore[arg-type]
    assert first.model.sha256() == again.model.sha256()
    assert first.evidence["cut"] == sum(first.evidence["cut_per_layer"].values())
    run = Run.create(seed=0, policy="fp32")
    assert accuracy(first.model, DATA.select, run) >= accuracy(model, DATA.select, run) - 0.02


def test_what_cannot_be_unlearned_is_refused() -> None:
    model = tiny_classifier("conv-bn")
    with pytest.raises(unbackdoor.InputError, match="needs labelled images"):
        unbackdoor.unlearn(model, CleanData.split(replace(DATA.all, labels=None)))
    with pytest.raises(unbackdoor.ConfigError, match="repeats"):
        unbackdoor.unlearn(model, DATA, options={"repeats": 0})
    with pytest.raises(unbackdoor.InputError, match="of another type"):
        unbackdoor.unlearn(model.network, DATA)  # type: ignore[arg-type]
    unlearned = unbackdoor.unlearn(model, DATA, options=QUICK)
    with pytest.raises(unbackdoor.InputError, match="no such class"):
        unlearned.recover_trigger(9)
    with pytest.raises(unbackdoor.ConfigError, match="score"):
        unlearned.prune("size")  # type: ignore[arg-type]
    with pytest.raises(unbackdoor.ConfigError, match="score"):
        unlearned.screen(tiny_data(4), score="size")  # type: ignore[arg-type]


def test_references_decide_whichever_way_they_are_given() -> None:
    model, clean = tiny_classifier("conv-bn"), (0.1,) * 19
    options = {**QUICK, "repeats": 8}
    given = [
        unbackdoor.unlearn(model, DATA, options=options, references=clean),
        unbackdoor.unlearn(model, DATA, options={**options, "references": clean}),
    ]
    assert given[0].detect() == given[1].detect()
    assert "calibration" not in given[0].detect().skipped
