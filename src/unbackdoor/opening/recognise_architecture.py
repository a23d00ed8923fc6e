"""From the names and shapes of tensors to the architectures that have them, or nearly have them.

Every family of this package is recognised by a small function that guesses its options; whether the guess
fits is then decided by building it without memory and comparing all tensors. Networks of timm and torchvision
are only known by a few tell-tale tensors, so that neither library is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from unbackdoor.errors import UnbackdoorError
from unbackdoor.networks.build import canonical, network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.resnet import DEPTHS
from unbackdoor.opening.recognise_chain import Chain, chains, modules
from unbackdoor.opening.rename_tensors import (
    adapt,
    fold_masks,
    head_of,
    leave_training,
    take_normalisation,
    without_body_prefix,
)

IN_ORDER = "sequential_cnn"
_MAX_TENSORS = 20_000
_MAX_CANDIDATES = 12
# Below this share of tensors in common a guess helps nobody.
_WORTH_NAMING = 0.3


@dataclass(frozen=True)
class Candidate:
    """An architecture that a state dict may belong to.

    Attributes:
        spec: Spec to build it from.
        fits: Whether its tensors are exactly those of the state dict, after the translation of names.
        classes: Number of classes, or None where no head was found.
        input_channels: Channels of the image, or None.
        side: Pixels a side of the images that it is for; None where any size does.
        note: What was assumed or what is missing, in words.
        matched: Share of the network's tensors that were found.
        choices: Options that no tensor shows, with what they may be, the more usual first.
    """

    spec: str
    fits: bool
    classes: int | None
    input_channels: int | None
    side: int | None = None
    note: str = ""
    matched: float = 0.0
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def nearest(state: Mapping[str, Tensor], *, side: int | None = None) -> list[Candidate]:
    """Return the architectures that a state dict fits, then those that it nearly fits, the nearest first.

    Only names and shapes are looked at, nothing is run, and no other library is imported.

    Args:
        state: Tensors by name; a wrapper's prefix, a normalising layer and pruning masks do no harm.
        side: Pixels a side of the images that the model is for, where known.
    """
    if not state or len(state) > _MAX_TENSORS:
        return []
    held, names = _plain(state)
    channels, classes = _input_channels(names), _classes(names)
    found: list[Candidate] = []
    if channels is not None and classes is not None:
        for known in (names, _without_body(names)):
            guesses = [guess for family in _FAMILIES for guess in family(known)] if known else []
            found += [c for g in guesses if (c := _checked(g, held, channels, classes, side)) is not None]
            if any(c.fits for c in found):
                break
        else:
            plain = [_of_chain(chain) for chain in chains(names, side)]
            found += [c for g in plain if (c := _checked(g, held, channels, classes, side)) is not None]
    found += _foreign(names, channels)
    unique = {candidate.spec: candidate for candidate in found if candidate.matched >= _WORTH_NAMING}
    ranked = sorted(unique.values(), key=lambda c: (not c.fits, -round(c.matched, 3)))
    return ranked[:_MAX_CANDIDATES]


def ends(state: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Return the image channels and the classes that first and last layers show, or None for either."""
    _, names = _plain(state)
    return _input_channels(names), _classes(names)


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
    return {stage: len(found) for stage, found in sorted(blocks.items())}


def _rows(names: Shapes, name: str) -> int | None:
    return int(names[name].shape[0]) if name in names and names[name].dim() else None


def _has(names: Shapes, pattern: str) -> bool:
    found = re.compile(pattern)
    return any(found.search(name) for name in names)


def _is_preact(names: Shapes) -> bool:
    # A block that norms its input first has as many norms as its input has channels, not its output.
    first = _rows(names, "layer2.0.bn1.weight") or _rows(names, "block2.layer.0.bn1.weight")
    conv = names.get("layer2.0.conv1.weight", names.get("block2.layer.0.conv1.weight"))
    return first is not None and conv is not None and first == conv.shape[1] != conv.shape[0]


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
    factor = int(last.shape[0]) // 64 if last is not None else 0
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
    if patch is None or token is None or patch.dim() != 4 or not depth:
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


def _checked(guess: _Guess, state: Shapes, channels: int, classes: int, side: int | None) -> Candidate | None:
    """Build a guess without memory and hold its tensors against those of the file."""
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
# Networks of other libraries, by tensors that no other of their networks has in this shape

# (spec, side, {name: shape}); K stands for any number of classes, C for any number of image channels, and no
# shape for a tensor that must not be there.
_C, _K = -1, -2
_SIGNATURES: tuple[tuple[str, int, dict[str, tuple[int, ...]]], ...] = (
    ("torchvision:densenet121", 224, {
        "features.conv0.weight": (64, _C, 7, 7),
        "features.denseblock4.denselayer16.conv2.weight": (32, 128, 3, 3),
        "features.denseblock3.denselayer24.conv2.weight": (32, 128, 3, 3), "classifier.weight": (_K, 1024),
    }),
    ("torchvision:densenet161", 224, {
        "features.conv0.weight": (96, _C, 7, 7),
        "features.denseblock3.denselayer36.conv2.weight": (48, 192, 3, 3),
        "features.denseblock4.denselayer24.conv2.weight": (48, 192, 3, 3), "classifier.weight": (_K, 2208),
    }),
    ("torchvision:wide_resnet50_2", 224, {
        "conv1.weight": (64, _C, 7, 7), "layer1.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.conv2.weight": (512, 512, 3, 3), "layer3.6.conv2.weight": (), "fc.weight": (_K, 2048),
    }),
    ("torchvision:resnext50_32x4d", 224, {
        "conv1.weight": (64, _C, 7, 7), "layer1.0.conv2.weight": (128, 4, 3, 3),
        "layer3.5.conv2.weight": (512, 16, 3, 3), "layer3.6.conv2.weight": (), "fc.weight": (_K, 2048),
    }),
    ("torchvision:inception_v3", 299, {
        "Conv2d_1a_3x3.conv.weight": (32, _C, 3, 3), "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "AuxLogits.fc.weight": (_K, 768), "fc.weight": (_K, 2048),
    }),
    ("torchvision:inception_v3[aux_logits=false]", 299, {
        "Conv2d_1a_3x3.conv.weight": (32, _C, 3, 3), "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "AuxLogits.fc.weight": (), "fc.weight": (_K, 2048),
    }),
    ("torchvision:googlenet", 224, {
        "conv1.conv.weight": (64, _C, 7, 7), "inception5b.branch1.conv.weight": (384, 832, 1, 1),
        "aux2.fc2.weight": (_K, 1024), "fc.weight": (_K, 1024),
    }),
    ("torchvision:googlenet[aux_logits=false]", 224, {
        "conv1.conv.weight": (64, _C, 7, 7), "inception5b.branch1.conv.weight": (384, 832, 1, 1),
        "aux2.fc2.weight": (), "fc.weight": (_K, 1024),
    }),
    ("torchvision:mnasnet1_0", 224, {
        "layers.0.weight": (32, _C, 3, 3), "layers.10.2.layers.0.weight": (480, 80, 1, 1),
        "layers.14.weight": (1280, 320, 1, 1), "classifier.1.weight": (_K, 1280),
    }),
    ("torchvision:efficientnet_b3", 300, {
        "features.0.0.weight": (40, _C, 3, 3), "features.8.0.weight": (1536, 384, 1, 1),
        "features.5.0.block.1.0.weight": (576, 1, 5, 5), "classifier.1.weight": (_K, 1536),
    }),
    ("torchvision:efficientnet_b0", 224, {
        "features.0.0.weight": (32, _C, 3, 3), "features.8.0.weight": (1280, 320, 1, 1),
        "features.1.0.block.0.0.weight": (32, 1, 3, 3), "features.1.1.block.0.0.weight": (),
        "classifier.1.weight": (_K, 1280),
    }),
    ("timm:efficientnet_b0", 224, {
        "conv_stem.weight": (32, _C, 3, 3), "conv_head.weight": (1280, 320, 1, 1),
        "blocks.0.0.conv_dw.weight": (32, 1, 3, 3), "blocks.0.0.se.conv_reduce.weight": (8, 32, 1, 1),
        "blocks.0.1.conv_dw.weight": (), "classifier.weight": (_K, 1280),
    }),
    ("torchvision:mobilenet_v3_small", 224, {
        "features.0.0.weight": (16, _C, 3, 3), "features.12.0.weight": (576, 96, 1, 1),
        "classifier.3.weight": (_K, 1024),
    }),
    ("torchvision:mobilenet_v3_large", 224, {
        "features.0.0.weight": (16, _C, 3, 3), "features.16.0.weight": (960, 160, 1, 1),
        "classifier.3.weight": (_K, 1280),
    }),
    ("torchvision:convnext_tiny", 224, {
        "features.0.0.weight": (96, _C, 4, 4), "features.7.2.block.0.weight": (768, 1, 7, 7),
        "features.5.8.block.0.weight": (384, 1, 7, 7), "features.5.9.block.0.weight": (),
        "classifier.2.weight": (_K, 768),
    }),
    ("torchvision:vit_b_16", 224, {
        "conv_proj.weight": (768, _C, 16, 16), "encoder.pos_embedding": (1, 197, 768),
        "encoder.layers.encoder_layer_11.mlp.0.weight": (3072, 768), "heads.head.weight": (_K, 768),
    }),
    ("torchvision:swin_t", 224, {
        "features.0.0.weight": (96, _C, 4, 4), "features.5.5.mlp.0.weight": (1536, 384),
        "features.5.6.mlp.0.weight": (), "features.1.0.attn.logit_scale": (), "head.weight": (_K, 768),
    }),
    ("torchvision:shufflenet_v2_x1_0", 224, {
        "conv1.0.weight": (24, _C, 3, 3), "conv5.0.weight": (1024, 464, 1, 1), "fc.weight": (_K, 1024),
    }),
    ("torchvision:squeezenet1_1", 224, {
        "features.0.weight": (64, _C, 3, 3), "features.12.expand3x3.weight": (256, 64, 3, 3),
        "classifier.1.weight": (_K, 512, 1, 1),
    }),
    ("timm:vit_tiny_patch16_224", 224, {
        "patch_embed.proj.weight": (192, _C, 16, 16), "blocks.11.attn.qkv.weight": (576, 192),
        "pos_embed": (1, 197, 192), "head.weight": (_K, 192),
    }),
    ("timm:vit_small_patch16_224", 224, {
        "patch_embed.proj.weight": (384, _C, 16, 16), "blocks.11.attn.qkv.weight": (1152, 384),
        "pos_embed": (1, 197, 384), "head.weight": (_K, 384),
    }),
    ("timm:vit_base_patch16_224", 224, {
        "patch_embed.proj.weight": (768, _C, 16, 16), "blocks.11.attn.qkv.weight": (2304, 768),
        "pos_embed": (1, 197, 768), "head.weight": (_K, 768),
    }),
)  # fmt: skip


def _foreign(names: Shapes, channels: int | None) -> Iterator[Candidate]:
    for spec, side, signature in _SIGNATURES:
        classes = None
        for name, shape in signature.items():
            held = tuple(names[name].shape) if name in names else ()
            if len(held) != len(shape):
                break
            wild = [extent in (_C, _K) for extent in shape]
            if any(not free and a != b for free, a, b in zip(wild, held, shape, strict=True)):
                break
            if _K in shape:
                classes = int(held[shape.index(_K)])
        else:
            library = spec.partition(":")[0]
            yield Candidate(
                spec,
                True,
                classes,
                channels,
                side,
                f"judged by {len(signature)} tensors; building it needs the package {library} (extra zoo)",
                1.0,
            )


# ---------------------------------------------------------------------------------------------------


def _plain(state: Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors without masks and normalisation, by the file's names and without a common prefix."""
    held, _ = fold_masks(state)
    held, _ = leave_training(held)
    held, _, _, _ = take_normalisation(held)
    return held, _without_prefix(held)


def _without_body(names: Shapes) -> dict[str, Tensor]:
    return {new: names[old] for new, old in without_body_prefix(names).items()}


def _without_prefix(state: Shapes) -> dict[str, Tensor]:
    names = dict(state)
    while names and len({name.partition(".")[0] for name in names}) == 1:
        shorter = {name.partition(".")[2]: tensor for name, tensor in names.items()}
        # Names such as "0.weight" of a whole network in one Sequential lose nothing here.
        if "" in shorter or any("." not in name for name in shorter):
            break
        names = shorter
    return names


def _classes(names: Shapes) -> int | None:
    head = head_of(names)
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
