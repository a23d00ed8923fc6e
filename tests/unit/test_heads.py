"""The layer whose input acts on the logits linearly: found by trying, in any network, or refused in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import tiny_classifier
from unbackdoor.engine.heads import find_affine_head, find_head
from unbackdoor.engine.rng import seeded
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.registry import ARCHITECTURES
from unbackdoor.types import Classifier

SHAPE = (1, 8, 8)
EXPECTED = {
    "mobilenet_v2": "network.classifier.1",
    "preact_resnet18": "network.linear",
    "resnet18": "network.fc",
    "small_cnn": "network.fc",
    "airbench": "network.head",
    "vgg19_bn": "network.classifier",
    "vit_small": "network.head",
    "wide_resnet": "network.fc",
}


class Wired(nn.Module):
    """Named layers with a forward of the test's own; draws nothing but its weights."""

    def __init__(self, forward: Callable[[Wired, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        """Return what the test computes."""
        return self._forward(self, x)


def wrapped(network: nn.Module) -> Classifier:
    return Classifier(network, input_shape=SHAPE, class_names="abcd").eval()


def wired(forward: Callable[[Wired, Tensor], Tensor], **layers: Callable[[], nn.Module]) -> Classifier:
    with seeded(0):
        return wrapped(Wired(forward, **{name: make() for name, make in layers.items()}))


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())


def moves_linearly(model: Classifier) -> None:
    """The property that everything else rests on, checked with a shift of its own."""
    head = find_affine_head(model)
    draws = torch.Generator().manual_seed(5)
    pixels = torch.rand(3, *model.input_shape, generator=draws)
    shift = torch.randn(head.features, generator=draws)
    with torch.no_grad():
        before = model(pixels)
        with head.shifted(shift):
            moved = model(pixels) - before
        wanted = (head.weight @ shift).expand_as(moved)
    off = (moved - moved.mean(1, keepdim=True)) - (wanted - wanted.mean(1, keepdim=True))
    assert off.abs().max() < 1e-3 * wanted.abs().max()
    with torch.no_grad():
        assert torch.equal(model(pixels), before)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_registered_architecture(name: str) -> None:
    width = {"mobilenet_v2": 0.1, "vit_small": 8}.get(name, 1)
    options = {"sequential_cnn": "features=c4-b-a-m"}.get(name, f"width={width}")
    model = build(f"{name}[{options}]", input_shape=(3, 16, 16), class_names="abcdef")
    head = find_affine_head(model)
    linear = find_head(model)
    assert head.name == linear.name
    assert head.name == EXPECTED.get(name, head.name)
    assert head.module is linear.module
    assert head.features == linear.features
    assert head.scale == 1
    assert head.weight.shape == (6, linear.features)
    moves_linearly(model)


FOUND: dict[str, tuple[Classifier, str, float]] = {
    "stack": (
        wired(
            lambda m, x: m.last(F.relu(m.first(x.flatten(1)))),
            first=lambda: nn.Linear(64, 4),
            last=lambda: nn.Linear(4, 4),
        ),
        "network.last",
        1,
    ),
    "1x1 convolution, averaged": (
        wired(lambda m, x: m.head(m.stem(x)).mean((2, 3)), stem=stem, head=lambda: nn.Conv2d(6, 4, 1)),
        "network.head",
        1,
    ),
    "1x1 convolution on pooled features": (
        wired(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.stem(x), 1)).flatten(1),
            stem=stem,
            head=lambda: nn.Conv2d(6, 4, 1),
        ),
        "network.head",
        1,
    ),
    "head on every token": (
        wired(lambda m, x: m.head(x[:, 0])[:, 2], head=lambda: nn.Linear(8, 4)),
        "network.head",
        1,
    ),
    "log-softmax": (
        wired(lambda m, x: m.head(x.flatten(1)).log_softmax(1), head=lambda: nn.Linear(64, 4)),
        "network.head",
        1,
    ),
    "temperature": (
        wired(lambda m, x: m.head(x.flatten(1)) / 4, head=lambda: nn.Linear(64, 4)),
        "network.head",
        0.25,
    ),
    "a wrapper for several devices": (
        wired(
            lambda m, x: m.parallel(x.flatten(1)),
            parallel=lambda: nn.DataParallel(nn.Sequential(nn.Linear(64, 4))),
        ),
        "network.parallel.module.0",
        1,
    ),
    "an auxiliary head that is not used": (
        wired(
            lambda m, x: (m.main(x.flatten(1)), m.aux(x.flatten(1)))[0],
            main=lambda: nn.Linear(64, 4),
            aux=lambda: nn.Linear(64, 4),
        ),
        "network.main",
        1,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_it_is_found(case: str) -> None:
    model, name, scale = FOUND[case]
    head = find_affine_head(model)
    assert head.name == name
    assert head.scale == pytest.approx(scale, rel=1e-3)
    moves_linearly(model)


REFUSED: dict[str, tuple[Classifier, str]] = {
    "a rectifier behind a convolution": (
        wired(
            lambda m, x: F.relu(m.head(m.stem(x))).mean((2, 3)), stem=stem, head=lambda: nn.Conv2d(6, 4, 1)
        ),
        r"network\.head \(the logits follow it, but not linearly\).*network\.stem\.0 \(6 outputs\)",
    ),
    "a squashing": (
        wired(lambda m, x: 3 * torch.tanh(m.head(x.flatten(1)) / 3), head=lambda: nn.Linear(64, 4)),
        "but not linearly",
    ),
    "a softmax": (
        wired(lambda m, x: m.head(x.flatten(1)).softmax(1), head=lambda: nn.Linear(64, 4)),
        "but not linearly",
    ),
    "a cosine head without a layer of its own": (
        wired(
            lambda m, x: (
                16 * F.linear(F.normalize(m.first(x.flatten(1))), F.normalize(m.first.weight[:, :4]))
            ),
            first=lambda: nn.Linear(64, 4),
        ),
        r"network\.first",
    ),
    "two heads averaged": (
        wired(
            lambda m, x: (m.one(x.flatten(1)) + m.two(x.flatten(1).sin())) / 2,
            one=lambda: nn.Linear(64, 4),
            two=lambda: nn.Linear(64, 4),
        ),
        r"more than one layer.*network\.two \(fits\); network\.one \(fits\)",
    ),
    "called twice": (
        wired(lambda m, x: m.head(x.flatten(1)) + m.head(-x.flatten(1).sin()), head=lambda: nn.Linear(64, 4)),
        "called 2 times",
    ),
    "no layer at all": (
        wired(lambda m, x: F.linear(x.flatten(1)[:, :4], m.pool(x).flatten(1)[:, :4]), pool=nn.Identity),
        "no linear layer and no convolution was called",
    ),
    "a large kernel": (
        wired(lambda m, x: m.head(x).flatten(1), head=lambda: nn.Conv2d(1, 4, 8)),
        "not a plain 1x1 convolution",
    ),
    "equal rows": (
        wired(
            lambda m, x: m.head(x.flatten(1)),
            head=lambda: nn.utils.skip_init(nn.Linear, 64, 4),
        ),
        "all its rows are equal",
    ),
}
with torch.no_grad():
    for parameter in REFUSED["equal rows"][0].parameters():
        parameter.fill_(0.5)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_and_the_candidates_are_listed(case: str) -> None:
    model, words = REFUSED[case]
    with pytest.raises(UnsupportedModel, match=words):
        find_affine_head(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_user_may_name_the_layer() -> None:
    model = REFUSED["two heads averaged"][0]
    head = find_affine_head(model, "network.one")
    assert head.name == "network.one"
    assert head.scale == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(InputError, match="no such layer"):
        find_affine_head(model, "network.three")
    with pytest.raises(UnsupportedModel, match=r"network\.conv1 \(8 outputs\)"):
        find_affine_head(tiny_classifier("conv-bn"), "network.conv1")


def test_a_head_moves_to_a_copy() -> None:
    model = tiny_classifier("conv-bn")
    twin = model.copy()
    head = find_affine_head(model).of(twin)
    assert head.module is twin.get_submodule("network.fc")


def test_the_shift_goes_when_the_block_raises() -> None:
    model = tiny_classifier("conv-bn")
    head = find_affine_head(model)
    with pytest.raises(RuntimeError, match="half-way"), head.shifted(torch.ones(head.features)):
        raise RuntimeError("half-way")
    assert not head.module._forward_pre_hooks
