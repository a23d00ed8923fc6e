"""Which networks a file of weights may be: one named by the user, or those that its tensors fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from unbackdoor.errors import InputError, MissingExtra, UnbackdoorError, UnsupportedModel
from unbackdoor.networks.build import canonical, preprocessing_of
from unbackdoor.networks.heads import ACTIVATION, HEAD
from unbackdoor.networks.sources.optional_libraries import is_installed
from unbackdoor.networks.spec import OWN, PYTHON, read_spec
from unbackdoor.opening.load_tensors import proposal
from unbackdoor.opening.recognise_architecture import (
    IN_ORDER,
    Candidate,
    in_libraries,
    nearest,
    with_several_layers,
)
from unbackdoor.opening.recognise_chain import averaged
from unbackdoor.weights.incomplete import adapted_layers

# More than this many ways to complete a network would take minutes to try.
_MAX_VARIANTS = 48
# With a wrong value of one of these the network computes something else.
_DECISIVE = ("activation", ACTIVATION)
_NAMED = "named by the user"


@dataclass(frozen=True)
class CandidateSet:
    """Specs that may be meant, the more usual first.

    Attributes:
        by_side: What to try for images of so many pixels a side; under None what takes any size.
        source: Where they come from, in words.
        decisive: Whether nothing but labelled images can decide between them.
        note: What no tensor shows, in words.
        fitting: All that fit, for the provenance.
        absent: The network of a library that has these tensors, where that library is not installed.
    """

    by_side: Mapping[int | None, tuple[str, ...]]
    source: str
    decisive: bool = False
    note: str = ""
    fitting: tuple[Candidate, ...] = field(default=())
    absent: str = ""

    @property
    def specs(self) -> tuple[str, ...]:
        """All specs."""
        return tuple(itertools.chain.from_iterable(self.by_side.values()))

    def only(self, side: int | None) -> CandidateSet:
        """Return those for images of a size; all where there are none for it."""
        return replace(self, by_side={side: self.by_side[side]}) if side in self.by_side else self

    def first(self) -> CandidateSet:
        """Return the most usual one alone."""
        side, specs = next(iter(self.by_side.items()))
        return replace(self, by_side={side: specs[:1]}, decisive=False)


def find_candidates(
    state: Mapping[str, Tensor], arch: str | None, *, side: int | None, exact: bool, where: Path
) -> CandidateSet:
    """Return the specs that may be meant.

    Args:
        state: Tensors by name.
        arch: What the user named, or None. Options that were not typed and that the tensors show, or that no
            tensor shows, are filled in.
        side: Pixels a side of the images, or None.
        exact: Whether the model takes no other size.
        where: File, for messages.

    Raises:
        ConfigError: If ``arch`` is no spec, or an unknown one.
        MissingExtra: If nothing was named, and the tensors are those of a library that is not installed.
        UnsupportedModel: If no architecture was named and none of the registered ones fits.
    """
    named = read_spec(arch) if arch is not None else None
    if named is not None and named.source != OWN:
        own_head = named.source == PYTHON or HEAD in named.options
        other = None if own_head else with_several_layers(str(named), state)
        if other is not None:
            return _with_all_choices([other], named.options, _NAMED)
        return CandidateSet({None: (str(named),)}, _NAMED)
    canonical_spec = canonical(arch) if arch is not None else ""
    candidates = [c for c in nearest(state, side=side) if c.fits]
    if side is not None and not exact:
        # Images of another size than the model's can be resized to it.
        exact_specs = {c.spec for c in candidates}
        candidates += [c for c in nearest(state) if c.fits and c.spec not in exact_specs]
    if named is not None:
        agreeing = [
            c for c in candidates if read_spec(c.spec).name == named.name and _agrees(c.spec, named.options)
        ]
        if not agreeing:
            return CandidateSet({None: (canonical_spec,)}, _NAMED)
        return _with_all_choices(agreeing, named.options, _NAMED)
    if not candidates and (layers := adapted_layers(state)):
        raise UnsupportedModel(
            "the file holds an adapter, such as LoRA, that is not merged into its base",
            got=f"{len(layers)} adapted layers, such as {repr(min(layers)[:120])[1:-1]}",
            where=where,
            remedy="Merge it (merge_and_unload of peft), and save the merged model",
        )
    if not candidates:
        raise UnsupportedModel(
            "no known architecture has these tensors",
            got=f"{len(state)} tensors, such as {repr(next(iter(state))[:120])[1:-1]}" if state else "none",
            where=where,
            remedy=f"Name the architecture. {proposal(state, side=side)}",
        )
    preferred = _preferred_sources(candidates)
    candidate_set = _with_all_choices(preferred, {}, "guessed from names and shapes of the tensors")
    others = _library_candidates(candidates)
    if others and all(read_spec(c.spec).name == IN_ORDER for c in preferred):
        return replace(candidate_set, absent=others[0].spec)
    return candidate_set


def library_size(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return (H, W) that a library states of the network that has these tensors, or None."""
    if not in_libraries(state):
        return None
    fitting = [c for c in nearest(state) if c.fits]
    try:
        return preprocessing_of(_preferred_sources(fitting)[0].spec).size
    except UnbackdoorError:
        return None


def _preferred_sources(candidates: list[Candidate]) -> list[Candidate]:
    """Return our own families, else what an installed library has, else plain chains of layers.

    Raises:
        MissingExtra: If only libraries have such a network, and none of them is installed.
    """
    own = [c for c in candidates if read_spec(c.spec).source == OWN]
    families = [c for c in own if read_spec(c.spec).name != IN_ORDER]
    if families or len(own) == len(candidates):
        return families or own
    foreign = _library_candidates(candidates)
    if installed := [c for c in map(_under_installed_library, foreign) if c is not None]:
        return installed
    if own:
        return own
    library = read_spec(foreign[0].spec).source
    raise MissingExtra(library, "zoo", f"the file, which holds the weights of {foreign[0].spec},")


def _library_candidates(candidates: list[Candidate]) -> list[Candidate]:
    return [c for c in candidates if read_spec(c.spec).source != OWN]


def _under_installed_library(candidate: Candidate) -> Candidate | None:
    """Return the candidate under a spec whose library is installed, or None."""
    specs = (candidate.spec, *candidate.same)
    at_hand = [spec for spec in specs if is_installed(read_spec(spec).source)]
    return replace(candidate, spec=at_hand[0]) if at_hand else None


def refuse_to_guess(candidates: CandidateSet, where: Path) -> InputError:
    """Return the error that lists the candidates where no image can decide between them."""
    return InputError(
        "several networks have these tensors, and without labelled images nothing tells which is meant",
        expected="one of " + ", ".join(candidates.specs[:8]),
        where=where,
        remedy="Name the architecture, or give labelled clean images"
        + (
            f'; they are the tensors of {candidates.absent}: pip install "unbackdoor[zoo]"'
            if candidates.absent
            else ""
        ),
    )


def _agrees(spec: str, typed: Mapping[str, str]) -> bool:
    """Tell whether a spec stays the same when the typed options are laid over it."""
    parsed = read_spec(spec)
    options = {**parsed.options, **typed}
    text = f"{parsed.name}[{','.join(f'{key}={value}' for key, value in options.items())}]"
    # Unseen options are open; everything else must be what the tensors show.
    changed = read_spec(canonical(text)).options
    return all(changed.get(key) == value for key, value in parsed.options.items())


def _with_all_choices(candidates: list[Candidate], typed: Mapping[str, str], source: str) -> CandidateSet:
    by_side: dict[int | None, list[str]] = {}
    for candidate in candidates:
        specs = by_side.setdefault(candidate.side, [])
        parsed = read_spec(candidate.spec)
        free = {key: values for key, values in candidate.choices.items() if key not in typed}
        for values in itertools.product(*free.values()):
            choice = dict(zip(free, values, strict=True))
            pooling = choice.pop("pooling", "max")
            options = {**parsed.options, **typed, **choice}
            spec = canonical(str(replace(parsed, options=options)))
            spec = averaged(spec) if pooling == "average" else spec
            if spec not in specs and len(specs) < _MAX_VARIANTS:
                specs.append(spec)
    unseen = any(key in c.choices and key not in typed for c in candidates for key in _DECISIVE)
    notes = dict.fromkeys(candidate.note for candidate in candidates if candidate.note)
    return CandidateSet(
        {side: tuple(specs) for side, specs in by_side.items()},
        source,
        decisive=unseen or len(candidates) > 1,
        note="; ".join(notes),
        fitting=tuple(candidates),
    )
