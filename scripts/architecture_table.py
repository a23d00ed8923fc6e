"""Make the table by which a file of weights of timm or torchvision is recognised.

    python scripts/architecture_table.py [--only REGEX] [--out FILE]

Needs timm and torchvision (extra ``zoo``). Every classifier of both is built without memory, with numbers of
classes and of image channels that occur nowhere else, so that the extents which follow them are seen. Where
several have the same names and shapes, those that also compute the same function are put together: in one
library their modules and all their settings are equal; between the two their outputs are, for the same
weights. The same versions of the libraries give the same file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write
from unbackdoor.networks.build import network, preprocessing_of
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources.optional_libraries import import_library
from unbackdoor.networks.spec import read_spec
from unbackdoor.opening.architecture_table import (
    FILE,
    Row,
    nameless_hash,
    names_hash,
    shapes_hash,
    table_text,
)

# Primes that are no extent of any network.
CLASSES, CHANNELS = 9973, 1009
# Settings that change the tensors, and that people's files have.
VARIANTS = ("torchvision:inception_v3[aux_logits=false]", "torchvision:googlenet[aux_logits=false]")
MAX_BUILT = 150_000_000  # parameters of a network that is built to compare outputs
_SIDE, _SMALL = 224, 128
# Of no consequence in evaluation mode.
_INERT_LAYERS = ("Identity", "DropPath", "Dropout", "Dropout2d", "DropBlock2d", "StochasticDepth")
_INERT_SETTINGS = frozenset(
    {
        *("training", "default_cfg", "pretrained_cfg", "drop_rate", "attn_drop_rate", "drop_path_rate"),
        *("drop_prob", "grad_checkpointing", "feature_info", "dropout", "dropout_prob", "attn_drop"),
    }
)
_FILLING = frozenset(
    {
        *("normal_", "uniform_", "trunc_normal_", "constant_", "ones_", "zeros_", "fill_", "zero_", "copy_"),
        *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
        *("erfinv_", "mul_", "add_", "div_", "clamp_"),
    }
)


@dataclasses.dataclass(frozen=True)
class Described:
    """A network as the table needs it."""

    spec: str
    shapes: dict[str, tuple[int, ...]]
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    structure: str
    parameters: int

    @property
    def key(self) -> tuple[str, str]:
        """What identifies a file."""
        return names_hash(self.shapes), shapes_hash(self.shapes, (*self.classes, *self.channels))

    @property
    def nameless(self) -> str:
        """The shapes of all but the last layer, for colour images."""
        heads = {place.rpartition(":")[0] for place in self.classes}
        return nameless_hash(
            tuple(3 if extent == CHANNELS else extent for extent in shape)
            for name, shape in self.shapes.items()
            if name not in heads and not name.endswith("num_batches_tracked")
        )


def main() -> None:
    """Write the table."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("--only", default="", help="a regular expression of specs")
    words.add_argument("--out", type=Path, default=FILE)
    arguments = words.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own code
        text = make_table(re.compile(arguments.only))
    with atomic_write(arguments.out) as draft:
        draft.write_text(text, encoding="utf-8")


def make_table(only: re.Pattern[str]) -> str:
    """Return the content of the table for the specs that match."""
    timm = import_library("timm", extra="zoo", purpose="the table of architectures")
    torchvision = import_library("torchvision", extra="zoo", purpose="the table of architectures")
    models = import_library("torchvision.models", extra="zoo", purpose="the table of architectures")
    names = [f"torchvision:{name}" for name in models.list_models(module=models)]
    names += [f"timm:{name}" for name in timm.list_models()]
    names += [spec for spec in VARIANTS if spec.partition("[")[0] in names]
    groups: dict[tuple[str, str], list[Described]] = {}
    for number, spec in enumerate(sorted(names), 1):
        if not only.search(spec):
            continue
        described = describe(spec)
        if described is None:
            print(f"{spec}: left out")
            continue
        groups.setdefault(described.key, []).append(described)
        if number % 100 == 0:
            print(f"{number} of {len(names)}", file=sys.stderr)
    versions = {module.__name__: module.__version__.partition("+")[0] for module in (timm, torchvision)}
    return table_text(make_rows(groups, {spec: _published(timm, spec) for spec in names}), versions)


def make_rows(groups: Mapping[tuple[str, str], list[Described]], published: Mapping[str, int]) -> list[Row]:
    """Return the rows of networks that are grouped by their names and shapes."""
    rows = []
    for (names_key, shapes_key), members in groups.items():
        members.sort(key=lambda d: _usual(d.spec, published[d.spec]))
        networks = same_functions(members)
        if len(networks) > 1:
            print(f"not told apart: {networks}")
        first = members[0]
        rows.append(Row(names_key, shapes_key, first.nameless, first.classes, first.channels, networks))
    return rows


def describe(spec: str) -> Described | None:
    """Build a network without memory and return what its tensors show; None where it is no classifier."""
    # Some take only colour images, and some compute their widths from numbers while they are built.
    for channels, counting in itertools.product((CHANNELS, 3), (False, True)):
        try:
            with _Unfilled(counting):
                built = network(spec, Geometry(channels, _SIDE, _SIDE, CLASSES), device="meta")
        # A library's code raises anything.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        return (
            Described(
                spec,
                shapes,
                places,
                _places(shapes, CHANNELS),
                structure(built),
                sum(p.numel() for p in built.parameters()),
            )
            if (places := _places(shapes, CLASSES))
            else None
        )
    print(f"{spec}: {reason}")
    return None


class _Unfilled(TorchFunctionMode):
    """Leaves out the first numbers of weights that have none, which are most of the time of building.

    With ``counting``, a row of numbers is computed in memory all the same.
    """

    def __init__(self, counting: bool) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _FILLING:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if self._counting and func in (torch.linspace, torch.arange, torch.tensor):
            kwargs = {**(kwargs or {}), "device": "cpu"}
        return func(*args, **(kwargs or {}))


def _places(shapes: Mapping[str, tuple[int, ...]], extent: int) -> tuple[str, ...]:
    return tuple(
        f"{name}:{axis}"
        for name, shape in sorted(shapes.items())
        for axis, size in enumerate(shape)
        if size == extent
    )


def _published(timm: Any, spec: str) -> int:
    """Return how many sets of weights timm publishes of a network; of torchvision's, one."""
    parsed = read_spec(spec)
    return len(timm.list_pretrained(f"{parsed.name}.*")) if parsed.source == "timm" else 1


def _usual(spec: str, published: int) -> tuple[bool, bool, int, int, str]:
    # Networks that repeat those of TensorFlow differ in their paddings, and are seldom meant.
    return not spec.startswith("torchvision:"), spec.startswith("timm:tf_"), -published, len(spec), spec


# ---------------------------------------------------------------------------------------------------
# Which compute the same


def same_functions(members: Sequence[Described]) -> tuple[tuple[str, ...], ...]:
    """Put together what computes the same from the same tensors, in the order of the members."""
    classes: list[list[Described]] = []
    for member in members:
        for others in classes:
            if any(member.structure == other.structure for other in others) or (
                read_spec(member.spec).source != read_spec(others[0].spec).source
                and same_outputs(member, others[0])
            ):
                others.append(member)
                break
        else:
            classes.append([member])
    return tuple(tuple(member.spec for member in same) for same in classes)


def structure(net: nn.Module) -> str:
    """Return a hash over all modules and their settings; equal only where the functions are equal."""
    usual = set(vars(nn.Module()))
    lines = []
    for path, module in net.named_modules():
        kind = type(module)
        if kind.__name__ in _INERT_LAYERS:
            continue
        settings = {
            key: _plain(value)
            for key, value in sorted(vars(module).items())
            if key not in usual and key not in _INERT_SETTINGS
        }
        lines.append(f"{path} {kind.__module__}.{kind.__qualname__} {settings}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_unknown = itertools.count()


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(map(str, items)) if isinstance(value, set | frozenset) else items
    if isinstance(value, Mapping):
        return [(str(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    name = getattr(value, "__qualname__", None)
    if callable(value) and name is not None and "<" not in name:
        return f"{getattr(value, '__module__', '')}.{name}"
    # Nothing is known of it, so that it equals nothing.
    return f"unknown {next(_unknown)}"


def same_outputs(one: Described, other: Described) -> bool:
    """Build both with the same weights and compare their outputs; False where that cannot be done."""
    if max(one.parameters, other.parameters) > MAX_BUILT:
        return False
    try:
        a, b = (_outputs(described.spec) for described in (one, other))
    except (UnbackdoorError, RuntimeError, ValueError, AssertionError) as error:
        print(f"{one.spec}, {other.spec}: {str(error)[:200]}")
        return False
    scale = float(a.std())
    sound = bool(torch.isfinite(a).all()) and scale > 0 and float((a[0] - a[1]).abs().max()) > 1e-3 * scale
    return sound and a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale))


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def _outputs(spec: str) -> Tensor:
    facts = preprocessing_of(spec)
    side = facts.size if facts.size is not None and facts.size_fixed else (_SMALL, _SMALL)
    net = network(spec, Geometry(3, *side, 10)).eval()
    state = net.state_dict()
    net.load_state_dict({name: _numbers(name, tensor) for name, tensor in state.items()})
    pixels = torch.rand(2, 3, *side, generator=torch.Generator().manual_seed(0))
    return net(pixels)


def _numbers(name: str, tensor: Tensor) -> Tensor:
    """Return numbers that depend on name and shape alone, such that no branch of a network is silent."""
    if not tensor.is_floating_point():
        return tensor
    seed = int(hashlib.sha256(f"{name} {tuple(tensor.shape)}".encode()).hexdigest()[:8], 16)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    if tensor.dim() > 1:
        return noise / max(1, tensor[0].numel()) ** 0.5
    centre = 1.0 if name.endswith(("weight", "running_var", "gamma", "scale")) else 0.0
    return centre + (0.1 * noise).clamp(-0.5, 0.5)


if __name__ == "__main__":
    main()
