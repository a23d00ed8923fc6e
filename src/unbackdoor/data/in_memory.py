"""Images that the caller has in memory: arrays with their labels, or a PyTorch data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unbackdoor.errors import InputError
from unbackdoor.types import CleanData, Images, Progress, silent

_COLOURS = (1, 3)  # channels of an image
_EXPECTED = (
    "Images, CleanData, a path, the name of a data set, an array of images, a pair (images, labels), "
    "or a torch.utils.data.Dataset"
)
_IMAGE_KEYS = ("image", "img", "pixel_values", "images")
_LABEL_KEYS = ("label", "labels", "fine_label")

InMemory = np.ndarray[Any, Any] | Tensor | tuple[Any, Any] | Dataset[Any] | DataLoader[Any]


def is_in_memory(data: object) -> bool:
    """Tell whether something is images in memory that :func:`images_in_memory` takes."""
    if isinstance(data, np.ndarray | Tensor | Dataset | DataLoader):
        return True
    if isinstance(data, tuple):
        return len(data) == 2
    # Duck-typed data sets, such as those of the library datasets.
    return not isinstance(data, str | bytes | dict | list | Images | CleanData) and all(
        hasattr(data, name) for name in ("__len__", "__getitem__")
    )


def images_in_memory(data: Any, *, what: str = "the clean images", progress: Progress = silent) -> Images:
    """Return images from memory as a set.

    Args:
        data: Pixels as an array or tensor, a pair of pixels and labels, or a data set of such pairs or of
            dictionaries with ``image`` and ``label``. Pixels are uint8, or numbers in [0, 1] that are rounded
            to 8 bits, of shape (N, C, H, W), (N, H, W, C) or (N, H, W), C being 1 or 3. Labels are whole
            numbers from 0, or names of classes.
        what: What they are called in messages.
        progress: Shows how far the reading of a data set has come.

    Raises:
        InputError: If they have another form, or are normalised.
    """
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, np.ndarray | Tensor):
        return _assembled(data, None, None, what)
    if isinstance(data, tuple):
        return _assembled(data[0], data[1], None, what)
    return _of_data_set(data, what, progress)


def _of_data_set(data: Any, what: str, progress: Progress) -> Images:
    try:
        count = len(data)
    except TypeError:
        raise InputError(
            f"{what} have no length", expected="a data set of known size", got=type(data).__name__
        ) from None
    pixels, labels = [], []
    for row in progress(range(count), f"reading {what}"):
        image, label = _item(data[row], row, what)
        pixels.append(_array(image, row, what))
        labels.append(label)
    if not pixels:
        raise InputError(f"{what} are none", expected="at least 1", got=0)
    if len({one.shape for one in pixels}) > 1:
        sizes = sorted({str(one.shape) for one in pixels})
        raise InputError(
            f"{what} differ in size",
            got=", ".join(sizes[:3]),
            remedy="Resize them in the data set's transform",
        )
    some = [label is not None for label in labels]
    if any(some) and not all(some):
        raise InputError("some images have a label and others have none", where=what)
    return _assembled(np.stack(pixels), labels if any(some) else None, _names_of(data), what)


def _item(item: Any, row: int, what: str) -> tuple[Any, Any]:
    if isinstance(item, dict):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        if image is not None:
            return image, next((item[key] for key in _LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    elif isinstance(item, Tensor | np.ndarray):
        return item, None
    elif isinstance(item, tuple | list) and len(item) == 1:
        return item[0], None
    got = sorted(map(str, item))[:5] if isinstance(item, dict) else type(item).__name__
    raise InputError(
        "an item of the data set has another form",
        expected="(image, label), or a dictionary with image and label",
        got=got,
        where=f"{what}, item {row}",
    )


def _array(image: Any, row: int, what: str) -> np.ndarray[Any, Any]:
    if isinstance(image, Tensor):
        array: np.ndarray[Any, Any] = image.detach().cpu().numpy()
    else:
        mode = getattr(image, "mode", None)  # of a picture of Pillow
        array = np.asarray(image.convert("RGB") if mode not in (None, "L", "RGB") else image)
    if array.ndim not in (2, 3):
        raise InputError(
            "an item of the data set is no image",
            expected="(C, H, W), (H, W, C) or (H, W)",
            got=array.shape,
            where=f"{what}, item {row}",
        )
    return array


def _names_of(data: Any) -> tuple[str, ...] | None:
    """Return the names of the classes that a data set states, as torchvision's and datasets' do."""
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if names is None and isinstance(features, dict):
        names = next((getattr(features[key], "names", None) for key in _LABEL_KEYS if key in features), None)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _assembled(pixels: Any, labels: Any, names: Sequence[str] | None, what: str) -> Images:
    tensor = _with_channels_first(_eight_bits(pixels, what), isinstance(pixels, Tensor), what)
    if labels is None:
        return Images(tensor.contiguous(), None, tuple(names or ()), what)
    numbers, own = _numbered(labels, what)
    if len(numbers) != len(tensor):
        raise InputError(
            "images and labels differ in number", expected=len(tensor), got=len(numbers), where=what
        )
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if own is None:
        own = tuple(names) if names is not None and len(names) >= count else tuple(map(str, range(count)))
    return Images(tensor.contiguous(), numbers, own, what)


def _eight_bits(pixels: Any, what: str) -> Tensor:
    try:
        values = torch.as_tensor(pixels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what} are no numbers", expected=_EXPECTED, got=str(error)[:200] or type(pixels).__name__
        ) from None
    if values.dtype == torch.uint8:
        return values
    if values.dtype in (torch.bool,) or values.is_complex():
        raise InputError(
            f"{what} are of another type", expected="uint8, or numbers in [0, 1]", got=values.dtype
        )
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if not values.is_floating_point():
        if low < 0 or high > 255:
            raise InputError(f"{what} are no pixels", expected="0..255", got=f"{low:g}..{high:g}")
        return values.to(torch.uint8)
    if not low >= 0 or not high <= 1:  # a NaN is neither
        raise InputError(
            f"{what} are no pixels",
            expected="uint8, or numbers in [0, 1]",
            got=f"{low:.4g}..{high:.4g}",
            remedy="Undo the normalisation, and give it as mean and std instead",
        )
    return (values.float() * 255).round().to(torch.uint8)


def _with_channels_first(values: Tensor, is_tensor: bool, what: str) -> Tensor:
    """Return (N, C, H, W) of (N, C, H, W), (N, H, W, C) or (N, H, W)."""
    if values.dim() == 3:
        return values[:, None]
    if values.dim() == 4:
        first, last = values.shape[1] in _COLOURS, values.shape[3] in _COLOURS
        if first and (is_tensor or not last):
            return values
        if last:
            return values.permute(0, 3, 1, 2)
        if first:
            return values
    raise InputError(
        f"{what} have another shape",
        expected="(N, C, H, W), (N, H, W, C) or (N, H, W), with 1 or 3 channels",
        got=tuple(values.shape),
    )


def _numbered(labels: Any, what: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Return labels as int64, and their names where they were names."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1:
        raise InputError(
            "the labels have another shape", expected="one for each image", got=array.shape, where=what
        )
    if array.dtype.kind in "US" or (array.dtype.kind == "O" and all(isinstance(x, str) for x in array)):
        names, places = np.unique(array.astype(str), return_inverse=True)
        return torch.from_numpy(places.astype(np.int64)), tuple(map(str, names))
    if array.dtype.kind not in "iu":
        raise InputError(
            "the labels are of another type",
            expected="whole numbers from 0, or names",
            got=array.dtype,
            where=what,
        )
    if len(array) and (int(array.min()) < 0 or int(array.max()) > 1_000_000):
        raise InputError("a label is out of range", expected="0 or more", got=int(array.min()), where=what)
    return torch.from_numpy(array.astype(np.int64)), None


def unusable(data: object, what: str = "the clean images") -> InputError:
    """Return the error for data of a type that nothing can be done with."""
    return InputError(f"{what} are of another type", expected=_EXPECTED, got=type(data).__name__)
