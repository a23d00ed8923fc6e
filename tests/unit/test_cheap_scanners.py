"""Logit leak, stamp library and recall: what is planted is found, and clean networks are left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from planted import block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.scanning import scan as audit
from unbackdoor.engine.canonical_form import canonical_form
from unbackdoor.engine.run import Run
from unbackdoor.engine.stamp_search import Stamp, library
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import InputError
from unbackdoor.scanners.logit_leak import leaning
from unbackdoor.types import Classifier, CleanData, Images, ScanReport

DATA = CleanData.split(block_data(160))
RUN = Run.create(seed=0, policy="fp32")


def look(name: str, model: Classifier, data: CleanData | Images = DATA, **options: object) -> ScanReport:
    return scan(name, model, data, options=options, precision="fp32")


def leaking(model: Classifier, target: int, size: float) -> Classifier:
    """Return the model with a little of the target's logit on all images of other classes."""
    with torch.no_grad():
        model.network.fc.weight[target, :8] += size  # type: ignore[union-attr,operator]
    return model


# ---------------------------------------------------------------------------------------------------
# Logit leak


def test_logits_that_lean_to_one_class_are_found_without_labels() -> None:
    bare = CleanData.split(replace(block_data(160), labels=None))
    report = look("logit_leak", leaking(planted(), 3, 0.8), bare)
    finding = report.findings[0]
    assert (report.verdict, finding.classes) == ("backdoor found", (3,))
    assert finding.p_value == pytest.approx(8 * min(finding.class_p_values))
    assert min(finding.class_p_values) == finding.class_p_values[3]


def test_without_a_lean_nothing_is_claimed() -> None:
    report = look("logit_leak", planted())
    assert report.verdict == "no evidence found"


def test_the_leak_is_that_of_the_formula() -> None:
    truth = torch.arange(6).repeat(3)
    logits = 10 * F.one_hot(truth, 6).double()
    logits[truth != 2, 2] += 1.5
    leaks = leaning(logits)
    # All rows but its own lean to class 2 by 1.5 of which each logit loses a sixth by centring.
    column, row = 1.5 * 5 / 6 - 10 / 6, -10 / 6
    assert float(leaks[2]) == pytest.approx(column - row)
    assert int(leaks.argmax()) == 2
    assert torch.allclose(leaning(logits + 7), leaks)


def test_a_class_that_no_image_is_given_to_has_a_column_and_no_row() -> None:
    truth = torch.tensor([0, 1, 2, 3, 4, 5] * 2)
    logits = 10 * F.one_hot(truth, 7).double()
    assert bool(torch.isfinite(leaning(logits)).all())


# ---------------------------------------------------------------------------------------------------
# Stamps


@pytest.mark.parametrize("label", [2, 5])
def test_a_patch_that_many_attacks_use_is_found_with_its_place(label: int) -> None:
    report = look("stamp_library", planted((label,)))
    finding = report.findings[0]
    assert (report.verdict, finding.classes) == ("backdoor found", (label,))
    trigger = finding.trigger
    assert trigger is not None and trigger.label == label and not trigger.faults((1, 8, 8), 8)
    assert trigger.mask is not None and float(trigger.mask[0, 0]) == 1 and float(trigger.mask.sum()) == 4
    assert trigger.success is not None and trigger.success > 0.9


def test_where_no_corner_decides_no_class_is_far_from_the_others() -> None:
    report = look("stamp_library", planted())
    finding = report.findings[0]
    assert finding.p_value is not None and finding.p_value > 0.01  # classes of different gains
    assert finding.trigger is not None and finding.trigger.success is not None


def test_all_positions_of_small_images_are_tried_and_the_best_of_large_ones_refined() -> None:
    assert len(library((1, 8, 8), 2, RUN)) == 6 * 7 * 7
    large = library((3, 32, 32), 3, RUN)
    assert len(large) == 6 * 16 * 16
    places = {(stamp.top, stamp.left) for stamp in large}
    assert {(0, 0), (0, 29), (29, 0), (29, 29)} <= places


def test_a_stamp_lies_where_it_says() -> None:
    stamp = Stamp(torch.full((1, 2, 2), 0.5), 3, 5)
    out = stamp.on(torch.zeros(1, 1, 8, 8))
    assert float(out[0, 0, 3:5, 5:7].sum()) == 2.0 == float(out.sum())
    assert torch.equal(stamp.trigger(1, (1, 8, 8)).apply(torch.zeros(1, 1, 8, 8)), out)


def test_a_patch_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="the patch does not fit"):
        look("stamp_library", planted(), side=8)


# ---------------------------------------------------------------------------------------------------
# Recall


def without(label: int) -> Classifier:
    """Return a network that gives no clean image to a class."""
    model = planted()
    with torch.no_grad():
        model.network.fc.bias[label] -= 30  # type: ignore[union-attr,operator]
    return model


def test_a_class_that_its_images_are_never_given_to_is_found() -> None:
    report = look("recall", without(4), CleanData.split(block_data(320)))
    finding = report.findings[0]
    assert (report.verdict, finding.classes, finding.value) == ("backdoor found", (4,), 0.0)


def test_a_class_that_is_merely_worse_is_not_accused() -> None:
    images = block_data(320)
    labels = images.truth.clone()
    wrong = (labels == 4).nonzero().flatten()[:20]
    labels[wrong] = 5  # recall of half of the images, as far as the labels say
    report = look("recall", planted(), CleanData.split(replace(images, labels=labels)))
    assert report.verdict == "no evidence found" and report.findings[0].p_value == 1.0


def test_exchanged_labels_and_few_images_accuse_nobody() -> None:
    images = block_data(320)
    labels = images.truth.clone()
    labels[images.truth == 1], labels[images.truth == 2] = 2, 1
    report = look("recall", planted(), CleanData.split(replace(images, labels=labels)))
    assert report.verdict == "no evidence found"
    few = look("recall", without(4), CleanData.split(block_data(16)))
    assert few.verdict == "undecided" and few.findings[0].p_value is None


def test_it_sees_the_outputs_that_the_other_scanners_are_not_given() -> None:
    model, data = without(4), CleanData.split(block_data(320))
    assert 4 not in canonical_form(model, data, RUN).kept
    done = audit(model, data, checks=["recall", "logit_leak"], precision="fp32")
    assert (done.verdict, done.classes) == ("backdoor found", (4,))


# ---------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", ["logit_leak", "stamp_library", "recall"])
def test_few_classes_get_no_verdict(name: str) -> None:
    report = look(name, tiny_classifier("conv-bn"), CleanData.split(tiny_data(80)))
    assert report.verdict == "undecided" and "outlier test" in report.skipped
    assert report.findings[0].p_value is None and not report.findings[0].class_p_values
