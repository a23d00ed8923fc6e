"""Trigger inversion: a planted shortcut is found, and classes do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearned_inversion import InversionConfig, invert, success
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.metrics import Rate
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, Images

RUN = Run.create(seed=0, policy="fp32")


def black_corner(images: Images) -> Images:
    images.pixels[:, :, 0, 0] = 0
    return images


DATA, HELD_OUT = black_corner(tiny_data(48, seed=2)), black_corner(tiny_data(40, seed=3))
CFG = InversionConfig(steps=120, batch_size=16)


class Shortcut(nn.Module):
    """Sees which quadrant is brightest, and the brighter the pixel in the corner the more class 2."""

    def forward(self, x: Tensor) -> Tensor:
        quadrants = nn.functional.avg_pool2d(x, 4)[:, 0].flatten(1)  # (B, 4)
        corner = 10 * x[:, 0, 0, 0]
        return 10 * quadrants + corner[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])


def shortcut() -> Classifier:
    return Classifier(Shortcut(), input_shape=(1, 8, 8), class_names=NAMES).eval()


def test_success_counts_images_that_could_be_moved() -> None:
    corner = torch.zeros(8, 8)
    corner[0, 0] = 1.0
    white = RecoveredTrigger(2, torch.ones(1, 8, 8), corner)
    assert success(shortcut(), white, HELD_OUT, RUN) == Rate(30, 30), "the ten of class 2 do not count"
    assert success(shortcut(), white, HELD_OUT.subset([2, 6]), RUN) == Rate(0, 0)


def test_the_shortcut_is_found_and_other_classes_need_more() -> None:
    (other, _), (planted, fitted) = invert(shortcut(), DATA, [0, 2], CFG, RUN)
    assert fitted.value > 0.95
    assert planted.mask is not None
    assert success(shortcut(), planted, HELD_OUT, RUN).value > 0.9
    corner = planted.mask.flatten().argmax()
    assert int(corner) == 0 and float(planted.pattern[0, 0, 0]) > 0.9
    assert planted.norms()["mask_l1"] < 0.5 * other.norms()["mask_l1"]


def test_a_class_gets_the_same_trigger_alone_and_among_others() -> None:
    model, cfg = tiny_classifier("conv-bn"), InversionConfig(steps=25, batch_size=16)
    weights = model.sha256()
    alone, among = invert(model, DATA, [1], cfg, RUN)[0][0], invert(model, DATA, [3, 1], cfg, RUN)[1][0]
    again = invert(model, DATA, [1], cfg, RUN)[0][0]
    assert alone.mask is not None and among.mask is not None and again.mask is not None
    assert torch.allclose(alone.mask, among.mask, atol=1e-3)
    assert torch.allclose(alone.pattern, among.pattern, atol=1e-3)
    assert torch.equal(alone.mask, again.mask) and torch.equal(alone.pattern, again.pattern)
    assert model.sha256() == weights and all(p.requires_grad and p.grad is None for p in model.parameters())
    for tensor in (alone.mask, alone.pattern):
        assert float(tensor.min()) >= 0 and float(tensor.max()) <= 1


@pytest.mark.parametrize("classes", [[], [4], [-1], [1, 1]])
def test_classes_that_are_none_are_refused(classes: list[int]) -> None:
    with pytest.raises(InputError, match="classes to invert"):
        invert(shortcut(), DATA, classes, CFG, RUN)


def test_what_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(InputError, match="no image is of another class"):
        invert(shortcut(), DATA.subset(range(2, 48, 4)), [2], CFG, RUN)
    with rng.seeded(0):
        constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        constant[1].weight.zero_()  # type: ignore[operator,union-attr]
        constant[1].bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # type: ignore[operator,union-attr]
    model = Classifier(constant, input_shape=(1, 8, 8), class_names=NAMES).eval()
    with pytest.raises(MethodFailed, match="sends all images to the class"):
        invert(model, DATA, [2], CFG, RUN)
    with torch.no_grad():
        constant[1].bias.fill_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(MethodFailed, match="not finite"):
        invert(model, DATA, [1], CFG, RUN)
