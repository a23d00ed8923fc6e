"""A Parquet file of the Hugging Face image schema; needs the extra ``parquet``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import CHUNK, Item, decode, require_memory
from unbackdoor.data.sources.checks import agreed_names, checked_labels
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.files import parse_json
from unbackdoor.types import Images, Progress, silent

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
        for batch in file.iter_batches(batch_size=batch_size, columns=["image.bytes"]):
            # Flattened, because a null image counts as null bytes.
            for data in batch.column(0).flatten()[0].to_pylist():
                if not data:
                    raise InputError(
                        "a row has no image",
                        expected="encoded bytes in image.bytes",
                        got="null" if data is None else "0 bytes",
                        where=f"{path}, row {row}",
                        remedy="Remove the row or write the image's bytes into it",
                    )
                yield f"{path}, row {row}", data
                row += 1

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            _require_columns(schema, pa, path)
            count = file.metadata.num_rows
            if count < 1:
                raise InputError("the file has no rows", expected="at least 1 image", got=0, where=path)
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            require_memory(max(groups), f"{path}, row group {int(np.argmax(groups))}")
            # A page may say in a few bytes that one image of many stands there again and again; no image is
            # larger than all that is stored of a group.
            batch_size = min(max(_BATCH_BYTES // max(*groups, 1), 1), CHUNK)
            require_memory(8 * count, f"{path}, column label")
            labels = _labels_of(file.read(columns=["label"]).column(0), path)
            names = agreed_names(class_names, _names_in(schema.metadata, path), str(path))
            names, labels = checked_labels(labels, names, lambda i: f"{path}, row {i}", str(path), partial)
            pixels = decode(items(), count, name=name or path.stem, size=size, progress=progress)
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
    return as_images(pixels, labels, names, name or path.stem)


def _require_columns(schema: Any, pa: Any, path: Path) -> None:
    remedy = "Use the Hugging Face image schema: image {bytes, path}, label"
    # A column is asked for by its path, so that a dotted name, or two of one name, may stand for another.
    roots = [name.split(".")[0] for name in schema.names]
    for column in ("image", "label"):
        if roots.count(column) > 1 or (column in roots and column not in schema.names):
            raise InputError(
                f"the name of the column {column!r} is ambiguous",
                expected="one column of that name",
                got=", ".join(map(repr, schema.names[:20])),
                where=path,
                remedy=remedy,
            )
    for column in ("image", "label"):
        if column not in schema.names:
            raise InputError(
                f"the column {column!r} is missing",
                expected="columns image and label",
                got=", ".join(schema.names) or "no columns",
                where=path,
                remedy=remedy,
            )
    kind = schema.field("image").type
    inner = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    data = inner.get("bytes")
    if data is None or not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
        raise InputError(
            "the column 'image' has the wrong type",
            expected="a struct with a binary field 'bytes'",
            got=kind,
            where=path,
            remedy=remedy,
        )
    if not pa.types.is_integer(schema.field("label").type):
        raise InputError(
            "the column 'label' has the wrong type",
            expected="integers",
            got=schema.field("label").type,
            where=path,
            remedy=remedy,
        )


def _labels_of(column: Any, path: Path) -> NDArray[np.int64]:
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise InputError(
            "a label is missing",
            expected="an integer",
            got="null",
            where=f"{path}, row {row}",
            remedy="Label the image or remove the row",
        )
    values = column.to_numpy()
    # Values of uint64 beyond int64 would turn negative, and then be reported as such.
    return np.ascontiguousarray(values, dtype=np.int64).copy()


def _names_in(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature = parse_json(text, "the metadata")["info"]["features"]["label"]
        names = feature.get("names")
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the metadata under 'huggingface' cannot be read",
            expected="JSON with info.features.label.names",
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
