"""Each class of a network with few classes is compared with itself in twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted import block_data, planted
from unbackdoor.audit.checks import default_checks, plan_checks
from unbackdoor.audit.scanning import scan as scan_model
from unbackdoor.engine import self_reference as engine
from unbackdoor.engine.self_reference import differences_of, p_values_of, spreads_of
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.engine.twin import Twin
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier, CleanData, Images

NAMES = ("left", "middle", "right")


class Thirds(nn.Module):
    """Sees which third of an image is brightest; a black corner may decide for a class.

    The corner of a clean image is white.
    """

    def __init__(self, corner: float = 0.0, label: int = 0) -> None:
        super().__init__()
        self.fc = nn.utils.skip_init(nn.Linear, 4, 3)
        weight = torch.cat([10 * torch.eye(3), torch.zeros(3, 1)], 1)
        weight[label, 3] = corner
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        thirds = F.adaptive_avg_pool2d(x, (1, 3)).flatten(1)  # (B, 3)
        logits: Tensor = self.fc(torch.cat([thirds, 1 - x[:, 0, :1, 0]], 1))
        return logits


def network(corner: float = 0.0, label: int = 0) -> Classifier:
    return Classifier(Thirds(corner, label), input_shape=(1, 9, 9), class_names=NAMES).eval()


def images(count: int = 90) -> CleanData:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, 120, (count, 1, 9, 9), generator=draws)
    for k in range(3):
        pixels[labels == k, :, :, 3 * k : 3 * k + 3] += 60
    pixels[:, :, 0, 0] = 255
    return CleanData.split(Images(pixels.to(torch.uint8), labels, NAMES, "thirds"))


@pytest.fixture
def twins_without_a_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the training of the twins, which other tests hold."""
    monkeypatch.setattr(engine, "relearned_twin", lambda *_, **__: Twin(network(), 1.0, 1.0, ()))


@pytest.mark.usefixtures("twins_without_a_corner")
@pytest.mark.parametrize("label", [0, 2])
def test_a_class_that_needs_less_than_in_its_twins_is_found(label: int) -> None:
    report = scan("self_reference", network(40.0, label), images())
    finding = report.findings[0]
    assert (report.verdict, finding.classes) == ("backdoor found", (label,))
    assert finding.p_value is not None and finding.p_value < 0.01
    assert min(range(3), key=lambda k: finding.class_p_values[k]) == label
    assert finding.trigger is not None and finding.trigger.label == label
    assert finding.trigger.success is not None  # on images that it was not made with


@pytest.mark.usefixtures("twins_without_a_corner")
def test_a_network_that_is_as_its_twins_is_not_accused() -> None:
    report = scan("self_reference", network(), images())
    assert report.verdict == "no evidence found"
    assert report.findings[0].p_value == 1.0


def test_damaged_twins_are_undecided_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "relearned_twin", lambda *_, **__: Twin(network(), 1.0, 0.4, ()))
    report = scan("self_reference", network(), images())
    assert report.verdict == "undecided"
    assert "40% of the held-out images" in report.skipped["comparison with twins"]


def test_more_classes_are_refused_where_it_is_named_and_not_asked_otherwise() -> None:
    with pytest.raises(UnsupportedModel, match="at most 5 classes, got 8"):
        scan("self_reference", planted(), CleanData.split(block_data(80)))
    everything, few, many = default_checks(), default_checks(5), default_checks(6)
    assert everything == few
    assert {c.name for c in few} - {c.name for c in many} == {"self_reference"}
    assert plan_checks(None, classes=6) == many
    assert [c.name for c in plan_checks(["self_reference"], classes=6)] == ["self_reference"]
    (checked,) = scan_model(planted(), checks="self_reference").checks
    assert checked.status == "skipped" and "images" in checked.reason


def test_what_lowers_all_classes_alike_and_what_raises_others_is_no_evidence() -> None:
    twins = torch.tensor([[2.0, 3.0, 2.5, 2.0]]).repeat(3, 1)
    assert differences_of(twins[0] - 1, twins).tolist() == [0, 0, 0, 0]
    assert differences_of(twins[0] + torch.tensor([0.0, 2, 2, 2]), twins).tolist() == [0, 2, 2, 2]
    lower = differences_of(twins[0] - torch.tensor([3.0, 0, 0, 0]), twins)
    assert lower.tolist() == [-3, 0, 0, 0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_law_keeps_its_level_for_the_spreads_that_it_was_made_of(classes: int) -> None:
    draws, spreads = torch.Generator().manual_seed(0), spreads_of(classes, (3, 32, 32))
    alarms = 0
    for _ in range(400):
        drawn = {
            kind: spread * torch.randn(classes, generator=draws, dtype=torch.float64)
            for kind, spread in spreads.items()
        }
        alarms += classes * float(p_values_of(drawn, spreads).min()) <= 0.05
    assert alarms <= 34  # 20 of 400 at most are expected, with a deviation of 4.4


def test_patches_of_larger_images_differ_by_more() -> None:
    small, large = spreads_of(3, (1, 8, 8)), spreads_of(3, (3, 32, 32))
    assert large["patch"] == pytest.approx(3 * small["patch"], rel=0.02)
    assert all(large[kind] == small[kind] for kind in ("blend", "stamp"))
    assert spreads_of(2, (1, 8, 8))["stamp"] > small["stamp"]
    assert spreads_of(3, (1, 4, 4)) == small
