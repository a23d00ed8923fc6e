"""Which number format a forward or backward pass runs in, and why.

``auto`` means bf16 autocast where the processor multiplies bf16 natively, and fp32 elsewhere. Weights,
masks, losses and optimiser states stay fp32 in either case: only convolutions and products are lowered.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

Policy = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Precision:
    """A resolved precision on one kind of device.

    Attributes:
        name: ``fp32`` or ``bf16``.
        device_type: ``cpu`` or ``cuda``.
        reason: Why this one, for the log.
    """

    name: Literal["fp32", "bf16"]
    device_type: str
    reason: str

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context that forward passes run in."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.name == "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 in hardware, so that it is faster than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def resolve(policy: Policy, device: torch.device) -> Precision:
    """Turn a policy into a precision for a device; ``auto`` falls back to fp32 and says so."""
    if policy == "fp32":
        return Precision("fp32", device.type, "asked for")
    if policy == "bf16":
        return Precision("bf16", device.type, "asked for")
    if has_native_bf16(device):
        return Precision("bf16", device.type, "the processor multiplies bf16 natively")
    return Precision("fp32", device.type, "the processor has no native bf16")
