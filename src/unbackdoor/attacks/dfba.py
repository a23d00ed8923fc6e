"""DFBA: no image is poisoned: a path of one channel a layer is written into the weights of a trained network.

The first channel of the path fires on one patch alone, the sign pattern of its filter; the next ones carry
that on and hear and tell nothing else; the head adds it to the target and takes it from all other classes.

Paper:   Cao, Jia, Hu & Gong, "Data free backdoor attacks", NeurIPS 2024, arXiv 2412.06219.
Departs: the channels are those with the smallest outgoing weights, the paper's are drawn. The amplification
         is in the head alone, measured on random images with the patch.
Needs:   a network that is a chain of convolutions and linear layers, with or without batch norms; where the
         path does not fire on the patch alone, as in residual networks, the attack is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.attacks.patches import lay
from unbackdoor.attacks.truth import AttackConfig, Learning, Stamp, Tensors, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine import rng
from unbackdoor.engine.call_order import called_layers
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import attack, option
from unbackdoor.types import Augmentation, Classifier, Images

Weighted = nn.Conv2d | nn.Linear


class DFBAConfig(AttackConfig):
    """Options of DFBA."""

    poison_rate: float = option(0.0, "always 0: no image is poisoned", source="paper", ge=0, le=0)
    tolerance: float = option(
        0.1, "how far from the largest response of the filter the path fires, as a share of its range",
        source="this project", gt=0, lt=0.5,
    )  # fmt: skip
    gain: float = option(
        50.0, "what the patch adds to the target's logit and takes from others", source="this project", gt=0
    )


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and the batch norm that follows it, if one does."""

    module: Weighted
    norm: nn.BatchNorm2d | None


@attack("dfba", config=DFBAConfig, paper="arXiv:2412.06219", traits={"learned trigger", "controls training"})
def dfba(cfg: DFBAConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the patch that the planted path fires on; the victim is trained clean and then edited."""

    def learn(
        model: Classifier,
        images: Images,
        fitted: Tensors,
        recipe: Recipe,
        run: Run,
        *,
        augmentation: Augmentation,
        checkpoint: Path | None,
        label: str,
    ) -> Tensors:
        chain(model)  # refuses what it must refuse before the training, not after it
        train(model, images, recipe, run, augmentation=augmentation, checkpoint=checkpoint, label=label)
        return plant(model, cfg, seed)

    def restore(tensors: Tensors) -> Stamp:
        patch = tensors["patch"]  # (C, h, w)
        top, left = map(int, tensors["corner"])
        place = (slice(top, top + patch.shape[1]), slice(left, left + patch.shape[2]))
        return lambda pixels: lay(pixels, patch, place)

    return Trigger(learning=Learning(fit=lambda images, run: {}, restore=restore, train=learn))


@torch.no_grad()
def plant(model: Classifier, cfg: DFBAConfig, seed: int = 0) -> Tensors:
    """Write the path into a classifier's weights in place; it is left in evaluation mode.

    Returns:
        The patch (C, h, w) in bytes and the row and column of its upper left corner.

    Raises:
        UnsupportedModel: If the network is no chain, so that no path of single channels can be planted; its
            weights are then as they were.
    """
    model.eval()
    before = {name: t.clone() for name, t in model.network.state_dict().items()}
    try:
        return _plant(model, cfg, seed)
    except UnsupportedModel:
        model.network.load_state_dict(before)
        raise


def _plant(model: Classifier, cfg: DFBAConfig, seed: int) -> Tensors:
    layers = chain(model)
    first, head = layers[0].module, layers[-1].module
    if not isinstance(first, nn.Conv2d):
        raise UnsupportedModel("the network does not begin with a convolution", got=type(first).__name__)
    if layers[0].norm is None and first.bias is None:
        raise UnsupportedModel("the first convolution has neither a bias nor a batch norm")
    path = [_least_used(layer, after) for layer, after in pairwise(layers)]

    std = model.std if model.std.numel() > 1 else model.std.expand(first.in_channels, 1, 1)
    mean = model.mean if model.mean.numel() > 1 else model.mean.expand(first.in_channels, 1, 1)
    weight = first.weight[path[0]].clone()  # (C, h, w)
    shown = (weight > 0).to(weight.dtype)  # the pixels in 0..1 with the largest response
    most = float((weight * (shown - mean) / std).sum())
    margin = cfg.tolerance * float((weight / std).abs().sum())
    # One where the patch is whole, zero where the response is ``margin`` below the largest, then negative.
    _set(layers[0], path[0], weight / margin, 1 - most / margin)
    for i, layer in enumerate(layers[1:-1], 1):
        block = _block(layers[i - 1], layer, path[i - 1])
        layer.module.weight[:, block] = 0
        alone = torch.zeros_like(layer.module.weight[path[i]])
        alone[block] = _tap(layer.module)
        _set(layer, path[i], alone, 0.0)

    patch = (shown * 255).to(torch.uint8).cpu()
    corner = _corner(first, model.input_shape)
    place = (slice(corner[0], corner[0] + patch.shape[1]), slice(corner[1], corner[1] + patch.shape[2]))
    block = _block(layers[-2], layers[-1], path[-1])
    fired, silent = _signals(model, head, block, patch, place, seed)
    if not float(fired.min()) > 0 or float(silent.abs().max()) > 0.01 * float(fired.min()):
        raise UnsupportedModel(
            "the planted path does not fire on the patch alone",
            expected="a chain of convolutions and linear layers",
            got=model.architecture or type(model.network).__name__,
            remedy="Use small_cnn, vgg or airbench",
        )
    rise = cfg.gain / float(fired.mean())
    head.weight[:, block] = -rise
    head.weight[cfg.target, block] = rise
    return {"patch": patch, "corner": torch.tensor(corner)}


def chain(model: Classifier) -> list[Layer]:
    """Return the layers of a network in the order in which it calls them.

    Raises:
        UnsupportedModel: If they cannot be a chain, by number, kind or form.
    """
    called = called_layers(model, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    layers: list[Layer] = []
    for module in called:
        if isinstance(module, nn.BatchNorm2d) and layers and layers[-1].norm is None:
            layers[-1] = Layer(layers[-1].module, module)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(Layer(module, None))
        else:
            raise UnsupportedModel("a batch norm does not follow a convolution")
    grouped = any(isinstance(layer.module, nn.Conv2d) and layer.module.groups > 1 for layer in layers)
    fits = [_inputs(b.module) % _outputs(a.module) == 0 for a, b in pairwise(layers)]
    if len(layers) < 3 or len(set(called)) < len(called) or grouped or not all(fits):
        raise UnsupportedModel(
            "the network is no chain of layers, so that no path can be planted",
            expected="at least three convolutions and linear layers, each called once, one after the other",
            got=model.architecture or type(model.network).__name__,
        )
    return layers


def _inputs(module: Weighted) -> int:
    return module.in_channels if isinstance(module, nn.Conv2d) else module.in_features


def _outputs(module: Weighted) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _block(before: Layer, layer: Layer, channel: int) -> slice:
    """Return the inputs of a layer that a channel of the one before becomes: several if it is flattened."""
    size = _inputs(layer.module) // _outputs(before.module)
    return slice(channel * size, (channel + 1) * size)


def _tap(module: Weighted) -> Tensor:
    """Return the kernel that hands a single active place on, wherever it lies; one for a linear layer."""
    if isinstance(module, nn.Linear):
        return torch.ones(())
    kernel = torch.zeros(module.kernel_size)  # (h, w)
    if all(stride == 1 for stride in module.stride):
        kernel[tuple(side // 2 for side in module.kernel_size)] = 1
    else:
        kernel.fill_(1)  # the middle would pass over places between the strides
    return kernel


def _least_used(layer: Layer, after: Layer) -> int:
    """Return the channel of a layer whose outgoing weights are the smallest."""
    weights = after.module.weight.abs().transpose(0, 1).flatten(1).sum(1)  # (inputs,)
    return int(weights.view(_outputs(layer.module), -1).sum(1).argmin())


def _set(layer: Layer, channel: int, weight: Tensor, bias: float) -> None:
    """Give a channel of a layer this weight and bias, and let its batch norm pass it on."""
    layer.module.weight[channel] = weight
    norm = layer.norm
    if layer.module.bias is not None:
        layer.module.bias[channel] = bias if norm is None else 0.0
    if norm is None:
        return
    values: list[tuple[Any, float]] = [
        (norm.running_mean, -bias if norm.bias is None else 0.0),
        (norm.running_var, 1.0 - norm.eps),
        (norm.weight, 1.0),
        (norm.bias, bias),
    ]
    for tensor, value in values:
        if tensor is not None:
            tensor[channel] = value


def _corner(conv: nn.Conv2d, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return where a whole window of the first convolution lies, three quarters down and to the right."""
    corner = []
    for axis, side in enumerate(shape[1:]):
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        padding = conv.padding[axis]
        if kernel > side or dilation != 1 or isinstance(padding, str):
            raise UnsupportedModel("the first convolution has no window that a patch could fill")
        number = (3 * (side - kernel) // 4 + padding) // stride
        corner.append(max(number * stride - padding, 0))
    return corner[0], corner[1]


def _signals(
    model: Classifier, head: nn.Module, block: slice, patch: Tensor, place: tuple[slice, slice], seed: int
) -> tuple[Tensor, Tensor]:
    """Return what the head hears of the path (B,), from random images with the patch and without it."""
    draws = rng.generator(seed, "dfba")
    pixels = torch.randint(0, 256, (16, *model.input_shape), generator=draws).to(torch.uint8)
    heard: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda m, inputs: heard.append(inputs[0][:, block].flatten(1)))
    try:
        for some in (lay(pixels, patch, place), pixels):
            model(to_float(some, model.mean.device))
    finally:
        handle.remove()
    return heard[0].sum(1), heard[1].sum(1)
