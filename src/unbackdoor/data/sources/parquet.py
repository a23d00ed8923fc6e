"""A Parquet file of the Hugging Face image schema; needs the extra ``parquet``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import CHUNK, Damaged, Item, damage_notes, decode, require_memory
from unbackdoor.data.sources.checks import agreed_names, checked_labels, intact_labels, labels_of_texts
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.files import parse_json
from unbackdoor.types import Images, Progress, silent

# As public data sets call them, the finest labels first.
_IMAGE_NAMES = ("image", "img", "images", "image_bytes", "picture", "photo", "jpg", "png", "bytes")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_id", "target", "category", "y", "cls",
                "coarse_label")  # fmt: skip
_REMEDY = "Use the Hugging Face image schema (image {bytes, path}, label), or name the column"
_BATCH_BYTES = 2 << 30  # of the images that are held at a time, at most
# What pyarrow raises over hostile bytes besides its own errors.
_BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, MemoryError)


def read_parquet(
    path: Path,
    *,
    class_names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    name: str | None = None,
    partial: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> Images:
    """Decode a Parquet file, past the cache; see :func:`load_images`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "reading Parquet files") from error

    row = 0

    def items() -> Iterator[Item]:
        nonlocal row
        columns = [f"{image}.bytes" if nested else image]
        for batch in file.iter_batches(batch_size=batch_size, columns=columns):
            # Flattened, because a null image counts as null bytes.
            column = batch.column(0)
            for data in (column.flatten()[0] if nested else column).to_pylist():
                if not data and not skip_damaged:
                    raise InputError(
                        "a row has no image",
                        expected=f"encoded bytes in {image}" + (".bytes" if nested else ""),
                        got="null" if data is None else "0 bytes",
                        where=f"{path}, row {row}",
                        remedy="Remove the row or write the image's bytes into it",
                    )
                yield f"{path}, row {row}", data or b""
                row += 1

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            image, label = _columns(schema, pa, path, image_column, label_column)
            nested = pa.types.is_struct(schema.field(image).type)
            count = file.metadata.num_rows
            if count < 1:
                raise InputError("the file has no rows", expected="at least 1 image", got=0, where=path)
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            require_memory(max(groups), f"{path}, row group {int(np.argmax(groups))}")
            # A page may say in a few bytes that one image of many stands there again and again; no image is
            # larger than all that is stored of a group.
            batch_size = min(max(_BATCH_BYTES // max(*groups, 1), 1), CHUNK)
            require_memory(8 * count, f"{path}, column {label}")
            stated = agreed_names(class_names, _names_in(schema.metadata, label, path), str(path))
            labels, names = _labels_of(file.read(columns=[label]).column(0), stated, pa, path)
            # Names that are taken from the labels need not all occur: the file may be a part of a larger set.
            some = partial or names is not stated
            names, labels = checked_labels(labels, names, lambda i: f"{path}, row {i}", str(path), some)
            damaged: list[Damaged] | None = [] if skip_damaged else None
            pixels = decode(
                items(), count, name=name or path.stem, size=size, progress=progress, damaged=damaged
            )
            labels = intact_labels(labels, damaged, names, str(path), partial=partial)
    except (pa.ArrowException, OSError, *_BROKEN) as error:
        # Arrow raises plain OSError for damage; a real I/O error has a number.
        if isinstance(error, OSError) and error.errno:
            raise InputError("the file cannot be read", where=path, got=error.strerror) from error
        raise InputError(
            "the Parquet file is damaged or cut short",
            expected="a complete Parquet file",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            where=f"{path}, near row {row}",
            remedy="Fetch or write the file again",
        ) from error
    notes = damage_notes(damaged or (), count)
    others = [column for column in _LABEL_NAMES if column in schema.names and column != label]
    if label_column is None and others:
        notes += (f"the labels are those of the column {label}; there is {' and '.join(others)} as well",)
    return as_images(pixels, labels, names, name or path.stem, notes, (one.row for one in damaged or ()))


def _columns(
    schema: Any, pa: Any, path: Path, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the columns of images and of labels: those asked for, else the first of a usual name and type.

    Raises:
        InputError: If one is missing or of another type.
    """

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            kind = {field.name: field.type for field in kind}.get("bytes")
        return kind is not None and bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def holds_labels(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        types = pa.types
        return any(test(kind) for test in (types.is_integer, types.is_string, types.is_large_string))

    asked = (
        ("image", image_column, _IMAGE_NAMES, holds_images),
        ("label", label_column, _LABEL_NAMES, holds_labels),
    )
    expected = {"image": "bytes, or a struct with a binary field 'bytes'", "label": "integers or texts"}
    # A column is asked for by its path, so that a dotted name, or two of one name, may stand for another.
    roots = [name.split(".")[0] for name in schema.names]
    chosen = []
    for what, wanted, usual, fits in asked:
        there = [name for name in ((wanted,) if wanted is not None else usual) if name in schema.names]
        fitting = [name for name in there if fits(schema.field(name).type)]
        if not fitting and (not there or there[0] not in (wanted, what)):
            raise InputError(
                f"the column {wanted or what!r} is missing",
                expected=wanted or "one of " + ", ".join(usual),
                got=", ".join(schema.names) or "no columns",
                where=path,
                remedy=f"{_REMEDY} with --{what}-column ({what}_column=)",
            )
        chosen.append((fitting or there)[0])
        if roots.count(chosen[-1]) > 1 or "." in chosen[-1]:
            raise InputError(
                f"the name of the column {chosen[-1]!r} is ambiguous",
                expected="one column of that name",
                got=", ".join(map(repr, schema.names[:20])),
                where=path,
                remedy=_REMEDY,
            )
    for name, (what, _, _, fits) in zip(chosen, asked, strict=True):
        if not fits(schema.field(name).type):
            raise InputError(
                f"the column {name!r} has the wrong type",
                expected=expected[what],
                got=schema.field(name).type,
                where=path,
                remedy=f"{_REMEDY} with --{what}-column ({what}_column=)",
            )
    image, label = chosen
    return image, label


def _labels_of(
    column: Any, names: tuple[str, ...] | None, pa: Any, path: Path
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise InputError(
            "a label is missing",
            expected="an integer or a text",
            got="null",
            where=f"{path}, row {row}",
            remedy="Label the image or remove the row",
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not pa.types.is_integer(column.type):
        numbers, in_texts = labels_of_texts(column.to_pylist(), names, lambda i: f"{path}, row {i}")
        return np.asarray(numbers, dtype=np.int64), names or tuple(in_texts)
    values = column.to_numpy()
    # Values of uint64 beyond int64 would turn negative, and then be reported as such.
    return np.ascontiguousarray(values, dtype=np.int64).copy(), names


def _names_in(metadata: dict[bytes, bytes] | None, label: str, path: Path) -> tuple[str, ...] | None:
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature = parse_json(text, "the metadata")["info"]["features"][label]
        names = feature.get("names")
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the metadata under 'huggingface' cannot be read",
            expected=f"JSON with info.features.{label}.names",
            got=f"{type(error).__name__}: {error}",
            where=path,
            remedy="Write the metadata again, or remove it and give the class names",
        ) from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            "the class names in the metadata are not a list of texts",
            got=str(names)[:80],
            where=path,
            remedy="Write the metadata again, or remove it and give the class names",
        )
    return tuple(names)
