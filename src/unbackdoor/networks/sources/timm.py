"""``timm:NAME``: a network of the library timm, without its weights; needs the extra ``zoo``."""

from __future__ import annotations

from typing import Any

from torch import nn

from unbackdoor.errors import ConfigError
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources.optional_libraries import import_library
from unbackdoor.networks.sources.preprocessing import Preprocessing, keywords
from unbackdoor.networks.spec import Spec
from unbackdoor.registry import near_match

OPTIONS = frozenset(
    {
        *(
            "img_size",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "mlp_ratio",
            "qkv_bias",
            "window_size",
        ),
        *("class_token", "reg_tokens", "global_pool", "pool_type", "pre_norm", "drop_rate", "num_features"),
        *("stem_type", "stem_width", "base_width", "cardinality", "block_reduce_first", "output_stride"),
        *("width_mult", "depth_multiplier"),
    }
)


def _library(spec: Spec) -> Any:
    return import_library("timm", extra="zoo", purpose=f"the architecture {spec}")


def _require_name(timm: Any, spec: Spec) -> None:
    # A name of another form would make timm look into folders or on the network.
    architecture = spec.name.split(".")[0]
    if not timm.is_model(architecture):
        raise ConfigError(
            f"the architecture {str(spec)!r}",
            [f"timm has no model {architecture!r}{near_match(architecture, timm.list_models())}"],
        )


def build(spec: Spec, geometry: Geometry) -> nn.Module:
    """Return the untrained network.

    Raises:
        MissingExtra: If timm is not installed.
        ConfigError: If there is no such model, or it does not take an option.
    """
    options = keywords(spec, OPTIONS)
    timm = _library(spec)
    _require_name(timm, spec)
    try:
        network = timm.create_model(
            spec.name,
            pretrained=False,
            num_classes=geometry.classes,
            in_chans=geometry.channels,
            exportable=False,
            scriptable=False,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"the architecture {str(spec)!r}", [f"timm says: {str(error)[:300]}"]) from error
    assert isinstance(network, nn.Module)
    return network


def preprocessing_of(spec: Spec) -> Preprocessing:
    """Return what timm's own weights of this name expect."""
    options = keywords(spec, OPTIONS)
    timm = _library(spec)
    _require_name(timm, spec)
    config = timm.get_pretrained_cfg(spec.name, allow_unregistered=True)
    config = config.to_dict() if config is not None else {}
    size = config.get("input_size")
    side = options.get("img_size")
    if isinstance(side, int):
        size = (3, side, side)
    mean, std = config.get("mean"), config.get("std")
    return Preprocessing(
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        size=None if size is None else (int(size[1]), int(size[2])),
        size_fixed=bool(config.get("fixed_input_size")),
        source=f"timm's configuration of {spec.name}",
    )
