"""Which normalisation and which variant is meant: decided by clean accuracy, and told how surely."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import confinement
from unbackdoor.audit.budget import budgeted
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.opening.normalisation_guess import (
    ROUNDS,
    Normalisation,
    infer_normalisation,
    lowest_plausible,
    usual_normalisations,
)
from unbackdoor.types import Images

CENTRES = (40, 80, 120, 160)


class Brightness(nn.Module):
    """Classifies by mean brightness, with centres in the units of one convention."""

    def __init__(self, convention: Normalisation, channels: int = 1, weights: tuple[float, ...] = ()) -> None:
        super().__init__()
        levels = torch.tensor(CENTRES).div(255).view(-1, 1, 1, 1).expand(-1, channels, 1, 1)
        self.weights = torch.tensor(weights or (1.0 / channels,) * channels)
        self.register_buffer("centres", (convention(levels).flatten(1) * self.weights).sum(1))
        self.mode_seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.mode_seen.append(self.training)
        level = (x.mean((2, 3)) * self.weights).sum(1)  # (B,)
        centres = self.get_buffer("centres")
        return -(level[:, None] - centres).abs() * 20  # (B, 4)


def images(count: int = 80, channels: int = 1, *, labels: bool = True, seed: int = 0) -> Images:
    draws = torch.Generator().manual_seed(seed)
    truth = torch.arange(count) % 4
    noise = torch.randint(-8, 9, (count, channels, 8, 8), generator=draws)
    pixels = (torch.tensor(CENTRES)[truth].view(-1, 1, 1, 1) + noise).to(torch.uint8)
    return Images(pixels, truth if labels else None, ("a", "b", "c", "d"))


def run() -> Run:
    return Run.create(policy="fp32")


class Slow(Brightness):
    """Takes a second for every image."""

    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__(usual_normalisations(1)[0])
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.seconds += len(x)
        return super().forward(x)


def test_a_budget_leaves_time_for_what_comes_after_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 224 pixels and 1,000 classes spent seven minutes here, and nothing was left to scan."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(confinement, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    trials = len(usual_normalisations(1))
    for budget, most in ((400, 100), (4000, 1000)):
        clock.seconds = 0.0
        with budgeted(budget):
            found = infer_normalisation({"net": Slow(clock)}, images(), run())
        assert clock.seconds <= most and found.best.accuracy == 1
        assert any("for lack of time" in note for note in found.notes) == (budget == 400)
    # Fewer images where time is short, and then fewer trials.
    for budget, first in ((160, 7), (100, 4), (52, 2), (40, 2)):
        clock.seconds = 0.0
        with budgeted(budget):
            found = infer_normalisation({"net": Slow(clock)}, images(), run())
        assert clock.seconds <= 2 + first * trials and found.best.total == first
        assert any("for lack of time" in note for note in found.notes)
    clock.seconds = 0.0
    with budgeted(1):  # one is always tried
        assert infer_normalisation({"net": Slow(clock)}, images(), run()).best.total == 2
    assert clock.seconds == 4


@pytest.mark.parametrize("convention", usual_normalisations(1), ids=lambda c: c.name)
def test_every_usual_convention_is_found(convention: Normalisation) -> None:
    found = infer_normalisation({"net": Brightness(convention)}, images(), run())
    assert found.best.normalisation == convention
    assert found.best.accuracy == 1
    assert found.by_labels
    assert found.warning == ""
    assert len(found.trials) == len(usual_normalisations(1))


def test_the_usual_conventions_of_colour_images() -> None:
    names = [convention.name for convention in usual_normalisations(3)]
    assert len(set(names)) == len(names) == 10
    for convention in usual_normalisations(3):
        found = infer_normalisation({"net": Brightness(convention, 3)}, images(40, 3), run())
        best = [t for t in found.trials if t.hits == found.best.hits]
        assert convention in [trial.normalisation for trial in best]


def test_the_variant_is_found_too() -> None:
    true = Normalisation("true", (0.3,), (0.2,))
    nets = {"wrong": Brightness(Normalisation("x", (0.9,), (0.9,))), "right": Brightness(true)}
    found = infer_normalisation(nets, images(), run(), normalisations=[*usual_normalisations(1), true])
    assert (found.best.variant, found.best.normalisation) == ("right", true)


def test_ties_go_to_the_preferred_and_are_told() -> None:
    true = Normalisation("true", (0.3,), (0.2,))
    near = Normalisation("near", (0.301,), (0.2,))
    for preferred in (true, near):
        found = infer_normalisation(
            {"net": Brightness(true)}, images(), run(), normalisations=[true, near], prefer=preferred
        )
        assert found.best.normalisation == preferred
        assert [trial.normalisation for trial in found.alternatives] == [near if preferred is true else true]
    found = infer_normalisation({"net": Brightness(true)}, images(), run(), normalisations=[near, true])
    assert found.best.normalisation == true  # the lower loss


def test_equal_losses_go_to_the_statistics_of_the_images() -> None:
    """A network that sees no scale cannot tell conventions apart; the images' own statistics can."""

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(4)[torch.arange(len(x)) % 4]

    truth = torch.tensor([0, 1] * 20)
    pixels = torch.full((40, 1, 8, 8), 33)
    pixels[:, :, :4] = 130  # mean .32, deviation .19: nearer to Fashion-MNIST's than to MNIST's
    held = Images(pixels.to(torch.uint8), truth, ("a", "b", "c", "d"))
    statistics = [c for c in usual_normalisations(1) if "MNIST" in c.name]
    found = infer_normalisation({"net": Blind()}, held, run(), normalisations=statistics)
    assert [c.name for c in statistics] == ["MNIST", "Fashion-MNIST"]
    assert found.best.normalisation == statistics[1]
    assert [trial.normalisation for trial in found.alternatives] == statistics[:1]


def test_too_low_an_accuracy_is_warned_of_with_its_numbers() -> None:
    labels = torch.arange(80) % 4
    wrong = Images(images().pixels, labels.roll(1), ("a", "b", "c", "d"))
    found = infer_normalisation({"net": Brightness(Normalisation("none"))}, wrong, run())
    assert "Clean accuracy is only" in found.warning
    assert "75% or more was to be expected" in found.warning
    # Every image would be right if b were called a, c were called b, and so on.
    assert any("another order" in note for note in found.notes)


@pytest.mark.parametrize(("classes", "limit"), [(2, 0.9), (3, 0.9), (4, 0.75), (5, 0.6), (1000, 0.6)])
def test_the_rule_of_the_warning(classes: int, limit: float) -> None:
    assert lowest_plausible(classes) == pytest.approx(limit)


def test_blue_before_red_is_noticed() -> None:
    first = Brightness(Normalisation("none"), 3, weights=(1.0, 0.0, 0.0))
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (80, 3, 8, 8), generator=draws).to(torch.uint8)
    truth = torch.arange(80) % 4
    pixels[:, 2] = torch.tensor(CENTRES)[truth].view(-1, 1, 1).to(torch.uint8)
    held = Images(pixels, truth, ("a", "b", "c", "d"))
    found = infer_normalisation({"net": first}, held, run(), channels_known=True)
    assert any("BGR" in note for note in found.notes)
    assert found.warning
    taken = infer_normalisation({"net": first}, held, run())
    assert taken.best.normalisation.bgr and taken.best.accuracy > 0.9 and not taken.warning
    assert any("takes BGR images, and gets them so" in note for note in taken.notes)
    given = infer_normalisation({"net": first}, held, run(), normalisations=[Normalisation("as given")])
    assert given.best.normalisation.bgr and not given.warning


def test_without_labels_there_is_only_a_weak_sign() -> None:
    true = usual_normalisations(1)[1]
    found = infer_normalisation({"net": Brightness(true)}, images(labels=False), run())
    assert not found.by_labels
    assert "no labels" in found.warning
    assert found.best.normalisation == true
    assert found.interval == (0, 1)
    assert math.isnan(found.best.accuracy)
    assert found.facts()["judged_by"].endswith("(weak)")
    one = infer_normalisation({"net": Brightness(true)}, images(labels=False), run(), normalisations=[true])
    assert one.warning == ""  # nothing was guessed


def test_a_network_that_always_says_the_same_is_not_right_about_one_class() -> None:
    """[0, 255] drives many networks into one answer, which is right for images of that class alone."""
    true = usual_normalisations(1)[0]
    held = images()
    one = held.subset((held.truth == 3).nonzero().flatten())
    found = infer_normalisation({"net": Brightness(true)}, one, run())
    assert not found.by_labels
    assert "one class" in found.warning


def test_few_images_are_told() -> None:
    found = infer_normalisation({"net": Brightness(usual_normalisations(1)[0])}, images(8), run())
    assert any("only 8 images" in note for note in found.notes)
    assert found.best.total == 8


def test_rounds_take_the_classes_in_turns_and_end_at_the_last_image() -> None:
    held = images(600)
    ordered = held.subset(held.truth.argsort(stable=True))  # as a folder of class folders gives them
    found = infer_normalisation({"net": Brightness(usual_normalisations(1)[2])}, ordered, run())
    assert found.best.total == ROUNDS[-1][0]
    assert found.best.accuracy == 1
    assert found.trials[-1].total >= ROUNDS[0][0]


def test_hundreds_of_trials_are_glanced_at_first() -> None:
    right = usual_normalisations(1)[2]
    variants = {f"wrong {k}": Brightness(usual_normalisations(1)[0]) for k in range(40)} | {
        "right": Brightness(right)
    }
    found = infer_normalisation(
        variants, images(200), run(), normalisations=[right, *usual_normalisations(1)[3:]]
    )
    assert (found.best.variant, found.best.accuracy) == ("right", 1)
    assert found.trials[-1].total < ROUNDS[0][0]


def test_the_networks_are_left_as_they_were_and_the_draw_is_seeded() -> None:
    net = Brightness(usual_normalisations(1)[0]).train()
    first = infer_normalisation({"net": net}, images(120), run())
    again = infer_normalisation({"net": net}, images(120), run())
    assert first.facts() == again.facts()
    assert net.training
    assert not any(net.mode_seen)


def test_overflow_is_a_bad_trial_and_no_error() -> None:
    class Explodes(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.where(x.abs().amax() > 10, math.inf, 1.0)

    found = infer_normalisation({"net": Explodes(usual_normalisations(1)[0])}, images(), run())
    assert found.best.normalisation == usual_normalisations(1)[0]


@pytest.mark.leaves_traces
def test_nothing_to_judge_by() -> None:
    with pytest.raises(InputError, match="nothing to judge"):
        infer_normalisation({}, images(), run())
    with pytest.raises(InputError, match="labels do not fit"):
        infer_normalisation({"net": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, images(), run())


class Scripted(nn.Module):
    """Answers by a script for each convention, which it knows by the scale of a white corner."""

    def __init__(self, scripts: dict[float, Tensor]) -> None:
        super().__init__()
        self.scripts = scripts  # by scale: logits (N, K)

    def forward(self, x: Tensor) -> Tensor:
        scale = x[:, 0, 0, 0]
        number = (x[:, 0, 1, 1] / scale * 255).round().long()
        return self.scripts[round(float(scale[0]), 3)][number]


def script(right: int, certainty: float) -> Tensor:
    """Return logits (80, 4) that are right on the first images, as certainly as that, and hardly wrong."""
    truth = torch.arange(80) % 4
    out = torch.zeros(80, 4)
    out[torch.arange(80), truth] = certainty
    out[torch.arange(right, 80), truth[right:]] = 0.0
    out[torch.arange(right, 80), (truth[right:] + 1) % 4] = 0.01
    return out


@pytest.mark.parametrize(
    ("hits", "preferred", "taken"),
    [
        # Right on 78 against 75: three images are no evidence, so that the loss decides.
        ((78, 75), None, "sure"),
        # Five against none are (p = 1/32): the most accurate is taken, whatever its loss.
        ((79, 74), None, "most accurate"),
        # What the architecture's library states wins over all that cannot be told from the best ...
        ((78, 75), "most accurate", "most accurate"),
        ((75, 78), "most accurate", "most accurate"),
        # ... and over nothing that is clearly better.
        ((74, 79), "most accurate", "sure"),
    ],
)
def test_the_most_accurate_is_taken_only_over_what_it_clearly_beats(
    hits: tuple[int, int], preferred: str | None, taken: str
) -> None:
    conventions = {
        "most accurate": Normalisation("most accurate", (0.0,), (1.0,)),
        "sure": Normalisation("sure", (0.0,), (0.5,)),
    }
    network = Scripted({1.0: script(hits[0], 0.1), 2.0: script(hits[1], 5.0)})
    pixels = torch.arange(80, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    pixels[:, :, 0, 0] = 255
    held = Images(pixels, torch.arange(80) % 4, ("a", "b", "c", "d"))
    found = infer_normalisation(
        {"net": network},
        held,
        run(),
        normalisations=list(conventions.values()),
        prefer=None if preferred is None else conventions[preferred],
    )
    assert found.best.normalisation.name == taken
    told_apart = abs(hits[0] - hits[1]) > 4
    assert bool(found.alternatives) is not told_apart
