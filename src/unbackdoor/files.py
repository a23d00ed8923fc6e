"""Writing files so that a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbackdoor.errors import DiskFull, InputError

_HASH_CHUNK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_IN_WORDS = "No space left on device"


def _ordinary_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# Read once, because reading it means setting it. Some writers make files that only their owner can read.
_MODE = _ordinary_mode()
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The folder is created where it is missing. The content is on the disk before the name changes, and the
    temporary file is removed on every failure, KeyboardInterrupt included. Of two processes that write
    the same path, the later one replaces the whole file.

    Args:
        path: The file to write or to replace.

    Raises:
        DiskFull: If the disk is full, whichever library wrote the temporary file.
        InputError: If the folder cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with atomic_write(target) as draft:
        ...     _ = draft.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.chmod(_MODE)
        _sync(draft)
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if explained := _explained(error, path):
            raise explained from error
        if error.filename is None or str(error.filename) == str(draft):
            error.filename = str(path)  # nobody but this function knows the draft
        raise
    except Exception as error:
        # Native writers report a full disk only in their own message, or wrap the system's error in another.
        hidden = error.__cause__ or error.__context__
        if _FULL_IN_WORDS in str(error):
            raise _disk_full(path, str(error)) from error
        if isinstance(hidden, OSError) and is_disk_full(hidden):
            raise _disk_full(path, hidden.strerror) from error
        raise
    finally:
        # After a success the draft is gone already.
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Return JSON-ready facts in which no number is infinite or NaN; such become None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def printable(text: object) -> str:
    """Return a text with control characters escaped, because names come from untrusted files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def write_json(path: Path, obj: object) -> None:
    """Write an object as indented UTF-8 JSON with a final newline, atomically.

    Args:
        path: The file to write or to replace.
        obj: Anything ``json`` can write; NaN and infinities are refused because JSON has none.
    """
    # Before the file is touched: an object that cannot be written must not cost a disk write.
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    # Some file systems refuse to sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        _sync(folder)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that there is no room on the disk."""
    return isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL)


def _disk_full(path: Path, words: str | None) -> DiskFull:
    return DiskFull(
        "the disk is full",
        where=path,
        expected="room for the whole file",
        got=words,
        remedy="Free some space or choose another folder; nothing half-written was left behind",
    )


def _explained(error: OSError, path: Path) -> InputError | None:
    if error.errno in _FULL:
        return _disk_full(path, error.strerror)
    if error.errno in _REFUSED:
        return InputError(
            "the file cannot be written",
            where=error.filename or path,
            got=error.strerror,
            remedy="Choose a folder that you may write to",
        )
    return None


def require_writable(files: Sequence[Path], *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Check, before any work is done, that all files can be written and that none is overwritten.

    Args:
        files: What is to be written.
        force: Whether existing files may be replaced.
        inputs: Files that are not replaced even then.

    Raises:
        InputError: If a file stands twice, is an input, exists, or cannot be written.
    """
    input_paths = {path.resolve() for path in inputs}
    output_paths: set[Path] = set()
    for file in files:
        place = file.resolve()
        if place in input_paths:
            raise InputError(
                "the output would replace an input", where=file, remedy="Choose another name for the output"
            )
        if place in output_paths:
            raise InputError(
                "two outputs have the same name", where=file, remedy="Choose another name for one of them"
            )
        output_paths.add(place)
        folder = file.parent
        while not folder.exists():  # the missing folders are made when the file is written
            folder = folder.parent
        if not folder.is_dir():
            raise InputError("this is no folder", where=folder, remedy="Name a folder")
        if file.is_dir():
            raise InputError("there is a folder of that name", where=file, remedy="Name a file")
        if file.exists() and not force:
            raise InputError(
                "the file exists",
                where=file,
                remedy="Choose another place, or replace it with --force (force=True)",
            )
        if not os.access(folder, os.W_OK):
            raise InputError("the folder cannot be written", where=folder, remedy="Choose another place")
