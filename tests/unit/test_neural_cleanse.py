"""Neural Cleanse: planted shortcuts are found in either form, one or two; without one nothing is claimed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from planted import block_data, planted
from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine import trigger_search
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.engine.trigger_search import TriggerSearchConfig, search_triggers, success
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.registry import SCANNERS
from unbackdoor.scanners.neural_cleanse import RECOVERED
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, Images, ScanReport

DATA = CleanData.split(replace(block_data(160), labels=None))
RUN = Run.create(seed=0, policy="fp32")


def look(model: Classifier, **options: object) -> ScanReport:
    return scan("neural_cleanse", model, DATA, options=options, precision="fp32")


def named(report: ScanReport, start: str) -> Finding:
    return next(f for f in report.findings if f.statistic.startswith(start))


@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("corner", [(2,), (2, 5)])
def test_planted_shortcuts_are_found_without_labels(corner: tuple[int, ...], form: str) -> None:
    report = look(planted(corner), form=form)
    assert report.verdict == "backdoor found"
    assert set(report.findings[0].classes) == set(corner)
    finding = report.findings[0]
    assert finding.p_value is not None and finding.p_value < 0.01
    if len(corner) == 1:  # two widen the spread for each other; the test of the finding sees both
        assert 8 * min(finding.class_p_values) < 0.01
        assert min(finding.class_p_values) == finding.class_p_values[corner[0]]
    shown = named(report, RECOVERED)
    assert shown.p_value is None and shown.value > 0.75
    assert shown.classes[0] in corner
    trigger = shown.trigger
    assert trigger is not None and (trigger.label, trigger.success) == (shown.classes[0], shown.value)
    assert not trigger.faults((1, 8, 8), 8) and (trigger.mask is None) == (form == "blend")
    if trigger.mask is not None:
        where = {2: 0, 5: 7}[shown.classes[0]]  # the corner that decides for the class
        assert int(trigger.mask.flatten().argmax()) == where


@pytest.mark.parametrize("form", ["patch", "blend"])
def test_without_a_shortcut_nothing_is_claimed(form: str) -> None:
    report = look(planted(), form=form)
    assert report.verdict == "no evidence found"
    assert all(math.isfinite(v) for f in report.findings for v in f.per_class)


def test_starts_that_end_in_a_poor_change_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(model: Classifier, form: str, starts: int, *more: object) -> torch.Tensor:
        raw = first_starts(model, form, starts, *more)  # type: ignore[arg-type]
        last = torch.arange(len(raw)) % starts != starts - 1
        raw[last, 0] = torch.where(
            torch.arange(64).view(8, 8) == 27, 20.0, 0.0
        )  # only the middle of the image
        return raw

    first_starts = trigger_search._starts
    monkeypatch.setattr(trigger_search, "_starts", poor)
    assert look(planted((2,)), starts=1).verdict == "backdoor found"
    report = look(planted((2,)), starts=4)
    assert report.verdict == "backdoor found" and report.findings[0].classes == (2,)


def test_few_images_will_do_and_few_classes_get_no_verdict() -> None:
    few = CleanData.split(replace(block_data(24), labels=None))
    report = scan("neural_cleanse", planted((2,)), few, precision="fp32")
    assert report.findings[0].classes == (2,)
    four = CleanData.split(tiny_data(40))
    report = scan("neural_cleanse", tiny_classifier("conv-bn"), four, precision="fp32")
    assert report.verdict == "undecided" and "outlier test" in report.skipped
    assert [f.p_value for f in report.findings] == [None] * 2


# ---------------------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("form", ["patch", "blend"])
def test_a_change_is_as_large_as_it_says_and_works_on_images_that_it_did_not_see(form: str) -> None:
    found = search_triggers(planted((2,)), DATA.fit, TriggerSearchConfig(), RUN, form=form)  # type: ignore[arg-type]
    for k, trigger in enumerate(found.triggers):
        size = trigger.pattern.norm() if trigger.mask is None else trigger.mask.sum()
        assert (trigger.label, trigger.mask is None) == (k, form == "blend")
        assert float(size) == pytest.approx(float(found.trigger_sizes[k]), rel=1e-4)
        if math.isfinite(float(found.sizes[k])):
            assert float(found.trigger_sizes[k]) == float(found.sizes[k])
            assert float(found.success[k]) >= 0.9 - 1e-6
            assert success(planted((2,)), trigger, DATA.fit, RUN).value > 0.6
    assert int(found.sizes.argmin()) == 2
    assert success(planted((2,)), found.triggers[2], DATA.select, RUN).value > 0.75


def test_losses_are_read_where_the_median_class_has_come_to_the_anchor() -> None:
    read = {}
    for anchor in (0.6, 0.35):
        found = search_triggers(planted((2,)), DATA.fit, TriggerSearchConfig(anchor=anchor), RUN, enough=1)
        assert bool(found.compared.all()) and int(found.losses.argmin()) == 2
        read[anchor] = found
    # A lower anchor is reached at a larger budget, whatever the budgets are that the model needs.
    assert read[0.35].anchored > read[0.6].anchored
    assert float(read[0.35].losses.median()) < float(read[0.6].losses.median())


def test_the_smallest_patch_is_one_pixel_of_the_image_at_its_own_size() -> None:
    for side in (8, 32):
        blocks = Classifier(nn.AdaptiveAvgPool2d(8), input_shape=(1, side, side), class_names=NAMES)
        problem = trigger_search._Problem(
            blocks, torch.zeros(0), torch.zeros(0), "patch", TriggerSearchConfig(), RUN
        )
        assert problem.lowest * problem.unit == pytest.approx(1.0)


def test_starts_of_masks_are_bumps_on_a_grid_and_the_rest_level() -> None:
    masks = trigger_search.bumps(11, 32, 32)
    peaks = [divmod(int(mask.argmax()), 32) for mask in masks[:9]]
    assert len(set(peaks)) == 9 and {row // 11 for row, _ in peaks} == {0, 1, 2}
    assert not masks[9:].any()


def test_images_are_drawn_anew_in_each_step() -> None:
    rows = torch.arange(24).expand(2, -1)
    problem = trigger_search._Problem(
        planted(), torch.zeros(0), rows, "patch", TriggerSearchConfig(images=8), RUN
    )
    drawn = torch.cat([problem.batch(step, 8)[0] for step in range(3)])
    assert sorted(drawn.tolist()) == list(range(24))
    assert problem.batch(0, 100).shape == (2, 24)


def test_a_class_that_is_waited_for_is_the_same_in_any_company() -> None:
    model, images = tiny_classifier("conv-bn"), tiny_data(40)
    cfg = TriggerSearchConfig(steps=24, images=12)
    everything = search_triggers(model, images, cfg, RUN)
    some = search_triggers(model, images, cfg, RUN, enough=2)
    assert torch.allclose(everything.losses, some.losses)
    reached = torch.isfinite(some.sizes)
    assert torch.allclose(everything.sizes[reached], some.sizes[reached])
    assert int(reached.sum()) >= 2 and some.steps <= everything.steps


def test_of_many_classes_only_the_easiest_enter_the_second_round() -> None:
    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 20 * nn.functional.adaptive_avg_pool2d(x, (6, 4)).flatten(1)

    names = tuple(f"class {k}" for k in range(24))
    model = Classifier(Many(), input_shape=(1, 12, 8), class_names=names).eval()
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 1, 12, 8), generator=draws).to(torch.uint8)
    found = search_triggers(model, Images(pixels, None, names, "noise"), TriggerSearchConfig(), RUN, enough=1)
    assert int(found.compared.sum()) == 10 and bool(torch.isfinite(found.losses).all())


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
