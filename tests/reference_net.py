"""The network and the images of the stored reference tensors, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unbackdoor.types import Classifier, Images

FOLDER = Path(__file__).parent / "reference"
NAMES = ("a", "b", "c", "d")
LARGEST = 50_000  # bytes of a file


class ReferenceNet(nn.Module):
    """Two convolutions, each followed by a norm, and a linear head; any image size that 4 divides.

    Args:
        conv: Makes convolutions, so that the authors' masked ones can stand in.
        norm: Makes batch norms, likewise.
    """

    def __init__(
        self, conv: Callable[..., nn.Module] = nn.Conv2d, norm: Callable[..., nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 6, 3, stride=4, padding=1, bias=False)
        self.norm1 = norm(6)
        self.conv2 = conv(6, 8, 3, stride=2, padding=1)
        self.norm2 = norm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 4) for images (B, 3, H, W)."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def grey(count: int, side: int, *, low: int = 64, high: int = 192) -> Images:
    """Return images (N, 3, side, side) of middling grey; the class makes a quadrant brighter."""
    draws = torch.Generator().manual_seed(side)
    labels = torch.arange(count) % 4
    pixels = torch.randint(low, high - 30, (count, 3, side, side), generator=draws)
    half = side // 2
    for k in range(4):
        top, left = half * (k // 2), half * (k % 2)
        pixels[labels == k, :, top : top + half, left : left + half] += 30
    return Images(pixels.to(torch.uint8), labels, NAMES, "reference")


def fitted(images: Images, steps: int) -> dict[str, Tensor]:
    """Return the state of a network that has learned the images a little, for a script to store."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = ReferenceNet()
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    pixels = images.pixels.float() / 255
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(pixels), images.truth)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def classifier(state: Mapping[str, Tensor], side: int) -> Classifier:
    """Return the network in a stored state, as the engine takes it: pixels in [0, 1] and no normalisation."""
    with torch.random.fork_rng():
        net = ReferenceNet()
    net.load_state_dict(dict(state))
    return Classifier(net, input_shape=(3, side, side), class_names=NAMES).eval()


def store(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tests/reference/NAME.safetensors``."""
    path = FOLDER / f"{name}.safetensors"
    save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, path)
    assert path.stat().st_size < LARGEST, path.stat().st_size


def stored(name: str) -> dict[str, Tensor]:
    """Read ``tests/reference/NAME.safetensors``."""
    return load_file(FOLDER / f"{name}.safetensors")


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what is stored under ``PREFIX/``, without the prefix."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with ``PREFIX/`` before their names."""
    return {f"{prefix}/{name}": value.clone() for name, value in tensors.items()}
