"""Repeated unlearning and what is read from it: votes, verdicts, screenings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine import repeated_unlearning as module
from unbackdoor.engine.repeated_unlearning import (
    HALF,
    REMAINING,
    Exposure,
    ExposureConfig,
    balanced_votes,
    expose,
    resampled,
)
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import ConfigError, InputError, MethodFailed, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.registry import SCANNERS
from unbackdoor.scanners.rnp_screen import ScreenConfig, screen_inputs
from unbackdoor.scanners.rnp_vote import ATTRACTION, RECOVERED, STABILITY, RNPVoteConfig, weigh
from unbackdoor.types import Classifier, CleanData, Images

DATA = CleanData.split(tiny_data(80, seed=1))
RUN = Run.create(seed=0, policy="fp32")
QUICK = ExposureConfig(repeats=2, batch_size=32)


@cache
def exposed() -> Exposure:
    return expose(tiny_classifier("conv-bn"), DATA, QUICK, RUN)


def voting(shares: torch.Tensor) -> Exposure:
    """An exposure with the given shares (R, D, K)."""
    repeats = len(shares)
    return Exposure(shares, torch.zeros(shares.shape[:2]), (None,) * repeats, 1.0, (), True)


def unanimous(repeats: int, classes: int = 10, share: float = 0.5) -> Exposure:
    """An exposure whose every vote is won by class 3."""
    shares = torch.zeros(repeats, len(REMAINING), classes)
    shares[:, :, 3] = share
    return voting(shares)


# ---------------------------------------------------------------------------------------------------
# Votes


def test_votes_leave_out_a_class_own_images_and_weigh_classes_alike() -> None:
    pixels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    images = Images(pixels, torch.tensor([0, 0, 0, 0, 1, 1]), ("a", "b", "c"))
    # Of a: two stay, one goes to b, one to c. Of b: both go to a. There is no image of c.
    votes = balanced_votes(torch.tensor([0, 0, 1, 2, 0, 0]), images)
    assert votes.tolist() == pytest.approx([1.0, 0.25, (0.25 + 0) / 2])


def test_a_resample_keeps_the_number_of_each_class() -> None:
    images = tiny_data(42)
    again = resampled(images, torch.Generator().manual_seed(0))
    assert torch.equal(again.truth.bincount(), images.truth.bincount())
    assert len(again.pixels.flatten(1).unique(dim=0)) < len(images)


def test_depths_are_reached_in_order_and_the_model_is_untouched() -> None:
    model = tiny_classifier("conv-bn")
    weights = model.sha256()
    found = expose(model, DATA, QUICK, RUN)
    assert model.sha256() == weights
    assert found.shares.shape == (2, len(REMAINING), 4)
    assert bool((found.accuracies.diff(dim=1) <= 0).all())
    limit = 0.25 + REMAINING[HALF] * (found.start - 0.25)
    assert bool((found.accuracies[:, HALF] <= limit + 1e-6).all())
    assert all(network is not None and not network.training for network in found.networks)
    assert found.held_out
    json.dumps(found.evidence(), allow_nan=False)


def test_same_seed_same_votes_and_another_seed_others() -> None:
    again = expose(tiny_classifier("conv-bn"), DATA, QUICK, RUN)
    assert torch.equal(again.shares, exposed().shares)
    assert [n.sha256() for n in again.half_unlearned()] == [n.sha256() for n in exposed().half_unlearned()]
    other = expose(tiny_classifier("conv-bn"), DATA, QUICK, Run.create(seed=1, policy="fp32"))
    assert not torch.equal(other.shares, exposed().shares)


def test_a_tie_and_a_missing_vote_have_no_winner() -> None:
    shares = torch.tensor([[[0.4, 0.4, 0.1], [0.1, 0.5, 0.2], [0.0, 0.0, 0.0], [math.nan] * 3]])
    assert voting(shares).winners().tolist() == [[-1, 1, -1, -1]]
    assert voting(shares).attraction().tolist() == pytest.approx([0.125, 0.225, 0.075])
    json.dumps(voting(shares).evidence(), allow_nan=False)


def test_a_repeat_that_fails_is_told_and_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module.unlearn, []

    def sometimes(model: Classifier, *arguments: object, **options: object) -> object:
        calls.append(model)
        if len(calls) == 1:
            raise MethodFailed("no luck")
        return real(model, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "unlearn", sometimes)
    found = expose(tiny_classifier("conv-bn"), DATA, QUICK, RUN)
    assert found.failed == ("no luck.",)
    assert found.networks[0] is None and len(found.half_unlearned()) == 1
    assert found.winners()[0].tolist() == [-1] * len(REMAINING)
    assert "1 of 2 ended early" in weigh(found, RNPVoteConfig()).skipped["repeats"]
    monkeypatch.setattr(module, "unlearn", lambda *a, **k: (_ for _ in ()).throw(MethodFailed("never")))
    with pytest.raises(MethodFailed, match="no repeat of the unlearning forgot anything"):
        expose(tiny_classifier("conv-bn"), DATA, QUICK, RUN)


# ---------------------------------------------------------------------------------------------------
# Verdicts


def test_stability_alone_is_never_enough() -> None:
    report = weigh(unanimous(8), RNPVoteConfig())
    assert report.verdict == "undecided"
    assert "at least 19" in report.skipped["calibration"]
    finding, *shown = report.findings
    assert [f.statistic for f in shown[:1]] == [ATTRACTION] and len(shown) == 1 + len(REMAINING)
    assert all(f.p_value is None for f in shown), "to look at"
    assert (finding.statistic, finding.classes, finding.value) == (STABILITY, (3,), 1.0)
    # All eight winners alike: 10 * 10^-8, times four depths.
    assert finding.p_value == pytest.approx(4e-7, rel=1e-3)
    assert finding.threshold == 5 / 8, "four of eight have probability 0.048, five 0.0041"


def test_winners_that_change_are_no_evidence_whatever_their_share() -> None:
    shares = torch.zeros(8, len(REMAINING), 10)
    shares[torch.arange(8), :, torch.arange(8)] = 0.9
    report = weigh(voting(shares), RNPVoteConfig(references=(0.0,) * 30))
    assert report.verdict == "no evidence found"
    assert report.coverage == ("stability",)


@pytest.mark.parametrize(
    ("references", "verdict"),
    [
        ((0.4,) * 19, "backdoor found"),
        ((0.4,) * 18, "undecided"),
        ((0.6,) + (0.4,) * 18, "no evidence found"),
        ((0.6,) + (0.4,) * 38, "backdoor found"),
        ((0.6,) * 2 + (0.4,) * 37, "no evidence found"),
        ((0.5,) * 2 + (0.4,) * 37, "no evidence found"),
    ],
)
def test_clean_references_decide_exactly(references: tuple[float, ...], verdict: str) -> None:
    report = weigh(unanimous(8), RNPVoteConfig(references=references))
    assert report.verdict == verdict
    first = report.findings[0]
    assert first.statistic == ATTRACTION and first.p_value is not None
    if len(references) >= 19:
        assert (first.p_value <= 0.05) == (first.value > first.threshold) == (verdict == "backdoor found")


def test_a_class_that_wins_often_but_is_not_the_strongest_stays_undecided() -> None:
    shares = unanimous(8, share=0.3).shares
    shares[:3, :, 3] = 0.0
    shares[:3, :, 7] = 1.0
    report = weigh(voting(shares), RNPVoteConfig(references=(0.1,) * 19))
    assert report.verdict == "undecided" and "agreement" in report.skipped


def test_two_classes_need_more_repeats_than_are_there() -> None:
    report = weigh(unanimous(2, classes=4), RNPVoteConfig())
    assert report.verdict == "undecided"  # a test that cannot find anything is no evidence of nothing
    assert report.findings[0].threshold == math.inf
    assert "2 repeats that agree cannot reach 0.05" in report.skipped["stability"]


# ---------------------------------------------------------------------------------------------------
# Scanning


def test_a_scan_is_pure_repeatable_and_shows_a_trigger() -> None:
    model = tiny_classifier("conv-bn")
    options = {"repeats": 2, "batch_size": 32}
    weights = model.sha256()
    one = scan("rnp_vote", model, DATA, options={**options, "recover_trigger": True}, precision="fp32")
    two = scan("rnp_vote", model, DATA, options=options, precision="fp32")
    assert model.sha256() == weights
    assert one.findings[0] == two.findings[0] and one.verdict == two.verdict
    shown = next(f for f in one.findings if f.statistic == RECOVERED)
    assert shown.trigger is not None and shown.trigger.success == shown.value
    assert not shown.trigger.faults((1, 8, 8), 4)
    assert not one.partial and SCANNERS["rnp_vote"].paper


def test_the_trigger_of_a_class_may_be_asked_for() -> None:
    model = tiny_classifier("conv-bn")
    options = {"repeats": 2, "batch_size": 32, "recover_trigger": True}
    report = scan("rnp_vote", model, DATA, options={**options, "target": 1}, precision="fp32")
    (shown,) = [f for f in report.findings if f.trigger is not None]
    assert shown.trigger is not None and (shown.trigger.label, shown.classes) == (1, (1,))
    with pytest.raises(InputError, match="no such class"):
        scan("rnp_vote", model, DATA, options={**options, "target": 4})


def test_a_scanner_that_fails_says_why_and_bad_input_is_refused() -> None:
    model = tiny_classifier("conv-bn")
    ignorant = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=NAMES, seed=5)
    with pytest.raises(MethodFailed, match="nothing to unlearn"):
        scan("rnp_vote", ignorant, DATA, precision="fp32")
    broken = model.copy()
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(InputError, match="not a finite number"):
        scan("rnp_vote", broken, DATA)
    bare = replace(DATA, fit=replace(DATA.fit, labels=None))
    with pytest.raises(InputError, match="needs labelled images"):
        scan("rnp_vote", model, bare)
    with pytest.raises(InputError, match="needs labelled images"):
        expose(model, bare, QUICK, RUN)
    single = tiny_data(80).subset(range(0, 80, 4))
    with pytest.raises(InputError, match="all of one class"):
        scan("rnp_vote", model, CleanData.split(single))
    with pytest.raises(InputError, match="all of one class"):
        expose(model, CleanData.split(single), QUICK, RUN)
    with pytest.raises(ConfigError, match="repeats"):
        scan("rnp_vote", model, DATA, options={"repeats": 1})


def test_a_classifier_that_says_one_class_is_refused() -> None:
    constant = tiny_classifier("conv-bn")
    head = constant.get_submodule("network.fc")
    with torch.no_grad():
        head.weight.zero_()  # type: ignore[operator,union-attr]
    with pytest.raises(MethodFailed, match="nothing to unlearn"):
        expose(constant, DATA, QUICK, RUN)


def test_one_image_a_class_works_and_is_flagged() -> None:
    few = CleanData.split(tiny_data(4, seed=1))
    found = expose(tiny_classifier("conv-bn"), few, QUICK, RUN)
    assert not found.held_out
    assert "held-out votes" in weigh(found, RNPVoteConfig()).skipped


# ---------------------------------------------------------------------------------------------------
# Screening


def test_screening_by_hand() -> None:
    model = tiny_classifier("conv-bn")
    inputs = replace(tiny_data(20, seed=3), labels=None)
    found = screen_inputs(model, DATA, inputs, ScreenConfig(repeats=2), run=RUN, exposure=exposed())
    pixels = inputs.pixels.float() / 255
    with torch.no_grad():
        predicted = model(pixels).argmax(1)
        kept = sum(n(pixels).log_softmax(1) for n in exposed().half_unlearned()) / 2
        clean = DATA.select.pixels.float() / 255
        own = sum(n(clean).log_softmax(1) for n in exposed().half_unlearned()) / 2
        own = own.gather(1, model(clean).argmax(1)[:, None])[:, 0]
    scores = kept.gather(1, predicted[:, None])[:, 0]
    assert torch.allclose(found.scores, scores, atol=1e-5)
    above = (own[None, :] >= scores[:, None] - 1e-6).sum(1)
    assert torch.allclose(found.p_values, (1 + above) / (len(own) + 1), atol=1e-6)
    assert torch.equal(found.suspicious, found.p_values <= 0.01)
    json.dumps(found.evidence(), allow_nan=False)


@pytest.mark.parametrize("score", ["kept", "lost", "voted"])
def test_an_image_scores_the_same_in_any_company(score: str) -> None:
    model, inputs = tiny_classifier("conv-bn"), tiny_data(20, seed=3)
    for centred in (False, True):
        cfg = ScreenConfig.parse({"score": score, "centred": centred}, subject="screening")
        all_of_them = screen_inputs(model, DATA, inputs, cfg, run=RUN, exposure=exposed())
        some = screen_inputs(model, DATA, inputs.subset([7, 2]), cfg, run=RUN, exposure=exposed())
        assert torch.allclose(some.scores, all_of_them.scores[[7, 2]], atol=1e-5)
        assert bool(((some.p_values > 0) & (some.p_values <= 1)).all())


def test_inputs_that_cannot_be_screened_are_refused() -> None:
    model = tiny_classifier("conv-bn")
    with pytest.raises(InputError, match="no image to screen"):
        screen_inputs(model, DATA, DATA.fit.subset([]), ScreenConfig(), run=RUN, exposure=exposed())
    large = Images(torch.zeros(2, 1, 9, 9, dtype=torch.uint8), None, NAMES)
    with pytest.raises(UnsupportedModel):
        screen_inputs(model, DATA, large, ScreenConfig(), run=RUN, exposure=exposed())
