"""The strength of soft masks: a path from nothing to all, climbed while the accuracy holds."""

from __future__ import annotations

import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.defenses.awm.mask_strength import LEVELS, softened, strongest_within, two_fold_splits
from unbackdoor.defenses.awm.weight_masks import maskable_weights
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run

RUN = Run.create(policy="fp32")


def test_softened_runs_from_ones_to_the_masks() -> None:
    values = {"a": torch.tensor([0.0, 0.4, 1.0])}
    assert torch.equal(softened(values, 0.0)["a"], torch.ones(3))
    assert torch.allclose(softened(values, 0.5)["a"], torch.tensor([0.5, 0.7, 1.0]))
    assert torch.allclose(softened(values, 1.0)["a"], values["a"])


def test_either_half_judges_the_other_and_every_image_counts_once() -> None:
    images = tiny_data(9)
    (one, other), (third, fourth) = two_fold_splits(images, torch.Generator().manual_seed(0))
    assert (len(one), len(other)) == (5, 4)
    assert torch.equal(one.pixels, fourth.pixels)
    assert torch.equal(other.pixels, third.pixels)
    assert sorted(torch.cat([one.truth, other.truth]).tolist()) == sorted(images.truth.tolist())


def test_the_climb_stops_before_the_first_fall() -> None:
    model = tiny_classifier("conv-bn")
    sites = maskable_weights(model, linear=False)
    images = tiny_data(40, seed=3)
    zeros = {site.name: torch.zeros(site.shape) for site in sites}
    out = strongest_within(model, sites, [(zeros, images)], RUN, tolerance=0.05)
    assert out.base == accuracy(model, images, RUN)
    assert 0 <= out.level < 1  # all weights at zero classify nothing
    assert [level for level, _ in out.trace] == list(LEVELS[: len(out.trace)])
    assert all(reached >= out.base - 0.05 - 1e-6 for _, reached in out.trace[:-1])
    assert out.trace[-1][1] < out.base - 0.05
    # Harmless masks on the other trial halve the fall, because the images of all trials count.
    ones = {site.name: torch.ones(site.shape) for site in sites}
    both = strongest_within(model, sites, [(zeros, images), (ones, images)], RUN, tolerance=0.05)
    for (_, alone), (_, mixed) in zip(out.trace, both.trace, strict=False):
        assert abs(mixed - (alone + out.base) / 2) < 1e-6
    assert strongest_within(model, sites, [(ones, images)], RUN, tolerance=0.0).level == 1.0
