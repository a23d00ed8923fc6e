"""Decode many images into one array, in parallel.

Worker processes, not threads: Pillow holds the interpreter lock for most of a small image, and two threads
are slower than none. Each worker is a script with pipes, whose answers are read straight into their rows of
the result.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, BufferedWriter
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from unbackdoor.data import decode_worker
from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.types import Progress, silent

CHUNK = 256
MAX_WORKERS = 16
# Below this, starting workers costs more than they save.
PARALLEL_FROM = 2048
_MAX_BYTES = 1 << 35
# A chunk of very large files is cut short, so that the pipes never hold more than this plus one image.
_CHUNK_BYTES = 1 << 25

Item = tuple[str, bytes]


@dataclass(frozen=True)
class Damaged:
    """An image that was left out: which, and what is wrong with it."""

    row: int
    error: InputError | UnsafeFile


def damage_notes(damaged: Sequence[Damaged], count: int) -> tuple[str, ...]:
    """Return in words what was left out of ``count`` images; nothing where nothing was."""
    if not damaged:
        return ()
    first = damaged[0].error
    return (f"{len(damaged)} of {count} images are damaged and were left out; the first: {first.where}",)


def decode(
    items: Iterable[Item],
    count: int,
    *,
    name: str,
    size: tuple[int, int] | None = None,
    progress: Progress = silent,
    workers: int | None = None,
    damaged: list[Damaged] | None = None,
) -> NDArray[np.uint8]:
    """Return pixels (N, C, H, W); C is 1 where every image is greyscale, else 3.

    Args:
        items: ``count`` pairs of where an image lies, in words, and its encoded bytes.
        count: Number of images N, at least 1.
        name: What the set is called in messages and beside the progress bar.
        size: (H, W) to resize to; None demands that all images have one size.
        progress: Shows the chunks that are done.
        workers: Worker processes; 0 decodes here, None chooses by the count and the cores.
        damaged: Takes the images that cannot be decoded, and they are left out; None makes each an error.

    Raises:
        InputError: If an image is damaged, differs in size, or the count is wrong; the first such image.
        UnsafeFile: If an image declares an absurd number of pixels.
    """
    if damaged is not None:
        items = _intact(items, size, damaged)
    chunks = _chunks(items)
    first = next(chunks, None)
    if first is None and damaged:
        raise damaged[0].error
    if first is None:
        raise InputError("the set is empty", expected=f"{count} images", got=0, where=name)
    try:
        top, _ = decode_worker.decode_image(first[0][1], size)
    except decode_worker.Undecodable as error:
        raise explained(error.facts, first[0][0]) from error
    height, width = top.shape[:2]
    require_memory(count * 3 * height * width, name)
    pixels = np.empty((count, 3, height, width), dtype=np.uint8)
    if workers is None:
        workers = min(MAX_WORKERS, processors()) if count >= PARALLEL_FROM else 0
    if workers < 2 or not sys.executable or not Path(decode_worker.__file__).is_file():
        workers = 0
    done, grey = 0, True
    with _Pool(workers, size) as pool:
        results = pool.run(chain([first], chunks), pixels, name)
        for rows, all_grey in progress(results, f"decoding {name}", -(-count // CHUNK)):
            done += rows
            grey = grey and all_grey
    if done + len(damaged or ()) != count:
        raise InputError("the number of images is wrong", expected=count, got=done, where=name)
    pixels = pixels[:done]
    return np.ascontiguousarray(pixels[:, :1]) if grey else pixels


def _intact(items: Iterable[Item], size: tuple[int, int] | None, damaged: list[Damaged]) -> Iterator[Item]:
    """Yield the images that can be decoded; each is decoded once to see."""
    for row, (where, data) in enumerate(items):
        try:
            decode_worker.decode_image(data, size)
        except decode_worker.Undecodable as error:
            damaged.append(Damaged(row, explained(error.facts, where)))
        else:
            yield where, data


def require_memory(needed: int, where: str) -> None:
    """Raise InputError where decoded pixels would take more than half of the machine's memory."""
    limit = _MAX_BYTES
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = min(limit, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if needed > limit:
        raise InputError(
            "the set is too large to hold in memory",
            expected=f"at most {limit / 2**30:.1f} GiB of pixels",
            got=f"{needed / 2**30:.1f} GiB",
            where=where,
            remedy="Give a smaller size or fewer images",
        )


def explained(facts: dict[str, Any], where: str) -> InputError | UnsafeFile:
    """Return the typed error for an image that cannot be used."""
    kind = UnsafeFile if facts["bomb"] else InputError
    return kind(
        facts["problem"],
        expected=facts["expected"] or None,
        got=facts["got"] or None,
        where=where,
        remedy=facts["remedy"] or None,
    )


class _Worker:
    """One decoder process."""

    def __init__(self) -> None:
        # -P: the script's own folder must not come before the installed packages. The path is handed on,
        # so that the worker finds the very Pillow that this process uses.
        command = [sys.executable, "-P", str(Path(decode_worker.__file__))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def decode(self, chunk: list[Item], size: tuple[int, int] | None, out: NDArray[np.uint8]) -> bool:
        """Fill ``out`` (B, 3, H, W) and return whether all images are greyscale."""
        stdin = cast(BufferedWriter, self._process.stdin)
        stdout = cast(BufferedReader, self._process.stdout)
        head = {"lengths": [len(data) for _, data in chunk], "size": size, "shape": out.shape[2:]}
        try:
            stdin.write(json.dumps(head).encode() + b"\n")
            stdin.writelines(data for _, data in chunk)
            stdin.flush()
            line = stdout.readline()
            answer = json.loads(line) if line else None
            if answer is not None and answer["ok"] and stdout.readinto(out.data.cast("B")) != out.nbytes:
                answer = None
        except OSError:
            answer = None
        if answer is None:
            raise InputError(
                "the image decoder stopped",
                expected=f"{len(chunk)} images",
                got=f"exit code {self._process.wait()}",
                where=f"{chunk[0][0]} to {chunk[-1][0]}",
                remedy="Look for a damaged image there, and for free memory",
            )
        if not answer["ok"]:
            raise explained(answer, chunk[answer["index"]][0])
        return bool(answer["grey"])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            # Closing flushes, and nobody reads any more.
            with suppress(OSError):
                cast(BufferedIOBase, pipe).close()


class _Pool:
    """Decodes chunks in order of submission; without workers, in this process."""

    def __init__(self, workers: int, size: tuple[int, int] | None) -> None:
        self._count = workers
        self._size = size
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        # Processes first: a thread that waits for an answer gets an end of file and returns.
        for worker in self._workers:
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def run(
        self, chunks: Iterable[list[Item]], pixels: NDArray[np.uint8], name: str
    ) -> Iterator[tuple[int, bool]]:
        """Yield the number of images of each chunk and whether they are greyscale, in order."""
        pending: deque[tuple[int, Future[bool]]] = deque()
        start = 0
        for chunk in chunks:
            rows = pixels[start : start + len(chunk)]
            start += len(chunk)
            if len(rows) < len(chunk):
                raise InputError(
                    "the number of images is wrong", expected=len(pixels), got=f"at least {start}", where=name
                )
            if self._count == 0:
                yield len(chunk), self._here(chunk, rows)
                continue
            pending.append((len(chunk), self._submit(chunk, rows)))
            # Bounds the encoded bytes in flight, and keeps errors in the order of the rows.
            if len(pending) > 2 * self._count:
                count, future = pending.popleft()
                yield count, future.result()
        for count, future in pending:
            yield count, future.result()

    def _here(self, chunk: list[Item], out: NDArray[np.uint8]) -> bool:
        try:
            out[:], grey = decode_worker.decode_chunk([data for _, data in chunk], self._size, _hw(out))
        except decode_worker.Undecodable as error:
            raise explained(error.facts, chunk[int(error.facts["index"])][0]) from error
        return grey

    def _submit(self, chunk: list[Item], out: NDArray[np.uint8]) -> Future[bool]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="decode")
            for _ in range(self._count):
                self._workers.append(_Worker())
                self._idle.put(self._workers[-1])
        return self._threads.submit(self._there, chunk, out)

    def _there(self, chunk: list[Item], out: NDArray[np.uint8]) -> bool:
        worker = self._idle.get()
        try:
            return worker.decode(chunk, self._size, out)
        finally:
            self._idle.put(worker)


def _hw(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    return (int(pixels.shape[2]), int(pixels.shape[3]))


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(_until(islice(iterator, CHUNK), _CHUNK_BYTES)):
        yield chunk


def _until(items: Iterator[Item], limit: int) -> Iterator[Item]:
    total = 0
    for item in items:
        yield item
        total += len(item[1])
        if total >= limit:
            return


def processors() -> int:
    """Return the number of processors that this process may use.

    A container or a batch system may grant fewer than the machine has.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
