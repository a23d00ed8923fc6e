"""From a text such as ``preact_resnet18[width=16]`` to a seeded, untrained classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from unbackdoor.errors import ConfigError
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.heads import canonical_head, split_head, with_head
from unbackdoor.networks.sources import SOURCES, Preprocessing
from unbackdoor.networks.spec import OWN, Spec, quoted, read_spec, take_apart
from unbackdoor.registry import ARCHITECTURES, Config, near_match
from unbackdoor.types import Classifier


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name[option=value,...]`` into the name and its options as text.

    Args:
        spec: Architecture, with or without options and with or without the prefix ``unbackdoor:``.

    Returns:
        The name, which is a registered architecture, and the options, whose values are not yet checked.

    Raises:
        ConfigError: If the text has another form or names an unknown architecture.

    Example:
        >>> parse_spec("preact_resnet18[width=16]")
        ('preact_resnet18', {'width': '16'})
    """
    parsed, faults = take_apart(spec)
    if parsed.source != OWN:
        faults.append(f"expected one of this package, got one of the source {parsed.source}")
    elif parsed.name not in ARCHITECTURES:
        names = list(ARCHITECTURES)
        faults.append(
            f"unknown name {parsed.name!r}{near_match(parsed.name, names)}; there are: {', '.join(names)}"
        )
    if faults:
        raise ConfigError(f"the architecture {quoted(spec)}", faults)
    return parsed.name, dict(parsed.options)


def configure(spec: str) -> tuple[str, Config]:
    """Return the registered name and the checked config of a spec.

    Raises:
        ConfigError: If the text has another form, or an option is unknown or out of bounds.
    """
    name, options = parse_spec(spec)
    return name, ARCHITECTURES[name].configure_text(options)


def canonical(spec: str) -> str:
    """Return the one spelling of a spec: the width, then every option that is not at its default.

    Specs of other sources keep the options as they were written.

    Example:
        >>> canonical("unbackdoor:preact_resnet18")
        'preact_resnet18[width=64]'
    """
    foreign, _ = take_apart(spec)
    bare, head = split_head(foreign)
    if head:
        inner = read_spec(canonical(str(bare)))
        options = {**inner.options, **canonical_head(head, f"the architecture {quoted(spec)}")}
        return str(replace(inner, options=options))
    if foreign.source != OWN:
        return str(read_spec(spec))
    name, cfg = configure(spec)
    written = []
    for key, declared in type(cfg).model_fields.items():
        value = getattr(cfg, key)
        if key == "width" or value != declared.default:
            # bool is spelled as JSON spells it, everything else as Python does.
            written.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return f"{name}[{','.join(written)}]"


def preprocessing_of(spec: str) -> Preprocessing:
    """Return the preprocessing that the source of a spec states; empty for this package's own networks."""
    foreign, _ = split_head(read_spec(spec))
    return Preprocessing() if foreign.source == OWN else SOURCES[foreign.source].preprocessing_of(foreign)


def network(spec: str, geometry: Geometry, *, seed: int = 0, device: str = "cpu") -> nn.Module:
    """Build the bare network of a spec; ``device="meta"`` gives its shapes without any memory.

    The global random state is left as it was found. A network of the source ``FILE.py`` is made by the user's
    code, which is called here.

    Raises:
        ConfigError: If the spec has an unknown name or option, or a value out of bounds.
        MissingExtra: If its source needs a library that is not installed.
        UnsupportedModel: If the architecture cannot take this geometry.
    """
    foreign, head = split_head(read_spec(canonical(spec)))
    make = _own if foreign.source == OWN else SOURCES[foreign.source].build
    with torch.random.fork_rng(devices=[]), torch.device(device):
        # Not torch.manual_seed, which would seed the accelerators too, and those are not forked.
        torch.default_generator.manual_seed(seed)
        made = make(foreign, geometry)
        return with_head(made, head, geometry.classes, spec) if head else made


def _own(spec: Spec, geometry: Geometry) -> nn.Module:
    name, cfg = configure(str(spec))
    built = ARCHITECTURES[name].function(cfg, geometry)
    assert isinstance(built, nn.Module)
    return built


def build(
    spec: str,
    *,
    input_shape: tuple[int, int, int],
    class_names: Sequence[str],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
    origin: str = "",
) -> Classifier:
    """Build an untrained classifier, in evaluation mode and on the CPU.

    The same arguments give the same weights, and the global random state is left as it was found.

    Args:
        spec: Architecture such as ``preact_resnet18[width=16]``.
        input_shape: (C, H, W).
        class_names: K names, in logit order.
        mean: Per-channel mean; empty for no normalisation.
        std: Per-channel deviation; empty for no normalisation.
        seed: Seed of the initial weights.
        origin: Where the weights come from, in words.

    Raises:
        ConfigError: If the spec has an unknown name or option, or a value out of bounds.
        InputError: If the input size, the number of classes or the normalisation is out of range.
        UnsupportedModel: If the architecture cannot take this input size.

    Example:
        >>> model = build("small_cnn[width=4]", input_shape=(1, 8, 8), class_names=["a", "b"])
        >>> model.architecture
        'small_cnn[width=4]'
    """
    channels, height, width = input_shape
    geometry = Geometry(channels, height, width, len(class_names))
    return Classifier(
        network(spec, geometry, seed=seed),
        input_shape=(channels, height, width),
        class_names=class_names,
        mean=mean,
        std=std,
        architecture=canonical(spec),
        origin=origin,
    ).eval()
