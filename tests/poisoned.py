"""Steps that misbehave, each in its own way; run by tests in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

Task = dict[str, Any]


def honest(task: Task, folder: Path) -> Task:
    """Do what is asked."""
    print("working")
    (folder / "kept.txt").write_text("kept", encoding="utf-8")
    return {"twice": 2 * task["number"]}


def raises(task: Task, folder: Path) -> Task:
    """Fail with a message."""
    print("about to fail")
    raise ValueError("no such luck")


def hangs(task: Task, folder: Path) -> Task:
    """Never end, and do not listen to being asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def returns_nan(task: Task, folder: Path) -> Task:
    """Return what is no JSON."""
    return {"acc": float("nan")}


def returns_an_object(task: Task, folder: Path) -> Task:
    """Return what is no JSON at all."""
    return {"acc": object()}


def exhausts_memory(task: Task, folder: Path) -> Task:
    """Take more and more."""
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def kills_itself(task: Task, folder: Path) -> Task:
    """Die as a worker does that the kernel picks when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leaves(task: Task, folder: Path) -> Task:
    """End without a word."""
    os._exit(7)


def writes_outside(task: Task, folder: Path) -> Task:
    """Leave a file where it does not belong."""
    Path(task["path"]).write_text("gotcha", encoding="utf-8")
    return {}


def removes_outside(task: Task, folder: Path) -> Task:
    """Remove a file that is not its own."""
    Path(task["path"]).unlink()
    return {}


def reads_the_truth(task: Task, folder: Path) -> Task:
    """Look where it was not invited."""
    return {"truth": Path(task["path"]).read_text(encoding="utf-8")}


def starts_a_program(task: Task, folder: Path) -> Task:
    """Have another program do it."""
    import subprocess

    subprocess.run(["touch", task["path"]], check=True)
    return {}


def opens_the_database(task: Task, folder: Path) -> Task:
    """Open the store with what Python does not see."""
    import sqlite3

    sqlite3.connect(str(Path(task["path"]) / "results.db")).execute("CREATE TABLE t (a)")
    return {}


def lists_the_store(task: Task, folder: Path) -> Task:
    """Look around."""
    return {"there": [file.name for file in Path(task["path"]).iterdir()]}


def opens_a_socket(task: Task, folder: Path) -> Task:
    """Have somebody to talk to."""
    import socket

    socket.socket().bind(("127.0.0.1", 0))
    return {}


def asks_for_a_name(task: Task, folder: Path) -> Task:
    """Say something in the name that it asks for."""
    import socket

    socket.getaddrinfo("weights.invalid", 80)
    return {}


def forks(task: Task, folder: Path) -> Task:
    """Be two."""
    if os.fork() == 0:
        os._exit(0)
    return {}


def spawns(task: Task, folder: Path) -> Task:
    """Start a program by the way that raises no event."""
    import sys
    from multiprocessing import util

    util.spawnv_passfds(os.fsencode(sys.executable), [sys.executable, "-c", "pass"], ())
    return {}


def makes_a_temporary_file(task: Task, folder: Path) -> Task:
    """Do as libraries do."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        return {"made": file.name}


def finds_no_room(task: Task, folder: Path) -> Task:
    """Meet a full disk."""
    import errno

    raise OSError(errno.ENOSPC, "No space left on device")


def tells_its_number(task: Task, folder: Path) -> Task:
    """Leave the process number, and stay."""
    (folder / "pid").write_text(str(os.getpid()), encoding="utf-8")
    while True:
        time.sleep(1)
