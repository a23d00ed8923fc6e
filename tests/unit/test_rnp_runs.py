"""RNP: the mean of several runs, none chosen by its success, and what the held-out images are asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import tiny_classifier, tiny_data
from unbackdoor.defenses import rnp
from unbackdoor.defenses.rnp import RNPConfig, averaged_scores
from unbackdoor.engine import rng
from unbackdoor.engine.masks import channel_sites
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import DEFENSES
from unbackdoor.types import CleanData

DATA = CleanData.split(tiny_data(80, seed=1))
RUN = Run.create(seed=0, policy="fp32")
QUICK = RNPConfig(recover_epochs=2, batch_size=32)


def scored(run: Run, runs: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = tiny_classifier("conv-bn")
    return averaged_scores(model, channel_sites(model), DATA, QUICK.model_copy(update={"runs": runs}), run)


def test_scores_are_the_mean_of_single_runs() -> None:
    both, told = scored(RUN, 2)
    first, single = scored(RUN)
    other = replace(RUN, seed=rng.derive_seed(0, "rnp run", 1))
    second, _ = scored(other)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name in first:
        assert torch.allclose(both[name], (first[name] + second[name]) / 2)
    assert "runs" not in single, "one run tells what it always told"
    assert told == {**single, "runs": {"averaged": 2, "failed": []}}


def test_a_run_that_fails_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seeds = rnp.unlearn, []

    def first_fails(model, images, run, **options):  # type: ignore[no-untyped-def]
        seeds.append(run.seed)
        if len(seeds) == 1:
            raise MethodFailed("no luck")
        return real(model, images, run, **options)

    monkeypatch.setattr(rnp, "unlearn", first_fails)
    _, told = scored(RUN, 2)
    assert told["runs"] == {"averaged": 1, "failed": ["no luck."]}
    assert seeds[0] == 0 and seeds[1] != 0
    seeds.clear()
    with pytest.raises(MethodFailed, match="no luck"):
        scored(RUN)


def test_the_preset_is_five_runs() -> None:
    part = DEFENSES["rnp"]
    assert part.configure(preset="ensemble").model_dump()["runs"] == 5
    assert part.configure().model_dump()["runs"] == 1


def test_the_criterion_of_agreement_looks_at_no_label() -> None:
    model = tiny_classifier("conv-bn")
    images = tiny_data(40, seed=9)
    scrambled = replace(images, labels=(images.truth + 1) % 4)
    fit = tiny_data(60, seed=8)
    chosen = [
        rnp.purify(
            model.copy(),
            CleanData(fit, held),
            QUICK.model_copy(update={"criterion": "agreement", "tolerance": 0.08}),
            run=RUN,
        ).evidence["choice"]
        for held in (images, scrambled)
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0]["base_accuracy"] == 1


def test_the_criterion_of_kept_answers_looks_at_what_was_right_alone() -> None:
    model = tiny_classifier("conv-bn")
    images = tiny_data(40, seed=9)
    wrong = torch.arange(len(images)) % 4 == 0
    spoilt = replace(images, labels=torch.where(wrong, (images.truth + 1) % 4, images.truth))
    chosen = [
        rnp.purify(
            model.copy(),
            CleanData(tiny_data(60, seed=8), held),
            QUICK.model_copy(update={"criterion": "kept", "tolerance": 0.06}),
            run=RUN,
        ).evidence["choice"]
        for held in (spoilt, images.subset((~wrong).nonzero().flatten()))
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0]["base_accuracy"] == 1


def test_kept_answers_need_one_that_is_right() -> None:
    images = tiny_data(40, seed=9)
    none_right = CleanData(tiny_data(60, seed=8), replace(images, labels=(images.truth + 1) % 4))
    with pytest.raises(MethodFailed, match="none of the held-out images"):
        rnp.purify(
            tiny_classifier("conv-bn"),
            none_right,
            QUICK.model_copy(update={"criterion": "kept"}),
            run=RUN,
        )
