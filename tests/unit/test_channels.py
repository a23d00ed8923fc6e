"""Scores of channels against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine import rng
from unbackdoor.engine.channels import (
    lipschitz_bounds,
    mean_activations,
    places,
    producers,
    standardised,
    weight_changes,
)
from unbackdoor.engine.masks import channel_sites
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, CleanData, Images

RUN = Run.create(seed=0, policy="fp32")


class Between(nn.Module):
    """A norm right behind a convolution, and one behind something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(2, eps=0.0), nn.BatchNorm2d(2, eps=0.0)
        self.fc = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.bn2(self.bn1(self.conv(x)).relu()).mean((2, 3)))
        return out


def between() -> Classifier:
    with rng.seeded(0):
        model = Classifier(Between(), input_shape=(1, 2, 2), class_names=NAMES).eval()
    network = model.network
    with torch.no_grad():
        network.conv.weight.copy_(torch.tensor([3.0, -2.0]).view(2, 1, 1, 1))  # type: ignore[union-attr,operator]
        network.bn1.weight.copy_(torch.tensor([1.0, 4.0]))  # type: ignore[union-attr,operator]
        network.bn1.running_var.copy_(torch.tensor([1.0, 4.0]))  # type: ignore[union-attr,operator]
        network.bn2.weight.copy_(torch.tensor([-5.0, 6.0]))  # type: ignore[union-attr,operator]
    return model


def test_a_norm_belongs_to_the_layer_that_feeds_it() -> None:
    model = between()
    assert producers(model, channel_sites(model)) == {"network.bn1": "network.conv", "network.bn2": None}


def test_lipschitz_by_hand() -> None:
    model = between()
    bounds = lipschitz_bounds(model, channel_sites(model))
    # 3 * 1 / 1 and 2 * 4 / 2; then the scales alone.
    assert bounds["network.bn1"].tolist() == [3.0, 4.0]
    assert bounds["network.bn2"].tolist() == [5.0, 6.0]


def test_activations_by_hand() -> None:
    model = between()
    pixels = torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(3, dtype=torch.int64), NAMES)
    means = mean_activations(model, channel_sites(model), images, RUN)
    assert means["network.bn1"].tolist() == [3.0, 0.0], "what is negative sleeps"


def test_changes_by_hand() -> None:
    before, after = between(), between()
    with torch.no_grad():
        after.network.conv.weight[1] += 0.5  # type: ignore[union-attr,index,operator]
        after.network.bn1.bias[1] -= 0.25  # type: ignore[union-attr,index,operator]
        after.network.bn2.weight[0] += 2.0  # type: ignore[union-attr,index,operator]
    changes = weight_changes(before, after, channel_sites(before))
    assert changes["network.bn1"].tolist() == [0.0, 0.75]
    assert changes["network.bn2"].tolist() == [2.0, 0.0]


def test_scores_of_layers_are_made_comparable_and_ordered() -> None:
    scores = standardised({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([100.0, 100.0])})
    assert scores["a"].tolist() == [-1.0, 1.0] and scores["b"].tolist() == [0.0, 0.0]
    order = places(scores)
    assert order["a"].tolist() == [1.0, 0.25] and order["b"].tolist() == [0.5, 0.75]


@pytest.mark.parametrize("score", ["change", "lipschitz", "activation", "recovery"])
def test_every_score_prunes_channels_and_changes_nothing_else(score: str) -> None:
    model = tiny_classifier("conv-bn")
    data = CleanData.split(tiny_data(80, seed=1))
    options = {"score": score, "recover_epochs": 2, "batch_size": 32, "tolerance": 0.1, "step": 0.05}
    first, again = (call("unlearned_prune", model, data, options=options, precision="fp32") for _ in range(2))
    assert first.model.sha256() == again.model.sha256()
    assert 0 < first.evidence["cut"] < first.evidence["channels"]
    zeroed = 0
    for (name, before), after in zip(model.named_parameters(), first.model.parameters(), strict=True):
        if torch.equal(before, after):
            continue
        assert ".bn" in name and name.endswith(".weight")
        assert bool(((after == before) | (after == 0)).all())
        zeroed += int((after == 0).sum())
    assert zeroed == first.evidence["cut"]


def test_presets_name_scores() -> None:
    part = DEFENSES["unlearned_prune"]
    for name, values in part.presets.items():
        assert part.configure(preset=name).model_dump()["score"] == name == values["score"]
