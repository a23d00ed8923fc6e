"""The recipe ``fast`` and the network made for it, each part against a closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import NAMES, tiny_data
from unbackdoor.data.batches import augment, batches, shifted
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import RECIPES, OwnRates, Recipe, _flips, _rate, initialise, train
from unbackdoor.networks import build
from unbackdoor.networks.airbench import Airbench
from unbackdoor.types import Classifier

DATA = tiny_data(64)


def fresh(width: int = 4) -> Classifier:
    model = build(f"airbench[width={width}]", input_shape=(1, 8, 8), class_names=NAMES, seed=1)
    initialise(model, DATA)
    return model


def test_the_named_recipe_hides_no_margins() -> None:
    assert RECIPES["fast"].label_smoothing == RECIPES["fast"].mixup == 0


def test_the_rate_of_the_reference_code_for_the_mean_loss() -> None:
    # 11.5 and 0.0153 for 1,024 examples, decoupled from a momentum of 0.85 in Nesterov's form.
    scale = 1 + 1 / (1 - 0.85)
    fast = RECIPES["fast"]
    assert fast.lr == pytest.approx(11.5 / scale, abs=1e-9 + 5e-3)
    assert fast.lr * fast.weight_decay == pytest.approx(0.0153 / scale, rel=5e-3)


def test_the_linear_schedule() -> None:
    recipe = Recipe(schedule="linear", warmup=0.23)
    assert _rate(recipe, 0.0) == pytest.approx(0.2)
    assert _rate(recipe, 0.23) == pytest.approx(1.0)
    assert _rate(recipe, 1.0) == pytest.approx(0.07)
    assert _rate(recipe, 0.115) == pytest.approx(0.6)


def test_every_image_is_seen_from_both_sides_in_two_epochs() -> None:
    run = Run.create(seed=3)
    first, second, third = (_flips(1000, epoch, run) for epoch in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 400 < int(first.sum()) < 600
    assert not torch.equal(first, _flips(1000, 0, Run.create(seed=4)))


def test_flips_belong_to_images_and_not_to_places_in_a_batch() -> None:
    flips = torch.arange(len(DATA)) % 3 == 0
    draws = torch.Generator().manual_seed(5)
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(5))
    (pixels, _), *_ = batches(
        DATA, len(DATA), generator=draws, augmentation="crop+flip", flips=flips, reflect=1
    )
    # The same draws again, image by image.
    again = torch.Generator().manual_seed(5)
    torch.randperm(len(DATA), generator=again)
    tops, lefts = (torch.randint(3, (len(DATA),), generator=again) for _ in range(2))
    expected = shifted(DATA.pixels[order], tops, lefts, flips[order], reflect=1)
    assert torch.equal(pixels, expected.float() / 255)


def test_the_mirrored_border_is_the_one_of_torch() -> None:
    pixels = torch.randint(256, (3, 2, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wide = F.pad(pixels.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    tops, lefts = torch.tensor([0, 4, 1]), torch.tensor([3, 0, 2])
    got = shifted(pixels, tops, lefts, reflect=2)
    for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        assert torch.equal(got[i], wide[i, :, top : top + 9, left : left + 7])


def test_without_options_an_augmentation_draws_as_it_always_did() -> None:
    pixels = DATA.pixels
    one = augment(pixels, "crop+flip", torch.Generator().manual_seed(1))
    two = augment(pixels, "crop+flip", torch.Generator().manual_seed(1), reflect=0, flips=None)
    assert torch.equal(one, two)


def test_whitened_patches_have_unit_variance_and_do_not_correlate() -> None:
    images = torch.rand(400, 3, 12, 12, generator=torch.Generator().manual_seed(2)) * 4 - 2
    images = images + images.mean(1, keepdim=True)  # channels that correlate
    network = build("airbench[width=4]", input_shape=(3, 12, 12), class_names=NAMES).network
    assert isinstance(network, Airbench)
    network.initialise_from(images)
    half = F.conv2d(images, network.whiten.weight[:12]).flatten(2).transpose(1, 2).reshape(-1, 12)
    covariance = half.T @ half / len(half)  # (12, 12), of all patches
    assert torch.allclose(covariance, torch.eye(12), atol=0.02)
    assert torch.equal(network.whiten.weight[:12], -network.whiten.weight[12:])


def test_convolutions_begin_as_the_identity() -> None:
    network = build("airbench[width=8]", input_shape=(3, 12, 12), class_names=NAMES).network
    assert isinstance(network, Airbench)
    x = torch.rand(2, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.group2.conv2(x), x)


def test_the_folded_scale_of_the_logits_learns_as_the_reference_code_does() -> None:
    # W' = W / 9 at a rate of lr / 81 is W at lr with logits W x / 9.
    network = build("airbench[width=4]", input_shape=(1, 8, 8), class_names=NAMES).network
    assert isinstance(network, OwnRates)
    factor = network.learning_rates(0)["head.weight"]
    draws = torch.Generator().manual_seed(0)
    features, labels = torch.randn(6, 5, generator=draws), torch.randint(3, (6,), generator=draws)
    weight = nn.Parameter(torch.randn(3, 5, generator=draws))
    folded = nn.Parameter(weight.detach() / 9)

    def step(parameter: nn.Parameter, logits: Tensor, rate: float) -> Tensor:
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), parameter)
        return (parameter - rate * slope).detach()

    theirs = step(weight, features @ weight.T / 9, 1.5)
    ours = step(folded, features @ folded.T, 1.5 * factor)
    assert torch.allclose(ours, theirs / 9, atol=1e-6)


def test_what_is_frozen_stays_and_the_early_bias_learns_early_alone(tmp_path: Path) -> None:
    del tmp_path
    recipe = Recipe.parse(
        {**RECIPES["fast"].model_dump(), "epochs": 3, "batch_size": 16, "lookahead": False}, subject="test"
    )
    short, long = fresh(), fresh()
    start = short.sha256()
    train(short, DATA, recipe, Run.create(policy="fp32"))
    train(long, DATA, recipe.model_copy(update={"epochs": 6}), Run.create(policy="fp32"))
    assert short.sha256() != start
    for model in (short, long):
        network = model.network
        assert isinstance(network, Airbench)
        untouched = fresh().network
        assert isinstance(untouched, Airbench)
        assert torch.equal(network.whiten.weight, untouched.whiten.weight)
        assert torch.equal(network.group1.bn1.weight, torch.ones(4))
        assert bool(network.whiten.bias.abs().sum() > 0)  # type: ignore[union-attr]  # it has one
    assert fresh().network.learning_rates(3)["whiten.bias"] == 0.0  # type: ignore[operator, union-attr]


def test_lookahead_ends_with_the_slow_weights() -> None:
    # With d = 0 at the first visit the slow copy is the network itself; later it lags behind.
    plain = {**RECIPES["fast"].model_dump(), "epochs": 4, "batch_size": 16}
    slow, quick = fresh(), fresh()
    train(slow, DATA, Recipe.parse(plain, subject="test"), Run.create(policy="fp32"))
    train(quick, DATA, Recipe.parse({**plain, "lookahead": False}, subject="test"), Run.create(policy="fp32"))
    assert slow.sha256() != quick.sha256()


def test_a_killed_fast_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = Recipe.parse({**RECIPES["fast"].model_dump(), "epochs": 4, "batch_size": 16}, subject="test")

    class Killed(BaseException):
        pass

    def show(items, label, total=None):  # type: ignore[no-untyped-def]
        for done, item in enumerate(items):
            if done == 10:
                raise Killed
            yield item

    whole, killed, resumed = fresh(), fresh(), fresh()
    train(whole, DATA, recipe, Run.create(seed=3, policy="fp32"))
    file = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(killed, DATA, recipe, Run.create(seed=3, policy="fp32", progress=show), checkpoint=file)
    assert train(resumed, DATA, recipe, Run.create(seed=3, policy="fp32"), checkpoint=file).resumed_from == 2
    assert resumed.sha256() == whole.sha256()
