"""Neural Cleanse: planted shortcuts are found in either form, one or two; without one nothing is claimed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from planted import block_data, planted
from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.engine.trigger_search import TriggerSearchConfig, search_triggers, success
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import SCANNERS
from unbackdoor.scanners.neural_cleanse import RECOVERED
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport

DATA = CleanData.split(replace(block_data(160), labels=None))
RUN = Run.create(seed=0, policy="fp32")
QUICK = {"steps": 120}


def look(model: Classifier, **options: object) -> ScanReport:
    return scan("neural_cleanse", model, DATA, options={**QUICK, **options}, precision="fp32")


def named(report: ScanReport, start: str) -> Finding:
    return next(f for f in report.findings if f.statistic.startswith(start))


@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("corner", [(2,), (2, 5)])
def test_planted_shortcuts_are_found_without_labels(corner: tuple[int, ...], form: str) -> None:
    report = look(planted(corner), form=form)
    assert report.verdict == "backdoor found"
    assert set(report.findings[0].classes) == set(corner)
    assert report.findings[0].p_value is not None and report.findings[0].p_value < 0.01
    assert "2 of 3 searches must agree, 2 were made" in report.findings[0].threshold_source
    shown = named(report, RECOVERED)
    assert shown.p_value is None and shown.value > 0.75
    assert shown.classes[0] in corner
    trigger = shown.trigger
    assert trigger is not None and (trigger.label, trigger.success) == (shown.classes[0], shown.value)
    assert not trigger.faults((1, 8, 8), 8) and (trigger.mask is None) == (form == "blend")
    if trigger.mask is not None:
        where = {2: 0, 5: 7}[shown.classes[0]]  # the corner that decides for the class
        assert int(trigger.mask.flatten().argmax()) == where


def test_without_a_shortcut_nothing_is_claimed_and_two_searches_are_enough() -> None:
    report = look(planted())
    assert report.verdict == "no evidence found"
    # The p-values are below what a single test would ask for, and pay for there being two.
    assert all(f.p_value is None or f.p_value > 0.025 for f in report.findings)
    assert "2 of 3 searches must agree, 2 were made" in report.findings[0].threshold_source
    assert all(math.isfinite(v) for f in report.findings for v in f.per_class)


def test_one_search_that_ends_in_a_poor_change_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def sometimes(*args: object, restart: int = 0, **options: object) -> object:
        found = search_triggers(*args, restart=restart, **options)  # type: ignore[arg-type]
        if restart == 1:  # the planted class looks as far away as the others
            return replace(
                found,
                losses=found.losses.index_copy(0, torch.tensor([2]), found.losses[3:4]),
                sizes=found.sizes.index_copy(0, torch.tensor([2]), found.sizes[3:4]),
            )
        return found

    monkeypatch.setattr("unbackdoor.scanners.neural_cleanse.search_triggers", sometimes)
    report = look(planted((2,)))
    assert report.verdict == "backdoor found" and report.findings[0].classes == (2,)
    assert "2 of 3 searches must agree, 3 were made" in report.findings[0].threshold_source
    # Of two, both must agree.
    assert look(planted((2,)), restarts=1).verdict == "backdoor found"
    assert look(planted((2,)), restarts=2).verdict == "no evidence found"


def test_few_images_serve_all_searches_and_few_classes_get_no_verdict() -> None:
    few = CleanData.split(replace(block_data(24), labels=None))
    report = scan("neural_cleanse", planted((2,)), few, options=QUICK, precision="fp32")
    assert "too few to share out" in report.skipped["different images"]
    four = CleanData.split(tiny_data(40))
    report = scan("neural_cleanse", tiny_classifier("conv-bn"), four, options=QUICK, precision="fp32")
    assert report.verdict == "undecided" and "outlier test" in report.skipped
    assert [f.p_value for f in report.findings] == [None] * 3


# ---------------------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("form", ["patch", "blend"])
def test_a_change_is_as_large_as_it_says_and_counts_are_those_of_success(form: str) -> None:
    cfg = TriggerSearchConfig(steps=60, images=24)
    found = search_triggers(planted((2,)), DATA.fit, cfg, RUN, form=form)  # type: ignore[arg-type]
    for k, trigger in enumerate(found.triggers):
        size = trigger.pattern.norm() if trigger.mask is None else trigger.mask.sum()
        assert (trigger.label, trigger.mask is None) == (k, form == "blend")
        assert float(size) == pytest.approx(float(found.trigger_sizes[k]), rel=1e-4)
        if math.isfinite(float(found.sizes[k])):
            assert float(found.trigger_sizes[k]) == float(found.sizes[k])
            assert int(found.hits[k]) >= 0.9 * found.images
            assert success(planted((2,)), trigger, DATA.fit, RUN).value > 0.6
    assert int(found.sizes.argmin()) == 2


def test_a_class_is_sought_alike_in_any_company() -> None:
    model, images = tiny_classifier("conv-bn"), tiny_data(40)
    cfg = TriggerSearchConfig(steps=40, images=12)
    everything = search_triggers(model, images, cfg, RUN)
    some = search_triggers(model, images, cfg, RUN, enough=2)
    first = everything.sizes.argsort()[:2]
    assert torch.allclose(everything.sizes[first], some.sizes[first])
    assert int(torch.isfinite(some.sizes).sum()) >= 2 and some.steps <= everything.steps
    assert bool((everything.sizes[~torch.isfinite(some.sizes)] > some.limit - 1e-9).all())


def test_hopeless_classes_are_given_up_at_the_fixed_budget() -> None:
    found = search_triggers(
        planted((2,)), DATA.fit, TriggerSearchConfig(steps=60), RUN, enough=1, fixed=1 / 64
    )
    assert int(found.compared.sum()) == 2 and bool(found.compared[2])  # twice as many as are waited for
    assert bool(torch.isfinite(found.losses).all())


def test_the_chosen_rows_alone_move() -> None:
    values = torch.zeros(3, 2)
    optimizer = RowAdam(values, 0.1)
    optimizer.step(torch.tensor([0, 2]), torch.tensor([[1.0, -1e-9], [0.0, 5.0]]))
    assert torch.allclose(values, torch.tensor([[-0.1, 0.1], [0.0, 0.0], [0.0, -0.1]]), atol=1e-6)


def test_success_counts_images_that_could_be_moved() -> None:
    black = torch.zeros(8, 8)
    black[0, 0] = 1
    trigger = RecoveredTrigger(2, torch.zeros(1, 8, 8), black)
    assert success(planted((2,)), trigger, block_data(16), RUN) == Rate(14, 14)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        search_triggers(planted(), DATA.fit.subset([]), TriggerSearchConfig(), RUN)
    constant = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 64, 4))
    with torch.no_grad():
        constant[1].weight.zero_()  # type: ignore[operator,union-attr]
        constant[1].bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # type: ignore[operator,union-attr]
    model = Classifier(constant, input_shape=(1, 8, 8), class_names=NAMES).eval()
    with pytest.raises(MethodFailed, match="sends all images to one class"):
        search_triggers(model, tiny_data(8), TriggerSearchConfig(), RUN)
    with torch.no_grad():
        constant[1].weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(MethodFailed, match="not finite"):
        search_triggers(model, tiny_data(8), TriggerSearchConfig(), RUN)


def test_the_part_is_declared() -> None:
    assert SCANNERS["neural_cleanse"].needs == {"images"}
