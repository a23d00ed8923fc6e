"""Channel Lipschitz pruning: cut the channels that can amplify their input the most. It needs no image.

A backdoor has to answer to a small trigger with a large change, so some channel on its way must be able to
amplify. How much a channel can is bounded by its own weights: the largest singular value of its kernel times
what the batch norm behind it multiplies with.

Paper:   Zheng, Tang, Li & Liu, "Data-free backdoor removal based on channel Lipschitzness", ECCV 2022,
         arXiv 2208.03111.
Needs:   nothing; clean images and labels for the preset ``held-out``.
Changes: scale and shift of batch norms (else weights and biases of units), set to zero.
Departs: a norm belongs to the layer whose output it reads, which is seen by running one image; the public
         code takes the convolution before it in the order of definition, which is another one in
         pre-activation networks. A norm behind an addition counts with its own factor alone. Without batch
         norms, the units of convolutions and linear layers are judged by their weights alone. Preset
         ``held-out`` lowers the threshold as far as clean images allow; the public code tries thresholds on
         the true attack.
Cost:    one singular value decomposition a channel.
Blind:   backdoors spread over many channels. Among fewer than 11 channels none can stand 3 deviations above
         the mean, so narrow layers are never touched at the published threshold. Networks of 16 to 32
         channels keep a patch whatever the threshold.
"""

from __future__ import annotations

from unbackdoor.engine.channel_pruning import OutlierPruningConfig, prune_outliers
from unbackdoor.engine.channels import lipschitz_bounds, prunable_sites
from unbackdoor.engine.masks import norm_sites
from unbackdoor.engine.run import Run
from unbackdoor.registry import defense
from unbackdoor.types import Classifier, CleanData, Purified


class CLPConfig(OutlierPruningConfig):
    """Options of channel Lipschitz pruning."""


@defense(
    "clp",
    config=CLPConfig,
    paper="arXiv:2208.03111",
    presets={"held-out": {"choice": "held-out"}},
)
def purify(model: Classifier, data: CleanData, cfg: CLPConfig, *, run: Run) -> Purified:
    """Cut the channels whose Lipschitz bound stands out in their layer."""
    sites = norm_sites(model, with_bias=True) or prunable_sites(model)
    return prune_outliers(model, sites, lipschitz_bounds(model, sites), cfg, data, run)
