"""Batches and augmentation, held against one image at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unbackdoor.data.batches import augment, batches, padding, resident, shifted, to_float
from unbackdoor.errors import InputError
from unbackdoor.types import Images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator(seed))


def images(count: int) -> Images:
    return Images(random_pixels(count, 3, 8, 8), torch.arange(count) % 2, ("a", "b"))


def naive(pixels: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor | None) -> Tensor:
    """One image at a time, one pixel at a time of thought: pad, cut, mirror."""
    out = []
    for i, image in enumerate(pixels):
        c, h, w = image.shape
        pad_y, pad_x = padding(h), padding(w)
        canvas = torch.zeros(c, h + 2 * pad_y, w + 2 * pad_x, dtype=image.dtype)
        canvas[:, pad_y : pad_y + h, pad_x : pad_x + w] = image
        window = canvas[:, tops[i] : tops[i] + h, lefts[i] : lefts[i] + w]
        out.append(window.flip(2) if flips is not None and flips[i] else window)
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    floating=st.booleans(),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_shifted_agrees_with_one_image_at_a_time(
    batch: int, channels: int, height: int, width: int, floating: bool, flip: bool, seed: int
) -> None:
    draw = generator(seed)
    pixels = random_pixels(batch, channels, height, width, seed=seed)
    if floating:
        pixels = pixels.to(torch.float32) / 255
    tops = torch.randint(2 * padding(height) + 1, (batch,), generator=draw)
    lefts = torch.randint(2 * padding(width) + 1, (batch,), generator=draw)
    flips = torch.rand(batch, generator=draw) < 0.5 if flip else None
    assert torch.equal(shifted(pixels, tops, lefts, flips), naive(pixels, tops, lefts, flips))


def test_padding_is_an_eighth() -> None:
    assert [padding(side) for side in (8, 32, 64, 28, 3)] == [1, 4, 8, 4, 0]


def test_the_middle_window_is_the_image() -> None:
    pixels = random_pixels(2, 3, 32, 32)
    middle = torch.full((2,), 4)
    assert torch.equal(shifted(pixels, middle, middle), pixels)
    mirrored = shifted(pixels, middle, middle, torch.tensor([True, False]))
    assert torch.equal(mirrored, torch.stack([pixels[0].flip(2), pixels[1]]))


def test_augment_draws_each_image_on_its_own() -> None:
    pixels = random_pixels(1, 3, 32, 32).expand(200, -1, -1, -1)
    out = augment(pixels, "crop+flip", generator())
    assert out.shape == pixels.shape and out.dtype == torch.uint8
    # 9 x 9 windows, mirrored or not: 162 possibilities, of which 200 draws see most.
    assert len(out.flatten(1).unique(dim=0)) > 90
    assert len(augment(pixels, "crop", generator()).flatten(1).unique(dim=0)) <= 81
    assert augment(pixels, "none", generator()) is pixels


def test_augment_is_deterministic_and_refuses_other_words() -> None:
    pixels = random_pixels(9, 1, 8, 8)
    assert torch.equal(augment(pixels, "crop", generator(5)), augment(pixels, "crop", generator(5)))
    assert not torch.equal(augment(pixels, "crop", generator(5)), augment(pixels, "crop", generator(6)))
    with pytest.raises(InputError, match="unknown augmentation"):
        augment(pixels, "rotate", generator())  # type: ignore[arg-type]


def test_to_float() -> None:
    pixels = random_pixels(2, 3, 4, 4)
    for channels_last in (True, False):
        out = to_float(pixels, "cpu", channels_last)
        assert out.dtype == torch.float32 and torch.equal(out, pixels.float() / 255)
    assert to_float(pixels).is_contiguous(memory_format=torch.channels_last)


def test_in_order_without_a_generator() -> None:
    data = images(7)
    seen = list(batches(data, 3))
    assert [len(pixels) for pixels, _ in seen] == [3, 3, 1]
    assert torch.equal(torch.cat([pixels for pixels, _ in seen]), data.pixels.float() / 255)
    assert torch.equal(torch.cat([labels for _, labels in seen if labels is not None]), data.truth)


def test_shuffled_is_a_seeded_permutation_with_its_labels() -> None:
    pixels = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = Images(pixels, torch.arange(100) % 7, tuple("abcdefg"))
    first, second = (list(batches(data, 32, generator=generator(3))) for _ in range(2))
    values = torch.cat([(p * 255).round().long().flatten() for p, _ in first])
    labels = torch.cat([y for _, y in first if y is not None])
    assert sorted(values.tolist()) == list(range(100)) and values.tolist() != list(range(100))
    assert torch.equal(labels, values % 7)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("count", "size", "options", "sizes"),
    [
        (9, 4, {}, [4, 4, 1]),
        (9, 4, {"min_batch": 2}, [4, 4]),
        (10, 4, {"min_batch": 2}, [4, 4, 2]),
        (1, 4, {"min_batch": 2}, [1]),
        (10, 4, {"drop_last": True}, [4, 4]),
        (3, 4, {"drop_last": True}, [3]),
        (8, 4, {"drop_last": True}, [4, 4]),
    ],
)
def test_the_trailing_batch(count: int, size: int, options: dict[str, int], sizes: list[int]) -> None:
    seen = [len(pixels) for pixels, _ in batches(images(count), size, **options)]  # type: ignore[arg-type]
    assert seen == sizes


def test_labels_may_be_absent() -> None:
    bare = Images(random_pixels(3, 1, 2, 2), None, ())
    assert [labels for _, labels in batches(bare, 2, generator=generator())] == [None, None]


def test_the_set_itself_is_never_written() -> None:
    data = images(6)
    before = data.fingerprint()
    for draw in (None, generator()):
        for pixels, labels in batches(data, 6, generator=draw):
            pixels.zero_()
            assert labels is not None
            labels.zero_()
    assert data.fingerprint() == before


def test_faults_are_found_at_the_call() -> None:
    with pytest.raises(InputError, match="the set is empty"):
        batches(images(1).subset([]), 4)
    with pytest.raises(InputError, match="batch size does not fit"):
        batches(images(1), 0)
    with pytest.raises(InputError, match=r"augmentation needs a generator.*Pass generator"):
        batches(images(1), 4, augmentation="crop")


def test_resident_returns_the_same_set_where_it_lies_there() -> None:
    data = images(2)
    assert resident(data, "cpu") is data
    # Labels cannot go there: their range cannot be checked on a device without values.
    moved = resident(Images(data.pixels, None, ()), "meta")
    assert moved.pixels.device.type == "meta"
