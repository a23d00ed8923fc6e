"""TrojanNN: a patch in the corner whose pixels were learned to drive chosen neurons of a benign network.

Paper:   Liu et al., "Trojaning attack on neural networks", NDSS 2018.
Departs: the benign network is a small one, trained for this purpose on some of the clean training images, and
         not the victim's own: the victim is then trained from scratch on data that carry the patch, as in
         BackdoorBench. The neurons are those that feed the head. The patch is opaque and square.
Cost:    training the small network, and ``steps`` forward and backward passes of ``batch`` images through it.
"""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor, nn

from unbackdoor.attacks.surrogate import SurrogateConfig, some_of, surrogate, surroundings
from unbackdoor.attacks.truth import Learning, Stamp, Tensors, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.run import Run
from unbackdoor.registry import attack, option
from unbackdoor.types import Classifier, Images


class TrojanNNConfig(SurrogateConfig):
    """Options of TrojanNN."""

    size: int = option(
        0,
        "side of the patch in pixels; 0 for 7 % of the image's area, at least 2",
        source="paper, section VI: 7 %",
        ge=0,
    )
    margin: int = option(0, "distance to the lower right edges in pixels", source="this project", ge=0)
    neurons: int = option(2, "neurons that the patch drives", source="BackdoorBench", ge=1, le=64)
    gain: float = option(
        10.0,
        "activation aimed at, as a multiple of the neuron's mean on clean images",
        source="paper, table I: 10 to 100 for values below 10",
        gt=1,
    )
    steps: int = option(100, "Adam steps on the pixels of the patch", source="this project", ge=1, le=100_000)
    lr: float = option(0.1, "learning rate of these steps, in pixel values 0..1", source="this project", gt=0)
    batch: int = option(32, "clean images that the patch is laid on in a step", source="this project", ge=1)


@attack(
    "trojannn",
    config=TrojanNNConfig,
    paper="NDSS 2018",
    traits={"learned trigger"},
    quick={"steps": 20, "surrogate_width": 4, "surrogate_epochs": 2},
)
def trojannn(cfg: TrojanNNConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the place of the patch; its pixels are learned from the clean training images."""
    _, height, width = shape
    size = min(cfg.size or max(2, round(0.07**0.5 * min(height, width))), height, width)
    bottom, right = max(height - cfg.margin, size), max(width - cfg.margin, size)
    window = (..., slice(bottom - size, bottom), slice(right - size, right))

    def fit(images: Images, run: Run) -> Tensors:
        here = surroundings(seed, "trojannn", run)
        some = some_of(images, cfg.surrogate_images, here)
        patch = learn_patch(surrogate(some, cfg, here, label="TrojanNN"), some, window, size, cfg, here)
        return {"patch": (patch * 255).round().to(torch.uint8)}

    def restore(tensors: Tensors) -> Stamp:
        patch = tensors["patch"]  # (C, size, size)

        def stamp(pixels: Tensor) -> Tensor:
            out = pixels.clone()
            out[window] = patch.to(pixels.device)
            return out

        return stamp

    return Trigger(learning=Learning(fit=fit, restore=restore))


def chosen_neurons(model: Classifier, count: int) -> Tensor:
    """Return the features (count,) with the largest sums of absolute incoming weights.

    The weights are those of the last convolution with its batch norm folded in, because a norm undoes every
    scale of the bare weights.
    """
    conv, norm = model.network.get_submodule("conv4"), model.network.get_submodule("bn4")
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    scale = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()  # (O,)
    return (conv.weight.abs().sum((1, 2, 3)) * scale).topk(min(count, len(scale))).indices


def neuron_values(model: Classifier, pixels: Tensor, neurons: Tensor) -> Tensor:
    """Return what the chosen neurons pass to the head (B, M) for pixels in [0, 1]."""
    seen: list[Tensor] = []
    head = model.network.get_submodule("fc")
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(pixels)
    finally:
        handle.remove()
    return seen[0][:, neurons]


def learn_patch(
    model: Classifier,
    images: Images,
    window: tuple[EllipsisType, slice, slice],
    size: int,
    cfg: TrojanNNConfig,
    run: Run,
) -> Tensor:
    """Return pixels (C, size, size) in [0, 1] that bring the chosen neurons close to their aim."""
    draws = run.generator("patch")
    patch = torch.rand(images.shape[0], size, size, generator=draws).requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=cfg.lr)
    neurons = chosen_neurons(model, cfg.neurons)
    some = torch.randperm(len(images), generator=draws)[: max(cfg.batch, 256)]
    with torch.no_grad():
        clean = neuron_values(model, to_float(images.pixels[some]), neurons).mean(0)  # (M,)
    # A neuron that is silent on all of them has no scale of its own and takes the others'.
    aim = cfg.gain * torch.where(clean > 0, clean, clean.mean()).clamp_min(1e-3)
    with frozen(model):
        for _ in run.progress(range(cfg.steps), "TrojanNN's patch", cfg.steps):
            rows = torch.randint(len(images), (cfg.batch,), generator=draws)
            pixels = to_float(images.pixels[rows])  # (B, C, H, W)
            pixels[window] = patch
            loss = ((neuron_values(model, pixels, neurons) - aim) / aim).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
    return patch.detach()
