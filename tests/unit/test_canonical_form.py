"""How a network is written down plays no part in what a scan says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planted import block_data, planted
from unbackdoor.audit.json_records import audit_json
from unbackdoor.audit.scanning import Audit, scan
from unbackdoor.engine import rng, trusted_caller
from unbackdoor.engine.canonical_form import COMPARISON, canonical_form, feature_units, form_for_checks
from unbackdoor.engine.heads import find_affine_head
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.types import Classifier, CleanData

RUN = Run.create(seed=0, policy="fp32")
IMAGES = block_data(96, seed=5)
DATA = CleanData.split(IMAGES)
NAMES = IMAGES.class_names
CHECKS = ["weight_statistics", "tac", "mm_bd", "logit_leak", "stamp_library", "neural_cleanse"]
COMPARED = [*CHECKS, "recall", "neural_cleanse:blend", "label_mapping"]  # all that compare classes by default
QUICK = {
    "label_mapping": {"steps": 20},
    "neural_cleanse:blend": {"steps": 20, "starts": 4, "images": 8},
    "mm_bd": {"steps": 40, "starts": 2},
    "neural_cleanse": {"steps": 20, "starts": 4, "images": 8},
    "stamp_library": {"finalists": 2, "final_images": 16},
}
NOISE = 0.02  # what rounding does to a p-value: a search takes another step


class Net(nn.Module):
    """A convolution, a normalisation, a rectifier or none, and a head."""

    def __init__(self, *, rectified: bool = True, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, (2, 4), stride=(2, 4))
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU() if rectified else nn.Identity()
        self.head = nn.Linear(8 * width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


@cache
def _trained(rectified: bool) -> Classifier:
    with rng.seeded(1):
        model = Classifier(Net(rectified=rectified), input_shape=(1, 8, 8), class_names=NAMES)
    recipe = Recipe(epochs=6, batch_size=32, optimizer="adamw", lr=0.01)
    train(model, block_data(320, seed=1), recipe, RUN)
    return model.eval()


def trained(*, rectified: bool = True) -> Classifier:
    return _trained(rectified).copy()


def head_of(model: Classifier) -> nn.Linear:
    head = model.get_submodule(f"network.{head_name(model)}")
    assert isinstance(head, nn.Linear)
    return head


def head_name(model: Classifier) -> str:
    return "head" if hasattr(model.network, "head") else "fc"


def with_outputs(model: Classifier, weight: Tensor, bias: Tensor) -> Classifier:
    """Return the model with another head; outputs beyond the known classes get names of their own."""
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    setattr(model.network, head_name(model), head)
    model.class_names = (*NAMES, *(f"extra {i}" for i in range(len(weight) - len(NAMES))))[: len(weight)]
    return model.eval()


def data_for(model: Classifier, data: CleanData = DATA) -> CleanData:
    fit, select = (replace(part, class_names=model.class_names) for part in (data.fit, data.select))
    return replace(data, fit=fit, select=select)


def look(model: Classifier, data: CleanData = DATA, checks: list[str] = CHECKS) -> Audit:
    options = {name: QUICK[name] for name in checks if name in QUICK}
    return scan(model, data_for(model, data), checks=checks, options=options, precision="fp32", thorough=True)


# ---------------------------------------------------------------------------------------------------
# Other ways to write the same network


def scaled(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    head = head_of(model)
    head.weight *= size
    head.bias *= size
    return model


def shifted_logits(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    head = head_of(model)
    head.bias += size
    head.weight += torch.randn(1, head.in_features, generator=draws)
    return model


def row_twice(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    head = head_of(model)
    row = int(torch.randint(8, (1,), generator=draws))
    return with_outputs(
        model,
        torch.cat([head.weight, head.weight[row : row + 1]]),
        torch.cat([head.bias, head.bias[row : row + 1]]),
    )


def row_nearly_twice(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    twin = row_twice(model, draws, size)
    row = head_of(twin).weight[-1]
    row += 1e-3 * float(row.std()) * torch.randn(row.shape, generator=draws)
    return twin


def row_twice_below(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    twin = row_twice(model, draws, size)
    head_of(twin).bias[-1] -= size
    return twin


def rescaled_channels(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    width = model.network.norm.num_features
    factors = (0.1 + size) * torch.exp(torch.randn(width, generator=draws))
    model.network.norm.weight *= factors
    model.network.norm.bias *= factors
    head_of(model).weight /= factors.repeat_interleave(8)
    return model


def permuted_channels(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    network = model.network
    order = torch.randperm(network.norm.num_features, generator=draws)
    network.conv.weight.copy_(network.conv.weight[order])
    network.conv.bias.copy_(network.conv.bias[order])
    for tensor in (
        network.norm.weight,
        network.norm.bias,
        network.norm.running_mean,
        network.norm.running_var,
    ):
        tensor.copy_(tensor[order])
    weight = head_of(model).weight
    weight.copy_(weight.unflatten(1, (-1, 8))[:, order].flatten(1))
    return model


def shifted_features(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    """Add constants to channels, and turn some around: possible where no rectifier follows."""
    network, head = model.network, head_of(model)
    signs = torch.randint(2, (network.norm.num_features,), generator=draws) * 2.0 - 1
    shift = size * torch.randn(len(signs), generator=draws)
    network.norm.weight *= signs
    network.norm.bias *= signs
    network.norm.bias += shift
    head.weight *= signs.repeat_interleave(8)
    head.bias -= head.weight @ shift.repeat_interleave(8)
    return model


def idle_row(model: Classifier, draws: torch.Generator, size: float) -> Classifier:
    head = head_of(model)
    row = 0.1 * torch.randn(1, head.in_features, generator=draws)
    low = torch.cat([head.bias, torch.tensor([-40.0 - 10 * size])])
    return with_outputs(model, torch.cat([head.weight, row]), low)


REWRITTEN: dict[str, Callable[[Classifier, torch.Generator, float], Classifier]] = {
    "logits times a factor": scaled,
    "a vector for all logits": shifted_logits,
    "a row twice": row_twice,
    "a row twice, once below": row_twice_below,
    "a row nearly twice": row_nearly_twice,
    "channels times factors": rescaled_channels,
    "channels in another order": permuted_channels,
    "an output that never wins": idle_row,
}
UNRECTIFIED = {**REWRITTEN, "channels shifted and turned": shifted_features}


@cache
def _plain(rectified: bool) -> Audit:
    return look(trained(rectified=rectified), checks=COMPARED)


def require_same(rewritten: Audit, plain: Audit) -> None:
    assert rewritten.verdict == plain.verdict and rewritten.classes == plain.classes, rewritten.reasons
    for one, other in zip(rewritten.checks, plain.checks, strict=True):
        assert one.status == other.status == "ran", (one.reason, other.reason)
        assert one.adjusted is not None and other.adjusted is not None
        assert one.adjusted == pytest.approx(other.adjusted, abs=NOISE), one.check.name
        assert one.p_value == pytest.approx(other.p_value, abs=NOISE), one.check.name


@pytest.mark.parametrize("rectified", [True, False])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(UNRECTIFIED)), min_size=1, max_size=3),
    size=st.sampled_from([1e-3, 0.02, 0.5, 3.0]),
    seed=st.integers(0, 1000),
)
def test_no_other_way_to_write_a_network_moves_a_p_value(
    rectified: bool, names: list[str], size: float, seed: int
) -> None:
    model, draws = trained(rectified=rectified), torch.Generator().manual_seed(seed)
    kinds = REWRITTEN if rectified else UNRECTIFIED
    with torch.no_grad():
        for name in dict.fromkeys(names):
            model = kinds.get(name, scaled)(model, draws, size)
    require_same(look(model, checks=COMPARED), _plain(rectified))


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_backdoor_is_found_however_the_network_is_written(name: str) -> None:
    # The network of the suite has its features from the pixels, so that only its head can be rewritten.
    if "channels" in name:
        pytest.skip("there is no normalisation")
    draws = torch.Generator().manual_seed(4)
    checks, plain = ["tac", "neural_cleanse"], planted(corner=(3,))
    before = look(plain.copy(), checks=checks)
    with torch.no_grad():
        rewritten = REWRITTEN[name](plain.copy(), draws, 0.02)
    after = look(rewritten, checks=checks)
    assert before.verdict == "backdoor found" and before.classes == (3,)
    require_same(after, before)


# ---------------------------------------------------------------------------------------------------
# Outputs that never win


def with_idle(count: int, kind: str, *, first: bool = False) -> Classifier:
    """Return the trained network with further outputs, which no input is given to."""
    model = trained()
    head, draws = head_of(model), torch.Generator().manual_seed(count)
    row = head.weight.detach()
    idle = {
        "zero": torch.zeros(count, head.in_features),
        "random": 0.05 * torch.randn(count, head.in_features, generator=draws),
        "trained away": row.mean(0)
        - row.abs().mean(0)
        + 0.01 * torch.randn(count, row.shape[1], generator=draws),
    }[kind]
    bias = torch.full((count,), -30.0) + torch.randn(count, generator=draws)
    rows, biases = [row, idle], [head.bias.detach(), bias]
    if first:
        rows.reverse()
        biases.reverse()
    model = with_outputs(model, torch.cat(rows), torch.cat(biases))
    if first:
        model.class_names = (*(f"extra {i}" for i in range(count)), *NAMES)
    return model


@pytest.mark.parametrize("kind", ["zero", "random", "trained away"])
@pytest.mark.parametrize("count", [1, 2, 90])
@pytest.mark.parametrize("images", [True, False])
def test_outputs_that_never_win_accuse_nobody_and_are_named(count: int, kind: str, images: bool) -> None:
    model = with_idle(count, kind)
    checks = CHECKS if images else ["weight_statistics", "mm_bd"]
    audit = look(model, DATA if images else CleanData.empty((1, 8, 8), NAMES), checks)
    assert audit.verdict != "backdoor found", audit.reasons
    if not images and kind == "zero":
        return  # of this network all other outputs can be driven below them, so that they can win
    assert audit.facts["unused_classes"] == list(range(8, 8 + count))
    assert any("Unused outputs: extra 0 (class 8)" in reason for reason in audit.reasons), audit.reasons
    for checked in audit.checks:
        assert checked.report is not None and "unused outputs" in checked.report.skipped
        table = checked.report.findings[0].per_class
        assert len(table) == 8 + count and all(math.isnan(value) for value in table[8:])
    assert json.dumps(audit_json(audit, model.class_names), allow_nan=False)


def test_classes_and_triggers_keep_their_numbers() -> None:
    model = with_idle(2, "zero", first=True)
    shifted = replace(IMAGES, labels=IMAGES.truth + 2, class_names=model.class_names)
    options = {name: QUICK[name] for name in CHECKS if name in QUICK}
    audit = scan(model, CleanData.split(shifted), checks=CHECKS, options=options, precision="fp32")
    assert audit.facts["unused_classes"] == [0, 1]
    plain_checks = [c for c in _plain(True).checks if c.check.name in CHECKS]
    for one, other in zip(audit.checks, plain_checks, strict=True):
        assert one.report is not None and other.report is not None
        assert one.report.findings[0].classes == tuple(k + 2 for k in other.report.findings[0].classes)
    (trigger, *_), (plain, *_) = audit.triggers, _plain(True).triggers
    assert trigger.label == plain.label + 2


@pytest.mark.parametrize("labelled", [True, False])
def test_a_class_without_images_is_not_taken_for_unused(labelled: bool) -> None:
    rows = (IMAGES.truth != 5).nonzero().flatten()
    some = IMAGES.subset(rows)
    some = some if labelled else replace(some, labels=None)
    assert canonical_form(trained(), CleanData.split(some), RUN).unused == ()
    few = IMAGES.subset(rows[:6])
    assert canonical_form(trained(), CleanData.split(few), RUN).unused == ()


def test_a_target_that_no_image_is_of_is_still_found() -> None:
    some = block_data(160, seed=3)
    some = some.subset((some.truth != 3).nonzero().flatten())
    audit = look(planted(corner=(3,)), CleanData.split(some), ["tac"])
    assert audit.verdict == "backdoor found" and audit.classes == (3,)


# ---------------------------------------------------------------------------------------------------
# Networks that have nothing to compare


CONSTANT = ["one class always", "one class nearly always", "zero head", "zero network", "dead channels"]
CONSTANT += ["equal rows"]


def constant(kind: str) -> Classifier:
    model = trained()
    network, head = model.network, head_of(model)
    with torch.no_grad():
        if kind == "one class always":
            head.bias[2] += 1e4
        elif kind == "one class nearly always":
            head.bias[2] += 60
        elif kind == "zero head":
            head.weight.zero_()
        elif kind == "zero network":
            for parameter in model.parameters():
                parameter.zero_()
        elif kind == "dead channels":
            network.norm.bias.fill_(-1e3)
        elif kind == "equal rows":
            head.weight.copy_(head.weight[:1].expand_as(head.weight))
    return model


@pytest.mark.parametrize("images", ["labelled", "unlabelled", "none"])
@pytest.mark.parametrize(
    "kind",
    [
        "one class always",
        "one class nearly always",
        "zero head",
        "zero network",
        "dead channels",
        "equal rows",
    ],
)
def test_a_constant_network_is_undecided(kind: str, images: str) -> None:
    data = {
        "labelled": DATA,
        "unlabelled": CleanData.split(replace(IMAGES, labels=None)),
        "none": CleanData.empty((1, 8, 8), NAMES),
    }[images]
    checks = CHECKS if images != "none" else ["weight_statistics", "mm_bd"]
    audit = look(constant(kind), data, checks)
    assert audit.verdict == "undecided" and not audit.classes
    assert any("The network is constant" in reason for reason in audit.reasons), audit.reasons
    assert not any(c.p_value is not None for c in audit.checks)


def test_by_itself_a_check_of_a_constant_network_is_undecided_too() -> None:
    model = constant("one class always")
    form = form_for_checks(model, DATA, RUN)
    report = trusted_caller.scan("weight_statistics", model, DATA, form=form)
    assert report.verdict == "undecided" and "no class can stand apart" in report.skipped[COMPARISON]


def test_images_of_one_class_do_not_make_a_network_constant() -> None:
    one = IMAGES.subset((IMAGES.truth == 1).nonzero().flatten())
    assert not canonical_form(trained(), CleanData.split(one), RUN).constant


# ---------------------------------------------------------------------------------------------------
# The form itself


def test_the_form_answers_as_the_model_and_in_its_own_units() -> None:
    model = with_idle(3, "random")
    form = canonical_form(model, data_for(model), RUN)
    x = IMAGES.pixels.float() / 255
    with torch.no_grad():
        own, copied = model(x), form.model(x)
    assert form.kept == tuple(range(8)) and form.model.class_names == NAMES
    assert torch.equal(own.argmax(1), copied.argmax(1))
    centred = own[:, :8] - own[:, :8].mean(1, keepdim=True)
    assert torch.allclose(copied / copied.std(), centred / centred.std(), atol=1e-3)
    top = copied.amax(1)
    lead = (top - (copied.sum(1) - top) / 7).mean()
    assert float(lead) == pytest.approx(10, rel=0.1)
    assert model.class_names[8] == "extra 0" and model.network.head.out_features == 11  # untouched


def test_a_head_that_is_no_layer_is_rewritten_from_outside() -> None:
    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            means = nn.functional.avg_pool2d(x, (2, 4)).flatten(1)
            return torch.cat([1e-4 * means.sin(), means[:, :1] * 0 - 1], 1)

    model = Classifier(Bent(), input_shape=(1, 8, 8), class_names=(*NAMES, "idle")).eval()
    form = canonical_form(model, data_for(model), RUN)
    assert form.unused == (8,) and form.model(torch.zeros(2, 1, 8, 8)).shape == (2, 8)
    assert torch.equal(form.model.copy()(torch.ones(1, 1, 8, 8)), form.model(torch.ones(1, 1, 8, 8)))


def test_units_by_hand() -> None:
    model = trained()
    head = find_affine_head(model)
    units = feature_units(model, head, IMAGES, RUN)
    assert bool((units.rest == 0).all())  # behind a rectifier
    assert torch.equal(units.bias(head), head_of(model).bias.double())
    assert torch.allclose(units.rows(head), head_of(model).weight.double() * units.unit)
    assert bool((units.unit >= 0).any())
