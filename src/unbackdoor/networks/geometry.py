"""What an architecture must know of its images and classes, with bounds that a hostile file cannot pass."""

from __future__ import annotations

from dataclasses import dataclass

from unbackdoor.errors import InputError

MIN_SIZE, MAX_SIZE = 8, 4096
MAX_CHANNELS = 1024
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Geometry:
    """Shape of one image and the number of classes.

    Attributes:
        channels: Image channels C, 1..1024.
        height: Image height H in pixels, 8..4096.
        width: Image width W in pixels, 8..4096; not to be confused with the width of a network.
        classes: Number of classes K, 1..100000.
    """

    channels: int
    height: int
    width: int
    classes: int

    def __post_init__(self) -> None:
        if (
            not 1 <= self.channels <= MAX_CHANNELS
            or not MIN_SIZE <= self.height <= MAX_SIZE
            or not MIN_SIZE <= self.width <= MAX_SIZE
        ):
            raise InputError(
                "the input size is out of range",
                expected=f"1..{MAX_CHANNELS} channels, {MIN_SIZE}..{MAX_SIZE} pixels a side",
                got=f"(C, H, W) = {(self.channels, self.height, self.width)}",
            )
        if not 1 <= self.classes <= MAX_CLASSES:
            raise InputError(
                "the number of classes is out of range", expected=f"1..{MAX_CLASSES}", got=self.classes
            )
