"""Untrusted files, read once: what is parsed and what is hashed are the same bytes.

A path is only a name. Between two uses of it the file may be replaced, overwritten, cut short, or a link may
point elsewhere. So a file is opened once and copied into memory while it is hashed; everything later works on
the copy. A memory map of the file would not be safe: overwriting the file changes the map, and truncating it
kills the process.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from unbackdoor.confinement import seen
from unbackdoor.errors import IntegrityError
from unbackdoor.files import opened, sha256_file
from unbackdoor.weights.formats.buffers import Buffer

MAX_FILE = 8 << 30  # bytes; a bound against nonsense, since a ResNet-18 of the usual width has 45 MB
HEAD = 512  # bytes that a format is judged by
_CHUNK = 1 << 20  # bytes that are hashed at a time

# How many bytes of a file to keep, by its first bytes and its size; may raise to refuse the file unread.
Keep = Callable[[bytes, int], int]


@dataclass(frozen=True, eq=False)
class StoredFile:
    """One file as it was when it was read.

    Attributes:
        path: Where it lay.
        size: Its bytes.
        sha256: Hash of all of them.
        content: Its bytes; only the first ones where the reader needs no more.
        others: Files that it names and that were read, by their names in it.
    """

    path: Path
    size: int
    sha256: str
    content: Buffer = field(repr=False)
    others: dict[str, StoredFile] = field(default_factory=dict, repr=False)

    @property
    def head(self) -> bytes:
        """The first bytes."""
        return bytes(self.content[:HEAD])

    def other(self, name: str, path: Path) -> StoredFile:
        """Return a file that this one names, read at its first use.

        Raises:
            InputError: If it cannot be read.
            UnsafeFile: If all of them together are larger than any model this package can build.
        """
        if name not in self.others:
            room = MAX_FILE - self.size - sum(file.size for file in self.others.values())
            self.others[name] = read_file(path, limit=max(room, 0))
        return self.others[name]

    def require_unchanged(self) -> None:
        """Raise IntegrityError unless the path still leads to these bytes."""
        try:
            size = self.path.stat().st_size
            now = sha256_file(self.path) if size == self.size else f"a file of {size} bytes"
        except OSError as error:
            now = error.strerror or "nothing"
        if now != self.sha256:
            raise IntegrityError(
                "the file has changed since it was read",
                expected=f"SHA-256 {self.sha256}",
                got=now,
                where=self.path,
                remedy="Nothing was written, because it would speak of another file. Begin again",
            )


def read_file(
    path: Path, keep: Keep | None = None, *, limit: int = MAX_FILE, what: str = "the model file"
) -> StoredFile:
    """Open a file once, and hash and copy the bytes of that one reading.

    Args:
        path: The file.
        keep: Returns from head and size how many bytes to keep, and may refuse the file; None keeps all.
        limit: Largest size in bytes; looked at before anything is read.
        what: What it is called in messages.

    Raises:
        InputError: If it cannot be read, or is no ordinary file.
        UnsafeFile: If it is larger than the limit, or hardly anything of it was ever written.
        IntegrityError: If it was written to meanwhile.
    """
    path = Path(path)
    with opened(path, what, limit=limit) as (descriptor, _):
        before = os.fstat(descriptor)
        head = os.pread(descriptor, HEAD, 0)
        retained = before.st_size if keep is None else min(keep(head, before.st_size), before.st_size)
        # Private memory that can be read like a file.
        content: Buffer = mmap.mmap(-1, retained) if retained else b""
        digest = hashlib.sha256()
        at = 0
        with memoryview(content) as view:
            while at < retained:
                count = os.readv(descriptor, [view[at : at + _CHUNK]])
                if not count:
                    break
                digest.update(view[at : at + count])
                at += count
        total = at
        # One byte beyond the size shows a file that grows; an endless one is not followed.
        while total <= before.st_size and (chunk := os.read(descriptor, _CHUNK)):
            digest.update(chunk)
            total += len(chunk)
        after = os.fstat(descriptor)
    if total != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise IntegrityError(
            "the file was changed while it was read",
            expected=f"{before.st_size} bytes",
            got=f"{total} bytes, written to in the meantime",
            where=path,
            remedy="Wait until nobody writes to it",
        )
    seen(digest.hexdigest(), path)
    return StoredFile(path, total, digest.hexdigest(), content)


def stored(file: Path | StoredFile) -> StoredFile:
    """Return what was read of a file; a path is read now."""
    return file if isinstance(file, StoredFile) else read_file(Path(file))
