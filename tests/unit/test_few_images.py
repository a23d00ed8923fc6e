"""A handful of images: views that enlarge them, steps drawn from them."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_data
from unbackdoor.defenses.awm.few_images import enlarged, shuffled, with_replacement


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ten_images_become_a_hundred_with_the_originals_first() -> None:
    images = tiny_data(10)
    out = enlarged(images, 100, "crop", generator())
    assert len(out) == 100
    assert torch.equal(out.pixels[:10], images.pixels)
    assert torch.equal(out.truth, images.truth.repeat(10))
    assert not torch.equal(out.pixels[10:20], images.pixels)
    again = enlarged(images, 100, "crop", generator())
    assert out.fingerprint() == again.fingerprint()


@pytest.mark.parametrize(("count", "expected"), [(1, 100), (43, 129), (99, 198), (100, 100), (500, 500)])
def test_how_many_there_are_afterwards(count: int, expected: int) -> None:
    assert len(enlarged(tiny_data(count), 100, "crop", generator())) == expected


def test_what_the_domain_does_not_allow_is_not_done() -> None:
    images = tiny_data(4)
    assert enlarged(images, 100, "none", generator()) is images
    assert enlarged(images, 0, "crop", generator()) is images


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"),
    # 5 passes of max(ceil(n / b), min(4, n)) steps.
    [(1, 128, 5), (3, 128, 15), (10, 128, 20), (100, 128, 20), (513, 128, 25), (100, 32, 20), (350, 32, 55)],
)
def test_every_image_comes_once_a_pass_in_batches_of_like_size(
    count: int, batch_size: int, steps: int
) -> None:
    out = shuffled(count, batch_size, 5, generator())
    assert len(out) == steps
    sizes = [len(rows) for rows in out]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    for start in range(0, steps, steps // 5):
        one_pass = torch.cat(out[start : start + steps // 5])
        assert torch.equal(one_pass.sort().values, torch.arange(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"),
    # 5 x floor(n / b): 15 for 500 images and 100 one-shot views; 0 below one batch, where the code crashes.
    [(500, 128, 15), (100, 32, 15), (43, 32, 5), (100, 128, 1), (10, 128, 1)],
)
def test_draws_with_replacement_take_as_many_steps_as_the_released_code(
    count: int, batch_size: int, steps: int
) -> None:
    out = with_replacement(count, batch_size, 5, generator())
    assert len(out) == steps
    assert all(len(rows) == batch_size and int(rows.max()) < count for rows in out)
