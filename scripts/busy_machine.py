"""Run a command again and again while busy loops hold the cores, and print how long each run took.

    python scripts/busy_machine.py --runs 5 --loops 4 -- .venv/bin/python -m pytest -n 2

The exit code is 0 if every run ended with 0, and 1 otherwise; a run that fails stops nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A loop ends with this process, however it ends: its standard input is closed then.
_LOOP = """
import sys, threading
def watch():
    sys.stdin.read()
    import os
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
while True:
    pass
"""


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep so many processes busy inside the block."""
    processes = [subprocess.Popen([sys.executable, "-c", _LOOP], stdin=subprocess.PIPE) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> int:
    """Parse, run, and print one line a run and a verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loops", type=int, default=4, help="busy processes beside the command")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    seconds, codes = [], []
    with busy(arguments.loops):
        for number in range(1, arguments.runs + 1):
            start = time.monotonic()
            codes.append(subprocess.run(arguments.command, check=False).returncode)
            seconds.append(round(time.monotonic() - start, 1))
            print(f"run {number} of {arguments.runs}: exit code {codes[-1]}, {seconds[-1]} s", flush=True)
    verdict = {"loops": arguments.loops, "exit_codes": codes, "seconds": seconds, "longest": max(seconds)}
    print(json.dumps(verdict))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
