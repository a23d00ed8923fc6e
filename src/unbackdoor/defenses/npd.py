"""Neural polarizer: a linear filter on the features before a late layer that takes the backdoor out of them.

Only the filter learns: clean images must be classified as before, and images pushed towards their second-best
class must keep their own and leave that class.

Paper:   Zhu, Wei, Zha & Wu, "Neural polarizer: a lightweight and effective backdoor defense via purifying
         poisoned features", NeurIPS 2023, arXiv 2306.16697.
Needs:   clean images and labels.          Changes: weights of one layer.
Departs: the filter is a matrix A on the channels without a shift, so that it is multiplied into the layer
         behind it: W A has the shape of W, and the repaired network is an ordinary one. The paper adds a
         1 x 1 convolution with batch norm as a layer. Perturbations live in pixel space and stay in [0, 1].
         The layer is the last but one convolution or linear layer besides the head, in the order of
         their calls, which in a ResNet-18 is the paper's ``layer4.1.conv1``; another may be named. Where only
         one is left, it is that one.
Cost:    epochs x (attack steps + 2) x (1 forward + 1 backward) over the images.
Blind:   backdoors that no linear map of the features at that layer separates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unbackdoor.data.batches import batches
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import Network, frozen, logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class NPDConfig(Config):
    """Options of the neural polarizer."""

    layer: str = option(
        "", "name of the layer whose input is filtered; empty: see the documentation", source="this project"
    )
    warmup: int = option(
        5, "passes at the small rate, on clean images alone", source="reference code", ge=0, le=10_000
    )
    warmup_lr: float = option(1e-4, "step of these passes", source="reference code", gt=0, le=1)
    epochs: int = option(50, "passes over the images", source="reference code", ge=1, le=10_000)
    lr: float = option(0.01, "first step of the cosine schedule", source="reference code", gt=0, le=1)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty of the filter", source="reference code", ge=0, le=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    radius: float = option(
        3.0,
        "L2 norm of the perturbations, in pixels of 0..1; of a 32 x 32 colour image, others in proportion",
        source="reference code",
        gt=0,
        le=100,
    )
    attack_steps: int = option(2, "steps of the attack", source="reference code", ge=1, le=100)
    adversarial_weight: float = option(
        0.4, "weight of each of the three losses on perturbed images", source="reference code", ge=0, le=100
    )


@defense(
    "npd",
    config=NPDConfig,
    paper="arXiv:2306.16697",
    needs={"images", "labels"},
    quick={"epochs": 2, "warmup": 1, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: NPDConfig, *, run: Run) -> Purified:
    """Learn the filter and multiply it into the layer behind it."""
    name = filtered_layer(model, cfg.layer)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight = layer.weight.detach()
    size = weight.shape[1]
    polarizer = torch.eye(size, device=weight.device, requires_grad=True)  # (I, I)

    def filtered(pixels: Tensor) -> Tensor:
        out: Tensor = functional_call(model, {f"{name}.weight": folded(weight, polarizer)}, (pixels,))
        return out

    radius = cfg.radius * (torch.Size(model.input_shape).numel() / (3 * 32 * 32)) ** 0.5
    epochs = cfg.warmup + cfg.epochs
    losses = []
    with frozen(model), mode(model, training=False):
        optimizer = torch.optim.SGD([polarizer], lr=cfg.warmup_lr)
        for epoch in run.progress(range(epochs), "NPD"):
            if epoch == cfg.warmup:
                optimizer = torch.optim.SGD(
                    [polarizer], lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
                )
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs)
            total, steps = 0.0, 0
            for pixels, labels in batches(
                data.all,
                cfg.batch_size,
                generator=run.generator("epoch", epoch),
                device=run.device,
                augmentation=data.augmentation,
            ):
                assert labels is not None  # registered as needing them
                loss = F.cross_entropy(logits_of(filtered, pixels, run), labels)
                if epoch >= cfg.warmup:
                    second = runner_up(logits_of(filtered, pixels, run).detach(), labels)
                    adversarial = pushed(filtered, pixels, second, radius, cfg.attack_steps, run)
                    logits = logits_of(filtered, adversarial, run)
                    terms = adversarial_losses(logits, labels, second)
                    loss = loss + cfg.adversarial_weight * terms
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, steps = total + float(loss.detach()), steps + 1
            if epoch >= cfg.warmup:
                schedule.step()
            losses.append(total / steps)
    out = model.copy()
    with torch.no_grad():
        out.get_parameter(f"{name}.weight").copy_(folded(weight, polarizer))
    moved = float((polarizer.detach() - torch.eye(size, device=weight.device)).norm())
    return Purified(out, {"layer": name, "channels": size, "moved": moved, "losses": losses})


def filtered_layer(model: Classifier, name: str) -> str:
    """Return the layer whose input is filtered: the named one, or the last but one before the head.

    Raises:
        ConfigError: If the named one is none that a filter can stand before.
        UnsupportedModel: If there is none besides the head.
    """
    head = head_name(model)
    layers = called_layers(model)
    if name:
        full = name if name in layers else f"network.{name}"
        if full not in layers:
            raise ConfigError(
                "the defense 'npd'", [f"layer: expected one of {', '.join(layers)}, got {name!r}"]
            )
        return full
    inner = [layer for layer in layers if layer != head]
    if not inner:
        raise UnsupportedModel(
            "the network has no layer besides its head whose input could be filtered", where=head
        )
    return inner[-2] if len(inner) > 1 else inner[-1]


def called_layers(model: Classifier) -> list[str]:
    """Return the linear layers and ungrouped convolutions in the order of their first calls."""
    called: dict[str, None] = {}

    def noter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: called.setdefault(name)

    handles = [
        module.register_forward_pre_hook(noter(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            model(torch.full((1, *model.input_shape), 0.5, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


def folded(weight: Tensor, polarizer: Tensor) -> Tensor:
    """Return the weight (O, I, ...) of a layer that filters its input channels by A (I, I) first: W A."""
    return torch.einsum("oj...,ji->oi...", weight, polarizer)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the likeliest class (B,) other than the label."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def pushed(network: Network, pixels: Tensor, target: Tensor, radius: float, steps: int, run: Run) -> Tensor:
    """Return pixels (B, C, H, W) in [0, 1] moved towards the targets within an L2 ball."""
    delta = torch.zeros_like(pixels)
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(logits_of(network, pixels + delta, run), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        # Two steps of the whole radius, projected: the ball is left by the first already.
        delta = delta.detach() - radius * gradient / length
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = delta * (radius / length).clamp_max(1.0)
        delta = (pixels + delta).clamp(0, 1) - pixels
    return pixels + delta


def adversarial_losses(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Return CE(adv, y) - log(1 - p(target)) - log(1 - p(second best of adv)), means over the batch."""
    second = runner_up(logits.detach(), labels)
    # log(1 - p_k) = logsumexp of the others - logsumexp of all, which stays finite where p_k is 1.
    total = logits.logsumexp(1)
    escape = [
        (total - logits.scatter(1, k[:, None], -torch.inf).logsumexp(1)).mean() for k in (target, second)
    ]
    return F.cross_entropy(logits, labels) + escape[0] + escape[1]
