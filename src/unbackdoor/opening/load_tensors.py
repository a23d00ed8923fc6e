"""Putting a file's tensors into a network, which is first built without memory to compare the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unbackdoor.errors import InputError, UnbackdoorError, UnsupportedModel
from unbackdoor.networks.build import network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources import SOURCES
from unbackdoor.networks.spec import OWN, read_spec
from unbackdoor.opening.recognise_architecture import IN_ORDER, nearest
from unbackdoor.opening.rename_tensors import Adapted, Difference, adapt, compare, names_of_library
from unbackdoor.weights.formats.buffers import listed

_PROPOSED = 3


@dataclass(frozen=True)
class Filled:
    """A network with the weights of a file, and how their names were translated."""

    network: nn.Module
    adapted: Adapted


def skeleton(architecture: str, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build a network without memory, so that the width in a hostile card costs nothing.

    The user's own code may not support that, so it is called as it is.
    """
    channels, height, width = input_shape
    geometry = Geometry(channels, height, width, classes)
    spec = read_spec(architecture)
    bare = spec.source == OWN or SOURCES[spec.source].skeleton
    try:
        return network(architecture, geometry, device="meta" if bare else "cpu")
    except (NotImplementedError, RuntimeError) as error:
        if spec.source == OWN:
            raise
        # Some networks of other libraries compute with real values while they are built.
        message = str(error)
        if "meta" not in message.lower():
            raise _unbuilt(architecture, error) from error
        return network(architecture, geometry)


def fill(
    architecture: str,
    state: Mapping[str, Tensor],
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    where: Path | str,
) -> Filled:
    """Build the network of a spec with the tensors of a file, after translating their names.

    Args:
        architecture: The spec.
        state: The file's tensors.
        input_shape: (C, H, W).
        classes: Number of classes K.
        where: File, for messages.

    Raises:
        UnsupportedModel: If the tensors do not fit; lists the differences and proposes what would fit.
        InputError: If a weight is not finite.
        UnbackdoorError: See :func:`unbackdoor.networks.build.network`.
    """
    bare = skeleton(architecture, input_shape, classes)
    expected = bare.state_dict()
    spec = read_spec(architecture)
    names_in = None if spec.source == OWN else SOURCES[spec.source].names_in
    if names_in is not None:
        names = names_of_library(names_in, bare, state)
        return _as_its_library(bare, state, names, architecture, input_shape, classes, where)
    adapted = adapt(state, expected, in_order=spec.source == OWN and spec.name == IN_ORDER)
    if not adapted.fits:
        raise misfit(adapted.difference, len(expected), state, where=where, side=input_shape[1])
    typed = {name: tensor.to(expected[name].dtype) for name, tensor in adapted.state.items()}
    # Only now: a number that float64 can hold may be an infinity in float32.
    require_finite(typed, where)
    if spec.source == OWN:
        bare.load_state_dict(typed, strict=True, assign=True)
        return Filled(bare, adapted)
    return Filled(_loaded(bare, typed, architecture, input_shape, classes), adapted)


def _as_its_library(
    bare: nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    architecture: str,
    input_shape: tuple[int, int, int],
    classes: int,
    where: Path | str,
) -> Filled:
    """Fill a network with what its library loads of a file, under the names that the library gives it."""
    expected = bare.state_dict()
    renamed = {new: old for old, new in names.items()}
    taken = {new: state[old] for new, old in renamed.items()}
    difference = compare(taken, expected)
    twice = [old for old, new in names.items() if renamed[new] != old]
    if difference or twice:
        left = tuple(name for name in state if name not in names)
        raise misfit(
            replace(difference, unexpected=(*left, *twice)),
            len(expected),
            state,
            where=where,
            side=input_shape[1],
        )
    reason = "its library does not load them"
    dropped = {name: reason for name in state if name not in names}
    adapted = Adapted(taken, difference, {new: old for new, old in renamed.items() if new != old}, dropped)
    typed = {name: tensor.to(expected[name].dtype) for name, tensor in taken.items()}
    require_finite(typed, where)
    return Filled(_loaded(bare, typed, architecture, input_shape, classes), adapted)


def _loaded(
    bare: nn.Module,
    typed: Mapping[str, Tensor],
    architecture: str,
    input_shape: tuple[int, int, int],
    classes: int,
) -> nn.Module:
    expected = bare.state_dict()
    if any(tensor.is_meta for tensor in expected.values()):
        # Networks of other libraries hold values that no state dict has, such as tables of positions: they
        # are computed by building the network again, which now costs no more than the file itself.
        channels, height, width = input_shape
        bare = network(architecture, Geometry(channels, height, width, classes))
    bare.load_state_dict(typed, strict=True)
    return bare


def misfit(
    difference: Difference,
    total: int,
    state: Mapping[str, Tensor],
    *,
    where: Path | str,
    side: int | None = None,
) -> UnsupportedModel:
    """Return the error that lists what does not fit and names the architectures that would."""
    parts = [
        ("missing", difference.missing),
        ("unexpected", difference.unexpected),
        ("of another shape", difference.other_shape),
    ]
    return UnsupportedModel(
        "the weights do not fit the architecture",
        expected=f"{total} tensors",
        got="; ".join(f"{word}: {listed(names)}" for word, names in parts if names),
        where=where,
        remedy="Give the architecture, width and number of classes that the weights were trained with. "
        + proposal(state, side=side),
    )


def proposal(state: Mapping[str, Tensor], *, side: int | None = None) -> str:
    """Return a sentence that names the nearest architectures of this package and of the table."""
    candidates = nearest(state, side=side)[:_PROPOSED]
    fitting = [c for c in candidates if c.fits]
    if fitting:
        named = ", ".join(f"{c.spec} ({c.classes} classes)" for c in fitting)
        return f"These weights fit: {named}"
    if candidates:
        named = ", ".join(f"{c.spec} ({c.note or f'{c.matched:.0%} of the tensors'})" for c in candidates)
        return f"Nearest known: {named}"
    return "No known architecture is near; name your own code as FILE.py:CALLABLE"


def require_finite(state: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise InputError where a weight is not a finite number."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                "a weight is not a finite number",
                expected="neither NaN nor infinity",
                got=f"{bad} of {tensor.numel()} values of tensor {name[:200]!r}",
                where=where,
            )


def _unbuilt(architecture: str, error: BaseException) -> UnbackdoorError:
    return UnsupportedModel(
        "the network cannot be built",
        got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}",
        where=architecture[:200],
    )
