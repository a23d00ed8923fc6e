"""SIG: a faint sinusoidal stripe pattern on images of the target class, whose labels stay true.

Paper:   Barni, Kallas & Tondi, "A new backdoor attack in CNNs by training set corruption without label
         poisoning", ICIP 2019.
Departs: in nothing known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbackdoor.attacks.truth import CleanLabelConfig, Trigger
from unbackdoor.registry import attack, option


class SIGConfig(CleanLabelConfig):
    """Options of SIG."""

    amplitude: float = option(40.0, "amplitude delta in grey levels", source="BackdoorBench", gt=0, le=255)
    frequency: float = option(6.0, "periods f across the image", source="paper, section 3", gt=0)


@attack("sig", config=SIGConfig, paper="ICIP 2019")
def sig(cfg: SIGConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return x'(i, j) = x(i, j) + delta sin(2 pi j f / W)."""
    width = shape[2]
    wave = cfg.amplitude * torch.sin(2 * math.pi * torch.arange(width) * cfg.frequency / width)  # (W,)

    def stamp(pixels: Tensor) -> Tensor:
        return (pixels.float() + wave.to(pixels.device)).round().clamp(0, 255).to(torch.uint8)

    return Trigger(stamp=stamp, clean_label=True)
