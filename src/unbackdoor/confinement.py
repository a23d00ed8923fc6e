"""Files of unknown origin are read in a process of their own first, within hard limits of memory and time.

The readers count what they do and refuse what no honest file needs (``weights.formats.limits``). What is not
foreseen there ends here: a file that hangs, fills the memory or ends the process of its reader does so in a
child, and is a typed error in the parent.

For files of weights the child is a rehearsal. It does the very work that the parent is about to do, and
answers nothing but the hashes of what it read; when it has come to its end, well or with a typed error, the
parent does the same work on the same bytes and comes to the same end. So nothing that a hostile file may have
touched is taken over, and no second form of every result is needed. The parent refuses bytes that were not
rehearsed. For sets of images, whose decoding takes minutes, the child leaves the pixels in the cache, a plain
file of tensors that is checked against its hash.

Confinement is the default. ``UNBACKDOOR_CONFINE=0`` turns it off, for systems where processes cannot be
started; where the operating system has no fork there is none.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.errors import InputError, IntegrityError, MethodFailed, UnbackdoorError, UnsafeFile

VARIABLE = "UNBACKDOOR_CONFINE"


@dataclass(frozen=True)
class Bounds:
    """What reading a file may take in its own process; each far beyond any honest file.

    Attributes:
        seconds: Wall time for a small file; a ResNet-18 is opened in less than one.
        bytes_per_second: Speed that a large file is read with at least.
        memory_mb: Memory for a small file, on top of what the imported code takes.
        memory_factor: Times the bytes of the file that may be taken in addition.
    """

    seconds: float = 300.0
    bytes_per_second: float = 4e6
    memory_mb: int = 4096
    memory_factor: float = 8.0


WEIGHTS = Bounds()
# Decoding is slower, and pixels take up to the half of the memory (``data.decode.require_memory``).
IMAGES = Bounds(seconds=900.0, bytes_per_second=2.5e5, memory_mb=6144, memory_factor=64.0)
# The end of the budget that holds, on the clock of ``now``; None without a limit. Opening may go on for the
# grace after it: a small budget then ends the checks, and the scan still says what it has.
GRACE = 15.0  # seconds
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

_rehearsed: ContextVar[frozenset[str] | None] = ContextVar("rehearsed", default=None)
_read: list[str] = []  # hashes of what this process, a child, has read
_MOST_READ = 10_000
_OUT_OF_MEMORY = ("alloc", "out of memory", "malloc")


def enabled() -> bool:
    """Tell whether files are read in a process of their own here."""
    if os.environ.get(VARIABLE) == "0" or not hasattr(os, "fork"):
        return False
    from unbackdoor import isolate

    return not isolate.inside()


def now() -> float:
    """Return the time of the clock that deadlines are measured by, in seconds."""
    return time.monotonic()


def start() -> None:
    """Start the server of processes, which imports its modules meanwhile."""
    if enabled():
        _isolate().start()


@contextmanager
def rehearsed(
    function: str,
    path: Path,
    options: Mapping[str, Any] | None = None,
    *,
    bounds: Bounds = WEIGHTS,
) -> Iterator[None]:
    """Do the work of the block in a child first; what is read in the block must be what was read there.

    Within another such block nothing is done, because that one has covered it.

    Args:
        function: Importable name of ``f(path, options)``, which does the work and may return the error that
            it reports instead of raising it.
        path: The file.
        options: JSON-ready.
        bounds: Limits of the child.

    Raises:
        UnsafeFile: If the child took too much time or memory, or died.
        InputError: If it raised an error that is none of ours: a defect, which the file brought to light.
    """
    if not enabled() or _rehearsed.get() is not None:
        yield
        return
    task = {"function": function, "path": str(Path(path).absolute()), "options": dict(options or {})}
    answer = _answer("unbackdoor.confinement:_rehearse", task, _size(path), path, bounds)
    token = _rehearsed.set(frozenset(answer["read"]))
    try:
        yield
    finally:
        _rehearsed.reset(token)


def seen(digest: str, where: object) -> None:
    """Tell that bytes with this SHA-256 have been read and are about to be parsed.

    Raises:
        IntegrityError: If they are not those that were rehearsed.
    """
    expected = _rehearsed.get()
    if expected is not None and digest not in expected:
        raise IntegrityError(
            "the file was changed while it was read", where=where, remedy="Wait until nobody writes to it"
        )
    _read.append(digest)
    del _read[:-_MOST_READ]


def run(
    function: str,
    task: Mapping[str, Any],
    size: int,
    where: object,
    *,
    bounds: Bounds = IMAGES,
    tick: Callable[[Mapping[str, Any] | None], None] | None = None,
) -> None:
    """Run ``f(task)`` in a child, which leaves its result in a file; its typed errors are raised here.

    Args:
        function: Importable name.
        task: JSON-ready; the function gets it with ``progress``, a file that it may write JSON to.
        size: Bytes of what it reads.
        where: The file, for messages.
        bounds: Limits of the child.
        tick: Called again and again with what stands in the file of the progress, or None.

    Raises:
        UnbackdoorError: As the function raised it, or as for :func:`rehearsed`.
    """
    answer = _answer("unbackdoor.confinement:_run", {"function": function, **task}, size, where, bounds, tick)
    if answer.get("error") is not None:
        raise _as_error(answer["error"])


# ---------------------------------------------------------------------------------------------------
# In the parent


def _isolate() -> Any:
    from unbackdoor import isolate

    isolate.preload("unbackdoor.opening.inspection", "unbackdoor.opening.open_model")
    return isolate


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError):
        return 0


def _answer(
    function: str,
    task: Mapping[str, Any],
    size: int,
    where: object,
    bounds: Bounds,
    tick: Callable[[Mapping[str, Any] | None], None] | None = None,
) -> dict[str, Any]:
    isolate = _isolate()
    seconds = bounds.seconds + size / bounds.bytes_per_second
    end = deadline.get()
    left = seconds if end is None else end + GRACE - now()
    seconds = max(min(seconds, left), 0.0)
    memory = int(bounds.memory_mb + bounds.memory_factor * size / 2**20)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
        memory = min(memory, max(machine, bounds.memory_mb))
    limits = isolate.Limits(
        seconds=seconds, memory_mb=memory, cpu_seconds=int(16 * seconds) + 1 if seconds < 1e8 else None
    )
    with _folder() as folder:
        report = Path(folder) / "progress.json"

        def look() -> None:
            assert tick is not None
            try:
                tick(json.loads(report.read_bytes()))
            except (OSError, ValueError):
                tick(None)

        task = {**task, "progress": str(report)}
        try:
            answer: dict[str, Any] = isolate.call(
                function, task, Path(folder), limits, tick=None if tick is None else look
            )
        except MethodFailed as error:
            if left <= seconds and end is not None and "out of time" in error.problem:
                raise InputError(
                    "the budget was spent before the file was read",
                    where=where,
                    remedy="Give a larger budget",
                ) from error
            raise _died(error, where, seconds, memory) from error
        except (OSError, EOFError) as error:  # no more processes, or no socket to ask for one
            raise _no_process(error) from error
    if answer.get("memory"):
        raise _exhausting("memory", f"{memory} MB", where)
    if answer.get("defect"):
        raise InputError(
            "the file cannot be read: it brings a defect of unbackdoor to light",
            got=answer["defect"],
            where=where,
            remedy="Please report it with the file",
        )
    return answer


@contextmanager
def _folder() -> Iterator[str]:
    try:
        made = tempfile.TemporaryDirectory(prefix="unbackdoor-")
    except OSError as error:
        raise _no_process(error) from error
    with made as folder:
        yield folder


def _no_process(error: BaseException) -> InputError:
    return InputError(
        "no process can be started to read the file in",
        got=str(error) or type(error).__name__,
        remedy=f"Set TMPDIR to a folder that can be written, or {VARIABLE}=0 to read it in this process",
    )


def _died(error: MethodFailed, where: object, seconds: float, memory: int) -> UnbackdoorError:
    if "out of time" in error.problem or "SIGXCPU" in str(error.got):
        return _exhausting("time", f"{seconds:.0f} s", where)
    if any(word in str(error).lower() for word in ("memoryerror", *_OUT_OF_MEMORY)):
        return _exhausting("memory", f"{memory} MB", where)
    return UnsafeFile(
        "the process that read the file died", got=error.got or error.problem, where=where, remedy=_REMEDY
    )


_REMEDY = "It may be built to exhaust its reader: do not load it"


def _exhausting(what: str, limit: str, where: object) -> UnsafeFile:
    return UnsafeFile(
        f"reading the file takes more {what} than that of any model or set of images",
        expected=f"at most {limit}",
        where=where,
        remedy=_REMEDY,
    )


def _as_error(facts: Mapping[str, Any]) -> UnbackdoorError:
    # The class is looked up among ours by its name; what it is made of are texts.
    from unbackdoor import errors

    kind = getattr(errors, str(facts["kind"]), None)
    if not (isinstance(kind, type) and issubclass(kind, UnbackdoorError)):
        kind = InputError
    texts = {
        key: str(value) if value is not None else None
        for key, value in dict(facts["facts"]).items()
        if key in ("expected", "got", "where", "remedy")
    }
    error = kind.__new__(kind)
    UnbackdoorError.__init__(error, str(facts["problem"]), **texts)  # some kinds take other arguments
    return error


# ---------------------------------------------------------------------------------------------------
# In the child


def _rehearse(task: Mapping[str, Any], _: Path) -> dict[str, Any]:
    def work() -> object:
        return _named(task["function"])(Path(task["path"]), dict(task["options"]))

    _read.clear()
    answer = _ended(work)[1]
    return {**answer, "read": list(_read)}


def _run(task: Mapping[str, Any], _: Path) -> dict[str, Any]:
    error, answer = _ended(lambda: _named(task["function"])(dict(task)))
    if error is not None:
        facts = {key: getattr(error, key) for key in ("expected", "got", "where", "remedy")}
        answer["error"] = {
            "kind": type(error).__name__,
            "problem": error.problem,
            "facts": {key: None if value is None else str(value) for key, value in facts.items()},
        }
    return answer


def _named(function: str) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _ended(work: Callable[[], object]) -> tuple[UnbackdoorError | None, dict[str, Any]]:
    """Return the typed error that the work raised or returned, and what else became of it."""
    try:
        result = work()
    except UnbackdoorError as error:
        result = error
    except MemoryError:
        return None, {"memory": True}
    except Exception as error:  # noqa: BLE001  the last stop: whatever it was, the parent makes it typed
        if _is_for_lack_of_memory(error):
            return None, {"memory": True}
        traceback.print_exc()
        return None, {"defect": f"{type(error).__name__}: {error}"[:500]}
    typed = result if isinstance(result, UnbackdoorError) else None
    # A reader may have taken the lack of memory for a damaged file; the parent has more, and would fill it.
    return typed, {"memory": True} if _is_for_lack_of_memory(typed) else {}


def _is_for_lack_of_memory(error: BaseException | None) -> bool:
    for _ in range(20):
        if error is None:
            return False
        words = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError | OSError) and any(word in words for word in _OUT_OF_MEMORY)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
