"""A plain chain of layers, written layer by layer: what a state dict shows of a network, plus what it hides.

The layers stand in two ``nn.Sequential``, ``features`` and ``classifier``, one token a position, so that the
numbers in the keys are those of the usual implementations:

    c32      3x3 convolution to 32 channels, padded to keep the size; c32k5p0 is 5x5 without padding,
             c32s2 has stride 2, c32g4 four groups, c32n no bias
    b        batch norm
    a        the activation that the option of that name says
    m, v     max or average pooling by 2; m3s2 is 3x3 at stride 2
    d        a dropout, or any other layer that does nothing in use; it is rebuilt as one that never does
    l128     linear layer to 128 values; l is the last one, to the classes; l128n has no bias

One ``l`` as the whole classifier is a bare linear layer (``classifier.weight``). The features are flattened
before the classifier, after an average pooling to ``side`` x ``side`` pixels where ``side`` is not 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks._layers import initialise_convs
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

Activation = Literal["relu", "elu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
_MAX_LAYERS = 400
_MAX_NUMBER = 65_536
_TOKEN = re.compile(
    r"(?P<conv>c\d+(?:[kspg]\d+)*n?)|(?P<pool>[mv]\d*(?:[sp]\d+)*)|(?P<linear>l\d*n?)|(?P<plain>[abd])"
)
_LETTER = re.compile(r"([cksglpmv])(\d+)")


class SequentialConfig(Config):
    """Options of a plain chain of layers."""

    features: str = option(
        "c32-b-a-c32-b-a-m-c64-b-a-c64-b-a-m-c128-b-a-c128-b-a-m",
        "layers of the convolutional part, one token a position",
        source="the usual small network for 32 pixels",
    )
    classifier: str = option(
        "l", "layers after the flattening, likewise; l alone is a bare linear layer", source="as above"
    )
    activation: Activation = option("relu", "what the token a stands for", source="the most usual one")
    side: int = option(
        0,
        "pixels a side that the features are averaged to before the flattening; 0 leaves them as they are",
        source="as above",
        ge=0,
        le=64,
    )

    @model_validator(mode="after")
    def _tokens_are_known(self) -> Self:
        for part, allowed in ((self.features, "conv pool plain"), (self.classifier, "linear plain")):
            texts = part.split("-") if part else []
            if len(texts) > _MAX_LAYERS:
                raise ValueError(f"at most {_MAX_LAYERS} layers, got {len(texts)}")
            for text in texts:
                match = _TOKEN.fullmatch(text)
                if match is None or match.lastgroup not in allowed.split():
                    raise ValueError(f"unknown layer {text[:40]!r} in {part[:40]!r}")
                if any(int(number) > _MAX_NUMBER for _, number in _LETTER.findall(text)):
                    raise ValueError(f"a number in {text[:40]!r} is beyond {_MAX_NUMBER}")
        ends = [text for text in self.classifier.split("-") if text in ("l", "ln")]
        if len(ends) != 1:
            raise ValueError("the classifier must have exactly one layer l or ln without a number")
        return self


def numbers(token: str) -> dict[str, int]:
    """Return the numbers of a token by their letters, such as ``{"c": 32, "k": 5, "p": 0}``."""
    return {letter: int(number) for letter, number in _LETTER.findall(token)}


def after(token: str, side: int) -> int:
    """Return the pixels a side that a layer leaves of ``side``; 0 or less where nothing is left."""
    values = numbers(token)
    if token[0] == "c":
        kernel = values.get("k", 3)
        return (side + 2 * values.get("p", kernel // 2) - kernel) // max(values.get("s", 1), 1) + 1
    if token[0] in "mv":
        kernel = values.get(token[0], 2)
        return (side + 2 * values.get("p", 0) - kernel) // max(values.get("s", kernel), 1) + 1
    return side


class SequentialCNN(nn.Module):
    """``features``, average to a side where one is given, flatten, ``classifier``."""

    def __init__(self, geometry: Geometry, cfg: SequentialConfig) -> None:
        super().__init__()
        tokens = cfg.features.split("-") if cfg.features else []
        height, width = geometry.height, geometry.width
        for token in tokens:
            height, width = after(token, height), after(token, width)
            if height < 1 or width < 1:
                raise UnsupportedModel(
                    "the image is too small for the layers",
                    expected="at least one pixel after every layer",
                    got=f"{height} x {width} after {token!r}, from {geometry.height} x {geometry.width}",
                    where="features",
                    remedy="Give the input size that the model was trained with",
                )
        activation = ACTIVATIONS[cfg.activation]
        layers, channels = _features(tokens, geometry.channels, activation)
        self.features = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d(cfg.side) if cfg.side else nn.Identity()
        pixels = cfg.side**2 if cfg.side else height * width
        head = list(_classifier(cfg.classifier, channels * pixels, geometry.classes, activation))
        self.classifier = head[0] if cfg.classifier in ("l", "ln") else nn.Sequential(*head)
        initialise_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        x = self.average(self.features(x)).flatten(1)  # (B, D)
        logits: Tensor = self.classifier(x)  # (B, K)
        return logits


def _features(tokens: list[str], channels: int, activation: type[nn.Module]) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for token in tokens:
        values = numbers(token)
        if token[0] == "c":
            kernel = values.get("k", 3)
            groups = values.get("g", 1)
            outputs = values["c"]
            if not (kernel and outputs and groups and channels % groups == outputs % groups == 0):
                raise UnsupportedModel(
                    "the layer cannot be built", got=f"{token!r} after {channels} channels", where="features"
                )
            layers.append(
                nn.Conv2d(
                    channels, outputs, kernel, max(values.get("s", 1), 1), values.get("p", kernel // 2),
                    groups=groups, bias=not token.endswith("n"),
                )
            )  # fmt: skip
            channels = outputs
        elif token[0] in "mv":
            kernel = max(values.get(token[0], 2), 1)
            pool = nn.MaxPool2d if token[0] == "m" else nn.AvgPool2d
            layers.append(pool(kernel, max(values.get("s", kernel), 1), values.get("p", 0)))
        else:
            layers.append(_plain(token, nn.BatchNorm2d(channels) if token == "b" else None, activation))
    return layers, channels


def _classifier(text: str, inputs: int, classes: int, activation: type[nn.Module]) -> Iterator[nn.Module]:
    for token in text.split("-"):
        if token[0] == "l":
            outputs = numbers(token).get("l", classes)
            yield nn.Linear(inputs, outputs, bias=not token.endswith("n"))
            inputs = outputs
        else:
            yield _plain(token, nn.BatchNorm1d(inputs) if token == "b" else None, activation)


def _plain(token: str, norm: nn.Module | None, activation: type[nn.Module]) -> nn.Module:
    if token == "a":
        return activation()
    return nn.Identity() if norm is None else norm


@architecture("sequential_cnn", config=SequentialConfig, paper="", traits={"conv", "bn"})
def sequential_cnn(cfg: SequentialConfig, geometry: Geometry) -> nn.Module:
    """A plain chain of layers, written layer by layer; for networks of no registered family."""
    return SequentialCNN(geometry, cfg)
