"""Heads of several layers in the place of a network's last linear layer, as options of any spec.

    resnet18[head=l256-a-d-l]  or  torchvision:vit_b_16[head=y-l64-a-l,head_activation=gelu]

One token a position of an ``nn.Sequential``: ``l128`` a linear layer to 128 values, ``l`` the last one, to
the classes (with ``n`` behind it: no bias), ``b`` a batch norm, ``y`` a layer norm, ``a`` the activation,
``p`` a PReLU, ``d`` a dropout or whatever else does nothing in use. With ``head_place=list`` the head stands
in the place of the whole ``nn.Sequential`` that the last linear layer lies in, such as that of a VGG.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.networks.sequential import ACTIVATIONS
from unbackdoor.networks.spec import PYTHON, Spec

HEAD, ACTIVATION, PLACE = "head", "head_activation", "head_place"
PLACES = ("layer", "list")
OPTIONS = (HEAD, ACTIVATION, PLACE)
_DEFAULTS = {ACTIVATION: "relu", PLACE: PLACES[0]}
_TOKEN = re.compile(r"l(\d{0,5})(n?)|[abdpy]")
_MAX_LAYERS = 40


def split_head(spec: Spec) -> tuple[Spec, dict[str, str]]:
    """Return a spec without the options of its head, and those options; code of the user has its own."""
    if spec.source == PYTHON:
        return spec, {}
    head = {key: text for key, text in spec.options.items() if key in OPTIONS}
    return replace(spec, options={k: text for k, text in spec.options.items() if k not in head}), head


def canonical_head(head: dict[str, str], where: str) -> dict[str, str]:
    """Return the options of a head, checked, without those at their default.

    Raises:
        ConfigError: If a token or an activation is unknown; all faults at once.
    """
    faults = []
    tokens = head.get(HEAD, "").split("-")
    if len(tokens) > _MAX_LAYERS or not all(_TOKEN.fullmatch(token) for token in tokens):
        faults.append(f"head: expected tokens such as l256-a-d-l, got {head.get(HEAD, 'none')[:80]!r}")
    elif [token for token in tokens if token in ("l", "ln")] != tokens[-1:]:
        faults.append("head: it must end in its one layer l or ln without a number")
    for key, choices in ((ACTIVATION, tuple(ACTIVATIONS)), (PLACE, PLACES)):
        if head.get(key, _DEFAULTS[key]) not in choices:
            faults.append(f"{key}: expected one of {', '.join(choices)}")
    if faults:
        raise ConfigError(where, faults)
    return {key: text for key, text in head.items() if _DEFAULTS.get(key) != text}


def with_head(network: nn.Module, head: dict[str, str], classes: int, where: str) -> nn.Module:
    """Put a head of several layers in the place of the last linear layer of a network.

    Raises:
        UnsupportedModel: If the network does not end in a linear layer to the classes.
    """
    linears = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    ends = [(name, m) for name, m in linears if m.out_features == classes and name]
    if not ends:
        raise UnsupportedModel(
            "the network does not end in a linear layer that a head could replace", where=where
        )
    path, first = ends[-1]
    if head.get(PLACE) == PLACES[1]:
        path = path.rpartition(".")[0]
        inner = network.get_submodule(path) if path else network
        if not path or not isinstance(inner, nn.Sequential):
            raise UnsupportedModel(
                "the last linear layer lies in no list that a head could replace", where=where
            )
        first = next(m for m in inner.modules() if isinstance(m, nn.Linear))
    activations: dict[str, type[nn.Module]] = {str(name): kind for name, kind in ACTIVATIONS.items()}
    activation = activations[head.get(ACTIVATION, "relu")]
    layers = _layers(head[HEAD].split("-"), first.in_features, classes, activation)
    network.set_submodule(path, nn.Sequential(*layers))
    return network


def _layers(tokens: Iterable[str], width: int, classes: int, activation: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for token in tokens:
        if (match := _TOKEN.fullmatch(token)) is not None and token[0] == "l":
            outputs = int(match[1]) if match[1] else classes
            layers.append(nn.Linear(width, outputs, bias=not match[2]))
            width = outputs
        elif token in "by":
            layers.append(nn.BatchNorm1d(width) if token == "b" else nn.LayerNorm(width))
        else:
            layers.append({"a": activation, "p": nn.PReLU}.get(token, nn.Identity)())
    return layers
