"""The differential search finds what one network alone does, and two twins give its law of chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.engine import differential_survey
from unbackdoor.engine.differential_search import Opponents, Stage, window_places
from unbackdoor.engine.differential_survey import (
    UNTARGETED,
    ChanceLaw,
    Conviction,
    Survey,
    convictions,
    survey,
    surveyed,
    tail_among,
    tail_of_largest,
)
from unbackdoor.engine.run import Run
from unbackdoor.engine.twin import Twin, relearned_twin
from unbackdoor.types import CleanData

DATA = block_data(160)
RUN = Run.create(seed=0, policy="fp32")
CORNER = 2  # class that the corner of the planted network decides for


def opponents(*corners: int) -> Opponents:
    return Opponents(planted(corners), planted(), replace(DATA, labels=None), RUN)


def twin() -> Twin:
    return Twin(planted(), 1.0, 1.0, ())


def never() -> Twin:
    raise AssertionError("a second twin was made for nothing")


def test_a_shortcut_of_one_network_is_found_and_convicted() -> None:
    pair = opponents(CORNER)
    result = survey(pair, seed="test", whole=True)
    assert result.gaps().index(max(result.gaps())) == CORNER
    # What moves to the class would explain what leaves all others, so that those need no law of their own.
    convicted, p_value = convictions(result, ChanceLaw(pair, never))
    assert [one.label for one in convicted] == [CORNER] and p_value < 0.05
    best = result.best(CORNER)
    assert best is not None and best.moved > 0.5 and best.gap == best.moved - best.moved_twin


def test_two_equal_networks_have_no_gap_and_ask_for_no_second_twin() -> None:
    pair = opponents()
    result = survey(pair, seed="test", whole=True)
    assert max(result.gaps()) == 0.0

    assert convictions(result, ChanceLaw(pair, never)) == ([], 1.0)


def test_a_plain_case_ends_the_survey_unless_all_is_asked_for() -> None:
    pair = opponents(CORNER)
    short, whole = (survey(pair, seed="test", whole=one) for one in (False, True))
    assert not short.whole and len(short.differences) < len(whole.differences)
    gone_on = survey(pair, seed="test", whole=True, begun=short)
    assert [d.gap for d in gone_on.differences] == [d.gap for d in whole.differences] and gone_on.whole


def test_a_plain_class_that_is_not_convicted_asks_for_the_longer_searches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def judge(result: Survey, *_: object, **__: object) -> tuple[list[Conviction], float]:
        asked.append(result.whole)
        return [], 0.2

    monkeypatch.setattr(differential_survey, "convictions", judge)
    result, convicted, p_value = surveyed(opponents(CORNER), twin, twin, seed="test", whole=False)
    assert asked == [False, True] and result.whole and (convicted, p_value) == ([], 0.2)


def test_plain_squares_are_found_by_forward_passes_alone() -> None:
    pair = opponents(CORNER)
    best = pair.with_classes(pair.measure(pair.stamps()))[0]
    assert best.change.label == CORNER and best.gap > 0.5


def test_entries_of_a_class_compete_among_themselves_where_asked() -> None:
    pair = opponents(CORNER)
    places = window_places(pair.model.input_shape, 4)
    stages = (Stage(2, 1),)
    single = pair.search("window", [0, 1, 2], places=places, stages=stages, single=True)
    assert sorted(one.label for one in single) == [0, 1, 2]
    assert len(pair.search("window", [0, 1, 2], places=places, stages=stages)) == 1


def test_the_same_seed_names_the_same_search() -> None:
    pair = opponents(CORNER)
    first, second = (pair.search("patch", [CORNER], stages=(Stage(3, 1),), seed="a") for _ in range(2))
    other = pair.search("patch", [CORNER], stages=(Stage(3, 1),), seed="b")
    assert torch.equal(first[0].parameters, second[0].parameters)
    assert not torch.equal(first[0].parameters, other[0].parameters)


def test_the_search_leaves_both_networks_as_they_were() -> None:
    model, other = planted((CORNER,)), planted()
    before = model.sha256(), other.sha256()
    pair = Opponents(model, other, DATA, RUN)
    survey(pair, seed="test", whole=False)
    assert (model.sha256(), other.sha256()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_the_law_of_the_largest_holds_its_level() -> None:
    draws = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(400):
        null = 0.2 + 0.1 * torch.randn(16, generator=draws, dtype=torch.float64)
        largest = float((0.2 + 0.1 * torch.randn(20, generator=draws, dtype=torch.float64)).max())
        alarms += tail_of_largest(largest, null, tests=20) <= 0.05
    # 20 of 400 are expected, with a deviation of 4.4.
    assert 8 <= alarms <= 34
    assert tail_of_largest(5.0, null, tests=20) == 1 / 20_001


def test_two_targets_do_not_hide_each_other() -> None:
    pair = opponents(CORNER, 5)
    convicted, p_value = convictions(survey(pair, seed="test", whole=True), ChanceLaw(pair, twin), lead=2.0)
    assert {one.label for one in convicted} == {CORNER, 5} and p_value < 0.05


def test_the_law_among_classes_holds_its_level_and_sees_up_to_three() -> None:
    draws = torch.Generator().manual_seed(0)
    alarms, found = 0, 0
    for _ in range(400):
        gaps = 0.1 + 0.1 * torch.randn(10, generator=draws, dtype=torch.float64)
        gaps = gaps.sort(descending=True).values
        alarms += tail_among(float(gaps[0]), gaps[1:]) <= 0.05
        gaps[:3] = torch.tensor([1.0, 0.95, 0.9])
        rest = [torch.cat([gaps[:i], gaps[i + 1 :]]) for i in range(3)]
        found += all(
            tail_among(float(gap), others) <= 0.05 for gap, others in zip(gaps[:3], rest, strict=True)
        )
    assert alarms <= 34  # 20 of 400 at most are expected, with a deviation of 4.4
    assert found >= 380


def test_classes_that_stand_a_little_apart_by_nature_are_not_trimmed() -> None:
    """The gaps of a patch on a clean network, and on one with a backdoor towards class 0."""
    clean = torch.tensor([0.354, 0.046, 0.25, 0.338, 0.227, 0.48, 0.025, 0.137, 0.216, 0.17]).double()
    assert tail_among(0.48, clean[clean != 0.48]) > 0.05
    natural = torch.tensor([1.0, 0, 0, 0, 0, 0, 0.1, 0, 0]).double()
    assert tail_among(0.41, natural) > 0.05


def test_a_gap_away_from_the_predicted_class_has_no_class() -> None:
    pair = opponents(CORNER)
    changes = pair.search("patch", [UNTARGETED], stages=(Stage(24, 1),))
    found = pair.with_classes(pair.measure(changes))
    assert {one.change.label for one in found} >= {UNTARGETED}
    # All that it moves goes to one class, so it counts as one towards that class as well.
    assert CORNER in {one.change.label for one in found} or found[0].moved == 0


def test_a_twin_keeps_the_task_and_the_network_stays() -> None:
    model, data = tiny_classifier(), CleanData.split(tiny_data(160))
    before = model.sha256()
    one, two = (relearned_twin(model, data, RUN, number=n, strengths=(1.0,)) for n in (0, 1))
    assert model.sha256() == before
    assert one.model.sha256() != two.model.sha256()  # twins differ by their draws
    assert one.tried == ((1.0, one.agreement),) and one.usable
