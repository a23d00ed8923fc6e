"""What the ``config.json`` of a model folder says of its weights: a network of transformers or of timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.errors import ConfigError, InputError, UnbackdoorError, UnsupportedModel
from unbackdoor.files import parse_json, read_text
from unbackdoor.networks.sources import Preprocessing, timm
from unbackdoor.networks.spec import read_spec
from unbackdoor.weights.model_folder import weights_in

CONFIG = "config.json"
_MAX_JSON = 4 << 20  # bytes
# Arguments of timm that the tensors show, or that no result depends on.
_OF_THE_GEOMETRY = ("num_classes", "in_chans")
_OF_THE_TRAINING = ("drop_rate", "drop_path_rate", "drop_block_rate")


@dataclass(frozen=True)
class ModelConfig:
    """A network that a model folder names.

    Attributes:
        spec: Spec to build it from.
        preprocessing: What the folder says about its input; None where its source reads it.
    """

    spec: str
    preprocessing: Preprocessing | None


def config_of(path: Path) -> ModelConfig | None:
    """Return what the folder of a file of weights says about it.

    Args:
        path: File of weights; the folder speaks only of the one that the libraries would take.

    Returns:
        The network, or None where the folder is no model folder.

    Raises:
        InputError: If the config cannot be read.
        UnsupportedModel: If it names a network with options that cannot be passed on.
    """
    config = path.parent / CONFIG
    if not config.is_file():
        return None
    try:
        if weights_in(path.parent)[0].name != path.name:
            return None
    except UnbackdoorError:
        return None
    content = parse_json(read_text(config, "the config", limit=_MAX_JSON), "the config", config)
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("architecture"), str):
        return _of_timm(content, config)
    if isinstance(content.get("model_type"), str) or isinstance(content.get("architectures"), list):
        try:
            return ModelConfig(str(read_spec(f"hf:{path.parent}")), None)
        except ConfigError as error:
            raise InputError(
                "the folder has a name that no architecture can have",
                got=path.parent,
                remedy="Give it another name, without brackets",
            ) from error
    return None


def _of_timm(content: Mapping[str, Any], where: Path) -> ModelConfig:
    nested = content.get("pretrained_cfg")
    facts = nested if isinstance(nested, dict) else content
    stated = content.get("model_args")
    options = {
        key: value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value
        for key, value in (stated if isinstance(stated, dict) else {}).items()
        if key not in _OF_THE_GEOMETRY and not key.endswith(_OF_THE_TRAINING)
    }
    if not all(key in timm.OPTIONS and isinstance(v, bool | int | float | str) for key, v in options.items()):
        raise UnsupportedModel(
            "the config builds the network with options that cannot be passed on",
            expected="none but " + ", ".join(sorted(timm.OPTIONS)),
            got=repr(options)[:200],
            where=where,
            remedy="Name your own code that builds it: --arch FILE.py:CALLABLE",
        )
    written = ",".join(f"{key}={str(value).lower()}" for key, value in options.items())
    # A release of weights stands behind a dot ("vit_tiny.augreg_in21k"); it names no other network.
    spec = f"timm:{content['architecture'].partition('.')[0]}" + (f"[{written}]" if written else "")
    names = content.get("label_names", facts.get("label_names"))
    size = facts.get("input_size")
    sides = size[1:] if isinstance(size, list) and len(size) == 3 else None
    classes = content.get("num_classes")
    preprocessing = Preprocessing(
        mean=_numbers(facts.get("mean")),
        std=_numbers(facts.get("std")),
        size=tuple(sides) if sides and all(isinstance(side, int) and side > 0 for side in sides) else None,
        size_fixed=bool(facts.get("fixed_input_size")),
        class_names=tuple(map(str, names)) if isinstance(names, list) and len(names) == classes else None,
        classes=classes if isinstance(classes, int) and classes > 0 else None,
        for_these_weights=facts.get("mean") is not None,
        source=CONFIG,
    )
    return ModelConfig(str(read_spec(spec)), preprocessing)


def _numbers(value: object) -> tuple[float, ...] | None:
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return tuple(float(v) for v in value)
    return None
