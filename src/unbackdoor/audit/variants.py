"""Which networks a file of weights may be: one named by the user, or those that its tensors fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.models.build import canonical
from unbackdoor.models.chain import averaged
from unbackdoor.models.fill import proposal
from unbackdoor.models.nearest import Candidate, nearest
from unbackdoor.models.spec import OWN, read_spec

# More than this many ways to complete a network would take minutes to try.
_MAX_VARIANTS = 48
# Where one of these is not known the network computes something else altogether.
_DECISIVE = ("activation",)


@dataclass(frozen=True)
class Variants:
    """Specs that may be meant, the more usual first.

    Attributes:
        specs: What to try.
        side: Pixels a side that they take; None where any size does.
        source: Where they come from, in words.
        decisive: Whether nothing but images can decide between them.
        note: What no tensor shows, in words.
        candidates: All that fit, for the story.
    """

    specs: tuple[str, ...]
    side: int | None
    source: str
    decisive: bool = False
    note: str = ""
    candidates: tuple[Candidate, ...] = field(default=())


def find(state: Mapping[str, Tensor], arch: str | None, *, side: int | None, where: Path) -> Variants:
    """Return the specs that may be meant.

    Args:
        state: Tensors by name.
        arch: What the user named, or None. Options that were not typed and that the tensors show, or that no
            tensor shows, are filled in.
        side: Pixels a side of the images, where known.
        where: File, for messages.

    Raises:
        ConfigError: If ``arch`` is no spec, or an unknown one.
        UnsupportedModel: If nothing was named and nothing known fits.
    """
    if arch is not None:
        named = read_spec(arch)
        if named.source != OWN:
            return Variants((str(named),), None, "named by the user")
        full = canonical(arch)
        same = [c for c in nearest(state, side=side) if c.fits and read_spec(c.spec).name == named.name]
        agreeing = [c for c in same if _agrees(c.spec, named.options)]
        if not agreeing:
            return Variants((full,), None, "named by the user")
        return _expanded(agreeing, named.options, "named by the user")
    candidates = [c for c in nearest(state, side=side) if c.fits]
    if not candidates:
        raise UnsupportedModel(
            "no known architecture has these tensors",
            got=f"{len(state)} tensors, such as {repr(next(iter(state))[:120])[1:-1]}",
            where=where,
            remedy=f"Name the architecture. {proposal(state, side=side)}",
        )
    ours = [c for c in candidates if read_spec(c.spec).source == OWN]
    return _expanded(ours or candidates, {}, "guessed from names and shapes of the tensors")


def refuse_to_guess(variants: Variants, where: Path) -> InputError:
    """Return the error that lists the variants where no image can decide between them."""
    return InputError(
        "several networks have these tensors, and without labelled images nothing tells which is meant",
        expected="one of " + ", ".join(variants.specs[:8]),
        where=where,
        remedy="Name the architecture, or give labelled clean images",
    )


def _agrees(spec: str, typed: Mapping[str, str]) -> bool:
    """Tell whether a spec stays the same when the typed options are laid over it."""
    parsed = read_spec(spec)
    options = {**parsed.options, **typed}
    text = f"{parsed.name}[{','.join(f'{key}={value}' for key, value in options.items())}]"
    # Unseen options are open; everything else must be what the tensors show.
    changed = read_spec(canonical(text)).options
    return all(changed.get(key) == value for key, value in parsed.options.items())


def _expanded(candidates: list[Candidate], typed: Mapping[str, str], source: str) -> Variants:
    specs: list[str] = []
    notes: list[str] = []
    for candidate in candidates:
        parsed = read_spec(candidate.spec)
        free = {key: values for key, values in candidate.choices.items() if key not in typed}
        for values in itertools.product(*free.values()):
            choice = dict(zip(free, values, strict=True))
            pooling = choice.pop("pooling", "max")
            options = {**parsed.options, **typed, **choice}
            written = f"{parsed.name}[{','.join(f'{key}={value}' for key, value in options.items())}]"
            spec = canonical(written) if parsed.source == OWN else candidate.spec
            specs.append(averaged(spec) if pooling == "average" else spec)
        if candidate.note:
            notes.append(candidate.note)
    sides = {candidate.side for candidate in candidates}
    unique = tuple(dict.fromkeys(specs))[:_MAX_VARIANTS]
    return Variants(
        unique,
        candidates[0].side,
        source,
        decisive=len(sides) > 1
        or len(candidates) > 1
        or any(key in c.choices and key not in typed for c in candidates for key in _DECISIVE),
        note="; ".join(dict.fromkeys(notes)),
        candidates=tuple(candidates),
    )
