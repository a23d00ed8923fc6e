"""Fixtures that every test may use, and the policing of what a test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import rich.live  # now: the import draws from the global generator, and the command line imports it late
import rich.progress
import rich.table  # noqa: F401
import torch

from differential import difference, safetensors_reads, torch_reads
from tiny import tiny_classifier, tiny_data
from unbackdoor.engine.trusted_caller import Surroundings
from unbackdoor.types import Classifier, CleanData
from unbackdoor.weights import read, weight_sets

LOADERS = {"checkpoint": torch_reads, "old checkpoint": torch_reads, "safetensors": safetensors_reads}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two workers with one thread each beat one worker with two, and sums stay in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that moves a global generator or flag, unless it is marked as meaning to."""
    before = Surroundings.take()
    yield
    if request.node.get_closest_marker("leaves_traces"):
        before.restore()
    assert before.changed() == []


@pytest.fixture(autouse=True)
def same_weights_as_other_loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which a file was read of which torch, or safetensors, would load other weights."""
    differences: list[str] = []
    states: list[Mapping[str, torch.Tensor]] = []
    reading, making_sets = read._FileReader.read, weight_sets.sets_of

    def noted(
        state: Mapping[str, torch.Tensor], *key: str, **facts: object
    ) -> dict[str, weight_sets.WeightSet]:
        states.append(state)  # before names and masks are changed
        return making_sets(state, *key, **facts)

    def compared(self: read._FileReader, magic: read.Magic) -> Mapping[str, torch.Tensor]:
        states.clear()
        own = reading(self, magic)
        if loader := LOADERS.get(self.format):
            for state in states or [own]:
                found = difference(bytes(self._file.content), state, loader)
                differences.extend([f"{self._path}: {found}"] if found else [])
        return own

    monkeypatch.setattr(weight_sets, "sets_of", noted)
    monkeypatch.setattr(read._FileReader, "read", compared)
    yield
    assert differences == []


@pytest.fixture(scope="session", params=["conv-bn", "conv", "transformer"])
def trained(request: pytest.FixtureRequest) -> tuple[Classifier, CleanData]:
    """A tiny classifier that knows its four classes, one for each family, and clean images."""
    return tiny_classifier(request.param), CleanData.split(tiny_data(80, seed=1))


@pytest.fixture(scope="session")
def tiny() -> tuple[Classifier, CleanData]:
    """The convolutional one with batch normalisation, where the family does not matter."""
    return tiny_classifier("conv-bn"), CleanData.split(tiny_data(80, seed=1))


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read files in the process of the test, where its doubles are; ``confined`` tests read them apart."""
    if not request.node.get_closest_marker("confined"):
        monkeypatch.setattr("unbackdoor.confinement.enabled", lambda: False)
