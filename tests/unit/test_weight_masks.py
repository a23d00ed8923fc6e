"""Weight masks: the masked copy equals masking, steps equal Adam written out, and weights never learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny import ARCHITECTURES, tiny_classifier, tiny_data
from unbackdoor.defenses.awm.weight_masks import WeightMasks, maskable_weights
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.masks import Masks, fold
from unbackdoor.engine.rng import seeded
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier

DATA = tiny_data(12)
PIXELS = DATA.pixels.float() / 255


def volumes() -> Classifier:
    """A classifier with convolutions in one, two and three dimensions."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(8, 8, 3, padding=1)
            self.two = nn.Conv2d(1, 2, 3, padding=1)
            self.three = nn.Conv3d(1, 2, (2, 3, 3), padding=(0, 1, 1))
            self.head = nn.Linear(128, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x.squeeze(1)).relu()[:, None]  # (B, 1, 8, 8)
            x = self.two(x).relu()[:, None]  # (B, 1, 2, 8, 8)
            out: torch.Tensor = self.head(self.three(x).flatten(1))  # (B, 2, 1, 8, 8) -> (B, 128)
            return out

    with seeded(0):
        return Classifier(Mixed(), input_shape=(1, 8, 8), class_names="abcd").eval()


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "volumes"])
def test_steps_equal_adam_on_masks_written_out(kind: str) -> None:
    """Two ways to the same numbers: this one, and autograd over mask x weight with Adam by hand."""
    model = volumes() if kind == "volumes" else tiny_classifier(kind)
    sites = maskable_weights(model, linear=kind == "transformer")
    before = model.sha256()
    ours = WeightMasks(model, sites, lr=0.05, eps=1e-8, sparsity=1e-3)
    plain = Masks(model, sites)
    first, second = ([torch.zeros_like(m) for m in plain.parameters()] for _ in range(2))
    with frozen(model):
        for step in range(1, 6):
            with ours.learning():
                F.cross_entropy(ours.network(PIXELS), DATA.truth).backward()
                ours.step()
            loss = F.cross_entropy(plain(PIXELS), DATA.truth)
            loss = loss + 1e-3 * sum(m.abs().sum() for m in plain.parameters())
            slopes = torch.autograd.grad(loss, plain.parameters())
            with torch.no_grad():
                for mask, g, m, v in zip(plain.parameters(), slopes, first, second, strict=True):
                    m.mul_(0.9).add_(g, alpha=0.1)
                    v.mul_(0.999).addcmul_(g, g, value=0.001)
                    mask -= 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                    mask.clamp_(0, 1)
    for value, mask in zip(ours.values, plain.parameters(), strict=True):
        assert torch.allclose(value, mask, atol=2e-3)
        assert float(value.min()) < 1
    values = {site.name: value for site, value in zip(sites, ours.values, strict=True)}
    folded = fold(model, sites, values)
    assert ours.network.sha256() == folded.sha256()  # folding equals masking, to the bit
    assert model.sha256() == before


def test_nothing_but_the_masks_learns() -> None:
    model = tiny_classifier("conv-bn")
    masks = WeightMasks(model, maskable_weights(model, linear=False), lr=0.05, eps=1e-12, sparsity=0.0)
    start = {name: value.clone() for name, value in masks.network.state_dict().items()}
    assert not any(p.requires_grad for p in masks.network.parameters())
    with masks.learning():
        learning = {name for name, p in masks.network.named_parameters() if p.requires_grad}
        masks.network(PIXELS).square().sum().backward()
        assert {name for name, p in masks.network.named_parameters() if p.grad is not None} == learning
        masks.step()
    assert learning == {f"network.conv{i}.weight" for i in range(1, 5)}
    assert not any(p.requires_grad or p.grad is not None for p in masks.network.parameters())
    changed = {n for n, v in masks.network.state_dict().items() if not torch.equal(v, start[n])}
    assert changed == learning
    assert all(float(m.min()) >= 0 and float(m.max()) <= 1 for m in masks.values)


def steps_to_zero(eps: float, sparsity: float, limit: int) -> int | None:
    """Steps until the mask of a weight without any task gradient is 0."""
    with seeded(0):
        network = nn.Sequential(nn.Conv2d(1, 1, 8), nn.Flatten(), nn.Linear(1, 2))
    model = Classifier(network, input_shape=(1, 8, 8), class_names="ab").eval()
    sites = maskable_weights(model, linear=False)
    masks = WeightMasks(model, sites, lr=0.01, eps=eps, sparsity=sparsity)
    for step in range(1, limit + 1):
        masks.step()  # no backward pass, hence no task gradient
        if float(masks.values[0].max()) == 0:
            return step
    return None


def test_the_epsilon_of_adam_and_the_sparsity_are_coupled_in_the_released_code() -> None:
    """At eps = gamma = 1e-8 each step is half of lr: 1 / (0.01 / 2) = 200 steps, and one for rounding."""
    assert steps_to_zero(1e-8, 1e-8, 250) == 201
    # A hundredth of the sparsity slows it a hundredfold there, and not at all with a tiny epsilon, where a
    # step is lr whatever the scale: then the sparsity says which weights go, and not how fast.
    assert steps_to_zero(1e-8, 1e-10, 250) is None
    assert steps_to_zero(1e-12, 1e-8, 250) in (100, 101)
    assert steps_to_zero(1e-15, 1e-10, 250) in (100, 101)
    assert steps_to_zero(1e-12, 0.0, 250) is None


def test_decay_lowers_the_step() -> None:
    model = tiny_classifier("conv-bn")
    sites = maskable_weights(model, linear=False)
    masks = WeightMasks(model, sites, lr=0.1, eps=1e-12, sparsity=1.0)
    masks.decay(0.5)
    masks.step()
    assert float(masks.values[0][0, 0, 0, 0]) == pytest.approx(0.95, abs=1e-4)


def test_the_head_is_never_masked() -> None:
    model = tiny_classifier("transformer")
    names = {site.name for site in maskable_weights(model, linear=True)}
    assert "network.head" not in names
    assert {site.name for site in maskable_weights(model, linear=False)} < names


def test_a_network_without_convolutions_is_refused_and_its_layers_named() -> None:
    with seeded(0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    model = Classifier(network, input_shape=(1, 8, 8), class_names="abcd").eval()
    with pytest.raises(UnsupportedModel, match=r"network\.1.*include_linear"):
        maskable_weights(model, linear=False)
    assert [site.name for site in maskable_weights(model, linear=True)] == ["network.1"]
    with seeded(0):
        bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    only = Classifier(bare, input_shape=(1, 8, 8), class_names="abcd")
    with pytest.raises(UnsupportedModel, match="besides the head"):
        maskable_weights(only.eval(), linear=True)
