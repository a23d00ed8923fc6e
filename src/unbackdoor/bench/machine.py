"""The memory that a process used, and a description of its device."""

from __future__ import annotations

import platform
import resource
import sys

import torch

from unbackdoor.engine.run import Run


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def describe_device(run: Run) -> str:
    """Return the device in words, with threads and precision."""
    if run.device.type == "cuda":
        return f"{torch.cuda.get_device_name(run.device)}, {run.precision.name}"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), {run.precision.name}"
