"""Scores of channels from weights and activations, comparable between layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.masks import CONVS, NORMS, Site, channel_sites, norm_sites
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, Images

Scores = dict[str, Tensor]


def prunable_sites(model: Classifier) -> list[Site]:
    """Return the channels that may be pruned: all but the outputs of the head, which are the classes.

    Where there are batch norms they are the channels, and what the network ends in does not matter.

    Raises:
        UnsupportedModel: If there is none, or no layer that could be the head; names the layers.
    """
    return norm_sites(model) or channel_sites(model, skip=(head_name(model),))


def producers(model: Classifier, sites: Sequence[Site]) -> dict[str, str | None]:
    """Return for each site the convolution or linear layer whose output it is or scales; None for neither.

    One grey image is run: a batch norm belongs to the layer whose output tensor is its input. Where something
    lies between them, as in networks that normalise before they convolve, it belongs to none.
    """
    names = {module: name for name, module in model.named_modules()}
    outputs: list[tuple[Tensor, str]] = []  # kept alive, so that identity means something
    producer_of: dict[str, str | None] = {}
    site_names = {site.name for site in sites}

    def record_output(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        outputs.append((out, names[module]))

    def record_producer(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        producer_of[names[module]] = next((name for out, name in outputs if out is inputs[0]), None)

    handles = []
    for module, name in names.items():
        if isinstance(module, (*CONVS, nn.Linear)):
            handles.append(module.register_forward_hook(record_output))
            producer_of[name] = name
        elif name in site_names:
            handles.append(module.register_forward_pre_hook(record_producer))
    try:
        with mode(model, training=False), torch.no_grad():
            model(torch.full((1, *model.input_shape), 0.5, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return {site.name: producer_of.get(site.name) for site in sites}


def mean_activations(model: Classifier, sites: Sequence[Site], images: Images, run: Run) -> Scores:
    """Return the mean positive output of each channel over the images and all places, by site."""
    totals = {site.name: torch.zeros(site.shape) for site in sites}

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            # Convolutions and their norms have the channel second, linear layers last.
            last = isinstance(module, nn.Linear) or out.dim() == 2
            flat = (
                out.detach().float().clamp_min(0).movedim(-1 if last else 1, 0).flatten(1)
            )  # (O, B * places)
            totals[name].add_(flat.mean(1).cpu() * len(out))

        return add

    handles = [model.get_submodule(s.name).register_forward_hook(adder(s.name)) for s in sites]
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / len(images) for name, total in totals.items()}


@torch.no_grad()
def lipschitz_bounds(model: Classifier, sites: Sequence[Site]) -> Scores:
    """Return the channel Lipschitz bound: largest singular value of the kernel times |scale / deviation|.

    A norm that no convolution feeds directly counts with its own factor alone.

    Paper: Zheng et al., "Data-free backdoor removal based on channel Lipschitzness", ECCV 2022.
    """
    out: Scores = {}
    owners = producers(model, sites)
    for site in sites:
        bound = torch.ones(site.shape)
        layer = owners[site.name]
        if layer is not None:
            weight = dict(model.named_parameters())[f"{layer}.weight"].float().cpu()
            rows = weight.flatten(2) if weight.dim() > 2 else weight[:, None]  # (O, I, kH * kW), (O, 1, I)
            bound = torch.linalg.matrix_norm(rows, ord=2)  # (O,)
        module = model.get_submodule(site.name)
        if isinstance(module, NORMS):
            # Without stored statistics each batch is brought to deviation 1.
            variance = 1.0 if module.running_var is None else module.running_var
            gain = module.weight / (variance + module.eps) ** 0.5
            bound = bound * gain.abs().float().cpu()
        out[site.name] = bound
    return out


@torch.no_grad()
def weight_changes(before: Classifier, after: Classifier, sites: Sequence[Site]) -> Scores:
    """Return the sum of |change| of each channel's own weights: of its site and of the layer that feeds it.

    Paper: Lin et al., "Unveiling and mitigating backdoor vulnerabilities based on unlearning weight changes
    and backdoor activeness" (TSBD), NeurIPS 2024, arXiv 2405.20291.
    """
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    owners = producers(before, sites)
    out: Scores = {}
    for site in sites:
        total = torch.zeros(site.shape)
        layers = {site.name, owners[site.name] or site.name}
        for name in [name for name in old if name.rpartition(".")[0] in layers]:
            moved = (new[name] - old[name]).abs().float().cpu()
            total += moved.reshape(len(total), -1).sum(1)  # (O,)
        out[site.name] = total
    return out


def standardised(scores: Mapping[str, Tensor]) -> Scores:
    """Return each layer's scores minus their mean, divided by their deviation; 0 where all are equal."""
    out: Scores = {}
    for name, score in scores.items():
        spread = score.std(unbiased=False)
        out[name] = (score - score.mean()) / spread if float(spread) > 0 else torch.zeros_like(score)
    return out


def places(suspicion: Mapping[str, Tensor]) -> Scores:
    """Return the place of each channel among all, in (0, 1], most suspicious first; ties in site order."""
    flat = torch.cat([score.flatten() for score in suspicion.values()])
    order = flat.argsort(descending=True, stable=True)
    place = torch.empty(len(flat))
    place[order] = torch.arange(1, len(flat) + 1) / len(flat)
    parts = place.split([score.numel() for score in suspicion.values()])
    return {name: part.view_as(suspicion[name]) for name, part in zip(suspicion, parts, strict=True)}
