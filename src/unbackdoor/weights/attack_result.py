"""The attack results of BackdoorBench (``attack_result.pt``): what such a file says beside its weights.

A dictionary of ``torch.save``: the name of the network and of the data set, the number of classes, the size
of the images, and ``bd_test``, the triggered test images. These lie there in one of three forms, by the
version that wrote them: as paths of PNG files in a folder beside the file, as pickled pictures of Pillow, or
as one tensor with the attacker's labels. All of it is described by the reader that calls nothing; no class
of the file, and none of Pillow or NumPy, is ever looked up.

Layout: https://github.com/SCLBD/BackdoorBench, utils/save_load_attack.py and utils/bd_dataset_v2.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbackdoor.confinement import rehearsed
from unbackdoor.errors import InputError, IntegrityError, UnsafeFile
from unbackdoor.weights.formats.buffers import short
from unbackdoor.weights.formats.limits import accounting, spend
from unbackdoor.weights.formats.tensors import TensorRef, materialise
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_reader import Stub, Trail, as_mapping
from unbackdoor.weights.formats.zip_archive import Archive
from unbackdoor.weights.source import Source
from unbackdoor.weights.stored_file import StoredFile, read_file

_MOST_CLASSES = 1 << 20
_MOST_SIDE = 1 << 14  # pixels
_NAME = 200  # characters of a name of a network or a data set
_PLACE = re.compile(r"(?:^|[/\\])(\d{1,9})[/\\](\d{1,12}\.png)")  # CLASS/INDEX.png at the end of a path
_INTEGERS = {f"{kind}{width}": (width, kind == "i") for kind in "iu" for width in (1, 2, 4, 8)}
_MODES = {"L": 1, "RGB": 3}  # of Pillow, with the bytes of a pixel
_REMEDY = "Give the attack_result.pt that an attack of BackdoorBench wrote"


@dataclass(frozen=True)
class AttackResult:
    """What an attack result says of the attack; untrusted, but of the right form.

    Attributes:
        network: What BackdoorBench calls the network.
        dataset: What it calls the data set.
        classes: Number of classes.
        size: (H, W) of the images; None where it is not stated.
        target: The class of all triggered test images, for the attacker.
        places: Triggered test images as files, ``CLASS/INDEX.png`` below their folder; else empty.
        pixels: Triggered test images as uint8 (N, C, H, W), where the file holds them; else None.
        labels: The classes that they show, (N,); None where the file does not say.
    """

    network: str
    dataset: str
    classes: int
    size: tuple[int, int] | None
    target: int
    places: tuple[str, ...]
    pixels: Tensor | None
    labels: Tensor | None


def read_attack_result(source: Source) -> AttackResult:
    """Read what a file says beside its weights; nothing in it is executed.

    Args:
        source: The file, opened.

    Raises:
        InputError: If it is damaged, or no attack result.
        UnsafeFile: If it names what would run code, or is built to exhaust its reader.
        IntegrityError: If the file was changed since it was opened.
    """
    with rehearsed("unbackdoor.weights.attack_result:rehearse", source.path):
        file = read_file(source.path)
        if file.sha256 != source.sha256:
            raise IntegrityError("the file was changed while it was read", where=source.path)
        return _read(file)


def rehearse(path: Path, options: Mapping[str, Any]) -> None:
    """Read a file in a process of its own."""
    _read(read_file(path))


def _read(file: StoredFile) -> AttackResult:
    trail = Trail()
    with accounting():
        if file.head.startswith(b"PK\x03\x04"):
            described = checkpoints.read_zip(Archive(file.content, file.path), file.content, trail, file.path)
        elif file.head.startswith(b"\x80"):
            described = checkpoints.read_stream(file.content, trail)[0]
        else:
            raise _other(file, "a file of torch.save", f"bytes that begin with {file.head[:8].hex()}")
        if trail.dangerous:
            raise UnsafeFile(
                f"the file names {short(trail.dangerous[0])}, which would run code; it was not executed",
                where=file.path,
                remedy="Do not load it with other programs",
            )
        return _AttackResultReader(file).read(described)


def _other(file: StoredFile, expected: str, got: object) -> InputError:
    return InputError(
        "the file is no attack result of BackdoorBench",
        expected=expected,
        got=got,
        where=file.path,
        remedy=_REMEDY,
    )


class _AttackResultReader:
    def __init__(self, file: StoredFile) -> None:
        self._file = file

    def read(self, described: object) -> AttackResult:
        top = self._mapping(described, "a dictionary")
        classes = self._whole(top.get("num_classes"), "num_classes", 2, _MOST_CLASSES)
        test = self._mapping(top.get("bd_test"), "bd_test, a dictionary of the triggered test images")
        network, dataset = (self._text(top, key) for key in ("model_name", "clean_data"))
        size = self._size(top.get("img_size"))
        if isinstance(test.get("x"), TensorRef):
            pixels, wanted = self._tensors(test)
            return AttackResult(network, dataset, classes, size, self._one(wanted, classes), (), pixels, None)
        container = self._mapping(test.get("bd_data_container"), "bd_test with x and y, or bd_data_container")
        entries = self._mapping(container.get("data_dict"), "bd_data_container with data_dict")
        if not entries:
            raise self._other("triggered test images", "none")
        spend("visits", 8 * len(entries))
        samples = [self._sample(entry, classes) for entry in entries.values()]
        target = self._one([wanted for _, wanted, _ in samples], classes)
        labels = torch.tensor([label for _, _, label in samples], dtype=torch.int64)
        places = [image for image, _, _ in samples if isinstance(image, str)]
        if places and len(places) < len(samples):
            raise self._other("images in files, or in the file itself", "some of each")
        if len(set(places)) < len(places):
            raise self._other("one file for each image", "a file that stands twice")
        if places:
            return AttackResult(network, dataset, classes, size, target, tuple(places), None, labels)
        pictures = [image for image, _, _ in samples if isinstance(image, np.ndarray)]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise self._other("images of one size", " and ".join(map(str, sorted(shapes)[:2])))
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))
        return AttackResult(network, dataset, classes, size, target, (), pixels, labels)

    def _sample(self, entry: object, classes: int) -> tuple[str | np.ndarray, int, int]:
        """Return an image or its place, the attacker's class, and the class that it shows."""
        image: object
        if isinstance(entry, dict):
            place, facts = entry.get("path"), entry.get("other_info")
            found = _PLACE.search(place[-64:]) if isinstance(place, str) else None
            # What stands before it is a path of another machine, which is not followed.
            if found is None or found.end() != len(found.string):
                raise self._other("a path that ends in CLASS/INDEX.png", short(place))
            image = f"{found[1]}/{found[2]}"
        elif isinstance(entry, list | tuple) and len(entry) > 2:
            image, *facts = entry
            image = self._picture(image)
        else:
            raise self._other("an image with two labels", type(entry).__name__)
        if not isinstance(facts, list | tuple) or len(facts) < 2:
            raise self._other("an image with two labels", short(facts))
        wanted, label = (self._whole(value, "a label", 0, classes - 1) for value in facts[:2])
        return image, wanted, label

    def _picture(self, image: object) -> np.ndarray:
        """Return the pixels (H, W, C) of a picture that Pillow pickled."""
        state = image.state if isinstance(image, Stub) and image.cls.startswith("PIL.") else None
        if not isinstance(state, list | tuple) or len(state) < 5:
            raise self._other("pictures of Pillow", type(image).__name__)
        mode, size, content = state[1], state[2], state[4]
        channels = _MODES.get(mode) if isinstance(mode, str) else None
        if channels is None:
            raise self._other("pictures of the modes RGB and L", short(mode))
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise self._other("the size of a picture", short(size))
        width, height = (self._whole(side, "a side of a picture", 1, _MOST_SIDE) for side in size)
        if not isinstance(content, bytes) or len(content) != width * height * channels:
            raise self._other(f"{width * height * channels} bytes of a picture", "others")
        spend("unpacked", len(content))
        return np.frombuffer(content, np.uint8).reshape(height, width, channels)

    def _tensors(self, test: Mapping[Any, Any]) -> tuple[Tensor, list[int]]:
        if not isinstance(test.get("y"), TensorRef):
            raise self._other("bd_test with x and y", "x alone")
        held = materialise({name: test[name] for name in ("x", "y")}, self._file.size)
        x, y = held["x"], held["y"]
        if x.ndim != 4 or x.shape[1] not in (1, 3) or not 0 < len(x) == y.numel() or y.ndim != 1:
            raise self._other("x of shape (N, C, H, W) and y of (N,)", f"{[*x.shape]} and {[*y.shape]}")
        if y.is_floating_point() or y.dtype == torch.bool:
            raise self._other("labels that are whole numbers", y.dtype)
        low, high = (float(edge) for edge in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > 255:
            raise self._other("pixels in 0..255", f"{low:g}..{high:g}")
        scale = 255.0 if x.is_floating_point() and high <= 1 else 1.0
        pixels = torch.empty(x.shape, dtype=torch.uint8)
        for one, out in zip(x, pixels, strict=True):  # a copy of all of them in floating point may not fit
            out.copy_((one.double() * scale).round())
        return pixels, [int(label) for label in y.tolist()]

    def _one(self, wanted: list[int], classes: int) -> int:
        """Return the only class that triggered images are sent to."""
        targets = sorted(set(wanted))
        if len(targets) > 1:
            raise InputError(
                "the attack sends triggered images to several classes, and such test sets are not judged",
                expected="one class for all of them",
                got=", ".join(map(str, targets[:8])),
                where=self._file.path,
            )
        return self._whole(targets[0], "a label", 0, classes - 1)

    def _whole(self, value: object, what: str, low: int, high: int) -> int:
        """Return a whole number of Python or, where it was described as one, of NumPy."""
        number = _numpy_integer(value) if isinstance(value, Stub) else value
        if type(number) is not int or not low <= number <= high:
            got = short(value) if type(value) in (int, str, float) else type(value).__name__
            raise self._other(f"{what} in {low}..{high}", got)
        return number

    def _size(self, value: object) -> tuple[int, int] | None:
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) not in (2, 3):
            raise self._other("img_size of two or three numbers", type(value).__name__)
        height, width = (self._whole(side, "img_size", 1, _MOST_SIDE) for side in value[:2])
        return height, width

    def _text(self, top: Mapping[Any, Any], key: str) -> str:
        value = top.get(key)
        if not isinstance(value, str) or len(value) > _NAME:
            raise self._other(f"{key}, a name", short(value))
        return value

    def _mapping(self, value: object, expected: str) -> Mapping[Any, Any]:
        mapping = as_mapping(value)
        if mapping is None:
            raise self._other(expected, "nothing" if value is None else type(value).__name__)
        return mapping

    def _other(self, expected: str, got: object) -> InputError:
        return _other(self._file, expected, got)


def _numpy_integer(stub: Stub) -> int | None:
    """Return the value of a described scalar of NumPy, or None."""
    if not stub.cls.startswith("numpy.") or not stub.cls.endswith("multiarray.scalar"):
        return None
    kind, content = stub.args if isinstance(stub.args, tuple) and len(stub.args) == 2 else (None, None)
    if not isinstance(kind, Stub) or kind.cls != "numpy.dtype" or not isinstance(content, bytes):
        return None
    code = kind.args[0] if isinstance(kind.args, tuple) and kind.args else None
    width, signed = _INTEGERS.get(code, (0, False)) if isinstance(code, str) else (0, False)
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else None
    if not width or len(content) != width or order not in ("<", "|"):
        return None
    return int.from_bytes(content, "little", signed=signed)
