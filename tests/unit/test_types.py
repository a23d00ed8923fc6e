"""Images, clean data and classifiers refuse what cannot be right, and hash what matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_classifier, tiny_data
from unbackdoor.errors import InputError, UnbackdoorError
from unbackdoor.types import Classifier, CleanData, Images, state_sha256

NAMES = ("a", "b", "c")


def test_images_are_checked() -> None:
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="uint8 pixels of shape"):
        Images(pixels.float(), None, NAMES)
    with pytest.raises(InputError, match=r"int64 of shape \(2,\)"):
        Images(pixels, torch.zeros(3, dtype=torch.int64), NAMES)
    with pytest.raises(InputError, match=r"expected 0..2, got 7") as caught:
        Images(pixels, torch.tensor([0, 7]), NAMES, "mine")
    assert "row 1" in str(caught.value.where)
    with pytest.raises(InputError, match="labels are needed"):
        Images(pixels, None, NAMES).truth  # noqa: B018


@given(st.integers(0, 10), st.integers(1, 9), st.floats(0.05, 0.95))
def test_a_split_is_disjoint_complete_and_stratified(seed: int, each: int, share: float) -> None:
    images = tiny_data(4 * each, seed=seed)
    data = CleanData.split(images, select_fraction=share, seed=seed)
    if data.select_is_fit:
        assert data.fit is data.select is images
        assert len(data) == len(images)
        return
    assert len(data) == len(data.fit) + len(data.select) == len(images)
    counts = torch.bincount(data.fit.truth, minlength=4)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    rows = {bytes(p.flatten().tolist()) for p in images.pixels}
    assert {bytes(p.flatten().tolist()) for p in data.all.pixels} == rows


def test_one_image_per_class_is_kept_for_fitting_and_said() -> None:
    data = CleanData.split(tiny_data(4))
    assert data.select_is_fit
    assert len(data.all) == 4


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no clean image"):
        CleanData.split(tiny_data(4).subset([]))


def test_unlabelled_images_can_be_split() -> None:
    data = CleanData.split(replace(tiny_data(20), labels=None))
    assert len(data.fit) == 14
    assert data.all.labels is None


def test_the_normaliser_is_inside() -> None:
    class Last(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    model = Classifier(Last(), input_shape=(2, 4, 4), class_names="ab", mean=(0.5, 0.25), std=(0.5, 0.25))
    out = model(torch.ones(1, 2, 4, 4))
    assert out.tolist() == [[1.0, 3.0]]
    assert list(model.state_dict()) == []
    with pytest.raises(InputError, match="normalisation"):
        Classifier(Last(), input_shape=(2, 4, 4), class_names="ab", mean=(0.5,), std=(0.5,))
    with pytest.raises(InputError, match="normalisation"):
        Classifier(Last(), input_shape=(2, 4, 4), class_names="ab", mean=(0.5, 0.5), std=(0.5, 0.0))


def test_the_hash_sees_values_and_not_layout() -> None:
    model = tiny_classifier("conv-bn")
    twin = model.copy()
    twin.to(memory_format=torch.channels_last)
    assert twin.sha256() == model.sha256()
    with torch.no_grad():
        next(twin.parameters()).view(-1)[0] += 1e-6
    assert twin.sha256() != model.sha256()
    one = {"a": torch.zeros(2), "b": torch.ones((), dtype=torch.int64)}
    assert state_sha256(one) == state_sha256(dict(reversed(one.items())))
    assert state_sha256(one) != state_sha256({**one, "a": torch.zeros(1, 2)})
    assert state_sha256({"a": torch.ones(2, dtype=torch.bfloat16)})


def test_errors_carry_their_facts_across_processes() -> None:
    import pickle

    error = InputError("it is wrong", expected=3, got=4, where="row 5", remedy="Mend it")
    assert str(error) == "it is wrong (row 5): expected 3, got 4. Mend it."
    twin = pickle.loads(pickle.dumps(error))
    assert isinstance(twin, InputError)
    assert isinstance(twin, UnbackdoorError)
    assert (str(twin), twin.expected, twin.remedy) == (str(error), 3, "Mend it")
