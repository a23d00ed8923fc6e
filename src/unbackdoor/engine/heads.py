"""Find the layer that turns features into logits, in any network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from unbackdoor.engine.inference import mode
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.types import Classifier

# Shifts of the head's input that it is tried with, in multiples of the input's own size: small ones, and
# some that are large enough to drive any saturation or rectifier behind the head out of its linear part.
_PROBES = (1.0, -1.0, 10.0, -10.0)
_TOLERANCE = 1e-3  # relative; fp32 sums over a few thousand features stay below 1e-5
_IMAGES = 4
_LISTED = 6  # layers that an error names


@dataclass(frozen=True)
class Head:
    """The last linear map of a network.

    Attributes:
        name: Name of the module inside the classifier.
        module: The linear layer; its input is the feature vector (B, D).
    """

    name: str
    module: nn.Linear

    @property
    def features(self) -> int:
        """Number of features D."""
        return self.module.in_features


@dataclass(frozen=True)
class AffineHead:
    """A layer for which adding s to its input adds W s to the logits.

    Attributes:
        name: Name of the module inside the classifier.
        module: A linear layer, or a convolution with 1x1 kernels that any averaging may follow.
        scale: Positive factor between what the layer returns and the logits.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """W, (K, D), with the scale in it; a view that gradients flow through."""
        return self.module.weight.flatten(1) * self.scale

    @property
    def features(self) -> int:
        """Number of features D."""
        return self.module.in_features if isinstance(self.module, nn.Linear) else self.module.in_channels

    def of(self, model: Classifier) -> AffineHead:
        """Return the same layer of a copy of the classifier."""
        return replace(self, module=cast("nn.Linear | nn.Conv2d", model.get_submodule(self.name)))

    @contextmanager
    def shifted(self, shift: Tensor) -> Iterator[None]:
        """Add ``shift`` (D,) to the layer's input inside the block, at all positions or tokens."""
        handle = self.module.register_forward_pre_hook(_adder(self.module, shift))
        try:
            yield
        finally:
            handle.remove()


def find_head(model: Classifier) -> Head:
    """Return the linear layer whose output is the model's output.

    It is found by running one grey image and comparing what each linear layer returned with the logits, so
    that no naming convention is needed.

    Raises:
        UnsupportedModel: If no linear layer makes the logits; the candidates are listed.
    """
    pixels = torch.full((1, *model.input_shape), 0.5, device=model.mean.device)
    logits, seen = _record(model, pixels, (nn.Linear,))
    for name, calls in reversed(seen.items()):
        out = calls[-1][1]
        if out.shape == logits.shape and torch.equal(out, logits):
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            return Head(name, module)
    raise UnsupportedModel(
        "no linear layer makes the logits",
        expected="a network that ends in a linear layer",
        got="linear layers: " + (", ".join(seen) or "none"),
        where=model.architecture or type(model.network).__name__,
    )


def find_affine_head(model: Classifier, name: str | None = None) -> AffineHead:
    """Return the layer whose input acts on the logits linearly, found by experiment.

    A shift s is added to the input of every layer that could be the head, and the layer is accepted if the
    logits move by a positive multiple of W s, up to a constant for each image, for shifts of all sizes. So
    a pooling, the choice of a token, a log-softmax or a temperature may follow the head; a rectifier, a
    squashing or a second layer may not. Names and the order of modules play no part.

    Args:
        model: The classifier; not changed.
        name: Name of the layer inside the classifier where the user knows it; it is tested all the same.

    Raises:
        InputError: If no layer has the given name.
        UnsupportedModel: If no layer or more than one fits; the likeliest are listed with the reason.
    """
    if name is not None and name not in dict(model.named_modules()):
        raise InputError("the model has no such layer", where=name)
    draws = torch.Generator().manual_seed(0)
    pixels = torch.rand(_IMAGES, *model.input_shape, generator=draws).to(model.mean.device)
    logits, seen = _record(model, pixels, (nn.Linear, nn.Conv2d))
    fitting: list[AffineHead] = []
    reasons: dict[str, str] = {}
    for candidate, calls in reversed(seen.items()):
        module = cast("nn.Linear | nn.Conv2d", model.get_submodule(candidate))
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        if name not in (None, candidate):
            continue
        if outputs != model.classes:
            reasons[candidate] = f"{outputs} outputs"
        elif isinstance(module, nn.Conv2d) and (module.kernel_size != (1, 1) or module.groups != 1):
            reasons[candidate] = "not a plain 1x1 convolution"
        elif len(calls) != 1:
            reasons[candidate] = f"called {len(calls)} times"
        else:
            head = AffineHead(candidate, module)
            scale = _scale(model, head, pixels, logits, calls[0][0], draws)
            if isinstance(scale, str):
                reasons[candidate] = scale
            else:
                fitting.append(AffineHead(candidate, module, scale))
    if len(fitting) == 1:
        return fitting[0]
    # Those with as many outputs as there are classes first: one of them was meant to be the head.
    rejected = sorted(reasons, key=lambda layer: reasons[layer].endswith(" outputs"))
    listed = "; ".join(f"{layer} ({reasons[layer]})" for layer in rejected[:_LISTED])
    listed += f" and {len(rejected) - _LISTED} more" if len(rejected) > _LISTED else ""
    if fitting:
        listed = "; ".join([f"{head.name} (fits)" for head in fitting] + [listed] * bool(listed))
    raise UnsupportedModel(
        "no single layer acts on the logits linearly"
        if not fitting
        else "more than one layer fits as the head",
        expected="one linear layer or 1x1 convolution behind which nothing bends",
        got=listed or "no linear layer and no convolution was called",
        where=name or model.architecture or type(model.network).__name__,
        remedy="Name the layer" if fitting else None,
    )


def head_name(model: Classifier) -> str:
    """Return the name of the layer whose outputs are the classes, linear or a 1x1 convolution.

    Raises:
        UnsupportedModel: If no layer makes the logits; the candidates are listed.
    """
    try:
        return find_head(model).name
    except UnsupportedModel:
        return find_affine_head(model).name


def _scale(
    model: Classifier,
    head: AffineHead,
    pixels: Tensor,
    logits: Tensor,
    inputs: Tensor,
    draws: torch.Generator,
) -> float | str:
    """Return the positive factor c with logits(s) - logits(0) = c W s, or the reason why there is none."""
    size = float(inputs.float().square().mean().sqrt()) or 1.0
    weight = head.weight.detach().float()  # (K, D)
    direction = torch.randn(head.features, generator=draws).to(weight) * size  # (D,)
    expected = _centred(weight @ direction)  # (K,)
    norm = float(expected.square().sum())
    if norm == 0:
        return "all its rows are equal"
    scale = None
    for factor in _PROBES:
        with head.shifted(factor * direction), mode(model, training=False), torch.no_grad():
            moved = _centred(model(pixels) - logits)  # (B, K)
        if scale is None:
            scale = float((moved @ expected).mean()) / (factor * norm)
            if not scale > 1e-6:
                return "the logits do not follow it"
        off = float((moved - factor * scale * expected).abs().max())
        limit = _TOLERANCE * abs(factor) * scale * float(expected.abs().max()) + 1e-5 * float(
            logits.abs().max()
        )
        if not off <= limit:
            return "the logits follow it, but not linearly"
    assert scale is not None
    return 1.0 if abs(scale - 1) < _TOLERANCE else scale


def _centred(logits: Tensor) -> Tensor:
    # A constant for each image does not matter: log-softmax subtracts one, and no decision depends on it.
    return logits.float() - logits.float().mean(-1, keepdim=True)


def _adder(module: nn.Module, shift: Tensor) -> Any:
    along = shift if isinstance(module, nn.Linear) else shift.view(-1, 1, 1)  # channels stand before H and W

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] + along.to(inputs[0]), *inputs[1:])

    return add


def _record(
    model: Classifier, pixels: Tensor, kinds: tuple[type[nn.Module], ...]
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Return the logits, and input and output of every call of the layers of some kinds, in call order."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen.setdefault(name, []).append((inputs[0].detach(), out.detach()))

    handles = [
        module.register_forward_hook(lambda m, inputs, out, name=name: note(name, inputs, out))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            logits = model(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen
