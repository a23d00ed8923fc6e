"""What every registered scanner and screener owes: it looks, it says why not, it says the same twice."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planted import block_data, planted
from tiny import tiny_data
from unbackdoor.engine.trusted_caller import scan, screen
from unbackdoor.errors import ConfigError, InputError, MethodFailed, UnbackdoorError, UnsupportedModel
from unbackdoor.registry import SCANNERS, SCREENERS, Part, Registry
from unbackdoor.types import Classifier, CleanData, ScanReport, Screening

# Options that make a part quick; its mathematics stays the same.
QUICK: dict[str, dict[str, object]] = {
    "mm_bd": {"steps": 20, "starts": 2},
    "neural_cleanse": {"steps": 30, "images": 8},
    "rnp": {"repeats": 2, "batch_size": 32},
    "rnp_vote": {"repeats": 2, "batch_size": 32},
    "strip": {"overlays": 5},
}
KINDS: dict[str, Registry[Any]] = {"scanner": SCANNERS, "screener": SCREENERS}
PARTS = [(kind, name) for kind, registry in KINDS.items() for name in registry]
EVERY = pytest.mark.parametrize(("kind", "name"), PARTS, ids=[name for _, name in PARTS])
Trained = tuple[Classifier, CleanData]
INPUTS = tiny_data(48, seed=7)


def part_of(kind: str, name: str) -> Part[Any]:
    return KINDS[kind][name]


def look(kind: str, name: str, model: Classifier, data: CleanData, **given: Any) -> ScanReport | Screening:
    options = {**QUICK.get(name, {}), **given.pop("options", {})}
    if kind == "scanner":
        return scan(name, model, data, options=options, precision="fp32", **given)
    inputs = given.pop("inputs", INPUTS)
    return screen(name, model, data, inputs, options=options, precision="fp32", **given)


def plain(found: ScanReport | Screening) -> Any:
    """Return all that was said, as JSON would have it, and the tensors as lists."""
    if isinstance(found, Screening):
        columns = (found.scores, found.p_values, found.predicted, found.suspicious)
        return [
            [c.tolist() for c in columns],
            json.dumps(dict(found.evidence), allow_nan=False, sort_keys=True),
        ]
    told = [
        (
            f.statistic,
            f.value,
            f.p_value,
            f.classes,
            f.per_class,
            {k: v.tolist() for k, v in f.artefacts.items()},
            None if f.trigger is None else {k: v.tolist() for k, v in f.trigger.tensors().items()},
        )
        for f in found.findings
    ]
    return [found.verdict, repr(told), dict(found.skipped), found.coverage]


@EVERY
def test_looks_at_any_family_and_changes_nothing(kind: str, name: str, trained: Trained) -> None:
    model, data = trained
    weights, images = model.sha256(), data.fingerprint()
    found = look(kind, name, model, data)
    assert model.sha256() == weights and data.fingerprint() == images
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert found.method["name"] == name and found.seconds >= 0
    json.dumps(dict(found.method), allow_nan=False)
    if isinstance(found, ScanReport):
        # With four classes, no law of the other classes can be calibrated.
        assert found.verdict != "backdoor found" and found.coverage + tuple(found.skipped)


@EVERY
def test_same_seed_says_the_same(kind: str, name: str, tiny: Trained) -> None:
    first, again = (plain(look(kind, name, *tiny, seed=3)) for _ in range(2))
    assert first == again


@EVERY
def test_numbers_are_numbers(kind: str, name: str) -> None:
    """With eight classes, so that the tests run."""
    data = CleanData.split(block_data(96))
    given = {"inputs": block_data(96, seed=4)} if kind == "screener" else {}
    found = look(kind, name, planted((2,)), data, **given)
    if isinstance(found, ScanReport):
        assert not found.partial
        for finding in found.findings:
            assert math.isfinite(finding.value) and finding.direction and finding.threshold_source
            assert all(math.isfinite(v) for v in finding.per_class)
            assert all(bool(torch.isfinite(t).all()) for t in finding.artefacts.values())
    else:
        assert bool(torch.isfinite(found.scores).all())


class _Nan(nn.Module):
    """A network whose answers are no numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x) / 0 * 0
        return out


@EVERY
def test_bad_input_is_refused_with_our_errors(kind: str, name: str, tiny: Trained) -> None:
    model, data = tiny
    broken = model.copy()
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(InputError, match="not a finite number"):
        look(kind, name, broken, data)
    large = replace(data.fit, pixels=torch.zeros(len(data.fit), 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(UnsupportedModel, match="do not fit the model"):
        look(kind, name, model, replace(data, fit=large))
    empty = CleanData.empty(model.input_shape, model.class_names)
    if "images" in part_of(kind, name).needs:
        with pytest.raises(InputError, match="needs clean images"):
            look(kind, name, model, empty)
    else:
        look(kind, name, model, empty)
    if "labels" in part_of(kind, name).needs:
        with pytest.raises(InputError, match="labelled images"):
            bare = replace(data, fit=replace(data.fit, labels=None))
            look(kind, name, model, bare)


@EVERY
def test_images_of_one_class_are_used_or_refused(kind: str, name: str, tiny: Trained) -> None:
    model, data = tiny
    one = CleanData.split(data.all.subset((data.all.truth == 0).nonzero().flatten()))
    if kind == "screener":
        inputs = INPUTS.subset((INPUTS.truth == 0).nonzero().flatten())
        tried: Callable[[], object] = lambda: look(kind, name, model, one, inputs=inputs)  # noqa: E731
    else:
        tried = lambda: look(kind, name, model, one)  # noqa: E731
    try:
        tried()
    except (InputError, MethodFailed) as error:
        assert "class" in str(error) and "raised" not in str(error)


@EVERY
def test_answers_that_are_no_numbers_are_an_error(kind: str, name: str, tiny: Trained) -> None:
    model, data = tiny
    broken = Classifier(_Nan(model.copy().network), input_shape=(1, 8, 8), class_names=model.class_names)
    try:
        found = look(kind, name, broken.eval(), data)
    except UnbackdoorError as error:
        assert " raised " not in str(error), "found by the part itself, and not by what it calls"
    else:
        assert isinstance(found, ScanReport) and found.verdict == "undecided"


@EVERY
def test_unknown_options_are_all_named(kind: str, name: str, tiny: Trained) -> None:
    with pytest.raises(ConfigError) as caught:
        look(kind, name, *tiny, options={"nonsense": 1, "rubbish": 2})
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("name", list(SCREENERS))
def test_an_input_is_refused_that_does_not_fit(name: str, tiny: Trained) -> None:
    large = replace(INPUTS, pixels=torch.zeros(len(INPUTS), 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(UnsupportedModel, match="do not fit the model"):
        look("screener", name, *tiny, inputs=large)
    with pytest.raises(InputError, match="no image to screen"):
        look("screener", name, *tiny, inputs=INPUTS.subset([]))


@EVERY
def test_documentation_is_complete(kind: str, name: str) -> None:
    part = part_of(kind, name)
    module = inspect.getmodule(part.function)
    text = module.__doc__ or ""
    for word in ("Paper:", "Needs:", "Departs:", "Cost:"):
        assert word in text, f"{module.__name__} lacks {word}"
    if kind == "screener":
        assert "Blind:" in text
    assert part.paper
    for option, field in part.config.model_fields.items():
        assert field.description, option
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["source"], option
    assert len(inspect.getsource(module).splitlines()) <= 220
    wanted = (
        ["model", "data", "cfg", "run"] if kind == "scanner" else ["model", "data", "inputs", "cfg", "run"]
    )
    assert list(inspect.signature(part.function).parameters) == wanted
