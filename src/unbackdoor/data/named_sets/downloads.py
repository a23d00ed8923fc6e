"""Published archives: read from a folder, or downloaded with a limit on their size and a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unbackdoor.data.named_sets.catalogue import Archive
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.files import atomic_write
from unbackdoor.types import Progress, silent

Opener = Callable[[str], Any]
_PIECE = 1 << 20
_TIMEOUT_SECONDS = 30.0


def open_url(url: str) -> Any:
    """Open an address for reading; a server that stays silent for half a minute counts as gone."""
    return urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)


def find_archive(archive: Archive, folders: Sequence[Path]) -> Path | None:
    """Return the archive from the first folder that holds it.

    Raises:
        IntegrityError: If a file of that name has another checksum.
    """
    for folder in folders:
        path = folder / archive.filename
        if path.is_file():
            with path.open("rb") as file:
                got = hashlib.file_digest(file, lambda: _hasher(archive)).hexdigest()
            if got != archive.digest:
                raise _wrong_checksum(archive, got, path, f"Delete {path}, or replace it from {archive.url}")
            return path
    return None


def fetch_archive(
    archive: Archive, folder: Path, *, progress: Progress = silent, opener: Opener = open_url
) -> Path:
    """Download an archive into a folder; it appears under its name only when complete and checked.

    Args:
        archive: What to fetch.
        folder: Where to; created where it is missing.
        progress: Shows the megabytes that have come.
        opener: Opens an address as a readable context manager with ``headers``.

    Raises:
        InputError: If the address cannot be reached or the answer is longer than it can be.
        IntegrityError: If the checksum is wrong.
    """
    path = folder / archive.filename
    digest = _hasher(archive)
    with atomic_write(path) as draft:
        with draft.open("wb") as file, _opened(archive, opener) as answer:
            stated = answer.headers.get("Content-Length") or ""
            length = int(stated) if stated.isdecimal() else 0
            pieces = _pieces(answer, archive, length)
            for piece in progress(pieces, f"downloading {archive.filename}", -(-length // _PIECE) or None):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != archive.digest:
            raise _wrong_checksum(
                archive, digest.hexdigest(), archive.url, "Try again later; nothing was kept"
            )
    return path


@contextlib.contextmanager
def _opened(archive: Archive, opener: Opener) -> Iterator[Any]:
    with _network_errors(archive):
        answer = opener(archive.url)
    with contextlib.closing(answer):
        yield answer


def _pieces(answer: Any, archive: Archive, length: int) -> Iterator[bytes]:
    total = 0
    while True:
        # Only around the read: an error of the disk must not be reported as one of the network.
        with _network_errors(archive):
            piece: bytes = answer.read(_PIECE)
        if not piece:
            break
        total += len(piece)
        if total > archive.max_bytes:
            raise InputError(
                "the download is longer than the file can be",
                expected=f"at most {archive.max_bytes} bytes",
                got="more",
                where=archive.url,
                remedy="Check the address in a browser; nothing was kept",
            )
        yield piece
    if total < length:
        raise InputError(
            "the download broke off",
            expected=f"{length} bytes",
            got=total,
            where=archive.url,
            remedy="Try again; nothing was kept",
        )


@contextlib.contextmanager
def _network_errors(archive: Archive) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            "the download failed",
            got=f"{type(error).__name__}: {error}",
            where=archive.url,
            remedy="Check the network connection; nothing was kept",
        ) from error


def _hasher(archive: Archive) -> Any:
    # A checksum that its owners chose; where policy forbids MD5 for security, it is still their checksum.
    return hashlib.new(archive.algorithm, usedforsecurity=False)


def _wrong_checksum(archive: Archive, got: str, where: object, remedy: str) -> IntegrityError:
    return IntegrityError(
        f"the {archive.algorithm} checksum of {archive.filename} is wrong",
        expected=archive.digest,
        got=got,
        where=where,
        remedy=remedy,
    )
