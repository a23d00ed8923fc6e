"""BAN fine-tuning: learn the clean images also with the noise on the neurons that hurts most.

Every scale and shift of the normalisations is changed by some per cent, in the direction in which the loss
rises; a backdoored network is more sensitive to that than a clean one, and learns not to be.

Paper:   Xu et al., "BAN: detecting backdoors activated by adversarial neuron noise", NeurIPS 2024,
         arXiv 2405.19928, its fine-tuning.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: stored batch statistics do not move in the noisy passes (in the released code they do). Any
         normalisation takes noise, and in a network without one the outputs of convolutions and linear layers
         do. All of the 25 passes are made (the code makes 24), and the rate, which there falls after the
         100th, is constant. A learning rate that destroys the network is lowered tenfold
         (engine/descent.py). The held-out images are trained on as well, since nothing is selected.
Cost:    epochs x (2 + steps) x (1 forward + 1 backward) over the clean set.
Blind:   backdoors that do not rest on a few sensitive neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unbackdoor.engine.descent import Batch, at_bearable_rate, descend, still_statistics
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.masks import NORMS, unit_sites
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

Noise = dict[str, Tensor]  # relative change of a parameter, by its name


class BANConfig(Config):
    """Options of BAN's fine-tuning."""

    eps: float = option(
        0.3, "largest random noise, and length of the way up from it", source="reference code", gt=0, le=1
    )
    steps: int = option(1, "steps of that way", source="reference code, ban_finetune", ge=1)
    noisy_weight: float = option(0.5, "lambda, weight of the loss with noise", source="reference code", ge=0)
    epochs: int = option(25, "passes over the clean images", source="reference code", ge=1, le=10_000)
    lr: float = option(0.005, "learning rate of SGD", source="reference code", gt=0, le=1)
    batch_size: int = option(128, "images a step", source="reference code", ge=2)
    momentum: float = option(0.9, "momentum of SGD", source="reference code", ge=0, lt=1)
    weight_decay: float = option(5e-4, "L2 penalty", source="reference code", ge=0, le=1)


@defense(
    "ban",
    config=BANConfig,
    paper="arXiv:2405.19928",
    needs={"images", "labels"},
    quick={"epochs": 2, "lr": 0.001},
)
def purify(model: Classifier, data: CleanData, cfg: BANConfig, *, run: Run) -> Purified:
    """Fine-tune on the clean loss and the loss under adversarial noise on the neurons."""
    names = noisy_parameters(model)

    def tuned(lr: float) -> Classifier:
        out = model.copy()

        def loss(batch: Batch) -> Tensor:
            noise = adversarial_noise(out, names, batch, cfg, run)
            noisy = noisy_loss(out, noise, batch, run)
            return F.cross_entropy(logits_of(out, batch.pixels, run), batch.labels) + cfg.noisy_weight * noisy

        recipe = Recipe(
            epochs=cfg.epochs, lr=lr, batch_size=cfg.batch_size, momentum=cfg.momentum,
            weight_decay=cfg.weight_decay, schedule="constant",
        )  # fmt: skip
        descend(out, data.all, recipe, loss, run, augmentation=data.augmentation, label="BAN")
        return out

    repaired, evidence = at_bearable_rate(model, data.all, cfg.lr, tuned, run)
    return Purified(repaired, {**evidence, "noisy": len(names)})


def noisy_parameters(model: Classifier) -> list[str]:
    """Return the names of the parameters that take noise: scales and shifts of the channels.

    Raises:
        UnsupportedModel: If the network has neither a normalisation nor a layer besides its head.
    """
    kinds = (*NORMS, nn.LayerNorm, nn.GroupNorm)
    names = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for own, _ in module.named_parameters(recurse=False)
    ]
    if not names:
        head = head_name(model)
        names = [name for site in unit_sites(model, skip=(head,)) for name in site.parameters]
        if not names:
            raise UnsupportedModel(
                "the network has no neuron to put noise on",
                expected="a normalisation, convolution or linear layer besides the head",
                where=head,
            )
    return names


def adversarial_noise(model: Classifier, names: list[str], batch: Batch, cfg: BANConfig, run: Run) -> Noise:
    """Return noise of the channels: drawn within the bound, then moved up the loss by signs.

    As in the released code the moved noise is not clamped, so that it reaches twice the bound.
    """
    draws, parameters = run.generator("noise", batch.step), dict(model.named_parameters())
    noise = {}
    for name in names:
        # One number for each channel, which scales the weights that make it alike.
        shape = (len(parameters[name]), *[1] * (parameters[name].dim() - 1))
        uniform = torch.rand(shape, generator=draws).to(parameters[name])
        noise[name] = cfg.eps * (2 * uniform - 1)
    for _ in range(cfg.steps):
        leaves = {name: value.detach().requires_grad_() for name, value in noise.items()}
        loss = noisy_loss(model, leaves, batch, run)
        # A layer that is not called, such as an auxiliary head, has no gradient.
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is not None:
                noise[name] = value.detach() + cfg.eps / cfg.steps * gradient.sign()
    return noise


def noisy_loss(model: Classifier, noise: Noise, batch: Batch, run: Run) -> Tensor:
    """Return the cross-entropy with parameters multiplied by one plus their noise."""
    parameters = dict(model.named_parameters())
    changed = {name: parameters[name] * (1 + value) for name, value in noise.items()}
    with still_statistics(model):
        logits = logits_of(lambda pixels: functional_call(model, changed, (pixels,)), batch.pixels, run)
    return F.cross_entropy(logits, batch.labels)
