"""Every verb takes clean images split or not, and refuses everything else at the door."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.errors import UnbackdoorError
from unbackdoor.registry import DEFENSES, SCREENERS
from unbackdoor.types import Classifier, CleanData, Images

IMAGES = tiny_data(80, seed=1)
INPUTS = tiny_data(8, seed=5)
CHECKS = ("tac", "weight_statistics")
UNLEARNING = {"repeats": 2, "batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1}
Verb = Callable[[Any, Any], Any]
VERBS: dict[str, Verb] = {
    "run": lambda model, data: unbackdoor.run("rnp", model, data, options=DEFENSES["rnp"].quick),
    "screen": lambda model, data: unbackdoor.screen(
        model, INPUTS, "strip", data, options=SCREENERS["strip"].quick
    ),
    "purify": lambda model, data: unbackdoor.purify(model, data, "fp", options=DEFENSES["fp"].quick),
    "scan": lambda model, data: unbackdoor.scan(model, data, checks=CHECKS),
    "verify": lambda model, data: unbackdoor.verify(model, copy.deepcopy(model), data, checks=CHECKS),
    "unlearn": lambda model, data: unbackdoor.unlearn(model, data, options=UNLEARNING),
}
EACH = pytest.mark.parametrize("verb", VERBS)


@EACH
def test_clean_images_are_taken_split_or_not(verb: str) -> None:
    model = tiny_classifier()
    before = IMAGES.fingerprint()
    for data in (IMAGES, CleanData.split(IMAGES)):
        assert VERBS[verb](model, data) is not None
    assert IMAGES.fingerprint() == before


def test_the_split_is_the_same_wherever_it_is_made() -> None:
    model, data = tiny_classifier(), CleanData.split(IMAGES, seed=0)
    whole, parts = (VERBS["run"](model, given).model.sha256() for given in (IMAGES, data))
    assert whole == parts
    scores = [VERBS["screen"](model, given).scores for given in (IMAGES, data)]
    assert torch.equal(*scores)


def test_images_to_screen_may_be_clean_data() -> None:
    model, split = tiny_classifier(), CleanData.split(INPUTS)
    out = unbackdoor.screen(model, split, "strip", IMAGES, options=SCREENERS["strip"].quick)
    assert out.scores.shape == (8,)


def test_purify_joins_the_parts_and_keeps_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CleanData] = []

    def run(method: object, model: Classifier, data: CleanData, **how: Any) -> Any:
        seen.append(data)
        return original(method, model, data, **how)

    original = unbackdoor.audit.purifying.trusted_caller.run  # type: ignore[attr-defined]
    monkeypatch.setattr("unbackdoor.audit.purifying.trusted_caller.run", run)
    split = CleanData.split(IMAGES, augmentation="crop")
    out = unbackdoor.purify(tiny_classifier(), split, "none")
    unbackdoor.purify(tiny_classifier(), split, "none", augmentation="crop+flip")
    assert [data.augmentation for data in seen] == ["crop", "crop+flip"]
    assert out.facts["images_for_the_method"] + out.facts["images_for_the_proof"] == len(IMAGES)
    proved = unbackdoor.purify(tiny_classifier(), IMAGES, "none", proof=CleanData.split(INPUTS))
    assert proved.facts["images_for_the_proof"] == len(INPUTS) and not proved.proof_is_fit
    assert unbackdoor.purify(tiny_classifier(), IMAGES, "none", proof=IMAGES).proof_is_fit


BY_PATH = {"purify", "run", "scan", "screen", "verify"}  # these take files and folders too


@EACH
@pytest.mark.parametrize("given", [7, "images/", [IMAGES], {"images": IMAGES.pixels}])
def test_images_of_another_type_are_refused(verb: str, given: object) -> None:
    meaning = r"images are of another type: expected Images(,| or) CleanData"
    if verb in BY_PATH and isinstance(given, str):
        meaning = "there is no such file or folder"
    with pytest.raises(unbackdoor.InputError, match=meaning):
        VERBS[verb](tiny_classifier(), given)


@EACH
def test_a_model_of_another_type_is_refused(verb: str) -> None:
    meaning = r"the model is of another type: expected .*a Classifier"
    with pytest.raises(unbackdoor.InputError, match=meaning):
        VERBS[verb](7, IMAGES)


@EACH
def test_no_image_is_refused_where_some_are_needed(verb: str) -> None:
    nothing: Images = replace(IMAGES, pixels=IMAGES.pixels[:0], labels=IMAGES.truth[:0])
    with pytest.raises(unbackdoor.InputError, match="no clean image"):
        VERBS[verb](tiny_classifier(), nothing)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"architecture": "resnet19"}, "did you mean"),
        ({"recipe": "plane"}, "did you mean 'plain'"),
        ({"attack": "badnet"}, "did you mean 'badnets'"),
        ({"attack_options": {"targt": 1}}, "did you mean 'target'"),
        ({"options": {"epoch": 2}}, "did you mean 'epochs'"),
    ],
)
def test_a_wrong_name_is_told_before_a_data_set_is_looked_for(
    named: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none it would be downloaded first, or the lack of it hide what is wrong."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a data set was loaded")

    monkeypatch.setattr("unbackdoor.bench.verbs._loaded", never)
    with pytest.raises(UnbackdoorError, match=re.escape(expected)):
        unbackdoor.train("cifar10", **named)
