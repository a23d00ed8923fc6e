"""Checks that every kind of input shares: sizes, class names, labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from unbackdoor.data.decode import Damaged
from unbackdoor.errors import InputError
from unbackdoor.text import is_text

REMEDY_FORMS = (
    "Give a .parquet file, a folder with one folder per class or with a labels.csv, an .npz file, or an image"
)
MAX_CLASSES = 1 << 16
_WHOLE = re.compile(r"\d{1,9}(\.0{0,20})?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MAX_NAME = 1000  # characters of the name of a class


def require_arguments(names: tuple[str, ...] | None, size: tuple[int, int] | None) -> None:
    if names is not None:
        require_names(names, "class_names")
    if size is not None and (len(size) != 2 or min(size) < 1 or max(size) > 1 << 14):
        raise InputError("the size does not fit", expected="(height, width), each in 1..16384", got=size)


def require_names(names: tuple[str, ...], where: str) -> None:
    odd = next((name for name in names if not is_text(name) or len(name) > MAX_NAME), None)
    if odd is not None or len(names) > MAX_CLASSES:
        raise InputError(
            "the class names do not fit",
            expected=f"at most {MAX_CLASSES} texts of at most {MAX_NAME} characters",
            got=f"{len(names)} names" if odd is None else repr(odd[:80]),
            where=where,
        )
    if not names or len(set(names)) != len(names):
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        raise InputError(
            "the class names do not fit",
            expected="at least one, no two alike",
            got="none" if twice is None else f"{twice!r} twice",
            where=where,
        )


def agreed_names(
    requested: tuple[str, ...] | None, in_file: tuple[str, ...] | None, where: str
) -> tuple[str, ...] | None:
    if in_file is not None:
        require_names(in_file, where)
    if requested is None or in_file is None or requested == in_file:
        return requested or in_file
    place = next((k for k, (a, b) in enumerate(zip(requested, in_file, strict=False)) if a != b), None)
    if place is None:
        expected, got = f"{len(requested)} classes", f"{len(in_file)}"
    else:
        expected, got = f"{requested[place]!r} for label {place}", repr(in_file[place])
    raise InputError(
        "the class names do not agree with those in the file",
        expected=expected,
        got=got,
        where=where,
        remedy="Leave the class names out, or renumber the labels of the file",
    )


def intact_labels(
    labels: NDArray[np.int64],
    damaged: Sequence[Damaged] | None,
    names: tuple[str, ...],
    file: str,
    *,
    partial: bool,
) -> NDArray[np.int64]:
    """Return the labels without those of damaged images, which must have left an image of every class."""
    if not damaged:
        return labels
    left = np.delete(labels, [one.row for one in damaged])
    lost = np.setdiff1d(labels, left)
    if len(lost) and not partial:
        raise InputError(
            f"all images of the class {names[lost[0]]!r} are damaged",
            expected="at least 1 image per class",
            got=0,
            where=file,
            remedy="Replace the images",
        )
    return left


def labels_of_texts(
    texts: Sequence[str], names: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[list[int], list[str]]:
    """Return a label for each text, and the class names.

    A label is a class name or an index; where the names are given and all labels are whole numbers that are
    no names, they are indices. Whole numbers may be written with decimals, as spreadsheets do.

    Args:
        texts: One for each image.
        names: Class names in label order, or None to take them from the texts: whole numbers in their order,
            others sorted.
        where: Where the text of a row stands, in words.

    Raises:
        InputError: If a label is no class.
    """
    whole = [_whole(text) for text in texts]
    digits = None not in whole
    if names is None:
        odd = next((row for row, number in enumerate(whole) if number is None), None)
        if odd is not None and all(_NUMBER.fullmatch(text) for text in texts):
            raise InputError(
                "the labels are numbers, and one is no number of a class",
                expected="0, 1, 2, ...; 3.0 counts as 3",
                got=repr(texts[odd][:80])[1:-1],
                where=where(odd),
            )
        # Bounded, because one absurd number must not make a billion names.
        count = min(max(number or 0 for number in whole) + 1, MAX_CLASSES) if digits else 0
        names = [str(k) for k in range(count)] if digits else sorted(set(texts))
    places = {name: k for k, name in enumerate(names)}
    by_index = digits and not any(text in places for text in texts)
    labels = []
    for row, (text, number) in enumerate(zip(texts, whole, strict=True)):
        label = number if by_index and number is not None else places.get(text, -1)
        if not 0 <= label < len(names):
            raise InputError(
                "the label is none of the classes",
                expected=f"0..{len(names) - 1} or one of " + ", ".join(list(names)[:20]),
                got=repr(text[:80])[1:-1],
                where=where(row),
            )
        labels.append(label)
    return labels, list(names)


def _whole(text: str) -> int | None:
    """Return a number of a class, also where a spreadsheet wrote it as ``3.0``; None for all else."""
    return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None


def checked_labels(
    labels: NDArray[np.int64],
    names: tuple[str, ...] | None,
    where: Callable[[int], str],
    file: str,
    partial: bool = False,
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return names and labels, all in range and, unless ``partial``, with an image of every class."""
    limit = len(names) if names is not None else MAX_CLASSES
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            "a label is out of range",
            expected=f"0..{limit - 1}",
            got=int(labels[row]),
            where=where(row),
            remedy="Correct the label, or give the class names in full",
        )
    if names is None:
        names = tuple(str(k) for k in range(int(labels.max()) + 1))
    counts = np.bincount(labels, minlength=len(names))
    if not (partial or counts.all()):
        empty = int((counts == 0).argmax())
        raise InputError(
            f"the class {names[empty]!r} (label {empty}) has no images",
            expected="at least 1 image per class",
            got=0,
            where=file,
            remedy="Add images of the class, or renumber the labels without it",
        )
    return names, labels
