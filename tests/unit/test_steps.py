"""The steps of a cell use the data and the weights that the cell was planned with, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from small_suite import fake_data
from tiny import tiny_classifier
from unbackdoor.bench import steps
from unbackdoor.errors import IntegrityError
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier

DATA = fake_data()["digits"]
SPEC = {
    "dataset": "digits",
    "data_sha256": [DATA.train.fingerprint(), DATA.test.fingerprint()],
    **steps.facts_of(DATA),
}


@pytest.mark.parametrize(
    ("changes", "parts", "word"),
    [
        ({}, ("train", "test"), None),
        ({"data_sha256": ["0", SPEC["data_sha256"][1]]}, ("test",), None),  # nobody uses that part
        ({"data_sha256": ["0", SPEC["data_sha256"][1]]}, ("train",), "train"),
        ({"data_sha256": [SPEC["data_sha256"][0], "0"]}, ("train", "test"), "test"),
        ({"augmentation": "crop"}, (), "augmentation"),
        ({"normalisation": [[0.5], [0.5]]}, (), "normalisation"),
    ],
    ids=str,
)
def test_data_that_the_cell_was_not_planned_with_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], parts: Any, word: str | None
) -> None:
    monkeypatch.setattr(steps, "load_dataset", lambda name, root, cache: DATA)
    task = {"spec": {**SPEC, **changes}, "place": {}}
    if word is None:
        assert steps.data_of(task, *parts) is DATA
    else:
        with pytest.raises(IntegrityError, match=f"judging by: {word}"):
            steps.data_of(task, *parts)


def test_weights_that_come_out_otherwise_than_they_went_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_model(tiny_classifier("conv-bn"), file)
    assert steps.model_of(file).sha256() == tiny_classifier("conv-bn").sha256()

    def mixes_up(path: Path) -> Classifier:
        model = load_model(path)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(steps, "load_model", mixes_up)
    with pytest.raises(IntegrityError, match="not the one that was saved"):
        steps.model_of(file)
    (tmp_path / "model.json").unlink()
    monkeypatch.setattr(steps, "load_model", lambda path: tiny_classifier("conv-bn"))
    with pytest.raises(IntegrityError, match="a card"):
        steps.model_of(file)
