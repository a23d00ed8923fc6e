"""Fixtures that every test may use, and the policing of what a test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from differential import difference, safetensors_reads, torch_reads
from tiny import tiny_classifier, tiny_data
from unbackdoor.engine.trusted_caller import Surroundings
from unbackdoor.types import Classifier, CleanData
from unbackdoor.weights import read

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
    reading = read._FileReader.read

    def compared(self: read._FileReader, magic: read.Magic) -> dict[str, torch.Tensor]:
        state = reading(self, magic)
        loader = LOADERS.get(self.format)
        found = loader and difference(bytes(self._file.content), state, loader)
        differences.extend([f"{self._path}: {found}"] if found else [])
        return state

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
