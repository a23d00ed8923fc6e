"""The images of the benchmarks, and the per-image data path that public training code takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from unbackdoor.data.batches import padding
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.engine import rng
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.types import Images

CLASS_NAMES = tuple("abcdefghij")


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Give a parser the choice of the images."""
    parser.add_argument(
        "--data",
        choices=("auto", "cifar10", "made-up"),
        default="auto",
        help="auto takes CIFAR-10 where it is found, and says so where it is not",
    )


def find_data(choice: str, *, train: int, test: int, size: int = 32) -> DataSet:
    """Return CIFAR-10, or images of its shape that were made up.

    Args:
        choice: See :func:`add_data_option`.
        train: Training images to make up.
        test: Test images to make up.
        size: Height and width of what is made up.
    """
    if choice != "made-up":
        try:
            return load_dataset("cifar10", download=False)
        except (InputError, MissingExtra) as error:
            if choice == "cifar10":
                raise
            print(f"CIFAR-10 is not at hand, so the images are made up ({error})\n")
    return DataSet(
        name="made-up images",
        train=made_up(train, "train", size),
        test=made_up(test, "test", size),
        augmentation="crop+flip",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def made_up(count: int, part: str, size: int = 32) -> Images:
    """Return learnable images (N, 3, size, size): a coarse pattern for each class, another for each image."""
    patterns = torch.rand(len(CLASS_NAMES), 3, 4, 4, generator=rng.generator(0, "patterns"))
    labels = torch.arange(count) % len(CLASS_NAMES)
    own = torch.rand(count, 3, 4, 4, generator=rng.generator(0, "own", part))
    coarse = 0.7 * patterns[labels] + 0.3 * own  # (N, 3, 4, 4)
    smooth = F.interpolate(coarse, size=size, mode="bilinear")  # (N, 3, size, size)
    return Images((255 * smooth).to(torch.uint8), labels, CLASS_NAMES, f"made-up {part}")


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as Pillow pictures that are transformed one at a time, the way torchvision's transforms do it.

    ``RandomCrop`` and ``RandomHorizontalFlip`` where augmented, then ``ToTensor`` and ``Normalize``, with
    the same calls of Pillow, NumPy and torch as there; torchvision itself is no dependency of this project.

    Args:
        images: RGB images.
        mean: Per-channel mean of the normalisation.
        std: Per-channel deviation likewise.
        augmented: Whether to crop and to flip.
    """

    def __init__(
        self, images: Images, mean: Sequence[float], std: Sequence[float], *, augmented: bool
    ) -> None:
        self.arrays = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
        self.labels: list[int] = images.truth.tolist()
        # Made once and not for every image as torchvision does it; this favours the plain side.
        self.mean = torch.tensor(list(mean)).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(list(std)).view(-1, 1, 1)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.arrays[row])
        if self.augmented:
            picture = flipped(cropped(picture))
        return to_tensor(picture).sub_(self.mean).div_(self.std), self.labels[row]


def cropped(picture: Image.Image) -> Image.Image:
    """Pad with black and cut the original size out at a random place."""
    width, height = picture.size
    border = padding(width)
    padded = ImageOps.expand(picture, border=border, fill=0)
    top = int(torch.randint(0, 2 * border + 1, (1,)))
    left = int(torch.randint(0, 2 * border + 1, (1,)))
    return padded.crop((left, top, left + width, top + height))


def flipped(picture: Image.Image) -> Image.Image:
    """Mirror left and right with probability 1/2."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else picture


def to_tensor(picture: Image.Image) -> Tensor:
    """Return float32 pixels (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture, copy=True))  # (H, W, C)
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
