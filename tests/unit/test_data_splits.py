"""Splits: disjoint, balanced, the same under the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.types import Images


def numbered(counts: list[int], seed: int = 0) -> Images:
    """Images whose pixels spell their own position, in a mixed order of classes."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    places = torch.arange(len(labels))
    pixels = torch.stack([places // 256, places % 256], 1).to(torch.uint8).view(-1, 1, 1, 2)
    return Images(pixels, labels, tuple(f"c{k}" for k in range(len(counts))), "numbered")


def places(images: Images) -> list[int]:
    flat = images.pixels.flatten(1).to(torch.int64)
    return (flat[:, 0] * 256 + flat[:, 1]).tolist()


COUNTS = st.lists(st.integers(2, 40), min_size=1, max_size=6)
FEW = settings(max_examples=40, deadline=None)


@FEW
@given(counts=COUNTS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_reserve_is_a_stratified_partition(counts: list[int], fraction: float, seed: int) -> None:
    images = numbered(counts)
    train, pool = reserve(images, fraction=fraction, seed=seed)
    assert sorted(places(train) + places(pool)) == list(range(len(images)))
    for part in (train, pool):
        assert places(part) == sorted(places(part))
        assert torch.equal(part.truth, images.truth[torch.tensor(places(part))])
    for k, number in enumerate(counts):
        held = int((pool.truth == k).sum())
        assert held == min(max(1, round(fraction * number)), number - 1)
    again = reserve(images, fraction=fraction, seed=seed)
    assert places(again[1]) == places(pool)


def test_another_seed_reserves_other_images() -> None:
    images = numbered([50, 50])
    assert places(reserve(images, seed=0)[1]) != places(reserve(images, seed=1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_reserve_refuses_a_bad_fraction(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction must lie in \(0, 1\)"):
        reserve(numbered([5, 5]), fraction=fraction)


def test_reserve_needs_two_of_each_class() -> None:
    with pytest.raises(InputError, match=r"class 'c1' has too few .*expected at least 2, got 1\. Add images"):
        reserve(numbered([5, 1]))


@FEW
@given(counts=COUNTS, data=st.data(), seed=st.integers(0, 2**31))
def test_draw_by_count_is_balanced(counts: list[int], data: st.DataObject, seed: int) -> None:
    pool = numbered(counts)
    count = data.draw(st.integers(1, min(counts) * len(counts)))
    clean = draw_clean(pool, count=count, seed=seed)
    per_class = clean.truth.bincount(minlength=len(counts))
    assert len(clean) == count == len(set(places(clean)))
    assert int(per_class.max() - per_class.min()) <= 1
    assert places(draw_clean(pool, count=count, seed=seed)) == places(clean)


@FEW
@given(counts=COUNTS, seed=st.integers(0, 2**31), per_class=st.integers(1, 2))
def test_draw_by_class(counts: list[int], seed: int, per_class: int) -> None:
    clean = draw_clean(numbered(counts), per_class=per_class, seed=seed)
    assert clean.truth.bincount().tolist() == [per_class] * len(counts)


@FEW
@given(counts=COUNTS, seed=st.integers(0, 2**31), fraction=st.floats(0.001, 1.0))
def test_draw_by_fraction(counts: list[int], seed: int, fraction: float) -> None:
    clean = draw_clean(numbered(counts), fraction=fraction, seed=seed)
    assert clean.truth.bincount().tolist() == [max(1, round(fraction * number)) for number in counts]


def test_training_pool_and_clean_set_are_disjoint() -> None:
    images = numbered([30, 40, 50])
    train, pool = reserve(images, fraction=0.3, seed=3)
    clean = draw_clean(pool, per_class=4, seed=3)
    assert set(places(clean)) <= set(places(pool)) and not set(places(clean)) & set(places(train))


def test_the_remainder_goes_to_classes_chosen_by_the_seed() -> None:
    pool = numbered([10] * 5)
    chosen = {tuple(draw_clean(pool, count=7, seed=seed).truth.bincount().tolist()) for seed in range(20)}
    assert len(chosen) > 1 and all(sorted(counts) == [1, 1, 1, 2, 2] for counts in chosen)


def test_fewer_of_a_class_than_asked_for() -> None:
    with pytest.raises(
        InputError,
        match=r"'c1' has too few images \(numbered, label 1\): expected at least 4, got 3\. Ask for fewer",
    ):
        draw_clean(numbered([9, 3]), per_class=4)


def test_fewer_in_all_than_asked_for() -> None:
    with pytest.raises(InputError, match=r"too few images \(numbered\): expected at least 13, got 12\. Ask"):
        draw_clean(numbered([9, 3]), count=13)


def test_what_small_classes_lack_comes_evenly_from_the_others() -> None:
    assert draw_clean(numbered([9, 3]), count=8).truth.bincount().tolist() == [5, 3]
    counts = draw_clean(numbered([1, 2, 9, 9, 9]), count=20).truth.bincount().tolist()
    assert counts[:2] == [1, 2]
    assert sorted(counts[2:]) == [5, 6, 6]
    assert len(draw_clean(numbered([9, 3]), count=12)) == 12


@pytest.mark.parametrize(
    ("amounts", "fault"),
    [
        ({}, "exactly one of count, per_class and fraction must be given, got none"),
        ({"count": 2, "fraction": 0.5}, "got count, fraction"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"per_class": -1}, "per_class must be at least 1, got -1"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"fraction": math.nan}, r"fraction must lie in \(0, 1\]"),
    ],
)
def test_bad_amounts(amounts: dict[str, float], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        draw_clean(numbered([5, 5]), **amounts)  # type: ignore[arg-type]


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError, match="3 faults"):
        draw_clean(numbered([5, 5]), count=0, fraction=2.0)


def test_labels_are_needed() -> None:
    bare = Images(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), None, ("a",))
    with pytest.raises(InputError, match="labels are needed"):
        draw_clean(bare, count=1)
