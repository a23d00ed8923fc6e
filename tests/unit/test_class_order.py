"""Classes in another order, and colours in another order, are found out and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbackdoor
from unbackdoor.engine.run import Run
from unbackdoor.networks import build
from unbackdoor.opening.normalisation_guess import _CAFFE, Normalisation, infer_normalisation
from unbackdoor.types import Images
from unbackdoor.weights.card import read_card

RUN = Run.create(policy="fp32")
PLAIN = [Normalisation("none, pixels in [0, 1]")]


class Brightest(nn.Module):
    """Answers with the place of the brightest of K columns; right in most cases."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))  # column that each output stands for

    def forward(self, x: Tensor) -> Tensor:
        return 20 * x.mean((1, 2))[:, self.get_buffer("order")]  # (B, K)


def columns(names: list[str], per_class: int = 8, wrong: float = 0.16) -> Images:
    """Return images of one bright column, which is the label of all but a share of them."""
    classes = len(names)
    truth = torch.arange(classes * per_class) % classes
    draws = torch.Generator().manual_seed(0)
    column = truth.clone()
    odd = torch.rand(len(truth), generator=draws) < wrong
    column[odd] = torch.randint(classes, (int(odd.sum()),), generator=draws)
    pixels = torch.randint(0, 60, (len(truth), 1, 4, classes), generator=draws)
    pixels[torch.arange(len(truth)), 0, :, column] = 200
    return Images(pixels.to(torch.uint8), truth, tuple(names))


def found_order(names: list[str], outputs: list[str]) -> tuple[Any, tuple[str, ...]]:
    """Return what is said of a network whose outputs mean other names than was thought."""
    network = Brightest([names.index(name) for name in outputs])
    found = infer_normalisation({"net": network}, columns(names), RUN, normalisations=PLAIN)
    return found, found.class_order


NUMBERS = [str(k) for k in range(12)]
WORDS = ["zebra", "Ant", "cat", "bee", "Dog", "eel", "fox", "gnu"]
FOLDERS = [f"class{k}" for k in range(12)]


@pytest.mark.parametrize(
    ("names", "outputs", "words"),
    [
        (NUMBERS, sorted(NUMBERS), "texts are sorted"),
        (sorted(NUMBERS), NUMBERS, "numbers are sorted"),
        (FOLDERS, sorted(FOLDERS), "texts are sorted"),
        (sorted(FOLDERS), FOLDERS, "numbers are sorted"),
        (WORDS, sorted(WORDS), "texts are sorted"),
        (WORDS, sorted(WORDS, key=str.casefold), "whatever their case"),
        (WORDS, WORDS[::-1], "other way round"),
        (NUMBERS, [NUMBERS[(k + 5) % 12] for k in range(12)], "each class is answered with"),
        (WORDS, [WORDS[k] for k in (3, 1, 4, 0, 5, 7, 2, 6)], "each class is answered with"),
    ],
)
def test_the_order_of_the_outputs_is_found(names: list[str], outputs: list[str], words: str) -> None:
    found, order = found_order(names, outputs)
    assert found.warning and found.best.accuracy < 0.5
    assert list(order) == outputs
    (note,) = (note for note in found.notes if "another order" in note)
    assert words in note and note.endswith(f"pass --class-names {','.join(outputs)}")
    assert note.startswith(("84", "85", "86", "87", "88"))
    assert found.facts()["class_order"] == outputs


def test_two_exchanged_classes_are_found_where_the_accuracy_is_not_low() -> None:
    order = [0, 2, 1, *range(3, 12)]
    held = columns(NUMBERS, per_class=30)
    found = infer_normalisation({"net": Brightest(order)}, held, RUN, normalisations=PLAIN)
    assert not found.warning and found.best.accuracy > 0.6
    assert list(found.class_order) == [NUMBERS[k] for k in order]
    assert any("another order" in note for note in found.notes)


def test_labels_that_were_sorted_as_texts_are_found_too() -> None:
    # The images say 0, 1, 2, ... and mean the first, second and third folder of a sorted listing.
    texts = sorted(NUMBERS)
    outputs = [NUMBERS[texts.index(name)] for name in NUMBERS]
    _, order = found_order(NUMBERS, outputs)
    assert list(order) == outputs


@pytest.mark.parametrize("kind", ["right", "blind", "one class", "few images"])
def test_where_no_order_helps_none_is_named(kind: str) -> None:
    names, per_class = NUMBERS, 3 if kind == "few images" else 8
    held = columns(names, per_class, wrong=0.16 if kind in ("right", "few images") else 1.0)
    order = [(k * 5) % 12 for k in range(12)] if kind == "few images" else list(range(12))
    network: nn.Module = Brightest(order)
    if kind == "one class":
        network = nn.Sequential(nn.Flatten(), nn.utils.skip_init(nn.Linear, 48, 12))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
    found = infer_normalisation({"net": network}, held, RUN, normalisations=PLAIN)
    assert found.class_order == () and found.facts()["class_order"] is None


def test_the_order_that_is_named_opens_the_model(tmp_path: Path) -> None:
    from unbackdoor.engine.training import Recipe, train

    names = [str(k) for k in range(11)]
    draws = torch.Generator().manual_seed(0)
    truth = torch.arange(220) % 11
    pixels = torch.randint(0, 40, (220, 1, 8, 11), generator=draws)
    pixels[torch.arange(220), 0, :, truth] = 220
    texts = tuple(sorted(names))
    trained_on = Images(pixels.to(torch.uint8), torch.tensor([texts.index(names[k]) for k in truth]), texts)
    model = build("small_cnn[width=16]", input_shape=(1, 8, 11), class_names=texts, seed=0)
    train(model, trained_on, Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=0.01), RUN)
    torch.save(model.network.state_dict(), tmp_path / "model.pth")
    mine = Images(pixels.to(torch.uint8), truth, tuple(names))
    opened = unbackdoor.open_model(tmp_path / "model.pth", arch="small_cnn[width=16]", images=mine)
    (note,) = (text for text in opened.provenance.images if "another order" in text)
    order = note.rsplit(" ", 1)[1].split(",")
    assert order == list(texts)
    again = unbackdoor.open_model(
        tmp_path / "model.pth", arch="small_cnn[width=16]", images=mine, class_names=order
    )
    assert again.provenance.clean_accuracy is not None and again.provenance.clean_accuracy.value > 0.9
    assert not again.warnings


# ---------------------------------------------------------------------------------------------------
# Blue first


class Scaled(nn.Module):
    """Answers with the brighter of red and blue, whose places it has as (red, blue), and wants its scale."""

    def __init__(self, scale: Normalisation) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v or d).view(-1, 1, 1) for v, d in
                     ((self.scale.mean, (0.0,) * 3), (self.scale.std, (1.0,) * 3)))  # fmt: skip
        level = (x * std + mean).mean((2, 3))  # (B, 3), in [0, 1] where the scale is the right one
        blue, green, red = level.unbind(1)
        off = 50 * (level.amax(1) - 1).clamp_min(0) + 50 * (-level.amin(1)).clamp_min(0)
        return torch.stack([red, blue + off, green], 1) * 10


def coloured(count: int = 90) -> Images:
    draws = torch.Generator().manual_seed(0)
    truth = torch.arange(count) % 3
    pixels = torch.randint(80, 120, (count, 3, 4, 4), generator=draws)
    place = torch.tensor([0, 2, 1])[truth]  # red, blue, green
    pixels[torch.arange(count), place] += 90
    return Images(pixels.to(torch.uint8), truth, ("red", "blue", "green"))


@pytest.mark.parametrize("scale", [PLAIN[0], Normalisation("0..255", (0.0,) * 3, (1 / 255,) * 3), _CAFFE])
def test_a_network_that_takes_blue_first_gets_it(scale: Normalisation) -> None:
    found = infer_normalisation({"net": Scaled(scale)}, coloured(), RUN)
    assert found.best.normalisation.bgr and found.best.accuracy == 1 and not found.warning
    assert "BGR" in found.best.normalisation.name and found.facts()["best"]["channels"] == "BGR"


def test_a_network_that_takes_red_first_is_left_alone() -> None:
    class Turned(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1))

    found = infer_normalisation({"net": Turned(PLAIN[0])}, coloured(), RUN)
    assert not found.best.normalisation.bgr and found.best.accuracy == 1


def test_blue_first_is_kept_in_the_card(tmp_path: Path) -> None:
    model = build("small_cnn[width=2]", input_shape=(3, 8, 8), class_names=["a", "b"])
    plain = unbackdoor.save_model(model, tmp_path / "plain.safetensors")
    assert not plain.bgr and "bgr" not in (tmp_path / "plain.json").read_text()
    model.bgr = True
    unbackdoor.save_model(model, tmp_path / "model.safetensors")
    assert read_card(tmp_path / "model.json").bgr
    opened = unbackdoor.open_model(tmp_path / "model.safetensors").model
    assert opened.bgr
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened(pixels), model.eval()(pixels))
    model.bgr = False
    assert torch.equal(opened(pixels), model(pixels.flip(1)))
    with pytest.raises(unbackdoor.InputError, match="blue first"):
        unbackdoor.Classifier(model.network, input_shape=(1, 8, 8), class_names=["a"], bgr=True)
