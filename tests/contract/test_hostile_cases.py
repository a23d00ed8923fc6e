"""RNP, AWM, IMS and TAC where they cannot work: a typed error in clear words, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.engine import rng
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.errors import InputError, MethodFailed, TooFewImages, UnbackdoorError, UnsupportedModel
from unbackdoor.registry import DEFENSES, SCANNERS
from unbackdoor.testing.examples import odd_classifier
from unbackdoor.types import Classifier, CleanData, Purified, ScanReport

# The words of these are pinned here; every other method is held to the contract suite alone.
METHODS = (
    "awm", "ims", "neural_cleanse", "rnp", "tac", "unlearned_prune", "scan tac", "scan rnp_vote"
)  # fmt: skip
LABELLED = tuple(name for name in METHODS if name not in ("ims", "scan tac"))
DATA = CleanData.split(tiny_data(80, seed=1))


def call(method: str, model: Classifier, data: CleanData, seed: int = 0) -> Purified | ScanReport:
    name = method.removeprefix("scan ")
    looks = method.startswith("scan ")
    verb, part = (caller.scan, SCANNERS[name]) if looks else (caller.run, DEFENSES[name])
    out: Purified | ScanReport = verb(part, model, data, options=part.quick, precision="fp32", seed=seed)
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


# ---------------------------------------------------------------------------------------------------
# Networks


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
    refused(method, odd_classifier(network), DATA, UnsupportedModel, words)


SUPPORTED = [
    *((method, "1x1 head") for method in METHODS),
    *((method, "norms and a bent head") for method in METHODS if "tac" not in method),
    ("rnp", "linear layers"),
    ("tac", "linear layers"),
    ("scan tac", "head only"),
]


@pytest.mark.parametrize(("method", "network"), SUPPORTED)
def test_what_the_network_ends_in_matters_only_where_it_must(method: str, network: str) -> None:
    model = odd_classifier(network)
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
