"""Writing files so that a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from unbackdoor.errors import DiskFull, InputError, UnsafeFile
from unbackdoor.text import is_text, json_text

_HASH_CHUNK = 1 << 20
MAX_FILE = 1 << 36  # bytes of any file that is read or hashed; a bound against nonsense
_HOLES_FROM = 1 << 26  # bytes from which a file is asked whether it was ever written
MAX_DEPTH = 64  # levels of a JSON document
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_IN_WORDS = "No space left on device"


def _ordinary_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# Read once, because reading it means setting it. Some writers make files that only their owner can read.
_MODE = _ordinary_mode()
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_keep_existing: ContextVar[bool] = ContextVar("keep_existing", default=False)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The folder is created where it is missing. The content is on the disk before the name changes, and the
    temporary file is removed on every failure, KeyboardInterrupt included. Of two processes that write
    the same path, the later one replaces the whole file; inside :func:`writing` without ``force`` it fails.
    Where the path is a link, the link is replaced, and what it leads to stays as it is.

    Args:
        path: The file to write or to replace.

    Raises:
        DiskFull: If the disk is full, whichever library wrote the temporary file.
        InputError: If the folder cannot be written, or the file exists and is to be kept.

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
        if _keep_existing.get():
            _put_if_absent(draft, path)
        else:
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


def _put_if_absent(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)  # fails where the name is taken, also by a file of this very moment
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links; between the two lines another process may still come.
        if os.path.lexists(path):
            raise _exists(path) from None
        draft.replace(path)


def finite(value: Any) -> Any:
    """Return JSON-ready facts in which no number is infinite or NaN; such become None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, obj: object) -> None:
    """Write an object as indented UTF-8 JSON with a final newline, atomically.

    Args:
        path: The file to write or to replace.
        obj: Anything ``json`` can write; NaN and infinities are refused because JSON has none.
    """
    # Before the file is touched: an object that cannot be written must not cost a disk write.
    text = json_text(obj) + "\n"
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def opened(path: Path, what: str = "the file", *, limit: int = MAX_FILE) -> Iterator[tuple[int, int]]:
    """Open an ordinary file for reading; its type and its size are looked at before any byte is read.

    Args:
        path: The file; links to it are followed.
        what: What it is called in messages.
        limit: Largest size in bytes.

    Yields:
        The descriptor, and the size in bytes. No more than that is to be read: what grows meanwhile, and the
        endless files of the system, have no other end.

    Raises:
        InputError: If it is no ordinary file, or cannot be read.
        UnsafeFile: If it is larger than the limit, or hardly anything of it was ever written.
    """
    descriptor = -1
    try:
        # Not blocking, because opening a pipe that has no writer would wait for one.
        descriptor = os.open(_sayable(path, what), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            got = "Is a directory" if stat.S_ISDIR(facts.st_mode) else "Is no ordinary file"
            raise InputError(f"{what} cannot be read", got=got, where=path)
        if facts.st_size > limit:
            raise UnsafeFile(
                f"{what} is too large", expected=f"at most {limit} bytes", got=facts.st_size, where=path
            )
        if _hardly_written(descriptor, facts):
            raise UnsafeFile(
                f"{what} consists of holes",
                expected="a file whose bytes were written",
                got=f"{facts.st_size} bytes, of which {512 * facts.st_blocks} are on the disk",
                where=path,
                remedy="Copy or download it again",
            )
        yield descriptor, facts.st_size
    except OSError as error:
        raise InputError(f"{what} cannot be read", got=error.strerror, where=path) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _sayable(path: Path, what: str) -> Path:
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{what} cannot be read", got="half of a character in its name") from error
    if "\0" in str(path):
        raise InputError(f"{what} cannot be read", got="a null character in its name")
    return path


def is_there(path: Path) -> bool:
    """Tell whether a path leads to anything; one that cannot be, such as too long a name, does not."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _hardly_written(descriptor: int, facts: os.stat_result) -> bool:
    """Tell whether a large file has holes and less than a quarter of it is on the disk."""
    if facts.st_size < _HOLES_FROM or 512 * facts.st_blocks >= facts.st_size // 4:
        return False
    try:
        hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except (OSError, AttributeError):  # not every system can tell, and some count their blocks in other ways
        return False
    return hole < facts.st_size


def read_bytes(path: Path, what: str = "the file", *, limit: int) -> bytes:
    """Return the content of an ordinary file; see :func:`opened`."""
    with opened(path, what, limit=limit) as (descriptor, size):
        out = bytearray()
        while len(out) < size and (chunk := os.read(descriptor, min(_HASH_CHUNK, size - len(out)))):
            out += chunk
    return bytes(out)


def read_text(path: Path, what: str = "the file", *, limit: int) -> str:
    """Return the content of an ordinary file in UTF-8, without the mark that some editors put before it.

    Raises:
        InputError: See :func:`opened`; and if it is no text in UTF-8.
        UnsafeFile: See :func:`opened`.
    """
    try:
        return read_bytes(path, what, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} cannot be read",
            expected="text in UTF-8",
            got=str(error)[:200],
            where=path,
            remedy="Save it as UTF-8",
        ) from error


def parse_json(text: str | bytes, what: str, where: object = None) -> Any:
    """Return what a JSON document of unknown origin says.

    Args:
        text: The document.
        what: What it is called in messages.
        where: The file.

    Raises:
        InputError: If it is no JSON, says NaN or an infinite number, holds half of a character, or lies more
            than 64 levels deep.
    """
    problem = f"{what} cannot be read"
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite_number)
    except (ValueError, RecursionError) as error:
        got = str(error)[:200] or type(error).__name__
        raise InputError(problem, expected="JSON", got=got, where=where) from error
    if depth(value) > MAX_DEPTH:
        raise InputError(problem, expected=f"at most {MAX_DEPTH} levels", got="more", where=where)
    # Only these can bring half of a character along.
    if (isinstance(text, bytes) or "\\u" in text or not is_text(text)) and not _all_texts(value):
        raise InputError(problem, expected="JSON", got="half of a character", where=where)
    return value


def depth(value: Any) -> int:
    """Return how many levels of tables and lists lie within each other; one more than the limit for more."""
    level, levels = [value], 0
    while (level := [inner for one in level for inner in _within(one)]) and levels <= MAX_DEPTH:
        levels += 1
    return levels


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _all_texts(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_text, value)) and all(map(_all_texts, value.values()))
    return is_text(value) if isinstance(value, str) else all(map(_all_texts, _within(value)))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite_number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:40])


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of an ordinary file's content as 64 hex digits; see :func:`opened`."""
    digest = hashlib.sha256()
    with opened(Path(path)) as (descriptor, size):
        at = 0
        while at < size and (chunk := os.read(descriptor, min(_HASH_CHUNK, size - at))):
            digest.update(chunk)
            at += len(chunk)
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


def require_writable(
    files: Sequence[Path], *, force: bool, inputs: Sequence[Path] = (), below: Path | None = None
) -> None:
    """Check, before any work is done, that all files can be written and that none is overwritten.

    Args:
        files: What is to be written.
        force: Whether existing files may be replaced; of a link, the link itself.
        inputs: Files that are not replaced even then.
        below: Folder of the user's choice inside which no folder may be a link.

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
        for folder in file.parents if below is not None else ():
            if folder == below:
                break
            if folder.is_symlink():
                raise InputError("a link stands in the place of a folder", where=folder, remedy="Remove it")
        folder = file.parent
        while not os.path.lexists(folder):  # the missing folders are made when the file is written
            folder = folder.parent
        if not folder.is_dir():
            raise InputError("this is no folder", where=folder, remedy="Name a folder")
        if file.is_dir() and not file.is_symlink():
            raise InputError("there is a folder of that name", where=file, remedy="Name a file")
        if os.path.lexists(file) and not force:
            raise _exists(file)
        if not os.access(folder, os.W_OK):
            raise InputError("the folder cannot be written", where=folder, remedy="Choose another place")


@contextmanager
def writing(
    files: Sequence[Path], *, force: bool, inputs: Sequence[Path] = (), below: Path | None = None
) -> Iterator[None]:
    """Check the files like :func:`require_writable`; inside the block only ``force`` replaces any.

    The check comes before the writing, and another process may have come between the two: two scans that were
    started with one folder would else end in one report of both.

    Args:
        files: See there, as for the others.
        force: See there.
        inputs: See there.
        below: See there.

    Raises:
        InputError: See there.
    """
    require_writable(files, force=force, inputs=inputs, below=below)
    token = _keep_existing.set(not force)
    try:
        yield
    finally:
        _keep_existing.reset(token)


def _exists(file: Path) -> InputError:
    return InputError(
        "the file exists",
        where=file,
        remedy="Choose another place, or replace it with --force (force=True)",
    )
