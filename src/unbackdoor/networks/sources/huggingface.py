"""``hf:FOLDER``: an image classifier that a config of transformers describes; needs the extra ``hf``.

The folder holds ``config.json`` and, where there is one, ``preprocessor_config.json``. Nothing is fetched,
and code that a config names is not run (``trust_remote_code`` stays off).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.files import parse_json, read_text
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources.optional_libraries import import_library
from unbackdoor.networks.sources.preprocessing import Preprocessing
from unbackdoor.networks.spec import Spec

_MAX_JSON = 4 << 20  # bytes


def build(spec: Spec, geometry: Geometry) -> nn.Module:
    """Return the untrained network; its output is the logits alone, its keys are those of transformers.

    Raises:
        MissingExtra: If transformers is not installed.
        InputError: If the folder holds no config, or one of no image classifier.
    """
    folder, content = _config(spec)
    transformers: Any = import_library("transformers", extra="hf", purpose=f"the architecture {spec}")
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        config.num_labels = geometry.classes
        if "num_channels" in content or hasattr(config, "num_channels"):
            config.num_channels = geometry.channels
        network = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "transformers cannot build an image classifier from the config",
            got=str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__,
            where=folder / "config.json",
            remedy="Give the folder that save_pretrained wrote",
        ) from error
    # A subclass and not a wrapper around it: a wrapper would put a prefix before every key.
    kind: Any = type(network)
    network.__class__ = _logits_only(kind)
    assert isinstance(network, nn.Module)
    return network


def names_in(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the network's name, by the file's, of every tensor that transformers loads into a network.

    Releases of transformers rename layers and keep the names in files; the library's own rules are applied.
    What it would leave out, it also leaves out here.
    """
    library: Any = network
    own = library.state_dict()
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        rules = mapping.get_model_conversion_mapping(library)
        renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        rename: Any = loading.rename_source_key
    except (ImportError, AttributeError):  # an older release, whose names are those in files
        renamings, rename = [], None
    out: dict[str, str] = {}
    for name in names:
        # A name that the network has is not renamed, whatever the rules say, as in the library.
        for applied in [name] if rename is None else _renamed(name, rename, renamings, library, own):
            if applied in own:
                out.setdefault(name, applied)
    return out


def _renamed(name: str, rename: Any, rules: list[Any], network: Any, own: dict[str, Tensor]) -> list[str]:
    prefix = network.base_model_prefix
    return [str(rename(name, some, [], prefix, own)[0]) for some in (rules, [])]


@cache
def _logits_only(kind: Any) -> Any:
    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        out = kind.forward(self, pixel_values=pixel_values)
        logits = getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(
                "the network of transformers returns no logits", got=type(out).__name__, where=kind.__name__
            )
        return logits

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def preprocessing_of(spec: Spec) -> Preprocessing:
    """Return the normalisation, size and class names that lie beside the weights."""
    folder, config = _config(spec)
    names = None
    labels = config.get("id2label")
    if isinstance(labels, dict) and set(labels) == {str(k) for k in range(len(labels))}:
        ordered = tuple(str(labels[str(k)]) for k in range(len(labels)))
        # transformers writes LABEL_0, LABEL_1, ... where nobody gave names.
        names = None if ordered == tuple(f"LABEL_{k}" for k in range(len(ordered))) else ordered
    size = _size(config.get("image_size"))
    fixed = size is not None
    mean = std = None
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        steps = _read(preprocessor)
        size = size or _size(steps.get("crop_size") if steps.get("do_center_crop") else None)
        size = size or _size(steps.get("size"))
        if steps.get("do_normalize", True):
            mean, std = _numbers(steps.get("image_mean")), _numbers(steps.get("image_std"))
        else:
            mean, std = (), ()
        factor = steps.get("rescale_factor", 1 / 255)
        if not steps.get("do_rescale", True):
            factor = 1.0
        if isinstance(factor, int | float) and factor > 0 and abs(factor * 255 - 1) > 1e-3:
            # Pixels there run to 255 * factor and not to 1: (p * 255 * factor - mean) / std.
            scale = 255 * float(factor)
            channels = len(mean) if mean else 3
            old_mean, old_std = mean or (0.0,) * channels, std or (1.0,) * channels
            mean, std = tuple(m / scale for m in old_mean), tuple(s / scale for s in old_std)
    return Preprocessing(
        mean=mean,
        std=std,
        size=size,
        size_fixed=fixed,
        class_names=names,
        classes=len(labels) if isinstance(labels, dict) and labels else None,
        for_these_weights=mean is not None,
        source=preprocessor.name if mean is not None else "config.json",
    )


def _config(spec: Spec) -> tuple[Path, dict[str, Any]]:
    if spec.options:
        raise ConfigError(f"the architecture {str(spec)[:80]!r}", ["hf: takes no options; edit the config"])
    folder = Path(os.path.expanduser(spec.name))  # noqa: PTH111 - a text that may be a folder or a file
    folder = folder.parent if folder.name == "config.json" else folder
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            "there is no config of transformers",
            expected=path,
            where=spec.name,
            remedy="Give a folder that save_pretrained wrote; nothing is fetched by name",
        )
    return folder, _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path, "the config", limit=_MAX_JSON), "the config", path)
    except InputError as error:
        raise InputError("the config cannot be read", got=error.got, where=path) from error
    if not isinstance(content, dict):
        raise InputError("the config is no JSON object", got=type(content).__name__, where=path)
    return content


def _size(value: object) -> tuple[int, int] | None:
    if isinstance(value, dict):
        if "height" in value and "width" in value:
            value = [value["height"], value["width"]]
        else:
            value = value.get("shortest_edge")
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return (int(value[0]), int(value[1]))
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: object) -> tuple[float, ...] | None:
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return tuple(float(v) for v in value)
    return None
