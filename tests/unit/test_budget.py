"""A budget holds for opening too, and ends a step that shows no progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tiny import tiny_classifier, tiny_data
from unbackdoor import confinement, scan, verify
from unbackdoor.audit.budget import budgeted, opening, watched
from unbackdoor.errors import InputError, MethodFailed, UnbackdoorError
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.opening.open_model import open_model
from unbackdoor.registry import SCANNERS, Config, scanner
from unbackdoor.types import Classifier, CleanData, ScanReport


class Clock:
    """Stands still until it is told to run, and then goes on by a second at every look."""

    def __init__(self) -> None:
        self.seconds, self.step = 0.0, 0.0

    def monotonic(self) -> float:
        self.seconds += self.step
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(confinement, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


@pytest.fixture(autouse=True)
def _only_ours() -> Iterator[None]:
    list(SCANNERS)
    before = dict(SCANNERS._parts)
    SCANNERS._parts.clear()
    yield
    SCANNERS._parts.clear()
    SCANNERS._parts.update(before)


@pytest.mark.parametrize("swallowed", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_long_step_without_progress_is_ended(clock: Clock, direction: str, swallowed: bool) -> None:
    done: list[str] = []

    @scanner("long", config=Config, question="How long?", cost=1)
    def long(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        try:
            if direction == "forward":
                clock.step = 1
                for _ in range(1000):
                    model(data.fit.pixels[:2].float() / 255)
            else:
                x = data.fit.pixels[:2].float().requires_grad_()
                for _ in range(1000):
                    x = x * x
                clock.step = 1
                x.sum().backward()
            done.append("came to its end")
        except UnbackdoorError as error:
            if not swallowed:
                raise MethodFailed("it did not work") from error
        return ScanReport("no evidence found")

    audit = scan(tiny_classifier("conv-bn"), tiny_data(40, seed=3), budget=50)
    assert [c.status for c in audit.checks] == ["out of budget"] and not done


@pytest.mark.leaves_traces
def test_watching_changes_no_number_and_leaves_nothing(clock: Clock) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 3))
    pixels = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)

    def gradient() -> torch.Tensor:
        x = pixels.clone().requires_grad_()
        network(x).logsumexp(1).sum().backward()
        assert x.grad is not None
        return x.grad

    plain = gradient()
    with watched(10.0):
        assert torch.equal(gradient(), plain)
    clock.seconds = 11
    assert torch.equal(gradient(), plain)


def test_opening_is_within_the_budget(clock: Clock, tmp_path: Path) -> None:
    save_model(tiny_classifier("conv-bn"), tmp_path / "m.safetensors", history=[])
    clock.step = 10
    with pytest.raises(InputError, match="budget was spent before the model"):
        scan(tmp_path / "m.safetensors", tiny_data(40, seed=3), budget=3)
    with pytest.raises(InputError, match="budget was spent before the model"):
        verify(tmp_path / "m.safetensors", tmp_path / "m.safetensors", tiny_data(40, seed=3), budget=3)


def test_what_opening_took_is_not_left_for_the_checks(clock: Clock) -> None:
    begun: list[float] = []

    @scanner("any", config=Config, question="Any?", cost=1)
    def any_check(model: Classifier, data: CleanData, cfg: Any, *, run: Any) -> ScanReport:
        begun.append(clock.seconds)
        return ScanReport("no evidence found")

    with budgeted(10):
        clock.seconds = 20  # as if opening had taken them
        audit = scan(tiny_classifier("conv-bn"), tiny_data(40, seed=3), budget=10)
    assert [c.status for c in audit.checks] == ["out of budget"] and not begun


def test_a_budget_within_another_ends_with_the_earlier(clock: Clock) -> None:
    with budgeted(10), budgeted(100):
        assert confinement.deadline.get() == 10
    with budgeted(10), budgeted(None):
        assert confinement.deadline.get() == 10
    assert confinement.deadline.get() is None
    with opening():
        clock.seconds = 1e9  # without a budget no time is too long


@pytest.mark.confined
def test_reading_a_file_is_within_the_budget(clock: Clock, tmp_path: Path) -> None:
    save_model(tiny_classifier("conv-bn"), tmp_path / "m.safetensors", history=[])
    with budgeted(10):
        clock.seconds = 100
        with pytest.raises(InputError, match="budget was spent before the file was read"):
            open_model(tmp_path / "m.safetensors")
