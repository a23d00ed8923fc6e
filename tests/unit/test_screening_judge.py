"""The judge of screenings knows the truth; a screening knows nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiny import tiny_data
from unbackdoor.attacks import poison
from unbackdoor.bench.screening import Resemblance, judge_screening, resemblance
from unbackdoor.errors import InputError
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Images

DATA = tiny_data(40, seed=4)
_, TRUTH = poison(DATA, "badnets", {"target": 1, "poison_rate": 0.2}, seed=0)


def test_a_perfect_screening_and_one_that_takes_the_target_class_for_triggered() -> None:
    stamped = TRUTH.trigger.stamp(DATA.pixels)
    known = {pixels.numpy().tobytes() for pixels in stamped}
    target = {pixels.numpy().tobytes() for pixels in DATA.pixels[DATA.truth == 1]}

    def perfect(images: Images) -> Tensor:
        assert images.labels is None and len(images) == 70, "40 clean ones, and 30 not of the target class"
        return torch.tensor([float(p.numpy().tobytes() in known) for p in images.pixels])

    def fooled(images: Images) -> Tensor:
        clean_target = torch.tensor([float(p.numpy().tobytes() in target) for p in images.pixels])
        return perfect(images).maximum(clean_target)

    best, worse = judge_screening(perfect, TRUTH, DATA), judge_screening(fooled, TRUTH, DATA)
    assert (best.all.auroc, best.all.tpr, best.all.clean, best.triggered) == (1.0, 1.0, 40, 30)
    assert worse.target is not None and worse.others is not None
    assert (worse.target.auroc, worse.target.tpr, worse.target.clean) == (0.5, 0.0, 10)
    assert (worse.others.auroc, worse.others.tpr, worse.others.clean) == (1.0, 1.0, 30)
    assert worse.all.auroc == pytest.approx(0.75 + 0.25 / 2)
    json.dumps(worse.to_json(), allow_nan=False)


def test_a_poisoned_training_set_is_judged_with_its_labels_and_share() -> None:
    def labels_alone(images: Images) -> Tensor:
        assert len(images) == 44 and images.truth[40:].tolist() == [1] * 4
        return (images.truth == 1).float()

    told = judge_screening(labels_alone, TRUTH, DATA, most=4, labelled=True)
    assert told.triggered == 4 and told.target is not None and told.target.auroc == 0.5


def test_a_trigger_is_held_against_the_attackers() -> None:
    """A patch in a corner: the same pixels, one of them, others, and none."""
    there = (TRUTH.trigger.stamp(DATA.pixels) != DATA.pixels).any(0).any(0)  # (H, W)
    bright = TRUTH.trigger.stamp(DATA.pixels)[0].float() / 255
    same = RecoveredTrigger(1, bright, there.float())
    assert resemblance(same, TRUTH, DATA) == Resemblance(1.0, pytest.approx(1.0, abs=1e-5))
    row, column = there.nonzero()[0].tolist()
    part = torch.zeros_like(there, dtype=torch.float)
    part[row, column] = 1
    some = resemblance(replace(same, mask=part), TRUTH, DATA)
    assert some.iou == pytest.approx(1 / int(there.sum()))
    assert 0 < some.cosine < 1
    elsewhere = resemblance(replace(same, mask=(~there).float()), TRUTH, DATA)
    assert elsewhere.iou == 0
    assert resemblance(replace(same, mask=torch.zeros_like(part)), TRUTH, DATA).iou == 0
    added = (TRUTH.trigger.stamp(DATA.pixels).float() - DATA.pixels.float()).mean(0) / 255
    whole = resemblance(RecoveredTrigger(1, added, None), TRUTH, DATA)
    assert whole.iou == 1.0 and whole.cosine > 0.9


def test_what_cannot_be_judged_is_refused() -> None:
    _, none = poison(DATA, "none", seed=0)
    with pytest.raises(InputError, match="nothing to find"):
        judge_screening(lambda images: torch.zeros(len(images)), none, DATA)
    with pytest.raises(InputError, match="do not fit the images"):
        judge_screening(lambda images: torch.zeros(3), TRUTH, DATA)
    with pytest.raises(InputError, match="not a finite number"):
        judge_screening(lambda images: torch.full((len(images),), torch.nan), TRUTH, DATA)
