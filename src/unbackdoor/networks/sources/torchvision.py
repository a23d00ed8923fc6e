"""``torchvision:NAME``: a classifier of torchvision, without its weights; needs the extra ``zoo``.

Where torchvision is not installed, the networks that our own families give with the same keys and the same
function are taken from there.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from unbackdoor.errors import ConfigError, MissingExtra
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources.optional_libraries import import_library
from unbackdoor.networks.sources.preprocessing import Preprocessing, keywords
from unbackdoor.networks.spec import OWN, Spec, read_spec
from unbackdoor.registry import ARCHITECTURES, near_match

OPTIONS = frozenset(
    {"image_size", "dropout", "width_mult", "init_weights", "aux_logits", "num_init_features"}
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEPTHS = (18, 34, 50, 101, 152)
# Same keys, same shapes, same function.
OURS = {f"resnet{depth}": f"resnet{depth}[width=64,stem=7x7+pool]" for depth in _DEPTHS} | {
    "mobilenet_v2": "mobilenet_v2[width=1.0,strides=large]"
}


def _library(spec: Spec) -> Any:
    return import_library("torchvision.models", extra="zoo", purpose=f"the architecture {spec}")


def own_equivalent(spec: Spec) -> Spec | None:
    """Return the same network of our own registry, or None."""
    return read_spec(OURS[spec.name]) if spec.name in OURS and not spec.options else None


def build(spec: Spec, geometry: Geometry) -> nn.Module:
    """Return the untrained network.

    Raises:
        MissingExtra: If torchvision is not installed, and no family of ours is the same network.
        ConfigError: If there is no such classifier, or it does not take an option.
    """
    options = keywords(spec, OPTIONS)
    try:
        models = _library(spec)
    except MissingExtra:
        own = own_equivalent(spec)
        if own is None:
            raise
        assert own.source == OWN
        part = ARCHITECTURES[own.name]
        built = part.function(part.configure_text(dict(own.options)), geometry)
        assert isinstance(built, nn.Module)
        return built
    _require_name(models, spec)
    try:
        network = models.get_model(spec.name, weights=None, num_classes=geometry.classes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the architecture {str(spec)!r}", [f"torchvision says: {str(error)[:300]}"]
        ) from error
    assert isinstance(network, nn.Module)
    return _with_channels(network, geometry.channels)


def preprocessing_of(spec: Spec) -> Preprocessing:
    """Return what torchvision's own weights of this name expect."""
    try:
        models = _library(spec)
    except MissingExtra:
        own = own_equivalent(spec)
        if own is None:
            raise
        return Preprocessing(
            *IMAGENET,
            size=(224, 224),
            source="torchvision's weights of this name",
            note=f"torchvision is not installed; {own} of this package is the same network",
        )
    _require_name(models, spec)
    weights = models.get_model_weights(spec.name)
    transforms = weights.DEFAULT.transforms() if len(weights) else None
    crop = getattr(transforms, "crop_size", None)
    side = keywords(spec, OPTIONS).get("image_size", crop[0] if crop else None)
    return Preprocessing(
        mean=tuple(transforms.mean) if transforms is not None else None,
        std=tuple(transforms.std) if transforms is not None else None,
        size=(int(side), int(side)) if side is not None else None,
        size_fixed=spec.name.startswith("vit_"),
        source=f"torchvision's weights of {spec.name}",
    )


def _require_name(models: Any, spec: Spec) -> None:
    names = models.list_models(module=models)
    if spec.name not in names:
        raise ConfigError(
            f"the architecture {str(spec)!r}",
            [f"torchvision has no classifier {spec.name!r}{near_match(spec.name, names)}"],
        )


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    """Give the first convolution another number of input channels, which torchvision has no option for."""
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            if layer.in_channels != channels:
                first = nn.Conv2d(
                    channels,
                    layer.out_channels,
                    layer.kernel_size,  # type: ignore[arg-type]
                    stride=layer.stride,  # type: ignore[arg-type]
                    padding=layer.padding,  # type: ignore[arg-type]
                    bias=layer.bias is not None,
                )
                network.set_submodule(path, first)
            break
    return network
