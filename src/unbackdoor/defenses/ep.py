"""Entropy pruning: cut the channels whose activations fall into two heaps on a set of mixed images.

A neuron that answers to a trigger has one heap of activations for triggered images and one for the others.
Of all laws with the same variance, two heaps have little entropy, and the normal law, which other channels
are near to, has the most.

Paper:   Zheng, Tang, Li & Liu, "Pre-activation distributions expose backdoor neurons", NeurIPS 2022, EP.
Needs:   images, triggered ones among them: the suspicious training set. Labels for the preset ``held-out``.
Changes: scale and shift of batch norms (else weights and biases of units), set to zero.
Departs: the images are the user's own, whatever they are. A channel that is constant on them is left alone;
         in the public code it has the least entropy of all. Without batch norms, the outputs of convolutions
         and linear layers are judged. Preset ``held-out`` lowers the threshold as far as labelled images
         allow.
Cost:    1 forward over the images.
Blind:   without triggered images among the given ones there is no second heap, and the cut is arbitrary:
         with clean images alone it removes nothing. So it is with a patch in small networks. Layers of fewer
         than 11 channels at the published threshold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unbackdoor.engine.channel_pruning import OutlierPruningConfig, prune_outliers
from unbackdoor.engine.channels import Scores, prunable_sites
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.masks import Site, norm_sites
from unbackdoor.engine.run import Run
from unbackdoor.registry import defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified

_MOST_BINS = 10_000  # of one channel; a single value a thousand deviations away would ask for as many


class EPConfig(OutlierPruningConfig):
    """Options of entropy pruning."""

    bin: float = option(
        0.1, "width of the bins, in standard deviations", source="reference code, step_size", gt=0, le=10
    )


@defense(
    "ep",
    config=EPConfig,
    paper="NeurIPS 2022",
    needs={"images"},
    presets={"held-out": {"choice": "held-out"}},
)
def purify(model: Classifier, data: CleanData, cfg: EPConfig, *, run: Run) -> Purified:
    """Cut the channels whose activations have unusually little entropy in their layer."""
    sites = norm_sites(model, with_bias=True) or prunable_sites(model)
    values = largest_activations(model, sites, data.all, run)
    suspicion = {name: -entropies(layer, cfg.bin) for name, layer in values.items()}
    return prune_outliers(model, sites, suspicion, cfg, data, run)


def largest_activations(model: Classifier, sites: list[Site], images: Images, run: Run) -> Scores:
    """Return the largest output (N, O) of each channel over all places, for every image, by site."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            # Convolutions and their norms have the channel second, linear layers last.
            last = isinstance(module, nn.Linear) or out.dim() == 2
            by_channel = out.detach().float().movedim(-1 if last else 1, 1)  # (B, O, ...)
            flat = by_channel.reshape(*by_channel.shape[:2], -1)  # (B, O, places)
            seen[name].append(flat.amax(2).cpu())

        return keep

    handles = [model.get_submodule(s.name).register_forward_hook(keeper(s.name)) for s in sites]
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that is never called has nothing to be judged by.
    return {s.name: torch.cat(seen[s.name]) if seen[s.name] else torch.zeros(1, s.shape[0]) for s in sites}


def entropies(values: Tensor, width: float) -> Tensor:
    """Return the entropy (O,) in nats of each column (N, O), standardised and sorted into bins.

    A column without spread gets the mean of the others, so that it does not stand out.
    """
    spread = values.std(0, unbiased=False)
    usable = spread > 1e-6 * values.abs().amax(0).clamp_min(1e-30)
    scaled = (values - values.mean(0)) / torch.where(usable, spread, 1.0)
    bins = ((scaled - scaled.amin(0)) / width).floor().clamp_max(_MOST_BINS - 1).long()  # (N, O)
    counts = torch.zeros(int(bins.max()) + 1, values.shape[1])
    counts.scatter_add_(0, bins, torch.ones(bins.shape))
    share = counts / len(values)  # (bins, O)
    out = -torch.special.xlogy(share, share).sum(0)
    return torch.where(usable, out, out[usable].mean() if usable.any() else 0.0)
