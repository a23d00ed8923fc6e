"""MM-BD: it needs no image, reaches the largest margin of a network that is known, and names its class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planted import NAMES, planted
from tiny import tiny_classifier
from unbackdoor.engine.inference import images_per_pass
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import SCANNERS
from unbackdoor.scanners import mm_bd
from unbackdoor.scanners.mm_bd import MMBDConfig, maximum_margins
from unbackdoor.types import Classifier, CleanData

EMPTY = CleanData.empty((1, 8, 8), NAMES)
RUN = Run.create(seed=0, policy="fp32")


def test_it_needs_nothing_but_the_model() -> None:
    assert SCANNERS["mm_bd"].needs == frozenset()
    report = scan("mm_bd", planted((2,)), EMPTY, precision="fp32")
    assert report.verdict == "backdoor found" and report.findings[0].classes == (2,)
    assert report.findings[0].p_value is not None and report.findings[0].p_value < 0.01
    assert report.findings[0].artefacts["input"].shape == (1, 8, 8)
    assert scan("mm_bd", planted(), EMPTY, precision="fp32").verdict == "no evidence found"


class Linear(nn.Module):
    """Logits that are one pixel each, times a gain."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].flatten(1)[:, :8] * torch.arange(1.0, 9.0)


def test_the_largest_margin_is_found() -> None:
    model = Classifier(Linear(), input_shape=(1, 8, 8), class_names=NAMES).eval()
    margins, shown = maximum_margins(model, MMBDConfig(starts=3), RUN)
    # Its own pixel white and all others black: the gain itself.
    assert margins.tolist() == pytest.approx([float(k) for k in range(1, 9)], rel=1e-3)
    assert bool(((shown >= 0) & (shown <= 1)).all())
    (logits,) = model(shown[None])
    assert int(margins.argmax()) == 7
    assert float(logits[7] - logits[:7].max()) == pytest.approx(float(margins[7]), abs=1e-4)


def test_classes_in_small_groups_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier(Linear(), input_shape=(1, 8, 8), class_names=NAMES).eval()
    margins, shown = maximum_margins(model, MMBDConfig(starts=3, steps=30), RUN)
    monkeypatch.setattr(mm_bd, "_GROUP", 2 * 3 * 64)
    apart, alike = maximum_margins(model, MMBDConfig(starts=3, steps=30), RUN)
    assert torch.equal(margins, apart)
    assert torch.equal(shown, alike)


def test_a_pass_holds_fewer_of_larger_images() -> None:
    assert images_per_pass((1, 8, 8)) == images_per_pass((3, 32, 32)) == 512
    assert images_per_pass((3, 224, 224)) == 10
    assert images_per_pass((3, 2000, 2000)) == 1


def test_few_classes_get_numbers_and_no_verdict() -> None:
    few = CleanData.empty((1, 8, 8), tiny_classifier("conv-bn").class_names)
    report = scan("mm_bd", tiny_classifier("conv-bn"), few, options={"steps": 20}, precision="fp32")
    assert report.verdict == "undecided" and report.findings[0].p_value is None
    assert len(report.findings[0].per_class) == 4


def test_a_logit_that_is_not_finite_ends_it() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0].flatten(1)[:, :8] / 0

    model = Classifier(Broken(), input_shape=(1, 8, 8), class_names=NAMES).eval()
    with pytest.raises(MethodFailed, match="not finite"):
        scan("mm_bd", model, EMPTY, precision="fp32")
