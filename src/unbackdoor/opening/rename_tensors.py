"""From the names in a checkpoint to the names of a network of the same layers; every change is listed.

What is done, in this order, and nothing else:

1. ``X_orig`` and ``X_mask`` of ``torch.nn.utils.prune`` become their product ``X``; so do the weight of a
   norm and the ``neuron_mask`` that pruning defenses (ANP, RNP) put beside it. Weights in the parts of weight
   or spectral norm are merged (``reparametrised``).
2. What belongs to the training is left out: a criterion, metrics, the counter of an averaged model, and the
   auxiliary heads of a network that is built without them.
3. A mean and a deviation stored by a normalising layer inside the model (``normalize.mean``) are taken out;
   where their values fit a normalisation of pixels they are reported as one.
4. A prefix that stands before all remaining names, or before all but the head's (``backbone.``), is taken off
   where the names then fit.
5. ``num_batches_tracked``, which old checkpoints lack and which no result depends on, is filled in.
6. Names that the network does not have are renamed, one to one and only between equal shapes: first by
   synonyms (``shortcut`` and ``downsample``, ``block1.layer.0`` and ``layer1.0``), then the head, whatever it
   is called, if it is the last linear layer of both. A plain chain (``sequential_cnn``) is renamed in order.

If names are left over after that, nothing is loaded: the difference is reported instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from unbackdoor.opening.recognise_chain import modules
from unbackdoor.opening.recognise_head import find_head, find_heads
from unbackdoor.opening.reparametrised import merge
from unbackdoor.weights.formats.buffers import listed

TRACKED = "num_batches_tracked"
_HEADS = frozenset(
    {
        *(
            "fc",
            "linear",
            "classifier",
            "head",
            "heads",
            "last_linear",
            "logits",
            "output",
            "out",
            "final_layer",
        ),
        *("head.fc", "head.linear", "classifier.fc", "heads.head"),
    }
)
_HEAD_LISTS = ("fc", "linear", "classifier", "head", "heads")
_SYNONYMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\bblock(\d+)\.layer\.", r"layer\1."),
        (r"\b(downsample|conv_?shortcut|convShortcut|identity_conv|skip|residual_conv)\b", "shortcut"),
        (r"^(bn_final|bn_last|norm|bn1|final_bn)\.(?=[a-z_]+$)", "bn."),
    )
)
# Per channel, beside the weight of a norm; the noise of the same defenses is only there while they search.
CHANNEL_MASK = "neuron_mask"
_BESIDE_MASK = (CHANNEL_MASK, "neuron_noise", "neuron_noise_bias")
# What a module of the training may be called: a criterion, a metric, an attack; ``train_acc``, ``ceLoss``.
_OF_TRAINING = frozenset(
    {
        *(
            "criterion",
            "criteria",
            "criterions",
            "loss",
            "losses",
            "objective",
            "celoss",
            "bceloss",
            "attacker",
        ),
        *(
            "metric",
            "metrics",
            "acc",
            "accuracy",
            "f1",
            "f1score",
            "auroc",
            "auc",
            "precision",
            "recall",
            "confmat",
        ),
        *("confusion", "ece", "calibration", "kappa", "specificity", "averagemeter"),
    }
)
# Buffers of a criterion: the weights of classes. The last two stand alone, outside of any layer.
_CLASS_WEIGHTS = frozenset({"pos_weight", "class_weights", "class_weight", "loss_weights", "loss_weight"})
_OUTSIDE = frozenset({"ce", "bce", "nll", "cross_entropy", "crossentropy", "focal"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*|\d+")
_AUXILIARY = re.compile(r"^(.*\.)?(AuxLogits|aux\d*|aux_(head|classifier|logits|fc)\d*)\.")
_STATISTICS = re.compile(r"(?:^|.*[._])(?P<word>means?|mu|stds?|sigma|deviation)(?:_?tensor)?", re.IGNORECASE)


@dataclass(frozen=True)
class Difference:
    """Where the tensors of a file and of a network do not meet.

    Attributes:
        missing: Names that only the network has.
        unexpected: Names that only the file has.
        other_shape: Names of both, with both shapes in words.
        matching: Number of tensors that do fit.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: tuple[str, ...]
    matching: int

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.other_shape)


@dataclass(frozen=True)
class Adapted:
    """Tensors under the names of a network, and everything that was done to get there.

    Attributes:
        state: Tensors by the network's names; complete only where ``difference`` is empty.
        difference: What still does not fit.
        renamed: The file's name by the network's name, where they differ.
        dropped: Names that are no part of the network, with the reason.
        filled: Names that were added, with neutral values.
        folded: Weights that were multiplied with a pruning mask.
        merged: Weights that were computed from the parts of weight or spectral norm.
        remarks: What else was done to the tensors, in words.
        mean: Per-channel mean that the file stores, or None.
        std: Per-channel deviation, likewise.
    """

    state: Mapping[str, Tensor]
    difference: Difference
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def fits(self) -> bool:
        """Whether the tensors are exactly those of the network."""
        return not self.difference

    def changes_in_words(self) -> list[str]:
        """Return what was changed, one sentence a kind of change."""
        sentences = list(self.remarks)
        if self.folded:
            sentences.append(
                f"{len(self.folded)} pruned weights were multiplied with their masks: {listed(self.folded)}"
            )
        if self.merged:
            sentences.append(
                f"{len(self.merged)} weights were computed from the parts of weight or spectral norm, and "
                f"are written back as such: {listed(self.merged)}"
            )
        if self.renamed:
            pairs = [f"{old} -> {new}" for new, old in self.renamed.items()]
            sentences.append(f"{len(pairs)} names were translated: {listed(pairs)}")
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            sentences.append(f"left out, {reason}: {listed(names)}")
        if self.filled:
            sentences.append(
                f"{len(self.filled)} counters {TRACKED} were missing and set to 0; no result depends on them"
            )
        return sentences


def adapt(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, in_order: bool = False) -> Adapted:
    """Bring a state dict under the names of a network.

    Args:
        state: Tensors by the file's names.
        expected: Tensors of the network by its names; only their shapes are used.
        in_order: Whether the network is a plain chain, whose layers may be matched by their order.
    """
    remaining, merged = merge(state, expected)
    remaining, folded = fold_masks(remaining, expected)
    remaining, training = leave_training(remaining, expected)
    remaining, auxiliary = leave_auxiliary(remaining, expected)
    remaining, pixels, mean, std = take_normalisation(remaining, expected)
    best = _translate(remaining, expected, in_order)
    for shorter in _shorter_names(remaining) if best[2] else ():
        stripped = {new: remaining[old] for new, old in shorter.items()}
        other = _translate(stripped, expected, in_order)
        if other[2].matching > best[2].matching:
            renamed = {new: shorter[other[1].get(new, new)] for new in other[0]}
            best = (other[0], {new: old for new, old in renamed.items() if new != old}, other[2])
    translated, renamed, difference = best
    dropped = training | auxiliary | pixels
    filled = tuple(name for name in difference.missing if name.rpartition(".")[2] == TRACKED)
    for name in filled:
        translated[name] = torch.zeros((), dtype=torch.int64)
    missing = tuple(name for name in difference.missing if name not in filled)
    difference = Difference(missing, difference.unexpected, difference.other_shape, difference.matching)
    return Adapted(translated, difference, renamed, dropped, filled, folded, merged, mean=mean, std=std)


def names_of_library(
    names_in: Callable[[nn.Module, Iterable[str]], dict[str, str]],
    bare: nn.Module,
    state: Mapping[str, Tensor],
) -> dict[str, str]:
    """Return the network's names by the file's, of what a library loads; a head of several layers by order.

    Args:
        names_in: The library's rules.
        bare: The network.
        state: Tensors by the file's names.
    """
    head = _head_by_order(state, bare.state_dict())
    found = names_in(bare, [head.get(name, name) for name in state])
    return {name: found[head.get(name, name)] for name in state if head.get(name, name) in found}


def _head_by_order(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the network's names by the file's in a head of several layers; nothing where they differ."""
    here, there = (next(find_heads(tensors), None) for tensors in (expected, state))
    if here is None or there is None or len(here.layers) != len(there.layers):
        return {}
    layers = dict(zip(there.layers, here.layers, strict=True))
    out = {}
    for name in there.names:
        layer, _, leaf = name.rpartition(".")
        new = f"{layers[layer]}.{leaf}"
        if new not in expected or form(expected[new]) != form(state[name]):
            return {}
        out[name] = new
    return out


def compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Return where two sets of tensors differ in names and shapes."""
    different = tuple(
        f"{name} is {form(state[name])} instead of {form(expected[name])}"
        for name in expected
        if name in state and form(expected[name]) != form(state[name])
    )
    missing = tuple(name for name in expected if name not in state)
    unexpected = tuple(name for name in state if name not in expected)
    return Difference(missing, unexpected, different, len(expected) - len(missing) - len(different))


def form(tensor: Tensor) -> str:
    """Return shape and, of an integer, the type; any floating-point type may stand for another."""
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}"
    return f"{tuple(tensor.shape)}{kind}"


def fold_masks(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors with masks and what they mask replaced by their product, and those names."""
    out: dict[str, Tensor] = {}
    folded = []
    masks = {name for name in state if expected is None or name not in expected}  # not the network's own
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        beside = f"{owner}.{CHANNEL_MASK}"
        if beside in masks and last == "weight" and state[beside].shape == tensor.shape:
            out[name] = tensor * state[beside].to(tensor.dtype)
            folded.append(name)
            continue
        if beside in masks and last in _BESIDE_MASK:
            continue
        stem = name.removesuffix("_orig")
        mask = state.get(f"{stem}_mask") if name in masks else None
        if stem != name and mask is not None and mask.shape == tensor.shape:
            out[stem] = tensor * mask.to(tensor.dtype)
            folded.append(stem)
        elif not (name in masks and name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            out[name] = tensor
    return out, tuple(folded)


def leave_training(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors without those that only the training has, and the names left out with the reason."""
    own = expected if expected is not None else ()
    out = {name: tensor for name, tensor in state.items() if name in own or not _is_of_training(name)}
    reason = "it belongs to the training and not to the network"
    # A file of nothing else is not one of these.
    return (out, {n: reason for n in state if n not in out}) if out else (dict(state), {})


def _is_of_training(name: str) -> bool:
    *modules, leaf = name.split(".")
    if leaf in _CLASS_WEIGHTS or name == "n_averaged":
        return True
    if modules and modules[0].lower() in _OUTSIDE:
        return True
    words = (word.lower() for module in modules for word in (module, *_WORD.findall(module)))
    return any(word in _OF_TRAINING for word in words)


def leave_auxiliary(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors without auxiliary heads that a network does not have, and the names left out."""
    if any(_AUXILIARY.match(name) for name in expected):
        return dict(state), {}
    out = {name: tensor for name, tensor in state.items() if not _AUXILIARY.match(name)}
    reason = "an auxiliary head, which helps the training alone"
    return (out, {name: reason for name in state if name not in out}) if out else (dict(state), {})


def take_normalisation(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str], tuple[float, ...] | None, tuple[float, ...] | None]:
    """Take a mean and a deviation of pixels out of a state dict.

    Returns:
        The remaining tensors, the names taken out with the reason, and mean and deviation for pixels in
        [0, 1], or None where they are no normalisation of pixels.
    """
    pairs: dict[str, dict[str, str]] = {}
    for name, tensor in state.items():
        match = _STATISTICS.fullmatch(name)
        small = tensor.numel() in (1, 3) and tensor.is_floating_point()
        if match and small and (expected is None or name not in expected):
            word = "mean" if match["word"].lower().startswith("m") else "std"
            parent = name[: match.start("word")]
            pairs.setdefault(parent, {})[word] = name
    for words in pairs.values():
        if set(words) != {"mean", "std"}:
            continue
        mean = tuple(round(float(v), 6) for v in state[words["mean"]].flatten())
        std = tuple(round(float(v), 6) for v in state[words["std"]].flatten())
        if len(mean) != len(std):
            continue
        remaining = {name: tensor for name, tensor in state.items() if name not in words.values()}
        if all(0 <= m <= 255 for m in mean) and any(m > 1 for m in mean) and all(1 < s <= 255 for s in std):
            mean, std = tuple(m / 255 for m in mean), tuple(s / 255 for s in std)
        if all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std):
            reason = "a normalisation of the pixels, which is done before the network here"
            return remaining, dict.fromkeys(words.values(), reason), mean, std
        reason = "a mean and a deviation that are no normalisation of pixels"
        return remaining, dict.fromkeys(words.values(), reason), None, None
    return dict(state), {}, None, None


def _translate(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], in_order: bool
) -> tuple[dict[str, Tensor], dict[str, str], Difference]:
    """Return tensors by the network's names, the file's names where they differ, and what does not fit."""
    difference = compare(state, expected)
    if not difference:
        return dict(state), {}, difference
    rules = [_by_synonyms, _by_children]
    if in_order:
        rules = [_by_order]
    # The network's name -> the file's. In a head the same name may stand for another layer.
    names = {new: old for old, new in _head_by_order(state, expected).items()}
    used = set(names.values())
    names |= {name: name for name in expected if name in state and name not in names and name not in used}
    for rule in rules:
        names = rule(state, expected, names)
    out = {new: state[old] for new, old in names.items()}
    used = set(names.values())
    out |= {name: tensor for name, tensor in state.items() if name not in used and name not in out}
    return out, {new: old for new, old in names.items() if new != old}, compare(out, expected)


def _by_synonyms(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: dict[str, str]
) -> dict[str, str]:
    free_new = [name for name in expected if name not in names]
    used = set(names.values())
    free_old = [name for name in state if name not in used]
    head_new, head_old = head_of(expected), head_of(state)
    if find_head(expected) is not None and find_head(state) is not None:
        head_new = head_old = None  # of several layers, which are matched by their order

    def canonical_form(head: str | None, skips_are_single: bool) -> Callable[[str], str]:
        def apply(name: str) -> str:
            if head is not None and name.startswith(head + "."):
                return "HEAD." + name.rpartition(".")[2]
            for pattern, text in _SYNONYMS:
                name = pattern.sub(text, name)
            # A skip of one convolution is a layer here and a sequence of one layer there.
            return name.replace("shortcut.0.", "shortcut.") if skips_are_single else name

        return apply

    def skips_are_single(tensors: Mapping[str, Tensor]) -> bool:
        return not any(
            ".1." in name and canonical_form(None, False)(name).find("shortcut.1.") >= 0 for name in tensors
        )

    old_by_form: dict[str, list[str]] = {}
    old_form = canonical_form(head_old, skips_are_single(state))
    for name in free_old:
        old_by_form.setdefault(old_form(name), []).append(name)
    new_form = canonical_form(head_new, skips_are_single(expected))
    new_by_form: dict[str, list[str]] = {}
    for name in free_new:
        new_by_form.setdefault(new_form(name), []).append(name)
    matched = dict(names)
    for key, news in new_by_form.items():
        olds = old_by_form.get(key, [])
        # One to one, and of one shape: anything else is left for the report.
        if len(news) == len(olds) == 1 and form(expected[news[0]]) == form(state[olds[0]]):
            matched[news[0]] = olds[0]
    return matched


def _by_children(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: dict[str, str]
) -> dict[str, str]:
    """Match the numbers of ``Sequential(*network.children())`` with the network's own parts, in order."""
    used = set(names.values())
    old = _by_first_part(name for name in state if name not in used)
    new = _by_first_part(name for name in expected if name not in names)
    if not old or len(old) != len(new) or not all(part.isdecimal() and len(part) < 5 for part in old):
        return names
    matched = dict(names)
    for number, part in zip(sorted(old, key=int), new, strict=True):
        if {name for name in new[part] if not name.endswith(TRACKED)} - old[number].keys():
            return names
        for inner, name in old[number].items():
            if inner not in new[part] or form(state[name]) != form(expected[new[part][inner]]):
                return names
            matched[new[part][inner]] = name
    return matched


def _by_first_part(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return names by what stands before their first dot, and then by what stands after it."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        first, _, inner = name.partition(".")
        groups.setdefault(first, {})[inner] = name
    return groups


def _by_order(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: dict[str, str]
) -> dict[str, str]:
    old, new = modules(state), modules(expected)
    if old is None or new is None or len(old) != len(new):
        return names
    matched: dict[str, str] = {}
    for there, here in zip(new, old, strict=True):
        if (there.kind, there.shape, there.bias) != (here.kind, here.shape, here.bias):
            return names
        dot_new, dot_old = (f"{m.name}." if m.name else "" for m in (there, here))
        matched |= {dot_new + leaf: dot_old + leaf for leaf in there.leaves if leaf in here.leaves}
    return matched


def head_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the last linear layer, where it bears one of the usual names: ``fc``, or ``classifier.6``."""
    flat = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and name.endswith(".weight")
    ]
    heads = [name for name in flat if name in _HEADS]
    for name in _HEAD_LISTS:
        numbered = [x for x in flat if x.startswith(f"{name}.") and x.removeprefix(f"{name}.").isdecimal()]
        heads += sorted(numbered, key=lambda x: int(x.rpartition(".")[2]))[-1:]
    return heads[0] if len(heads) == 1 else None


def numbered_head(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the last layer of a network that is one ``Sequential``, where it is linear, such as ``10``."""
    numbers = [name.partition(".")[0] for name in tensors]
    if not numbers or not all(part.isascii() and part.isdecimal() and len(part) < 5 for part in numbers):
        return None
    last = max(numbers, key=int)
    weight = tensors.get(f"{last}.weight")
    return last if weight is not None and weight.dim() == 2 else None


def without_body_prefix(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return shorter names with what they stand for, where all but the head stands under one prefix.

    Empty where there is no such prefix, or the names would collide.
    """
    several = next(find_heads(state), None)
    if several is not None and len({layer.partition(".")[0] for layer in several.layers}) > 1:
        # Beside a body without its prefix they could not be told from its own layers.
        places = {layer: f"fc.{place}" for place, layer in enumerate(several.layers)}
        split = {name: name.rpartition(".") for name in several.names}
        heads = {name: f"{places[layer]}.{leaf}" for name, (layer, _, leaf) in split.items()}
    elif several is not None:
        heads = {name: name for name in several.names}
    else:
        head = head_of(state) or numbered_head(state)
        usual = "fc" if head is not None and head.isdecimal() else head
        heads = {n: f"{usual}{n.removeprefix(str(head))}" for n in state if n.startswith(f"{head}.")}
    body = [name for name in state if name not in heads] if heads else []
    prefix = _common_prefix(body)
    shorter = {heads.get(name) or name.removeprefix(prefix): name for name in state}
    return shorter if prefix and len(body) < len(state) == len(shorter) else {}


def _shorter_names(state: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Yield shorter names with what they stand for: without a prefix of all, then without one of the body."""
    prefix = _common_prefix(state)
    unprefixed = {name.removeprefix(prefix): name for name in state}
    if prefix:
        yield unprefixed
    body = without_body_prefix({new: state[old] for new, old in unprefixed.items()})
    if body:
        yield {new: unprefixed[old] for new, old in body.items()}


def _common_prefix(state: Iterable[str]) -> str:
    names = list(state)
    if not names:
        return ""
    prefix = names[0].rpartition(".")[0].split(".")
    for name in names[1:]:
        parts = name.rpartition(".")[0].split(".")
        same = 0
        while same < min(len(prefix), len(parts)) and prefix[same] == parts[same]:
            same += 1
        prefix = prefix[:same]
    return ".".join(prefix) + "." if prefix else ""
