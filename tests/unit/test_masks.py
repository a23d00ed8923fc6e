"""Masks: folding equals gating, ones are the identity, and the network is never touched."""

from __future__ import annotations

import pytest
import torch

from tiny import ARCHITECTURES, tiny_classifier, tiny_data
from unbackdoor.engine.heads import find_head
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.masks import (
    Masks,
    channel_sites,
    fold,
    keep_above,
    norm_sites,
    removed,
    unit_sites,
    weight_sites,
)
from unbackdoor.engine.rng import seeded
from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.types import Classifier

PIXELS = tiny_data(12).pixels.float() / 255


def all_sites(model: Classifier) -> dict[str, list]:
    return {
        "norm": norm_sites(model),
        "norm with bias": norm_sites(model, with_bias=True),
        "unit": unit_sites(model),
        "weight": weight_sites(model, linear=True),
        "channel": channel_sites(model, skip=(find_head(model).name,)),
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ones_are_the_identity_and_folding_equals_gating(kind: str) -> None:
    model = tiny_classifier(kind)
    before = model.sha256()
    plain = model(PIXELS)
    for name, sites in all_sites(model).items():
        if not sites:
            continue
        masks = Masks(model, sites)
        assert torch.equal(masks(PIXELS), plain), name
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for mask in masks.values.values():
                mask.copy_(torch.rand(mask.shape, generator=draws))
        gated = masks(PIXELS)
        assert not torch.allclose(gated, plain), name
        assert torch.equal(fold(model, sites, masks.values)(PIXELS), gated), name
    assert model.sha256() == before


def test_only_masks_learn() -> None:
    model = tiny_classifier("conv-bn")
    masks = Masks(model, norm_sites(model))
    with frozen(model):
        masks(PIXELS).square().sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().sum() > 0 for mask in masks.parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_channel_pruning_equals_a_manual_loop() -> None:
    model = tiny_classifier("conv-bn")
    sites = norm_sites(model)
    draws = torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.shape, generator=draws) for site in sites}
    pruned = fold(model, sites, keep_above(scores, 0.4))
    manual = model.copy()
    count = 0
    for site in sites:
        weight = manual.get_submodule(site.name).weight
        for k in range(len(weight)):
            if scores[site.name][k] <= 0.4:
                with torch.no_grad():
                    weight[k] = 0
                count += 1
    assert pruned.sha256() == manual.sha256()
    assert removed(keep_above(scores, 0.4)) == count > 0


def test_clamp_bounds_in_place() -> None:
    model = tiny_classifier("conv-bn")
    masks = Masks(model, norm_sites(model))
    with torch.no_grad():
        for mask in masks.values.values():
            mask.uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    masks.clamp_()
    assert all(m.min().item() >= 0 and m.max().item() <= 1 for m in masks.values.values())


def test_the_head_is_found_by_what_it_returns() -> None:
    expected = {"conv-bn": "network.fc", "conv": "network.fc", "transformer": "network.head"}
    for kind, name in expected.items():
        head = find_head(tiny_classifier(kind))
        assert head.name == name
        assert head.module.out_features == 4


def test_a_network_without_a_linear_head_is_refused_by_name() -> None:
    with seeded(0):
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten())
    model = Classifier(network, input_shape=(1, 8, 8), class_names="abcd")
    with pytest.raises(UnsupportedModel, match="linear layers: none"):
        find_head(model)


def test_nothing_to_mask_is_refused() -> None:
    with seeded(0):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    model = Classifier(network, input_shape=(1, 8, 8), class_names="abcd")
    with pytest.raises(UnsupportedModel, match="no channel to mask"):
        channel_sites(model, skip=("network.1",))


def test_sites_of_the_standard_network() -> None:
    model = build("preact_resnet18[width=4]", input_shape=(3, 32, 32), class_names="0123456789")
    # 2 norms in each of 8 blocks and the last one: 2 x (4+4) + (4+8+8+8) + (8+16+16+16) + (16+32+32+32) + 32.
    assert sum(site.shape[0] for site in norm_sites(model)) == 244
    assert len(weight_sites(model)) == 20
