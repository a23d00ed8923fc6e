"""What clean images can tell of a promise about accuracy, and what they cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.comparison import paired_interval
from unbackdoor.audit.purifying import Promise, PromiseBroken, purify
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.types import Images


def promise(asked: float, lost: int, gained: int, images: int, rule: Any = "evidence") -> Promise:
    low, high = paired_interval(lost, gained, images)
    return Promise(asked, (lost - gained) / images, low, high, images, rule)


@pytest.mark.parametrize(
    ("lost", "images", "kept", "refused_on_evidence", "refused_if_strict"),
    [
        (0, 1000, True, False, False),
        (6, 150, "cannot be told", False, True),  # 4.0 points; the true loss may be 1 or 8
        (8, 150, "cannot be told", False, True),  # 5.3 points of which 4 were allowed: no evidence
        (60, 150, False, True, True),
        (60, 1000, False, True, True),
        (20, 1000, True, False, False),
    ],
)
def test_a_promise_has_three_answers(
    lost: int, images: int, kept: Any, refused_on_evidence: bool, refused_if_strict: bool
) -> None:
    answer = promise(0.04, lost, 0, images)
    assert answer.kept == kept
    assert answer.refused is refused_on_evidence
    assert replace(answer, rule="strict").refused is refused_if_strict
    told = answer.to_dict()
    assert told["points_per_image"] == pytest.approx(100 / images)
    assert told["low"] <= told["measured"] <= told["high"] and told["kept"] == kept
    assert f"{images} images" in answer.in_words() and json.dumps(told)


def test_a_repair_whose_true_loss_is_allowed_is_rarely_refused() -> None:
    """A true loss of 2.9 points under a promise of 4 was refused for one image too many of 150."""
    draw = torch.Generator().manual_seed(0)
    lost = (torch.rand(2000, 150, generator=draw) < 0.029).sum(1).tolist()
    refused = [promise(0.04, count, 0, 150).refused for count in lost]
    assert sum(refused) / 2000 < 0.01
    assert sum(count / 150 > 0.04 for count in lost) / 2000 > 0.1  # which the measured number alone refuses


def right(images: Images) -> Images:
    """Return images with the labels that the model gives them."""
    answers = predict(tiny_classifier("conv-bn"), images, Run.create(policy="fp32")).argmax(1)
    return replace(images, labels=answers)


def test_a_repair_says_what_its_promise_is_worth() -> None:
    done = purify(tiny_classifier("conv-bn"), tiny_data(80, seed=5), "none", max_accuracy_drop=0.3)
    assert done.promise is not None and done.promise.kept is True
    assert done.promise.images == done.facts["images_for_the_proof"]
    assert done.to_dict()["promise"]["rule"] == "evidence"
    assert purify(tiny_classifier("conv-bn"), tiny_data(80), "none").to_dict()["promise"] is None


def test_what_cannot_be_told_is_refused_by_a_strict_promise_only() -> None:
    model, images = tiny_classifier("conv-bn"), right(tiny_data(80, seed=5))
    count = round(0.3 * 80)
    best = paired_interval(0, 0, count)[1]
    assert purify(model, images, "none", max_accuracy_drop=best / 2).promise.kept == "cannot be told"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="so strict a promise cannot be shown"):
        purify(model, images, "none", max_accuracy_drop=best / 2, promise="strict")
    with pytest.raises(InputError, match="no such rule"):
        purify(model, images, "none", max_accuracy_drop=0.1, promise="loose")  # type: ignore[arg-type]


def test_a_strict_promise_that_cannot_be_told_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from unbackdoor.audit import purifying

    genuine = purifying.compare_accuracy

    def some_lost(*arguments: Any) -> Any:
        found = genuine(*arguments)
        assert found is not None
        after = replace(found.before, hits=found.before.hits - 2)
        return replace(found, after=after, lost=2, gained=0)

    monkeypatch.setattr(purifying, "compare_accuracy", some_lost)
    model, images = tiny_classifier("conv-bn"), right(tiny_data(80, seed=5))
    done = purify(model, images, "none", max_accuracy_drop=0.15)
    assert done.promise is not None and done.promise.kept == "cannot be told"
    with pytest.raises(PromiseBroken, match=r"cannot be told.*thrown away"):
        purify(model, images, "none", max_accuracy_drop=0.15, promise="strict")


def test_what_flatters_is_said(tmp_path: Path) -> None:
    model = tiny_classifier("conv-bn")
    few = purify(model, tiny_data(8), "none")
    assert any("the method saw" in reason for reason in few.flattered)
    perfect = purify(model, right(tiny_data(80, seed=5)), "none")
    assert any("trained on" in reason for reason in perfect.flattered)
    assert unbackdoor.record(perfect)["accuracy_flattered_because"]
    draw = torch.Generator().manual_seed(1)
    noisy = replace(tiny_data(80, seed=5), labels=torch.randint(0, 4, (80,), generator=draw))
    assert purify(model, noisy, "none").flattered == ()
    # Images of one's own for the proof, that no training saw, are the remedy.
    given = unbackdoor.purify(model, tiny_data(40), "none", proof=noisy)
    assert given.flattered == () and given.facts["images_for_the_proof"] == 80


def test_losses_are_fractions_in_python_and_points_in_words() -> None:
    model, images = tiny_classifier("conv-bn"), tiny_data(80, seed=5)
    with pytest.raises(InputError, match=r"0\.04 is 4 points"):
        purify(model, images, "none", max_accuracy_drop=4)
    done = purify(model, images, "none", max_accuracy_drop=0.04)
    assert done.promise is not None and done.promise.asked == 0.04
    assert -1 <= done.promise.low <= done.promise.measured <= done.promise.high <= 1
    assert "at most 4.0 points" in done.promise.in_words()
