"""The discrete cosine transform of images, for triggers that are made in frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal matrix (size, size) of the DCT-II: ``D @ x`` are the frequencies of ``x``."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (places[None] + 0.5) * places[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def from_frequencies(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Return the picture (..., height, width) of its lowest frequencies (..., h, w); the others are zero."""
    rows = dct_matrix(height)[: coefficients.shape[-2]]  # (h, H)
    columns = dct_matrix(width)[: coefficients.shape[-1]]  # (w, W)
    return rows.T @ coefficients @ columns
