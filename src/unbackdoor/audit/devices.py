"""Where to compute: ``auto`` takes what the machine has."""

from __future__ import annotations

from typing import Any

import torch

AUTO = "auto"


def resolved_device(device: Any) -> Any:
    """Return a device, ``auto`` resolved: CUDA, else Apple's MPS, else the CPU; others as they are.

    Results name the device and the number format that were used.
    """
    if device != AUTO:
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
