"""Run one function in a process of its own, with its time, memory and files bounded.

The process is forked from a server that has imported everything and seen no data, so that starting one
costs milliseconds and nothing of the driver's memory is in it. It ends when its driver ends. The steps of a
benchmark run in such processes, and files of unknown origin are read in them (``unbackdoor.confinement``).
"""

from __future__ import annotations

import _posixsubprocess
import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from unbackdoor.errors import DiskFull, MethodFailed
from unbackdoor.files import is_disk_full, write_json

TASK, RESULT, LOG = "task.json", "result.json", "log.txt"
SCRATCH = "tmp"  # where a confined process makes its temporary files
_preloaded: list[str] = []
_TICK = 0.1  # seconds between two looks at a process
_GRACE = 5.0  # seconds between asking a process to end (SIGTERM) and killing it
_FULL = errno.ENOSPC  # exit status of a process whose disk is full, even for its answer


@dataclass(frozen=True)
class Limits:
    """What a process may take.

    Attributes:
        seconds: Wall time.
        memory_mb: Memory of its own, on top of what the imported code takes.
        threads: Threads of the numerical libraries.
        cpu_seconds: Time of all its processors together, or None.
    """

    seconds: float = 3600
    memory_mb: int = 8192
    threads: int = 1
    cpu_seconds: int | None = None


_inside = False  # whether this process is one of those that are started here
_context: ForkServerContext | None = None
_context_lock = threading.Lock()


_living: set[Any] = set()
_living_lock = threading.Lock()


def end_all() -> None:
    """End every process that was started here; the calls that wait for them fail."""
    with _living_lock:
        for process in _living:
            with contextlib.suppress(ValueError, OSError):
                process.kill()


def preload(*modules: str) -> None:
    """Have the server import modules before it forks; without effect once it runs."""
    _preloaded.extend(module for module in modules if module not in _preloaded)


def inside() -> bool:
    """Tell whether this process was started here."""
    return _inside


def start() -> None:
    """Start the server, which imports its modules while this process goes on."""
    _allow_children()
    _server()


def _server() -> ForkServerContext:
    global _context
    with _context_lock:
        if _context is None:
            _context = multiprocessing.get_context("forkserver")
            _context.set_forkserver_preload(list(_preloaded))
        resource_tracker.ensure_running()  # first, because starting it unblocks the signal again
        with _interrupts_blocked():
            forkserver.ensure_running()
        return _context


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C for a server that is started here; it ignores it by itself only after its imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main program, which multiprocessing would import again in the new process.

    A program of the user that does its work at the top level would do it once more there.
    """
    main = sys.modules.get("__main__")
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        if main is not None:
            sys.modules["__main__"] = main


def call(
    function: str,
    task: Mapping[str, Any],
    folder: Path,
    limits: Limits,
    *,
    private: Sequence[Path] = (),
    tick: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run ``module:function`` on a JSON task in another process and return its JSON result.

    Args:
        function: Importable name of ``f(task, folder) -> dict``.
        task: JSON-ready argument.
        folder: Existing folder for the task, the log and what the function writes.
        limits: Time, memory and threads.
        private: For code that is not trusted: refuse it all writing outside ``folder``, and all reading of
            these files and folders but for ``folder`` itself.
        tick: Called again and again while the process runs.

    Raises:
        DiskFull: If it found no room for what it had to write.
        MethodFailed: If the process raised, was killed, ran out of time or memory, or returned no JSON. The
            end of its log is in the message.
    """
    write_json(folder / TASK, dict(task))
    (folder / RESULT).unlink(missing_ok=True)
    _allow_children()
    process = _server().Process(
        target=_child,
        args=(function, str(folder), limits, [str(path) for path in private]),
        daemon=True,
    )
    with _living_lock, _without_main():
        process.start()
        _living.add(process)
    try:
        end = time.monotonic() + limits.seconds
        while tick is not None and process.is_alive() and time.monotonic() < end:
            process.join(_TICK)
            tick()
        process.join(max(end - time.monotonic(), 0))
        timed_out = process.is_alive()
    finally:
        _end(process)
        with _living_lock:
            _living.discard(process)
    if timed_out:
        raise MethodFailed("it ran out of time", expected=f"at most {limits.seconds:g} s", got="no end")
    if (folder / RESULT).exists():
        answer = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if answer.get("full"):
            raise _full(folder)
        if "error" in answer:
            raise MethodFailed(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result
    code = process.exitcode or 0
    if code == _FULL:
        raise _full(folder)
    outcome = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    raise MethodFailed("its process ended without a result", got=outcome)


def _full(folder: Path) -> DiskFull:
    return DiskFull("the disk is full", where=folder, got=os.strerror(_FULL), remedy="Free some space")


def _allow_children() -> None:
    """Let a worker that a nanny of Dask started have processes of its own.

    Such a worker is a daemon process, and multiprocessing refuses children to daemons, because they might
    outlive it. Ours end with it.
    """
    worker = multiprocessing.current_process()
    if worker.daemon:
        worker.daemon = False


def log_of(folder: Path, limit: int = 20_000) -> str:
    """Return the end of what a process printed."""
    try:
        data = (folder / LOG).read_bytes()
    except OSError:
        return ""
    return data[-limit:].decode("utf-8", "replace")


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(_GRACE)
    if process.is_alive():
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------------
# Inside the process


def _child(function: str, folder: str, limits: Limits, private: Sequence[str]) -> None:
    global _inside
    _inside = True
    place = Path(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    _die_with_driver()
    log = os.open(place / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    answer: dict[str, Any]
    try:
        _apply_limits(limits)
        module, name = function.split(":")
        step = getattr(importlib.import_module(module), name)
        task = json.loads((place / TASK).read_text(encoding="utf-8"))
        if private:
            os.chdir(place)
            (place / SCRATCH).mkdir(exist_ok=True)
            tempfile.tempdir = os.environ["TMPDIR"] = str(place / SCRATCH)
            confine(place, [Path(path) for path in private])
        answer = {"result": step(task, place)}
    except BaseException as error:  # noqa: BLE001  whatever it was, it becomes a row
        with contextlib.suppress(OSError):  # a log that finds no room
            traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"[:4000], "full": is_disk_full(error)}
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        write_json(place / RESULT, answer)
    except DiskFull:
        os._exit(_FULL)
    except Exception as error:  # noqa: BLE001  such as a result that is no JSON
        traceback.print_exc()
        write_json(place / RESULT, {"error": f"its result could not be written: {error}"[:4000]})


def _apply_limits(limits: Limits) -> None:
    import torch

    torch.set_num_threads(limits.threads)
    if sys.platform.startswith("linux"):
        # On top of what the imported code takes, which is the same for every method.
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        limit = pages * resource.getpagesize() + limits.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if limits.cpu_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_with_driver() -> None:
    """End this process when its driver is gone, however it went.

    The driver holds the other end of a pipe, which the operating system closes when the driver ends. The
    fork server cannot be watched instead, because it lives as long as its processes; nor can the driver's
    process number, because it may be given to another process later.
    """
    driver = parent_process()
    assert driver is not None  # only ever called in a process of a fork server

    def watch() -> None:
        connection.wait([driver.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def confine(folder: Path, private: Sequence[Path]) -> None:
    """Refuse this process to write outside a folder, or to read anything else that is private.

    An audit hook sees every file that Python opens, moves or removes. It stops mistakes and forbidden reads
    by Python code; it cannot stop machine code.
    """
    own_folder = str(folder.resolve())
    hidden = [str(path.resolve()) for path in private]
    writing = {
        "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
        "os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile",
    }  # fmt: skip
    refused = {
        "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
        "socket.__new__", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
        "socket.gethostbyname",
    }  # fmt: skip
    listing = {"os.listdir", "os.scandir"}

    def no_program(*words: object) -> int:
        raise PermissionError("a method may not start a program")

    # multiprocessing starts programs with this function, and it is the only way that raises no audit event.
    _posixsubprocess.fork_exec = no_program

    def inside(path: object, root: str) -> bool:
        try:
            text = os.path.realpath(os.fspath(path))  # type: ignore[call-overload]
        except (TypeError, ValueError):
            return True  # a file descriptor: it was checked when it was opened
        return bool(text == root or text.startswith(root + os.sep))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in refused:
            raise PermissionError(f"a method may not do {event}")
        if event in writing:
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)) and not inside(path, own_folder):
                    raise PermissionError(f"a method may not write outside its folder: {path!r}")
        if event == "sqlite3.connect" and args[0] != ":memory:":  # opened by machine code, unseen below
            raise PermissionError(f"a method may not open a database: {args[0]!r}")
        if event in listing:
            place = args[0] or "."
            if not inside(place, own_folder) and any(inside(place, root) for root in hidden):
                raise PermissionError(f"a method may not look there: {place!r}")
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, _, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
            if writes and not inside(path, own_folder) and os.fspath(path) != os.devnull:
                raise PermissionError(f"a method may not write outside its folder: {path!r}")
            if not inside(path, own_folder) and any(inside(path, root) for root in hidden):
                raise PermissionError(f"a method may not read there: {path!r}")

    sys.addaudithook(hook)
