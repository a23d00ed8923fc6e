"""Where channels can be gated, found by structure, and networks whose gates are arguments.

A gate is a number that multiplies a channel. Every gate here is a multiplier on parameters, so folding it
into the weights is exact:

- of a convolution: its kernel and bias; or the scale and shift of the batch norm that alone reads it, because
  a kernel of zero before a batch norm leaves the constant ``shift - scale * mean / deviation`` behind;
- of the residual stream after a transformer block: the layer norms that read the stream from there on. A gate
  on the stream itself cannot be folded, because nothing multiplies the path around a block, and a layer
  norm's statistics would change with it. What every later reader sees of the channel is scaled instead. Where
  a block ends in a layer norm (post-norm), its scale and shift are the gate of the stream, exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unbackdoor.engine import rng
from unbackdoor.engine.inference import Network, mode
from unbackdoor.engine.masks import Site
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier

Position = Literal["conv", "norm"]


def gated(model: Classifier, sites: Sequence[Site], values: Mapping[str, Tensor]) -> Network:
    """Return the network with its gates multiplied in; the model is not changed and nothing is remembered.

    A parameter that belongs to several sites is multiplied by all of them, as by ``masks.fold``.

    Args:
        model: The classifier.
        sites: Where the gates are.
        values: Gate (O,) of each site by name.
    """
    parameters = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for site in sites:
        for name in site.parameters:
            weight = changed.get(name, parameters[name])
            changed[name] = weight * values[site.name].view(-1, *[1] * (weight.dim() - 1))

    def network(pixels: Tensor) -> Tensor:
        out: Tensor = functional_call(model, changed, (pixels,))
        return out

    return network


def gate_sites(model: Classifier, *, position: Position = "norm", squeeze_excite: bool = False) -> list[Site]:
    """Return the sites of the transformer blocks where there are any, else those of the convolutions.

    Args:
        model: The classifier.
        position: Of a convolution that only a batch norm reads: gate the batch norm, or the convolution.
        squeeze_excite: Gate the convolutions of squeeze-excite modules too, where a gate of 0 means half.

    Raises:
        UnsupportedModel: If nothing can be gated; names the layer that stands in the way.
    """
    calls = _record(model)
    return _stream_sites(calls) or _conv_sites(model, calls, position, squeeze_excite)


# ---------------------------------------------------------------------------------------------------
# What calls what


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module: the first tensor that it received and the first that it returned."""

    name: str
    module: nn.Module
    received: Tensor
    returned: Tensor


def _record(model: Classifier) -> list[_Call]:
    # Noise, because a grey image could leave a layer with nothing but zeros. With gradients, because torch's
    # own transformer layers otherwise take a fused path around their parts.
    pixels = torch.rand(2, *model.input_shape, generator=rng.generator(0, "gate probe"))
    calls: list[_Call] = []
    with _recording(model, calls), mode(model, training=False), torch.enable_grad():
        model(pixels.to(model.mean.device))
    return calls


@contextmanager
def _recording(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Append the calls inside the block, in the order in which they end."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
            received, out = _first((*args, *kwargs.values())), _first(returned)
            if received is not None and out is not None:
                calls.append(_Call(name, module, received, out))

        return hook

    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any) -> Tensor | None:
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None


# ---------------------------------------------------------------------------------------------------
# Convolutions


def _conv_sites(
    model: Classifier, calls: Sequence[_Call], position: Position, squeeze_excite: bool
) -> list[Site]:
    left_out = set() if squeeze_excite else _squeeze_excite(model, calls)
    norms = _private_norms(model, calls) if position == "norm" else {}
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in left_out:
            owners = norms.get(name, name)
            names = [owners + "." + p for p, _ in model.get_submodule(owners).named_parameters(recurse=False)]
            sites.append(Site(name, tuple(names), (module.out_channels,)))
    if not sites:
        layers = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
        raise UnsupportedModel(
            "the network has no channel to gate",
            expected="a convolution outside squeeze-excite modules, or transformer blocks",
            got=", ".join(sorted({type(m).__name__ for m in model.modules()})),
            where=", ".join(layers) or model.architecture or type(model.network).__name__,
        )
    return sites


@torch.no_grad()
def _private_norms(model: Classifier, calls: Sequence[_Call]) -> dict[str, str]:
    """Map each convolution that only one affine batch norm reads to that batch norm."""
    makers = {id(call.returned): call.name for call in calls if isinstance(call.module, nn.Conv2d)}
    pairs = {
        makers[id(call.received)]: call.name
        for call in calls
        if id(call.received) in makers and isinstance(call.module, nn.BatchNorm2d) and _stores(call.module)
    }
    pixels = torch.rand(2, *model.input_shape, generator=rng.generator(0, "gate probe"))
    pixels = pixels.to(model.mean.device)
    parameters = dict(model.named_parameters())

    def same(tried: Mapping[str, str]) -> bool:
        # Double the convolutions and halve the norms' scales; the shifts make up for the stored means. The
        # logits stay where they are unless something else reads a convolution, and sees it doubled.
        changed = {}
        for conv, norm in tried.items():
            for p, _ in model.get_submodule(conv).named_parameters(recurse=False):
                changed[f"{conv}.{p}"] = 2 * parameters[f"{conv}.{p}"]
            bn: Any = model.get_submodule(norm)
            changed[f"{norm}.weight"] = bn.weight / 2
            changed[f"{norm}.bias"] = (
                bn.bias - bn.weight / 2 * bn.running_mean / (bn.running_var + bn.eps).sqrt()
            )
        return torch.allclose(functional_call(model, changed, (pixels,)), plain, rtol=1e-3, atol=1e-4)

    with mode(model, training=False):
        plain = model(pixels)
        if same(pairs):  # as a rule: one pass for all of them
            return pairs
        return {conv: norm for conv, norm in pairs.items() if same({conv: norm})}


def _stores(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats


@torch.no_grad()
def _squeeze_excite(model: Classifier, calls: Sequence[_Call]) -> set[str]:
    """Return the 1x1 convolutions of modules that pool whatever they are given before they convolve.

    Found by running such a module alone on a map of 5 x 5: in a small image the last maps are single pixels
    anyway, so that the sizes of one pass show nothing.
    """
    channels = {call.name: call.received.shape[1] for call in calls if call.received.dim() == 4}
    convolutions: set[str] = set()
    for name, module in model.named_modules():
        convs = [inner for inner in module.modules() if isinstance(inner, nn.Conv2d)]
        if isinstance(module, nn.Conv2d) or name not in channels or not convs:
            continue
        if any(conv.kernel_size != (1, 1) for conv in convs):
            continue
        inner_calls: list[_Call] = []
        like = convs[0].weight
        wide = torch.ones(1, channels[name], 5, 5, device=like.device, dtype=like.dtype)
        with _recording(module, inner_calls), mode(module, training=False):
            try:
                module(wide)
            except (RuntimeError, TypeError, ValueError):
                continue  # it takes more than a map, so it is no such module
        inside = [call for call in inner_calls if isinstance(call.module, nn.Conv2d)]
        if inside and all(call.received.shape[-2:] == (1, 1) for call in inside):
            convolutions.update(f"{name}.{call.name}" for call in inside)
    return convolutions


# ---------------------------------------------------------------------------------------------------
# Transformers


def _stream_sites(calls: Sequence[_Call]) -> list[Site]:
    blocks = _blocks(calls)
    for block, following in itertools.pairwise(blocks):
        if following.received is not block.returned:
            raise UnsupportedModel(
                "the transformer blocks do not follow each other on one residual stream",
                expected=f"the output of {block.name}, as it is",
                got=f"something made of it, {tuple(following.received.shape)}",
                where=following.name,
            )
    sites = []
    for block in blocks:
        own = _norms_of(block, calls)
        closing = [call for call in own if call.returned is block.returned]
        if not closing and not _entry(block, calls):
            raise UnsupportedModel(
                "no layer norm at the entry or the exit of a transformer block can carry its gate",
                expected="a layer norm that reads what the block is given, or makes what it returns",
                got=", ".join(call.name for call in own),
                where=block.name,
            )
        readers = closing or _readers(block, blocks, calls)
        names = [f"{norm.name}.{p}" for norm in readers for p, _ in norm.module.named_parameters()]
        sites.append(Site(block.name, tuple(names), (block.returned.shape[-1],)))
    return sites


def _blocks(calls: Sequence[_Call]) -> list[_Call]:
    """Return the modules from tokens (B, T, D) to tokens that mix them and hold layer norms of D.

    Those with a norm at their entry are the blocks of a pre-norm network, and what lies inside them are their
    parts. Without any, the blocks are what holds no further candidate.
    """
    candidates = [
        call
        for call in calls
        if call.received.dim() == 3
        and call.received.shape == call.returned.shape
        and any(isinstance(m, nn.Linear) for m in call.module.modules())
        and any(_is_norm(m, call.received.shape[-1]) for m in call.module.children())
    ]
    candidates = [c for c in candidates if _entry(c, calls)] or candidates
    return [c for c in candidates if not any(o.name.startswith(f"{c.name}.") for o in candidates)]


def _entry(block: _Call, calls: Sequence[_Call]) -> bool:
    return any(norm.received is block.received for norm in _norms_of(block, calls))


def _is_norm(module: nn.Module, width: int) -> bool:
    return isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) == (width,)


def _norms_of(block: _Call, calls: Sequence[_Call]) -> list[_Call]:
    """Return the calls of the block's own affine layer norms, not of those deeper inside its parts."""
    return [
        call
        for call in calls
        if call.name.rpartition(".")[0] == block.name
        and _is_norm(call.module, block.received.shape[-1])
        and call.module.weight is not None
    ]


def _readers(block: _Call, blocks: Sequence[_Call], calls: Sequence[_Call]) -> list[_Call]:
    """Return the layer norms that read the stream after a block: those of later blocks, and the last one."""
    later = blocks[blocks.index(block) + 1 :]
    width = block.returned.shape[-1]
    after = calls[calls.index(blocks[-1]) + 1 :]
    last = [c for c in after if _is_norm(c.module, width) and c.module.weight is not None][:1]
    if not last:
        raise UnsupportedModel(
            "no layer norm reads the last transformer block",
            expected=f"an affine layer norm of {width} after it",
            where=blocks[-1].name,
        )
    return [norm for reader in later for norm in _norms_of(reader, calls)] + last
