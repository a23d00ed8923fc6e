"""RNP, AWM, IMS and TAC where they cannot work: a typed error in clear words, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine import rng
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import InputError, MethodFailed, TooFewImages, UnbackdoorError, UnsupportedModel
from unbackdoor.types import Classifier, CleanData, Purified, ScanReport

OPTIONS: dict[str, dict[str, Any]] = {
    "awm": {"rounds": 2, "passes": 2, "tau": 3000.0},
    "ims": {"start_rounds": 2, "free_rounds": 2, "sparse_rounds": 2, "steps": 2, "batch_size": 32},
    "neural_cleanse": {"steps": 40, "images": 8, "rounds": 1, "epochs": 1},
    "rnp": {"recover_epochs": 2, "batch_size": 32, "step": 0.2, "max_steps": 40, "unlearn_lr": 0.1},
    "tac": {"epochs": 1, "search": False},
    "unlearned_prune": {"batch_size": 32, "step": 0.1, "max_steps": 40, "unlearn_lr": 0.1},
    "scan tac": {},
    "scan rnp_vote": {"repeats": 2, "batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1},
}
METHODS = tuple(OPTIONS)
LABELLED = tuple(name for name in METHODS if name not in ("ims", "scan tac"))
DATA = CleanData.split(tiny_data(80, seed=1))


def call(method: str, model: Classifier, data: CleanData, seed: int = 0) -> Purified | ScanReport:
    verb = caller.scan if method.startswith("scan ") else caller.run
    out: Purified | ScanReport = verb(
        method.removeprefix("scan "), model, data, options=OPTIONS[method], precision="fp32", seed=seed
    )
    return out


def state(model: Classifier) -> list[object]:
    """Return all that a method could leave on a model; what it leaves in the process, conftest watches."""
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return [model.sha256(), hooks, grads, [m.training for m in model.modules()]]


def refused(method: str, model: Classifier, data: CleanData, kind: type[UnbackdoorError], words: str) -> None:
    before, images = state(model), data.fingerprint()
    with pytest.raises(kind, match=words) as caught:
        call(method, model, data)
    assert type(caught.value) is kind
    assert " raised " not in str(caught.value), "found by the method itself, and not by what it calls"
    assert state(model) == before and data.fingerprint() == images


def wrapped(network: nn.Module) -> Classifier:
    return Classifier(network, input_shape=(1, 8, 8), class_names=NAMES).eval()


# ---------------------------------------------------------------------------------------------------
# Classifiers that say one thing


def silenced() -> Classifier:
    model = tiny_classifier("conv-bn")
    with torch.no_grad():
        model.network.fc.weight.zero_()
    return model


def biased() -> Classifier:
    model = tiny_classifier("conv-bn")
    with torch.no_grad():
        model.network.fc.bias[2] += 1000
    return model


HARDLY = (MethodFailed, "hardly classifies the clean images")
ONE_CLASS = (MethodFailed, "every clean image to one class")
SILENCED = {
    "awm": (MethodFailed, r"no perturbation that moves a label.*fooling rate of 0\.000"),
    "ims": ONE_CLASS,
    "neural_cleanse": (MethodFailed, "sends all images to one class"),
    "rnp": HARDLY,
    "tac": (UnsupportedModel, r"network\.fc \(all its rows are equal\)"),
    "unlearned_prune": HARDLY,
    "scan tac": (UnsupportedModel, r"network\.fc \(all its rows are equal\)"),
    "scan rnp_vote": HARDLY,
}
BIASED = {**SILENCED, "tac": ONE_CLASS, "scan tac": ONE_CLASS}


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_classifier_is_refused(method: str) -> None:
    refused(method, silenced(), DATA, *SILENCED[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_whose_bias_decides_is_refused(method: str) -> None:
    refused(method, biased(), DATA, *BIASED[method])


# ---------------------------------------------------------------------------------------------------
# Images that do not suffice


def of_class(images: CleanData, k: int) -> CleanData:
    return CleanData.split(images.all.subset((images.all.truth == k).nonzero().flatten()))


def bare(data: CleanData) -> CleanData:
    return replace(data, fit=replace(data.fit, labels=None), select=replace(data.select, labels=None))


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_single_class_are_refused(method: str) -> None:
    kind = MethodFailed if method == "ims" else InputError  # it looks at no label, but at the predictions
    refused(method, tiny_classifier("conv-bn"), of_class(DATA, 0), kind, r"(of|to) one class")


@pytest.mark.parametrize("method", METHODS)
def test_missing_labels_are_refused_where_they_are_needed(method: str) -> None:
    model = tiny_classifier("conv-bn")
    if method in LABELLED:
        refused(method, model, bare(DATA), InputError, "needs labelled images.*no labels")
    else:
        call(method, model, bare(DATA))
        refused(method, model, bare(of_class(DATA, 0)), *ONE_CLASS)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_images_than_classes_are_used_or_refused(method: str) -> None:
    model, three, two = tiny_classifier("conv-bn"), *(CleanData.split(tiny_data(n, seed=2)) for n in (3, 2))
    if method in ("awm", "ims", "rnp", "tac", "unlearned_prune", "scan tac"):
        refused(method, model, three, TooFewImages, "fewer images than classes.*at least 4 images, got 3")
    else:
        before = state(model)
        out = call(method, model, two)
        assert state(model) == before
        if isinstance(out, ScanReport):
            assert out.verdict == "undecided" and "too few images" in out.skipped["held-out votes"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(method: str, value: float) -> None:
    model = tiny_classifier("conv-bn")
    with torch.no_grad():
        model.network.fc.weight[0, 0] = value
    refused(method, model, DATA, InputError, r"not a finite number \(fc\.weight\)")


class _Overflowing(nn.Module):
    """Finite weights, and answers that are no numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out * torch.inf * 0


@pytest.mark.parametrize("method", METHODS)
def test_answers_that_are_no_numbers_are_refused(method: str) -> None:
    model = wrapped(_Overflowing(tiny_classifier("conv-bn").network))
    before = state(model)
    with pytest.raises((MethodFailed, InputError, UnsupportedModel)) as caught:
        call(method, model, DATA)
    assert " raised " not in str(caught.value)
    assert state(model) == before


# ---------------------------------------------------------------------------------------------------
# Networks


class Pooled(nn.Module):
    """Has no weight at all."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of each quadrant (B, 4), which are the classes."""
        return 20 * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def body() -> list[nn.Module]:
    return [nn.Conv2d(1, 8, 4, stride=4), nn.ReLU()]  # (B, 8, 2, 2)


BUILT: dict[str, Callable[[], nn.Module]] = {
    "no weight": Pooled,
    "head only": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
    "linear layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
    "convolution as head": lambda: nn.Sequential(*body(), nn.Conv2d(8, 4, 2), nn.Flatten()),
    "1x1 head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 12, 2), nn.ReLU(), nn.Conv2d(12, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "norms and a bent head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Softplus(),
        nn.Flatten(),
    ),
}  # fmt: skip


@cache
def built(name: str) -> Classifier:
    with rng.seeded(1):
        model = wrapped(BUILT[name]())
    if any(True for _ in model.parameters()):
        # Smoothed labels, because a saturated network takes hundreds of steps to unlearn.
        recipe = Recipe(epochs=12, batch_size=32, optimizer="adamw", lr=0.02, label_smoothing=0.1)
        train(model, tiny_data(160), recipe, Run.create(seed=0, policy="fp32"))
    return model.eval()


NO_CHANNEL = r"no channel to mask \(network\.1\)"
NO_HEAD = r"no single layer acts on the logits linearly"
UNSUPPORTED = [
    *((method, "no weight", r"Pooled|no linear layer and no convolution") for method in METHODS),
    ("awm", "head only", r"no weight to mask \(network\.1\)"),
    ("ims", "head only", r"no channel to gate \(network\.1\)"),
    ("rnp", "head only", NO_CHANNEL),
    ("unlearned_prune", "head only", NO_CHANNEL),
    ("tac", "head only", r"no layer but the head can learn \(network\.1\)"),
    ("awm", "linear layers", r"network\.1, network\.3.*Set include_linear"),
    ("ims", "linear layers", r"no channel to gate \(network\.1, network\.3\)"),
    ("rnp", "convolution as head", rf"{NO_HEAD}.*network\.2 \(not a plain 1x1 convolution\)"),
    ("unlearned_prune", "convolution as head", rf"{NO_HEAD}.*network\.2"),
    ("tac", "norms and a bent head", rf"{NO_HEAD}.*network\.3"),
    ("scan tac", "norms and a bent head", rf"{NO_HEAD}.*network\.3"),
]


@pytest.mark.parametrize(("method", "network", "words"), UNSUPPORTED)
def test_an_unsupported_network_is_refused_with_the_layer(method: str, network: str, words: str) -> None:
    refused(method, built(network), DATA, UnsupportedModel, words)


SUPPORTED = [
    *((method, "1x1 head") for method in METHODS),
    *((method, "norms and a bent head") for method in METHODS if "tac" not in method),
    ("rnp", "linear layers"),
    ("tac", "linear layers"),
    ("scan tac", "head only"),
]


@pytest.mark.parametrize(("method", "network"), SUPPORTED)
def test_what_the_network_ends_in_matters_only_where_it_must(method: str, network: str) -> None:
    model = built(network)
    before = state(model)
    out = call(method, model, DATA)
    assert state(model) == before
    if isinstance(out, Purified):
        assert out.model.network.state_dict().keys() == model.network.state_dict().keys()


# ---------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize("kind", ["conv", "transformer"])
@pytest.mark.parametrize("method", ["awm", "ims", "neural_cleanse", "rnp", "tac", "scan tac"])
def test_the_seed_decides_and_the_global_generators_do_not(method: str, kind: str) -> None:
    model, found = tiny_classifier(kind), []
    for number in (1, 2):
        with rng.seeded(number):
            out = call(method, model, DATA, seed=3)
        if isinstance(out, Purified):
            found.append(out.model.sha256())
        else:
            found.append(repr([(f.value, f.p_value, f.classes, f.per_class) for f in out.findings]))
    assert found[0] == found[1]
