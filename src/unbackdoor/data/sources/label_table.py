"""A table of files and labels, ``labels.csv``, and the images that it names."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import Damaged, damage_notes, decode
from unbackdoor.data.sources.checks import checked_labels, intact_labels, labels_of_texts
from unbackdoor.data.sources.image_files import is_file, read_bounded
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.files import read_text
from unbackdoor.text import is_text
from unbackdoor.types import Images, Progress, silent

NAME = "labels.csv"
_FILE_HEADS = ("file", "filename", "file_name", "path", "image", "image_path", "img", "name")
_LABEL_HEADS = ("label", "class", "classid", "class_id", "target", "category", "class_name", "y")
_MAX_BYTES = 1 << 26
_MAX_ROWS = 1 << 20
_MAX_FIELDS = 1 << 24
_MAX_NAME = 4096  # characters of a path
_FORM = "Write one row an image: file,label"


@dataclass(frozen=True)
class Entry:
    """One row: where it stands, the image's file, and the label as text."""

    line: int
    file: Path
    label: str


def read_labelled(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
    skip_damaged: bool = False,
) -> Images:
    """Decode the images of a table of files and labels, past the cache; see :func:`load_images`."""
    table = path / NAME if path.is_dir() else path
    entries = read_table(table)
    numbers, texts = numbered(entries, class_names, table)
    labels = np.asarray(numbers, dtype=np.int64)
    # Without given names, whole numbers need not all occur: the table may be a part of a larger one.
    names, labels = checked_labels(
        labels,
        tuple(texts),
        lambda i: f"{table}, line {entries[i].line}",
        str(table),
        partial or class_names is None,
    )
    title = name or table.parent.name or "images"
    items = ((str(entry.file), read_bounded(entry.file)) for entry in entries)
    damaged: list[Damaged] | None = [] if skip_damaged else None
    pixels = decode(items, len(entries), name=title, size=size, progress=progress, damaged=damaged)
    # Without given names a class may have no images, so it may lose them.
    labels = intact_labels(labels, damaged, names, str(table), partial=partial or class_names is None)
    notes = damage_notes(damaged or (), len(entries))
    return as_images(pixels, labels, names, title, notes, (one.row for one in damaged or ()))


def read_table(table: Path) -> list[Entry]:
    """Return the rows of a table; files are named relative to its folder, and stay inside it.

    A first row that names the columns is recognised by its words; without one, they are file and label.
    Fields are separated by commas, semicolons or tabs.

    Raises:
        InputError: If the table cannot be read, is empty, or a row is incomplete or names no file.
        UnsafeFile: If a row names a file outside the folder.
    """
    rows = _rows(table)
    file_at, label_at, first = _columns(rows, table)
    root = table.parent.resolve()
    inside: dict[Path, bool] = {}  # by folder, because there are many files in each
    entries = []
    for line, row in rows[first:]:
        if not any(field.strip() for field in row):
            continue
        if len(row) <= max(file_at, label_at) or not row[file_at].strip() or not row[label_at].strip():
            raise InputError(
                "a row is incomplete", got=",".join(row)[:80], where=f"{table}, line {line}", remedy=_FORM
            )
        name = row[file_at].strip()
        if "\\" in name and not is_file(table.parent / name):
            name = name.replace("\\", "/")  # written on Windows
        file = table.parent / name
        if not _lies_inside(name, file, root, inside):
            raise UnsafeFile(
                "the table names a file outside its folder",
                expected=f"a path inside {table.parent}",
                got=repr(name[:80])[1:-1],
                where=f"{table}, line {line}",
                remedy="Put the images beside the table",
            )
        if not is_file(file):
            raise InputError("the image is not there", where=f"{table}, line {line}", expected=file)
        entries.append(Entry(line, file, row[label_at].strip()))
    if not entries:
        raise InputError("the table has no rows", expected="at least 1 image", got=0, where=table)
    return entries


def _lies_inside(name: str, file: Path, root: Path, inside: dict[Path, bool]) -> bool:
    if "\0" in name or not is_text(name) or len(name) > _MAX_NAME:
        return False
    folder = file.parent
    try:
        if folder not in inside:
            inside[folder] = folder.resolve().is_relative_to(root)
        return inside[folder] and (not file.is_symlink() or file.resolve().is_relative_to(root))
    except (OSError, RuntimeError):  # a part of a path that is too long, or links in a circle
        return False


def numbered(
    entries: Sequence[Entry], names: Sequence[str] | None, table: Path
) -> tuple[list[int], list[str]]:
    """Return a label for each row, and the class names; see :func:`labels_of_texts`.

    Args:
        entries: The rows.
        names: Class names in label order, or None to take them from the table, sorted.
        table: For messages.

    Raises:
        InputError: If a label is no class.
    """
    return labels_of_texts(
        [entry.label for entry in entries], names, lambda i: f"{table}, line {entries[i].line}"
    )


def _rows(table: Path) -> list[tuple[int, list[str]]]:
    text = read_text(table, "the table", limit=_MAX_BYTES)
    head = text.split("\n", 1)[0]
    separator = max(",;\t", key=head.count)
    if text.count(separator) > _MAX_FIELDS:
        raise UnsafeFile("the table has too many fields", expected=f"at most {_MAX_FIELDS}", where=table)
    try:
        lines = csv.reader(io.StringIO(text), delimiter=separator)
        # One more than there may be, so that no more are made.
        rows = list(islice(((i, row) for i, row in enumerate(lines, 1) if row), _MAX_ROWS + 1))
    except csv.Error as error:
        raise InputError("the table cannot be read", got=str(error), where=table, remedy=_FORM) from error
    if not rows or len(rows) > _MAX_ROWS:
        raise InputError(
            "the table has no rows" if not rows else "the table has too many rows",
            expected=f"1..{_MAX_ROWS}",
            got="more" if rows else 0,
            where=table,
            remedy=_FORM,
        )
    return rows


def _columns(rows: Sequence[tuple[int, list[str]]], table: Path) -> tuple[int, int, int]:
    """Return the columns of file and label, and the first row that is no header."""
    heads = [field.strip().lower() for field in rows[0][1]]
    file_at = next((heads.index(word) for word in _FILE_HEADS if word in heads), None)
    label_at = next((heads.index(word) for word in _LABEL_HEADS if word in heads), None)
    if file_at is not None and label_at is not None:
        return file_at, label_at, 1
    if len(heads) < 2:
        raise InputError("the table has one column only", got=",".join(heads)[:80], where=table, remedy=_FORM)
    # A header in words that nobody knows: its first field is no file.
    first = rows[0][1][0].strip()
    named = False
    for name in (first, first.replace("\\", "/")) if first else ():
        inside = _lies_inside(name, table.parent / name, table.parent.resolve(), {})
        named = named or (inside and is_file(table.parent / name))
    return 0, 1, 0 if named or len(rows) == 1 else 1
