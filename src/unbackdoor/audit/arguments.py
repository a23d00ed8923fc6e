"""What the verbs take: told at the door, and not by an attribute that is missing somewhere inside."""

from __future__ import annotations

from unbackdoor.errors import InputError
from unbackdoor.types import Classifier, CleanData, Images


def require_classifier(model: object) -> None:
    """Raise InputError unless it is a classifier."""
    if not isinstance(model, Classifier):
        opened = isinstance(getattr(model, "model", None), Classifier)
        raise InputError(
            "the model is of another type",
            expected="a Classifier",
            got=type(model).__name__,
            remedy="Give its attribute model" if opened else "Open the file with unbackdoor.open_model",
        )


def require_images(images: object) -> None:
    """Raise InputError unless it is a set of images."""
    if not isinstance(images, Images):
        raise InputError(
            "the clean images are of another type",
            expected="Images, all of them",
            got=type(images).__name__,
            remedy="Load them with unbackdoor.load_images; they are split inside",
        )


def clean_data(data: object, seed: int) -> CleanData | None:
    """Return clean images split for a scan; images that are not split yet are.

    Raises:
        InputError: If it is of another type.
    """
    if data is None or isinstance(data, CleanData):
        return data
    require_images(data)
    assert isinstance(data, Images)
    return CleanData.split(data, seed=seed)
