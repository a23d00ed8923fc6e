"""A trigger from a picture, as papers publish them: where it goes, how strongly, and to which class.

A text names the picture and, behind commas, how it is meant::

    patch.png,class=3                              opaque, in the lower right corner
    patch.png,class=cat,place=24x24,size=5x5       its upper left pixel in row 24 and column 24, 5 x 5 pixels
    logo.png,class=3,mask=mask.png,strength=0.5    where the mask is white, half transparent
    noise.png,class=3,add                          added to every pixel

A transparent picture is its own mask. A picture of the size of the model's images needs no place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbackdoor.confinement import rehearsed, seen
from unbackdoor.data.conform import GREY
from unbackdoor.data.decode import explained
from unbackdoor.data.decode_worker import Undecodable, decode_rgba
from unbackdoor.data.sources.image_files import IMAGE_SUFFIXES, is_file, read_bounded
from unbackdoor.errors import InputError
from unbackdoor.registry import near_match
from unbackdoor.triggers import RecoveredTrigger

CORNERS = {
    "top-left": (0.0, 0.0), "top-right": (0.0, 1.0), "bottom-left": (1.0, 0.0), "bottom-right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}  # fmt: skip
_KEYS = ("class", "mask", "place", "size", "strength", "add")


def names_picture(text: Path | str) -> bool:
    """Return whether a text names a picture rather than the tensors of a recovered trigger."""
    path, _ = _parts(text)
    return path.suffix.lower() in IMAGE_SUFFIXES


def picture_path(text: Path | str) -> Path:
    """Return the path in a text that names a picture."""
    return _parts(text)[0]


def picture_label(text: Path | str, class_names: Sequence[str], *, required: bool = True) -> int | None:
    """Return the class that a text says a picture leads to; None where it says none and need not.

    Raises:
        InputError: If there is no such class, or none is said.
    """
    _, stated = _parts(text)
    return None if "class" not in stated and not required else _label(stated, class_names, str(text))


def without_class(text: Path | str) -> str:
    """Return the text without the class that it names."""
    path, stated = _parts(text)
    rest = [f"{key}={value}" if value else key for key, value in stated.items() if key != "class"]
    return ",".join([str(path), *rest])


def read_trigger_picture(
    text: Path | str,
    input_shape: tuple[int, int, int],
    class_names: Sequence[str],
    *,
    label: int | None = None,
) -> RecoveredTrigger:
    """Read a trigger from a picture, in a process of its own first, and from the very bytes that it read.

    Args:
        text: The picture's path, and behind commas what is stated above.
        input_shape: (C, H, W) of the images that it is put on.
        class_names: Their classes.
        label: Class that it leads to, where the text does not say so.

    Raises:
        InputError: If a file cannot be read, or what is stated does not fit the model.
        UnsafeFile: If a picture declares an absurd number of pixels.
        IntegrityError: If a picture was replaced in the meantime.
    """
    text = str(Path.cwd() / text)  # that process may stand in another folder
    options = {
        "text": text,
        "input_shape": list(input_shape),
        "class_names": list(class_names),
        "label": label,
    }
    # Libraries of pictures decode it.
    with rehearsed("unbackdoor.data.trigger_picture:rehearse", picture_path(text), options):
        return _read(text, input_shape, class_names, label)


def rehearse(path: Path, options: Mapping[str, Any]) -> None:
    """Read a picture in a process of its own."""
    channels, height, width = options["input_shape"]
    _read(options["text"], (channels, height, width), options["class_names"], options["label"])


def _read(
    text: str, input_shape: tuple[int, int, int], class_names: Sequence[str], label: int | None
) -> RecoveredTrigger:
    path, stated = _parts(text)
    _require_known(stated, str(text))
    label = _label(stated, class_names, str(text)) if label is None else label
    channels, height, width = input_shape
    size = _pair(stated.get("size"), "size", str(text))
    if size is not None:
        _require_room(size, (height, width), path)  # before anything of that size is made
    picture = _picture(path, size)  # (4, h, w) in [0, 1]
    _require_room((picture.shape[1], picture.shape[2]), (height, width), path)
    mask = picture[3]
    if "mask" in stated:
        mask = mask * _mask(path.parent / stated["mask"], mask.shape)
    strength = _number(stated.get("strength", "1"), str(text))
    h, w = mask.shape
    top, left = _place(stated.get("place", "bottom-right"), (height - h, width - w), str(text))
    pattern, whole = torch.zeros(channels, height, width), torch.zeros(height, width)
    pattern[:, top : top + h, left : left + w] = _channels(picture[:3], channels, path)
    whole[top : top + h, left : left + w] = strength * mask
    if "add" in stated:
        return RecoveredTrigger(label, pattern * whole, None, path.name)
    return RecoveredTrigger(label, pattern, whole, path.name)


def _parts(text: Path | str) -> tuple[Path, dict[str, str]]:
    """Return the path and what is stated behind it; a path that exists may have commas of its own."""
    words = str(text).split(",")
    for count in range(len(words), 0, -1):
        path = Path(",".join(words[:count]))
        if path.suffix.lower() in IMAGE_SUFFIXES and (count == 1 or is_file(path)):
            pairs = [word.partition("=") for word in words[count:]]
            return path, {key.strip(): value.strip() for key, _, value in pairs}
    return Path(text), {}


def _label(facts: Mapping[str, str], names: Sequence[str], where: str) -> int:
    stated = facts.get("class")
    if stated in names:
        return list(names).index(str(stated))
    if stated is not None and stated.isascii() and stated.isdecimal() and int(stated[:9]) < len(names):
        return int(stated)
    raise InputError(
        "it is not said which class the picture leads to"
        if stated is None
        else f"there is no class {stated!r}{near_match(stated, list(names))}",
        expected=f"a name of a class, or 0..{len(names) - 1}",
        where=where,
        remedy="Add ,class=NAME behind the picture",
    )


def _picture(path: Path, size: tuple[int, int] | None) -> Tensor:
    """Return red, green, blue and opacity (4, h, w) in [0, 1]."""
    try:
        content = read_bounded(path)
        seen(hashlib.sha256(content).hexdigest(), path)
        pixels = decode_rgba(content)
    except Undecodable as error:
        raise explained({**error.facts, "remedy": "Give another picture"}, str(path)) from error
    if size is not None and pixels.shape[:2] != size:
        image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def _mask(path: Path, shape: torch.Size) -> Tensor:
    """Return a mask (h, w): how light the picture is, and how opaque."""
    picture = _picture(path, (shape[0], shape[1]))
    return (picture[:3] * torch.tensor(GREY).view(3, 1, 1)).sum(0) * picture[3]


def _require_room(size: tuple[int, int], image: tuple[int, int], path: Path) -> None:
    if size[0] > image[0] or size[1] > image[1]:
        raise InputError(
            "the picture of the trigger is larger than the model's images",
            expected=f"at most {image[0]} x {image[1]} (height x width)",
            got=f"{size[0]} x {size[1]}",
            where=path,
            remedy="Add ,size=HxW",
        )


def _channels(picture: Tensor, channels: int, path: Path) -> Tensor:
    if channels == 3:
        return picture
    if channels == 1:
        return (picture * torch.tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
    raise InputError("a picture has 1 or 3 channels", got=f"a model of {channels}", where=path)


def _pair(text: str | None, key: str, where: str) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [part.removeprefix("-") for part in text.split("x")]
    if len(numbers) == 2 and all(n.isascii() and n.isdecimal() and len(n) < 6 for n in numbers):
        first, second = (int(part) for part in text.split("x"))
        if key == "place" or min(first, second) > 0:
            return first, second
    raise InputError(f"the {key} does not fit", expected=f"{key}=ROWSxCOLUMNS", got=text[:80], where=where)


def _place(text: str, most: tuple[int, int], where: str) -> tuple[int, int]:
    """Return row and column of the upper left pixel; negative ones count from the lower right place."""
    if text in CORNERS:
        down, right = CORNERS[text]
        return round(down * most[0]), round(right * most[1])
    pair = _pair(text, "place", where)
    assert pair is not None
    top, left = (at + room if part.startswith("-") else at
                 for at, room, part in zip(pair, most, text.split("x"), strict=True))  # fmt: skip
    if not (0 <= top <= most[0] and 0 <= left <= most[1]):
        raise InputError(
            "the picture would lie outside of the image",
            expected=f"a place in 0..{most[0]} x 0..{most[1]}, or one of {', '.join(CORNERS)}",
            got=text[:80],
            where=where,
        )
    return top, left


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise InputError(
            "the strength does not fit", expected="a number in (0, 1]", got=text[:80], where=where
        )
    return value


def _require_known(stated: Mapping[str, str], where: str) -> None:
    unknown = next((key for key in stated if key not in _KEYS), None)
    if unknown is not None:
        raise InputError(
            f"{unknown!r} says nothing of a trigger{near_match(unknown, list(_KEYS))}",
            expected=", ".join(_KEYS),
            where=where,
        )
