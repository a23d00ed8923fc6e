"""Threads that sleep while they wait for each other, against threads that spin.

    python benchmarks/waiting.py [--pairs 5] [--threads 2] [--json waiting.json]

The threads of torch meet after every operation. Those that arrive first spin by default, and where another
program runs as well, they spin on the core that the last one waits for. The command line asks for the other
way (``OMP_WAIT_POLICY=PASSIVE``). Measured: steps of training a small network in a given time, in new
processes, on a machine that has nothing else to do and beside one busy loop for each core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from _harness import Ratio, Result, parser
from busy_machine import busy

POLICY = "OMP_WAIT_POLICY"
STEPS = """
import sys, time
import torch
from unbackdoor.networks.build import network
from unbackdoor.networks.geometry import Geometry

seconds, threads = float(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
net = network("small_cnn", Geometry(3, 32, 32, 10))
images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()

for _ in range(3):
    step()
done, start = 0, time.perf_counter()
while done < 1 or time.perf_counter() - start < seconds:
    step()
    done += 1
print((time.perf_counter() - start) / done)
"""


def main() -> None:
    """Parse, run in turn, print."""
    options = parser(__doc__ or "", pairs=5)
    options.add_argument("--seconds", type=float, default=8.0, help="of each run")
    arguments = options.parse_args()
    seconds, pairs = (0.2, 1) if arguments.quick else (arguments.seconds, arguments.pairs)
    loops = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result = Result(
        "waiting",
        f"training steps of small_cnn with {arguments.threads} threads, asleep against spinning",
        {"seconds": seconds, "pairs": pairs, "threads": arguments.threads, "loops": loops},
    )
    measured: dict[str, list[float]] = {}
    for label, count in ((f"beside {loops} busy loops", loops), ("nothing else to do", 0)):
        with busy(count):
            for _ in range(pairs):
                for policy in ("DEFAULT", "PASSIVE"):
                    step = _step(policy, seconds, arguments.threads)
                    measured.setdefault(f"{label}, {policy.lower()}", []).append(step)
        result.add(label, Ratio.of(measured[f"{label}, default"], measured[f"{label}, passive"]))
    result.notes.append("Default is what torch does where nobody asks for anything else.")
    result.show(measured, arguments.json)


def _step(policy: str, seconds: float, threads: int) -> float:
    """Return the seconds of a step, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in (POLICY, "OMP_NUM_THREADS")}
    if policy != "DEFAULT":
        environment[POLICY] = policy
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(seconds), str(threads)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
