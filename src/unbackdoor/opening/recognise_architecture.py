"""From the names and shapes of tensors to the architectures that have them, or nearly have them.

Every family of this package is recognised by a small function that guesses its options; whether the guess
fits is then decided by building it without memory and comparing all tensors. Networks of timm and torchvision
are looked up in a table of hashes, so that nothing of theirs is imported or built here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unbackdoor.errors import UnbackdoorError
from unbackdoor.networks.build import canonical, network, preprocessing_of
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.heads import ACTIVATION, HEAD, PLACE, PLACES
from unbackdoor.networks.resnet import DEPTHS
from unbackdoor.networks.sequential import ACTIVATIONS
from unbackdoor.networks.sources import SOURCES
from unbackdoor.networks.sources.optional_libraries import is_installed
from unbackdoor.networks.spec import OWN, read_spec
from unbackdoor.opening.architecture_table import Match, linear_heads, lookup, same_shapes
from unbackdoor.opening.recognise_chain import Chain, chains, modules
from unbackdoor.opening.recognise_head import Head, find_head, find_heads
from unbackdoor.opening.rename_tensors import (
    adapt,
    fold_masks,
    form,
    head_of,
    leave_auxiliary,
    leave_training,
    names_of_library,
    numbered_head,
    take_normalisation,
    without_body_prefix,
)
from unbackdoor.opening.reparametrised import merge

IN_ORDER = "sequential_cnn"
_MAX_TENSORS = 20_000
_MAX_CANDIDATES = 12
_MAX_HEADS = 4  # that may be meant in one file; each is tried
_MAX_PREFIXES = 8  # wrappers around a network
# Each of them may have to be built and tried, at the cost of the file itself.
_MAX_OF_LIBRARIES = 6
_USUAL = 224  # pixels a side that libraries build for
# Below this share of common tensors a guess is of no use.
_WORTH_NAMING = 0.3


@dataclass(frozen=True)
class Candidate:
    """An architecture that a state dict may belong to.

    Attributes:
        spec: Spec to build it from.
        fits: Whether its tensors are exactly those of the state dict, after the translation of names.
        classes: Number of classes, or None where there is no head.
        input_channels: Channels of the image, or None.
        side: Pixels a side of the images that it is for; None where any size does.
        note: What was assumed or what is missing, in words.
        matched: Share of the network's tensors that the file has.
        choices: Options that no tensor shows, with what they may be, the more usual first.
        same: Other specs of the same network.
    """

    spec: str
    fits: bool
    classes: int | None
    input_channels: int | None
    side: int | None = None
    note: str = ""
    matched: float = 0.0
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    same: tuple[str, ...] = ()


def nearest(state: Mapping[str, Tensor], *, side: int | None = None, heads: bool = True) -> list[Candidate]:
    """Return the architectures that a state dict fits, then those that it nearly fits, the nearest first.

    Only names and shapes are used, nothing is run, and no other library is imported.

    Args:
        state: Tensors by name; a wrapper's prefix, a normalising layer and pruning masks do no harm.
        side: Pixels a side of the images that the model is for, or None.
        heads: Whether a head of several layers may stand in the place of one.
    """
    if not state or len(state) > _MAX_TENSORS:
        return []
    stored, names = _without_extras(state)
    match = _table_match(stored, names)
    channels, classes = _ends(names, match)
    candidates: list[Candidate] = []
    if channels is not None and classes is not None:
        for shapes in (names, _without_body(names), _of_children(names), _of_children(_without_body(names))):
            guesses = [guess for family in _FAMILIES for guess in family(shapes)] if shapes else []
            candidates += [
                c for g in guesses if (c := _compare_guess(g, stored, channels, classes, side)) is not None
            ]
            if any(c.fits for c in candidates):
                break
        else:
            plain = [_of_chain(chain) for chain in chains(names, side)]
            candidates += [
                c for g in plain if (c := _compare_guess(g, stored, channels, classes, side)) is not None
            ]
    if match is not None:
        candidates += _of_libraries(match, channels)
    elif not any(c.fits for c in candidates):
        candidates += _under_other_names(names, channels, classes)
    if heads and not any(c.fits for c in candidates):
        candidates += _under_other_heads(stored, names, side)
    unique = {candidate.spec: candidate for candidate in candidates if candidate.matched >= _WORTH_NAMING}
    ranked = sorted(unique.values(), key=lambda c: (not c.fits, -round(c.matched, 3)))
    return ranked[:_MAX_CANDIDATES]


def ends(state: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Return the image channels and the classes that first and last layers show, or None for either."""
    stored, names = _without_extras(state)
    return _ends(names, _table_match(stored, names) if 0 < len(state) <= _MAX_TENSORS else None)


def in_libraries(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a network of timm or torchvision has exactly these tensors."""
    return bool(state) and len(state) <= _MAX_TENSORS and _table_match(*_without_extras(state)) is not None


def _ends(names: Shapes, match: Match | None) -> tuple[int | None, int | None]:
    if match is None:
        return _input_channels(names), _classes(names)
    return match.channels or _input_channels(names), match.classes


# ---------------------------------------------------------------------------------------------------
# Guesses, family by family

Shapes = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Guess:
    spec: str
    side: int | None = None
    note: str = ""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_STAGE = re.compile(r"(?:layer|block)(\d+)\.(?:layer\.)?(\d+)\.(.+)")


def _stages(names: Shapes) -> dict[int, int]:
    """Return the number of blocks by stage of a residual network."""
    blocks: dict[int, set[int]] = {}
    for name in names:
        if match := _STAGE.match(name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    return {stage: len(indices) for stage, indices in sorted(blocks.items())}


def _rows(names: Shapes, name: str) -> int | None:
    return int(names[name].shape[0]) if name in names and names[name].dim() else None


def _has(names: Shapes, pattern: str) -> bool:
    regex = re.compile(pattern)
    return any(regex.search(name) for name in names)


def _is_preact(names: Shapes) -> bool:
    # A block that norms its input first has as many norms as its input has channels, not its output.
    first = _rows(names, "layer2.0.bn1.weight") or _rows(names, "block2.layer.0.bn1.weight")
    conv = names.get("layer2.0.conv1.weight", names.get("block2.layer.0.conv1.weight"))
    return (
        first is not None and conv is not None and conv.dim() == 4 and first == conv.shape[1] != conv.shape[0]
    )


def _resnet(names: Shapes) -> Iterator[_Guess]:
    stages = tuple(_stages(names).values())
    stem = names.get("conv1.weight")
    if len(stages) != 4 or stem is None or stem.dim() != 4 or _is_preact(names):
        return
    bottleneck = _has(names, r"layer1\.0\.conv3\.")
    usual = [depth for depth, (blocks, kind) in DEPTHS.items() if kind == bottleneck]
    usual.sort(key=lambda depth: sum(abs(a - b) for a, b in zip(DEPTHS[depth][0], stages, strict=True)))
    large = stem.shape[2] == 7
    width = int(stem.shape[0])
    stems = ("7x7+pool", "7x7") if large else ("3x3", "3x3+pool")
    yield _Guess(
        f"resnet{usual[0]}[width={width},stem={stems[0]}]",
        note=f"whether a max-pool follows the {stems[0][:3]} stem cannot be seen",
        choices={"stem": stems},
    )


def _cifar_resnet(names: Shapes) -> Iterator[_Guess]:
    stages = tuple(_stages(names).values())
    width = _rows(names, "conv1.weight")
    if len(stages) != 3 or width is None or _is_preact(names):
        return
    depth = 6 * max(stages) + 2
    if _has(names, r"(shortcut|downsample)\.0\.weight"):
        yield _Guess(f"cifar_resnet[depth={depth},width={width},shortcut=conv]")
        return
    yield _Guess(
        f"cifar_resnet[depth={depth},width={width}]",
        note="where the skips put their zeros cannot be seen",
        choices={"shortcut": ("pad", "pad_end")},
    )


def _preact_resnet(names: Shapes) -> Iterator[_Guess]:
    width = _rows(names, "conv1.weight")
    if len(_stages(names)) != 4 or width is None or not _is_preact(names):
        return
    final = _has(names, r"^(bn|norm|bn1)\.running_mean$")
    yield _Guess(f"preact_resnet18[width={width},final_norm={str(final).lower()}]")


def _wide_resnet(names: Shapes) -> Iterator[_Guess]:
    stages = tuple(_stages(names).values())
    if len(stages) != 3 or not _is_preact(names):
        return
    last = names.get("layer3.0.conv1.weight", names.get("block3.layer.0.conv1.weight"))
    factor = int(last.shape[0]) // 64 if last is not None and last.dim() else 0
    if factor:
        depth = 6 * max(stages) + 4
        yield _Guess(f"wrn16[width={factor}]" if depth == 16 else f"wrn[width={factor},depth={depth}]")


def _small_cnn(names: Shapes) -> Iterator[_Guess]:
    width = _rows(names, "conv1.weight")
    if width is not None and {f"conv{i}.weight" for i in range(1, 5)} <= set(names):
        yield _Guess(f"small_cnn[width={width}{'' if 'bn1.weight' in names else ',norm=none'}]")


def _airbench(names: Shapes) -> Iterator[_Guess]:
    width, deep = _rows(names, "group1.conv1.weight"), _rows(names, "group3.conv2.weight")
    if width and deep and "whiten.weight" in names and deep % width == 0:
        yield _Guess(f"airbench[width={width},expansion={deep // width}]")


def _vgg(names: Shapes) -> Iterator[_Guess]:
    width = _rows(names, "features.0.weight")
    if width is not None and "features.49.weight" in names and "classifier.weight" in names:
        yield _Guess(f"vgg19_bn[width={width}]")


def _mobilenet(names: Shapes) -> Iterator[_Guess]:
    stem = _rows(names, "features.0.0.weight")
    if stem is None or "features.18.0.weight" not in names:
        return
    # Channels are rounded to multiples of 8, so that several multipliers give the same stem.
    for multiplier in sorted(
        (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.4, 1.5, 2.0), key=lambda m: abs(32 * m - stem)
    ):
        yield _Guess(
            f"mobilenet_v2[width={multiplier}]",
            note="whether it has the strides for small or for large images cannot be seen",
            choices={"strides": ("small", "large")},
        )


def _vit(names: Shapes) -> Iterator[_Guess]:
    patch, token = names.get("patch_embed.proj.weight"), names.get("cls_token")
    depth = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    if patch is None or token is None or patch.dim() != 4 or not token.dim() or not depth:
        return
    # The family of this package always has 8 x 8 patches.
    yield _Guess(f"vit_small[width={int(token.shape[-1])},depth={depth}]", side=8 * int(patch.shape[2]))


_FAMILIES: tuple[Callable[[Shapes], Iterator[_Guess]], ...] = (
    _resnet,
    _cifar_resnet,
    _preact_resnet,
    _wide_resnet,
    _small_cnn,
    _airbench,
    _vgg,
    _mobilenet,
    _vit,
)


def _of_chain(chain: Chain) -> _Guess:
    unseen = " and ".join(chain.choices)
    return _Guess(
        chain.spec,
        side=chain.side,
        note=f"{unseen} cannot be seen in the weights" if unseen else "",
        choices=chain.choices,
    )


def _compare_guess(
    guess: _Guess, state: Shapes, channels: int, classes: int, side: int | None
) -> Candidate | None:
    """Build a guess without memory and compare its tensors with those of the file."""
    size = guess.side or side or 32
    try:
        skeleton = network(guess.spec, Geometry(channels, size, size, classes), device="meta").state_dict()
    except UnbackdoorError:
        return None
    adapted = adapt(state, skeleton, in_order=guess.spec.startswith(IN_ORDER))
    matched = adapted.difference.matching / max(len(skeleton), len(state))
    return Candidate(
        canonical(guess.spec),
        adapted.fits,
        classes,
        channels,
        guess.side,
        guess.note if adapted.fits else "",
        1.0 if adapted.fits else matched,
        guess.choices if adapted.fits else {},
    )


# ---------------------------------------------------------------------------------------------------
# Networks of other libraries


def _table_match(stored: Shapes, names: Shapes) -> Match | None:
    """Return what the table has under these names, or with another name of the last layer."""
    views = (stored, names, _without_body(names))
    for shapes in (*views, *(leave_auxiliary(view)[0] for view in views if leave_auxiliary(view)[1])):
        head = head_of(shapes)
        others = [name for name in linear_heads() if name != head and _is_usual_head(name)] if head else []
        for view in (shapes, *(_with_head(shapes, str(head), name) for name in others)):
            if (match := lookup(view)) is not None:
                return match
    return None


def _is_usual_head(name: str) -> bool:
    # Else the tensors could not be renamed to it.
    return head_of({f"{name}.weight": torch.empty(1, 1, device="meta")}) == name


def _with_head(names: Shapes, head: str, other: str) -> dict[str, Tensor]:
    return {
        f"{other}.{name.removeprefix(head + '.')}" if name.startswith(head + ".") else name: tensor
        for name, tensor in names.items()
    }


def _of_libraries(match: Match, channels: int | None) -> Iterator[Candidate]:
    for spec, *others in match.networks[:_MAX_OF_LIBRARIES]:
        library = spec.partition(":")[0]
        yield Candidate(
            spec,
            True,
            match.classes,
            match.channels or channels,
            note=f"all names and shapes are those of {spec}, which needs the package {library} (extra zoo)",
            matched=1.0,
            same=tuple(others),
        )


def _under_other_heads(stored: Shapes, names: Shapes, side: int | None) -> Iterator[Candidate]:
    """Yield the networks that fit where a head of several layers is one linear layer."""
    for head in itertools.islice(find_heads(names), _MAX_HEADS):
        one = torch.empty(head.classes, head.inputs, device="meta")
        body = {name: tensor for name, tensor in names.items() if name not in head.names}
        single = {**body, "fc.weight": one, "fc.bias": one[:, 0]}
        fitting = [
            _with_head_of(candidate, head)
            for candidate in nearest(single, side=side, heads=False)
            if candidate.fits
        ]
        found = [candidate for candidate in fitting if _has_head(candidate.spec, stored, candidate)]
        if found:
            yield from found
            return


def _with_head_of(candidate: Candidate, head: Head, **options: str) -> Candidate:
    parsed = read_spec(candidate.spec)
    choices = {ACTIVATION: tuple(ACTIVATIONS)} if head.activated else {}
    return replace(
        candidate,
        spec=str(replace(parsed, options={**parsed.options, HEAD: head.tokens, **options})),
        note="; ".join(text for text in (candidate.note, head.note) if text),
        choices={**candidate.choices, **choices},
        same=(),
    )


def with_several_layers(spec: str, state: Shapes) -> Candidate | None:
    """Return a named network of a library with the head of several layers that a state dict has; else None.

    Args:
        spec: The network, as the user named it.
        state: Tensors by name.
    """
    stored, names = _without_extras(state)
    heads = list(itertools.islice(find_heads(names), _MAX_HEADS))
    if not heads:
        return None
    stated = preprocessing_of(spec).size
    plain = Candidate(spec, False, heads[0].classes, _ends(names, None)[0], stated[0] if stated else None)
    if _has_head(spec, stored, plain, exact=False):
        return None  # as VGG, whose own head is of several layers
    for head in heads:
        for place in PLACES:
            candidate = _with_head_of(replace(plain, classes=head.classes), head, **{PLACE: place})
            candidate = replace(candidate, spec=canonical(candidate.spec))
            if _has_head(candidate.spec, stored, candidate, exact=False):
                return replace(candidate, fits=True, matched=1.0, side=None)
    return None


def _has_head(spec: str, stored: Shapes, candidate: Candidate, *, exact: bool = True) -> bool:
    """Tell whether a spec has these tensors; unless ``exact``, for images of another size."""
    parsed = read_spec(spec)
    if exact and parsed.source != OWN and not is_installed(parsed.source):
        return True  # all but the head is in the table
    side = candidate.side or (32 if parsed.source == OWN else _USUAL)
    geometry = Geometry(candidate.input_channels or 3, side, side, candidate.classes or 1)
    try:
        expected = network(spec, geometry, device="meta")
    except (UnbackdoorError, RuntimeError, NotImplementedError):
        return False
    names_in = None if parsed.source == OWN else SOURCES[parsed.source].names_in
    if names_in is not None:
        return set(names_of_library(names_in, expected, stored).values()) == expected.state_dict().keys()
    skeleton = expected.state_dict()
    adapted = adapt(stored, skeleton)
    if exact or adapted.difference.missing or adapted.difference.unexpected:
        return adapted.fits
    head = {name for head in find_heads(skeleton) for name in head.names}
    return all(form(adapted.state[name]) == form(skeleton[name]) for name in head)


def _under_other_names(names: Shapes, channels: int | None, classes: int | None) -> Iterator[Candidate]:
    head = head_of(names) or numbered_head(names)
    body = {name: t for name, t in names.items() if head is None or not name.startswith(f"{head}.")}
    for spec, *others in same_shapes(body)[:_MAX_OF_LIBRARIES] if len(body) < len(names) else ():
        note = "all of its shapes, under other names"
        fits = _fits_by_children(spec, names, channels, classes)
        yield Candidate(spec, fits, classes, channels, note=note, matched=1.0, same=tuple(others))


def _fits_by_children(spec: str, names: Shapes, channels: int | None, classes: int | None) -> bool:
    """Tell whether these are the tensors of ``Sequential(*network.children())``, by building the network."""
    numbered = any(name.partition(".")[0].isdecimal() for name in (*names, *_without_body(names)))
    if not (numbered and channels and classes and is_installed(read_spec(spec).source)):
        return False
    try:
        skeleton = network(spec, Geometry(channels, _USUAL, _USUAL, classes), device="meta").state_dict()
    except (UnbackdoorError, RuntimeError, NotImplementedError):
        return False
    return adapt(names, skeleton).fits


# ---------------------------------------------------------------------------------------------------


def _without_extras(state: Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors without masks and normalisation, by the file's names and without a common prefix."""
    remaining, _ = merge(state)
    remaining, _ = fold_masks(remaining)
    remaining, _ = leave_training(remaining)
    remaining, _, _, _ = take_normalisation(remaining)
    return remaining, _without_prefix(remaining)


def _of_children(names: Shapes) -> dict[str, Tensor]:
    """Return ``Sequential(*network.children())`` of a residual network under usual names; else nothing."""
    head = head_of(names) or numbered_head(names)
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    numbers = sorted(
        (p for p in parts if p.isascii() and p.isdecimal() and len(p) < 5 and p != head), key=int
    )
    if len(numbers) < 5 or head is None or set(parts) - {*numbers, head.partition(".")[0]}:
        return {}
    usual = dict(
        zip(numbers, ("conv1", "bn1", *(f"layer{i}" for i in range(1, len(numbers) - 1))), strict=True)
    )
    if head.isdecimal():
        usual[head] = "fc"
    return {
        f"{usual.get(first, first)}.{rest}": names[f"{first}.{rest}"]
        for first, _, rest in (name.partition(".") for name in names)
        if rest
    }


def _without_body(names: Shapes) -> dict[str, Tensor]:
    return {new: names[old] for new, old in without_body_prefix(names).items()}


def _without_prefix(state: Shapes) -> dict[str, Tensor]:
    names = dict(state)
    for _ in range(_MAX_PREFIXES):
        if len({name.partition(".")[0] for name in names}) != 1:
            break
        shorter = {name.partition(".")[2]: tensor for name, tensor in names.items()}
        # Names such as "0.weight" of a whole network in one Sequential lose nothing here.
        if "" in shorter or any("." not in name for name in shorter):
            break
        names = shorter
    return names


def _classes(names: Shapes) -> int | None:
    if (several := find_head(names)) is not None:
        return several.classes
    head = head_of(names) or numbered_head(names)
    if head is not None:
        return int(names[f"{head}.weight"].shape[0])
    if (layers := modules(names)) is not None:
        return layers[-1].shape[0]
    flat = [tensor for name, tensor in names.items() if tensor.dim() == 2 and name.endswith("weight")]
    # A convolution that is averaged afterwards, as in SqueezeNet.
    flat = flat or [tensor for name, tensor in names.items() if tensor.dim() == 4 and _CONV_HEAD.search(name)]
    return int(flat[-1].shape[0]) if flat else None


_CONV_HEAD = re.compile(r"^(classifier|head|fc)(\.\d+)?\.weight$")
_FIRST = (
    "conv1.weight", "conv1.0.weight", "features.0.weight", "features.0.0.weight", "features.conv0.weight",
    "conv_stem.weight", "stem.0.weight", "patch_embed.proj.weight", "conv_proj.weight",
)  # fmt: skip


def _input_channels(names: Shapes) -> int | None:
    if (layers := modules(names)) is not None:
        return layers[0].shape[1]
    for name in _FIRST:
        if name in names and names[name].dim() == 4:
            return int(names[name].shape[1])
    # Depthwise convolutions have one input channel as well, and files may be sorted by name.
    inputs = [int(tensor.shape[1]) for tensor in names.values() if tensor.dim() == 4]
    if 3 in inputs:
        return 3
    return inputs[0] if inputs else None
