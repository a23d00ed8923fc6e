"""Contracts on what a method does where something is wrong, missing or odd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from unbackdoor.engine.trusted_caller import Surroundings
from unbackdoor.errors import InputError, IntegrityError, UnbackdoorError, UnsupportedModel
from unbackdoor.testing.contract import METHODS, Result, Subject, contract, demand, raises, state_of
from unbackdoor.testing.examples import (
    ODD_NETWORKS,
    Bomb,
    Fuse,
    NotNumbers,
    clean_data,
    odd_classifier,
    on_quadrants,
    tiny_classifier,
    tiny_data,
)
from unbackdoor.types import CleanData, Purified, ScanReport


@contract(
    *METHODS,
    name="failure half-way",
    meaning="where the network raises, the error comes through and nothing stays behind",
)
def _failure_half_way(subject: Subject) -> None:
    data = clean_data()
    for calls in (0, 1):
        fuse = Fuse(calls)
        bomb = on_quadrants(Bomb(tiny_classifier().network, fuse))
        before, surroundings = state_of(bomb), Surroundings.take()
        result: Result | None = None
        inside = 0
        try:
            result = subject.call(bomb, data)
        except IntegrityError as error:
            raise AssertionError(str(error)) from error
        except UnbackdoorError as error:
            demand("bang" in str(error), f"the error of the network is hidden behind: {error}")
        except RuntimeError:
            inside = 1  # the caller's own look at what was returned
        if result is not None and isinstance(result, ScanReport):
            reported = not fuse.explosions or any("bang" in text for text in result.errors.values())
            demand(reported, "a check crashed, and the report does not say so")
        elif result is not None or inside:
            demand(fuse.explosions <= inside, "the error of the network was swallowed")
        demand(state_of(bomb) == before, "something was left on the model")
        demand(not surroundings.changed(), f"left behind: {', '.join(surroundings.changed())}")


@contract(
    *METHODS,
    name="bad input",
    meaning="weights that are no numbers and images that do not fit are refused with our errors",
)
def _bad_input(subject: Subject) -> None:
    model, data = tiny_classifier(), clean_data()
    for value in (math.nan, math.inf):
        broken = model.copy()
        with torch.no_grad():
            next(broken.parameters()).view(-1)[0] = value
        refused = lambda broken=broken: subject.call(broken, data)  # noqa: E731
        raises(InputError, "not a finite number", refused, "a weight that is no number")

    def call_with(changed: CleanData) -> Callable[[], object]:
        return lambda: subject.call(model, changed)

    large = replace(data.fit, pixels=torch.zeros(len(data.fit), 1, 9, 9, dtype=torch.uint8))
    raises(UnsupportedModel, "do not fit the model", call_with(replace(data, fit=large)), "large images")
    more = replace(data.fit, class_names=("a", "b", "c", "d", "e"), labels=torch.full((len(data.fit),), 4))
    raises(UnsupportedModel, r"labels in 0\.\.3", call_with(replace(data, fit=more)), "a label too high")
    if subject.part.kind == "screener":
        inputs = tiny_data(48, seed=7)
        wide = replace(inputs, pixels=torch.zeros(len(inputs), 1, 9, 9, dtype=torch.uint8))
        screen_wide = lambda: subject.call(model, data, inputs=wide)  # noqa: E731
        raises(UnsupportedModel, "do not fit the model", screen_wide, "large inputs")
        nothing = lambda: subject.call(model, data, inputs=inputs.subset([]))  # noqa: E731
        raises(InputError, "no image to screen", nothing, "no input")


@contract(
    *METHODS,
    name="declared needs",
    meaning="it works without what it does not declare to need, and is refused without what it does",
)
def _declared_needs(subject: Subject) -> None:
    model, data, needs = tiny_classifier(), clean_data(), subject.part.needs
    if "labels" in needs:
        raises(InputError, "labelled images", lambda: subject.call(model, unlabelled(data)), "no labels")
    else:
        subject.call(model, unlabelled(data))
    empty = CleanData.empty(model.input_shape, model.class_names)
    if "images" in needs:
        raises(InputError, "needs clean images", lambda: subject.call(model, empty), "no images")
    else:
        subject.call(model, empty)


@contract(
    *METHODS,
    name="few images",
    meaning="one image a class, fewer, or one class only: a result, or an error that says why not",
)
def _few_images(subject: Subject) -> None:
    model, data = tiny_classifier(), clean_data()
    four = CleanData.split(tiny_data(4, seed=2))
    result = subject.attempt("one image a class", model, four)
    if isinstance(result, Purified):
        demand(result.model.classes == 4, "one image a class: the classes changed")
    if subject.part.kind == "defense":
        demand(result is not None, "one image a class: a defense must work with it")
    for count in (3, 2):
        subject.attempt(f"{count} images for 4 classes", model, CleanData.split(tiny_data(count, seed=2)))
    one = _of_class(data, 0)
    inputs = tiny_data(48, seed=7).subset(list(range(0, 48, 4)))
    subject.attempt("images of one class", model, one, inputs)
    if "labels" in subject.part.needs and subject.part.kind == "defense":
        raises(InputError, "all of one class", lambda: subject.call(model, one), "images of one class")
    if "labels" not in subject.part.needs:
        subject.attempt("unlabelled images of one class", model, unlabelled(one), inputs)


@contract(
    *METHODS,
    name="useless networks",
    meaning="logits that are NaN or the same for every image: a result, or an error that says why not",
)
def _useless_networks(subject: Subject) -> None:
    data = clean_data()
    result = subject.attempt("logits that are NaN", on_quadrants(NotNumbers(tiny_classifier().network)), data)
    silent = isinstance(result, ScanReport) and result.verdict == "undecided"
    demand(result is None or silent, "logits that are NaN: expected an error or an undecided report")
    for situation in ("constant logits", "a bias that decides"):
        model = tiny_classifier()
        head = model.network.get_submodule("fc")
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            if situation == "constant logits":
                head.weight.zero_()
            else:
                head.bias[2] += 1000
        subject.attempt(situation, model, data)


@contract(
    *METHODS,
    name="odd networks",
    meaning="networks built in unusual ways: a result, or an UnsupportedModel that names the layer",
)
def _odd_networks(subject: Subject) -> None:
    for name in ODD_NETWORKS:
        model = odd_classifier(name)
        result = subject.attempt(name, model, clean_data())
        if isinstance(result, Purified):
            same = result.model.network.state_dict().keys() == model.network.state_dict().keys()
            demand(same, f"{name}: the tensors have other names")


def unlabelled(data: CleanData) -> CleanData:
    return replace(data, fit=replace(data.fit, labels=None), select=replace(data.select, labels=None))


def _of_class(data: CleanData, k: int) -> CleanData:
    return CleanData.split(data.all.subset((data.all.truth == k).nonzero().flatten()))
