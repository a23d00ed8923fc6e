"""Statistics of the head: an odd row is named, ordinary rows are not, and what is left out is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_classifier
from unbackdoor.engine.heads import find_affine_head
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import UnsupportedModel
from unbackdoor.scanners.weight_statistics import head_statistics
from unbackdoor.types import Classifier, CleanData

NAMES = tuple("abcdefghij")
EMPTY = CleanData.empty((1, 4, 4), NAMES)


def classifier(seed: int = 0, *, odd: int = -1, bias: bool = True) -> Classifier:
    """Return a network with a random head; the row of one class may be four times as long."""
    draws = torch.Generator().manual_seed(seed)
    linear = nn.utils.skip_init(nn.Linear, 16, 10, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(10, 16, generator=draws))
        if bias:
            linear.bias.copy_(0.1 * torch.randn(10, generator=draws))
        if odd >= 0:
            linear.weight[odd] *= 4
    network = nn.Sequential(nn.Flatten(), linear)
    return Classifier(network, input_shape=(1, 4, 4), class_names=NAMES).eval()


def test_an_odd_row_is_named() -> None:
    report = scan("weight_statistics", classifier(odd=6), EMPTY)
    best = report.findings[0]
    assert report.verdict == "backdoor found" and best.classes == (6,)
    assert best.statistic.startswith("weak:")
    assert best.p_value is not None and best.p_value <= 0.05


def test_ordinary_rows_raise_few_alarms() -> None:
    verdicts = [scan("weight_statistics", classifier(seed), EMPTY).verdict for seed in range(40)]
    assert verdicts.count("backdoor found") <= 6  # 2 expected at most


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_many_classes_raise_no_more_alarms_than_few(law: str) -> None:
    names = tuple(map(str, range(200)))
    data = CleanData.empty((1, 16, 16), names)
    found = []
    for seed in range(10):
        draws = torch.Generator().manual_seed(seed)
        linear = nn.utils.skip_init(nn.Linear, 256, 200)
        with torch.no_grad():
            for parameter in linear.parameters():
                # Uniform ones are what torch begins with.
                fill = parameter.normal_ if law == "normal" else parameter.uniform_
                fill(*((0.0, 0.1) if law == "normal" else (-0.1, 0.1)), generator=draws)
            model = Classifier(
                nn.Sequential(nn.Flatten(), linear), input_shape=(1, 16, 16), class_names=names
            )
            found.append(scan("weight_statistics", model.eval(), data).verdict)
            linear.weight[7] += 0.3
        assert scan("weight_statistics", model, data).findings[0].classes == (7,)
    assert found.count("backdoor found") <= 2


def test_numbers_by_hand() -> None:
    model = classifier(bias=False)
    weight = model.network[1].weight.detach().double()
    table = head_statistics(find_affine_head(model))
    assert "bias" not in table  # there is none, so nobody pays for its test
    centred = weight - weight.mean(0)
    assert torch.allclose(table["length"], centred.norm(dim=1) ** (2 / 3))
    assert torch.allclose(table["mean weight"], weight.mean(1))
    assert bool((table["share of the leading direction"].abs() <= 1).all())


def test_few_classes_are_refused_and_a_bent_head_is_unsupported() -> None:
    few = CleanData.empty((1, 8, 8), tiny_classifier("conv-bn").class_names)
    report = scan("weight_statistics", tiny_classifier("conv-bn"), few)
    assert report.verdict == "undecided" and not report.findings and report.skipped

    class Bent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10].sin()

    with pytest.raises(UnsupportedModel):
        scan("weight_statistics", Classifier(Bent(), input_shape=(1, 4, 4), class_names=NAMES).eval(), EMPTY)


def test_the_channel_is_shown_and_not_judged() -> None:
    network = nn.Sequential(
        nn.utils.skip_init(nn.Conv2d, 1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.utils.skip_init(nn.Linear, 32, 10),
    )
    with torch.no_grad():
        draws = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=draws) + 0.5)
        network[1].weight[3] = 50.0
    shown = scan(
        "weight_statistics", Classifier(network.eval(), input_shape=(1, 4, 4), class_names=NAMES), EMPTY
    )
    assert shown.findings[1].p_value is None and shown.findings[1].value > 2
