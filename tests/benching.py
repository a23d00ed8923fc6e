"""What the tests of whole benchmark runs share: a tiny suite, drivers in processes of their own, rows."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from unbackdoor.bench.results import rows_of
from unbackdoor.bench.store import Store

# Two victims and four repairs, a second of work each; nothing here is about whether a method works.
TINY = """
name = "{name}"
version = 1
precision = "fp32"

[[data]]
name = "digits"

[[model]]
architecture = "small_cnn"
widths = [8]

[[recipe]]
name = "plain"
changes = {{ epochs = 2, augmentation = "none" }}

[[attack]]
name = "badnets"

[[attack]]
name = "none"

[defender]
clean_images = [20]

[[defense]]
name = "none"

[[defense]]
name = "ft"
options = {{ epochs = 2 }}
{more}
[limit]
seconds = {seconds}
memory_mb = 2048
"""
LABEL = "tiny-v1"
CELLS = 6
PATIENCE = 600  # seconds; a run takes seconds by itself, and minutes on a machine that is busy elsewhere
# The columns in which two equal runs may differ.
OWN_TIME = {"seconds", "peak_mb", "commit", "victim_processor_seconds"}


def write_suite(folder: Path, name: str = "tiny", *, more: str = "", seconds: int = 300) -> Path:
    """Write a tiny suite into a folder of suites, and return the folder."""
    folder.mkdir(exist_ok=True)
    text = TINY.format(name=name, more=more, seconds=seconds)
    (folder / f"{name}-v1.toml").write_text(text, encoding="utf-8")
    return folder


def start(*words: str | Path, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start ``unbackdoor bench`` as a shell starts it: the first of its process group, hearing Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "unbackdoor", "bench", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(variables or {})},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for a command, check its exit code, and return what it printed on both streams."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return out, err


def bench(*words: str | Path, code: int = 0, variables: dict[str, str] | None = None) -> tuple[str, str]:
    """Run ``unbackdoor bench`` to its end."""
    return ended(start(*words, variables=variables), code)


def rows(store: Path, label: str = LABEL) -> list[dict[str, Any]]:
    """Return the rows of a suite without the columns that two equal runs may differ in."""
    with Store(store) as opened:
        return [row.model_dump(exclude=OWN_TIME) for row in rows_of(opened, label)]


def cells(store: Path, label: str = LABEL) -> list[Any]:
    """Return the cells of a suite."""
    with Store(store) as opened:
        return [cell for cell, _ in opened.members(label)]


def left_behind(store: Path) -> list[str]:
    """Return what lies in a store that is neither a result nor wanted by one."""
    found = [str(f) for name in ("work", "drivers", "checkpoints") for f in (store / name).glob("*")]
    return found + [str(f) for f in store.rglob(".*")]


def database_is_sound(store: Path) -> bool:
    """Have SQLite check every page."""
    with sqlite3.connect(store / "results.db") as db:
        return bool(db.execute("PRAGMA integrity_check").fetchone() == ("ok",))


def states(store: Path, label: str = LABEL) -> dict[str, int]:
    """Return how many cells are in each state, as the command tells it."""
    out, _ = bench("status", label, "--store", store, "--json")
    counts: dict[str, int] = json.loads(out)["suites"][label]
    return counts
