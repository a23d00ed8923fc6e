"""Networks that take only one memory layout, and outputs of several members."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from tiny import tiny_data
from unbackdoor.engine import rng
from unbackdoor.engine.inference import predict, settle_layout
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import UnsupportedModel
from unbackdoor.testing.examples import QUADRANTS, Viewed
from unbackdoor.types import Classifier, logits_in

RUN = Run.create(seed=0, policy="fp32")


def viewed() -> Classifier:
    with rng.seeded(0):
        network = Viewed()
    return Classifier(network, input_shape=(1, 8, 8), class_names=QUADRANTS).eval()


def test_the_layout_is_noticed_once_and_kept_in_copies() -> None:
    model, calls = viewed(), []
    model.network.conv.register_forward_hook(lambda *_: calls.append(1))
    settle_layout(model, RUN)
    assert len(calls) == 2  # the attempt, and the pass that worked
    twin = model.copy().to(memory_format=torch.channels_last)
    logits = predict(twin, tiny_data(12), RUN)
    assert len(calls) == 3
    expected = model.network(
        (tiny_data(12).pixels.float() / 255).clone(memory_format=torch.contiguous_format)
    )[0]
    assert torch.allclose(logits, expected, atol=1e-6)
    assert all(p.is_contiguous() for p in twin.parameters())


def test_such_a_network_learns() -> None:
    model = viewed()
    before = model.sha256()
    train(model, tiny_data(64), Recipe(epochs=2, batch_size=16), RUN)
    assert model.sha256() != before


def test_another_error_of_the_network_is_its_own() -> None:
    with rng.seeded(0):
        model = Classifier(nn.Linear(3, 4), input_shape=(1, 8, 8), class_names=QUADRANTS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 1, 8, 8))
    assert model.to(memory_format=torch.channels_last) is model


LOGITS, FEATURES = torch.zeros(5, 4), torch.zeros(5, 16)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS, FEATURES),
        [FEATURES, LOGITS],
        (LOGITS, None),
        (torch.tensor(0.5), LOGITS),
        OrderedDict(loss=None, logits=LOGITS, hidden=FEATURES),
        (LOGITS, torch.zeros(5, 8, 4, 4)),
    ],
)
def test_the_member_of_the_shape_of_logits_is_taken(outputs: object) -> None:
    assert logits_in(outputs, 4) is LOGITS


@pytest.mark.parametrize(
    "outputs", [(), (FEATURES,), (LOGITS, LOGITS.clone()), None, "logits", {"hidden": FEATURES}]
)
def test_no_or_several_such_members_are_refused(outputs: object) -> None:
    with pytest.raises(UnsupportedModel, match="returns no logits"):
        logits_in(outputs, 4)
