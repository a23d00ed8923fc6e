"""How visible a trigger is: PSNR and SSIM between clean and triggered images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks.poison import stamped
from unbackdoor.attacks.truth import AttackTruth
from unbackdoor.errors import InputError

_WINDOW, _SIGMA = 11, 1.5  # of the Gaussian, in the paper of SSIM
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(clean: Tensor, changed: Tensor) -> Tensor:
    """Return the PSNR (N,) of uint8 images (N, C, H, W), in dB; inf where nothing changed.

    Example:
        >>> white = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
        >>> psnr(white, white - 1).round(decimals=2)
        tensor([48.1300])
    """
    squares = (_both(clean, changed)[0] - changed.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / squares)


def ssim(clean: Tensor, changed: Tensor) -> Tensor:
    """Return the structural similarity (N,) of uint8 images (N, C, H, W): 1 where nothing changed.

    It is the mean over all places and channels. Images are continued beyond their edges, so that a patch in a
    corner counts like one in the middle; small images have smaller windows.

    Paper: Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment", IEEE TIP 13 (2004).
    """
    x, y = _both(clean, changed)
    channels, height, width = x.shape[1:]
    sizes = [min(_WINDOW, side) for side in (height, width)]
    curves = [torch.exp(-((torch.arange(n) - (n - 1) / 2) ** 2) / (2 * _SIGMA**2)) for n in sizes]
    window = torch.outer(*curves)
    window = (window / window.sum()).expand(channels, 1, *sizes).to(x.device)

    def mean(values: Tensor) -> Tensor:
        (rows, columns), before = sizes, [n // 2 for n in sizes]
        border = (before[1], columns - 1 - before[1], before[0], rows - 1 - before[0])
        return F.conv2d(F.pad(values, border, mode="replicate"), window, groups=channels)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    likeness = (2 * mx * my + _C1) * (2 * both + _C2) / ((mx**2 + my**2 + _C1) * (vx + vy + _C2))
    return likeness.flatten(1).mean(1)


def _both(clean: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    if clean.shape != changed.shape or clean.dim() != 4:
        raise InputError("images differ in form", expected=tuple(clean.shape), got=tuple(changed.shape))
    return clean.float(), changed.float()


@dataclass(frozen=True)
class Visibility:
    """Means over images.

    Attributes:
        psnr: In dB, of the mean squared error over all images; inf where nothing changed.
        ssim: Mean structural similarity.
        largest: Largest change of a pixel in grey levels.
        pixels: Share of the pixels that change at all.
    """

    psnr: float
    ssim: float
    largest: int
    pixels: float


def visibility(pixels: Tensor, truth: AttackTruth) -> Visibility:
    """Measure the trigger of an attack on clean uint8 images (N, C, H, W), at least one.

    Raises:
        InputError: If there is no image, or the trigger is not learned yet.
    """
    if not len(pixels):
        raise InputError("there is no image to put the trigger on")
    changed = stamped(pixels, truth)
    difference = (changed.float() - pixels.float()).abs()
    square = float(difference.square().mean())
    return Visibility(
        psnr=10 * math.log10(255**2 / square) if square else math.inf,
        ssim=float(ssim(pixels, changed).mean()),
        largest=int(difference.max()),
        pixels=float((difference.amax(1) > 0).float().mean()),
    )
