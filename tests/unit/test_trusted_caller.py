"""The trusted caller catches a method that misbehaves, each way of misbehaving by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from unbackdoor.engine.trusted_caller import run
from unbackdoor.errors import IntegrityError, MethodFailed
from unbackdoor.networks import build
from unbackdoor.registry import Config, Part
from unbackdoor.types import Classifier, CleanData, Images, Purified

Trained = tuple[Classifier, CleanData]
Body = Callable[[Classifier, CleanData], Any]


def _void(value: object) -> None:
    """Do for effect inside a lambda what would return something."""


def method(body: Body) -> Part[Any]:
    """Return a defense that does ``body`` and returns what it returns, or else the model."""

    def purify(model: Classifier, data: CleanData, cfg: Config, *, run: Any) -> Any:
        out = body(model, data)
        return Purified(model) if out is None else out

    return Part("rogue", "defense", purify, Config, "", frozenset({"images"}))


def test_an_honest_method_passes_and_is_timed(tiny: Trained) -> None:
    model, data = tiny
    out = run(method(lambda m, d: None), model, data, seed=4)
    assert out.model.sha256() == model.sha256()
    assert out.model is not model
    assert out.method["seed"] == 4


def test_the_copy_tells_no_tales(tiny: Trained) -> None:
    model, data = tiny
    told = model.copy()
    told.origin = "badnets victim, target 0"
    seen: list[str] = []
    named = replace(data, fit=replace(data.fit, name="poisoned by badnets"))
    run(method(lambda m, d: seen.extend([m.origin, d.fit.name])), told, named)
    assert seen == ["", "clean images"]
    assert told.origin == "badnets victim, target 0"


@contextmanager
def _restored() -> Iterator[None]:
    # The caller restores all of it; this only makes a failing test harmless to the next.
    yield
    torch.nn.modules.module._global_forward_hooks.clear()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


GLOBALS: dict[str, tuple[Callable[[], Any], str]] = {
    "torch generator": (lambda: torch.rand(1), "torch's global generator"),
    "numpy generator": (lambda: np.random.rand(1), "NumPy's global generator"),  # noqa: NPY002
    "python generator": (random.random, "Python's global generator"),
    "gradient mode": (lambda: torch.set_grad_enabled(False), "the gradient mode"),
    "default type": (lambda: torch.set_default_dtype(torch.float64), "torch's default type"),
    "global hook": (
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *a: None),
        "torch's global forward hooks",
    ),
}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("what", GLOBALS)
def test_what_belongs_to_the_process_is_caught_and_put_back(what: str, raises: bool, tiny: Trained) -> None:
    model, data = tiny
    touch, words = GLOBALS[what]

    def body(m: Classifier, d: CleanData) -> None:
        touch()
        if raises:
            raise RuntimeError("half-way")

    with _restored(), pytest.raises(IntegrityError, match=words):
        run(method(body), model, data)
    # The fixture no_traces asserts that everything is as before.


def test_a_method_that_raises_leaves_a_typed_error_with_its_cause(tiny: Trained) -> None:
    model, data = tiny

    def body(m: Classifier, d: CleanData) -> None:
        raise ZeroDivisionError("no")

    with pytest.raises(MethodFailed, match="ZeroDivisionError: no") as caught:
        run(method(body), model, data)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda m, d: 7, "returned no repaired classifier"),
        (lambda m, d: Purified(m.network), "returned no repaired classifier"),  # type: ignore[arg-type]
        (lambda m, d: _void(next(m.parameters()).data.fill_(float("inf"))), "not finite"),
        (
            lambda m, d: Purified(build("small_cnn[width=9]", input_shape=(1, 8, 8), class_names="abcd")),
            "changed the form of the network",
        ),
    ],
)
def test_nonsense_is_refused(body: Body, words: str, tiny: Trained) -> None:
    model, data = tiny
    with pytest.raises(MethodFailed, match=words):
        run(method(body), model, data)


def _with_gradient(m: Classifier, d: CleanData) -> None:
    m(torch.zeros(1, 1, 8, 8)).sum().backward()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda m, d: _void(m.network.register_forward_hook(lambda *a: None)), "a hook on network"),
        (lambda m, d: _void(m.train()), "training mode"),
        (_with_gradient, "a gradient on"),
        (lambda m, d: _void(m.requires_grad_(False)), "which parameters learn"),
    ],
)
def test_traces_on_the_model_are_refused(body: Body, words: str, tiny: Trained) -> None:
    model, data = tiny
    with pytest.raises(IntegrityError, match=words):
        run(method(body), model, data)


def test_the_given_model_is_out_of_reach(tiny: Trained) -> None:
    model, data = tiny

    def smuggled(m: Classifier, d: CleanData) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1)

    keep = next(model.parameters()).detach().clone()
    try:
        with pytest.raises(IntegrityError, match="the weights it was given to read"):
            run(method(smuggled), model, data)
    finally:
        next(model.parameters()).data.copy_(keep)
    with pytest.raises(IntegrityError, match="the model it must not touch"):
        run(method(lambda m, d: Purified(model)), model, data)


def test_changed_images_do_not_reach_the_owner(tiny: Trained) -> None:
    model, data = tiny
    before = data.fingerprint()
    run(method(lambda m, d: _void(d.fit.pixels.zero_())), model, data)
    assert data.fingerprint() == before


def test_rates_for_training_from_scratch_are_off_for_a_method() -> None:
    model = build(
        "airbench[width=8,expansion=1]",
        input_shape=(3, 32, 32),
        class_names=("a", "b"),
        mean=(),
        std=(),
        seed=0,
    )
    images = Images(
        torch.arange(8 * 3072).view(8, 3, 32, 32).to(torch.uint8), torch.arange(8) % 2, ("a", "b")
    )
    assert model.network.learning_rates(0)  # type: ignore[operator]
    rates: list[object] = []
    rogue = method(lambda m, d: _void(rates.append(m.network.learning_rates(0))))  # type: ignore[operator]
    out = run(rogue, model, CleanData.split(images))
    assert rates == [{}]
    assert "learning_rates" not in vars(out.model.network)
    assert out.model.network.learning_rates(0) == model.network.learning_rates(0)  # type: ignore[operator]
