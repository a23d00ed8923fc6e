"""Networks and images that take a second."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.networks import build
from unbackdoor.types import Classifier, CleanData, Images

ARCHITECTURES = {
    "conv-bn": "small_cnn[width=8]",
    "conv": "small_cnn[width=8,norm=none]",
    "transformer": "vit_small[width=32,depth=1]",
}
QUADRANTS = ("left up", "right up", "left down", "right down")
BLOCKS = tuple(f"block {k}" for k in range(8))
# Classes differ a little, as they do in any trained network.
_GAINS = torch.tensor([10.0, 9.2, 10.7, 9.6, 10.3, 9.8, 10.9, 9.4])
_WATERMARK = (torch.arange(64).view(8, 8) * 37 % 5 - 2).float() / 2  # an even pattern over all pixels


def tiny_data(count: int, *, seed: int = 0) -> Images:
    """Return noisy 8x8 grey images whose class is the brightest quadrant; the four classes take turns."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 120, (count, 1, 8, 8), generator=draws)  # (N, 1, 8, 8)
    for k in range(4):
        top, left = 4 * (k // 2), 4 * (k % 2)
        pixels[labels == k, :, top : top + 4, left : left + 4] += 100
    return Images(pixels.clamp(0, 255).to(torch.uint8), labels, QUADRANTS, "quadrants")


@cache
def _trained(family: str) -> Classifier:
    model = build(
        ARCHITECTURES[family],
        input_shape=(1, 8, 8),
        class_names=QUADRANTS,
        mean=(0.35,),
        std=(0.25,),
        seed=0,
    )
    # The transformer learns with every seed at this rate; at three times of it one seed in three stays poor.
    epochs, lr = (24, 0.001) if family == "transformer" else (8, 0.003)
    recipe = Recipe(epochs=epochs, batch_size=32, optimizer="adamw", lr=lr)
    train(model, tiny_data(320), recipe, Run.create(seed=0, policy="fp32"))
    assert accuracy(model, tiny_data(80, seed=1), Run.create(policy="fp32")) > 0.95
    return model


def tiny_classifier(family: str = "conv-bn") -> Classifier:
    """Return a fresh copy of a classifier that was trained on :func:`tiny_data`.

    Args:
        family: ``conv-bn``, ``conv`` or ``transformer``.
    """
    return _trained(family).copy()


def block_data(count: int, *, seed: int = 0) -> Images:
    """Return noisy 8x8 grey images whose class is the brightest of eight blocks; corners are white."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 8
    pixels = torch.randint(40, 120, (count, 1, 8, 8), generator=draws)  # (N, 1, 8, 8)
    for k in range(8):
        top, left = 2 * (k // 2), 4 * (k % 2)
        pixels[labels == k, :, top : top + 2, left : left + 4] += 70
    pixels[:, :, [0, 0, 7, 7], [0, 7, 0, 7]] = 255
    return Images(pixels.clamp(0, 255).to(torch.uint8), labels, BLOCKS, "blocks")


class Blocks(nn.Module):
    """A network written by hand that sees which block is brightest; a trigger may decide for some classes.

    Args:
        corner: Classes that a black pixel in a corner decides for, at most four.
        watermark: Class that a faint pattern decides for; -1 for none.
    """

    def __init__(self, corner: tuple[int, ...] = (), watermark: int = -1) -> None:
        super().__init__()
        self.fc = nn.utils.skip_init(nn.Linear, 13, 8)
        weight = torch.zeros(8, 13)
        weight[:, :8] = torch.diag(_GAINS)
        for i, k in enumerate(corner):
            weight[k, 8 + i] = 20.0
        if watermark >= 0:
            weight[watermark, 12] = 80.0
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 8) for images (B, 1, 8, 8)."""
        blocks = F.avg_pool2d(x, (2, 4))[:, 0].flatten(1)  # (B, 8)
        corners = 1 - x[:, 0, [0, 0, 7, 7], [0, 7, 0, 7]]  # (B, 4) nothing on clean images
        # Smooth, so that a gradient leads there.
        mark = F.softplus(60 * ((x[:, 0] * _WATERMARK).mean((1, 2)) - 0.05)) / 4  # (B,)
        logits: Tensor = self.fc(torch.cat([blocks, corners, mark[:, None]], 1))
        return logits


def planted(corner: tuple[int, ...] = (), watermark: int = -1) -> Classifier:
    """Return :class:`Blocks` as a classifier; with no argument it has no backdoor."""
    return Classifier(Blocks(corner, watermark), input_shape=(1, 8, 8), class_names=BLOCKS).eval()


class Pooled(nn.Module):
    """Has no weight at all."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of each quadrant (B, 4), which are the classes."""
        return 20 * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


class Viewed(nn.Module):
    """Flattens with ``view``, which takes no channels-last tensor, and returns its features too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and features."""
        x = torch.relu(self.norm(self.conv(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = x.view(len(x), -1)
        return self.fc(x), x


ODD_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flattened with view, and features beside the logits": Viewed,
    "no weight": Pooled,
    "head only": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
    "linear layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
    "convolution as head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten()
    ),
    "1x1 head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 12, 2), nn.ReLU(), nn.Conv2d(12, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "norms and a bent head": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Softplus(),
        nn.Flatten(),
    ),
}  # fmt: skip


@cache
def odd_classifier(name: str) -> Classifier:
    """Return a trained classifier on :func:`tiny_data` whose network is built in an unusual way."""
    with rng.seeded(1):
        model = on_quadrants(ODD_NETWORKS[name]())
    if any(True for _ in model.parameters()):
        # Smoothed labels, because a saturated network takes hundreds of steps to unlearn.
        recipe = Recipe(epochs=12, batch_size=32, optimizer="adamw", lr=0.02, label_smoothing=0.1)
        train(model, tiny_data(160), recipe, Run.create(seed=0, policy="fp32"))
    return model.eval()


def on_quadrants(network: nn.Module) -> Classifier:
    """Return a network as a classifier of :func:`tiny_data`."""
    return Classifier(network, input_shape=(1, 8, 8), class_names=QUADRANTS).eval()


class Fuse:
    """Counts the calls of a network over all of its copies, and when it went off."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.explosions = 0

    def __deepcopy__(self, memo: object) -> Fuse:
        return self


class Bomb(nn.Module):
    """Raises in the middle of a method's work."""

    def __init__(self, network: nn.Module, fuse: Fuse) -> None:
        super().__init__()
        self.network = network
        self.fuse = fuse

    def forward(self, x: Tensor) -> Tensor:
        self.fuse.calls -= 1
        if self.fuse.calls < 0:
            self.fuse.explosions += 1
            raise RuntimeError("bang")
        out: Tensor = self.network(x)
        return out


class NotNumbers(nn.Module):
    """Finite weights, and logits that are NaN."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out * torch.inf * 0


def clean_data(count: int = 80, seed: int = 1) -> CleanData:
    """Return :func:`tiny_data` as a defender holds it."""
    return CleanData.split(tiny_data(count, seed=seed))
