"""Optimal-transport repair: mix a pruned copy into the network, filter by filter. It needs no image.

Unlearning random noise moves the neurons of a backdoor most. A copy without the neurons that moved most is
transported onto the network: where much has moved, filters are mixed with many others of the copy, which
dilutes the backdoor, and where little has moved they stay as they are.

Paper:   Lin, Liu, Li & Xiong, "Fusing pruned and backdoored models: optimal transport-based data-free
         backdoor mitigation", AAAI 2025, arXiv 2408.15861.
Needs:   nothing; clean images and labels for the preset ``held-out``.
Changes: weights and biases of layers besides the head, from the first pruned one on.
Departs: noise of any size and labels of all classes; the public code has 3 x 32 x 32 and leaves the last
         class out. The transport is entropic (Sinkhorn's iteration) and not exact. Its map is not carried
         into the next layer, for which the order of layers in any network would have to be known: both
         networks have one origin, so their inputs are aligned already. The share of pruned neurons is fixed,
         or, with preset ``held-out``, raised as far as clean images allow; the public code reports all
         shares.
Cost:    steps x (1 forward + 1 backward) over a batch, and a transport between the filters of each layer.
Blind:   to its own damage: on small networks it takes the backdoor and a part of the clean accuracy, and an
         owner without images cannot see how much. What the preset ``held-out`` allows there keeps the
         backdoor.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.channels import Scores, places, weight_changes
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import logits_of, mode, require_learner
from unbackdoor.engine.masks import Site, unit_sites
from unbackdoor.engine.run import Run
from unbackdoor.engine.selection import harshest_within
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

_ITERATIONS = 50  # of Sinkhorn at each of the levels of entropy, each half of the one before
_LEVELS = 6
_FACTOR = 2.0


class OTBRConfig(Config):
    """Options of the repair by optimal transport."""

    steps: int = option(20, "steps of the ascent on noise", source="reference code", ge=1, le=10_000)
    lr: float = option(1e-4, "step of the ascent", source="reference code", gt=0, le=1)
    momentum: float = option(0.9, "momentum of SGD", source="reference code of TSBD", ge=0, lt=1)
    batch_size: int = option(256, "images of noise a step", source="reference code", ge=2)
    share: float = option(
        0.05,
        "gamma, share of the neurons that are pruned in the copy",
        source="the paper tries 0.01 to 0.3; larger shares cost small networks a quarter of their accuracy",
        gt=0,
        lt=1,
    )
    weight: float = option(
        0.5, "weight of the transported copy in the mean", source="reference code", ge=0, le=1
    )
    entropy: float = option(
        0.02, "entropy of the transport, as a share of the mean distance", source="this project", gt=0, le=10
    )
    choice: Literal["fixed", "held-out"] = option(
        "fixed",
        "fixed: prune `share`; held-out: raise the share from 0.01 to 0.3 while the accuracy on held-out "
        "labelled images holds",
        source="this project",
    )
    tolerance: float = option(
        0.02, "largest loss of held-out accuracy where these images choose", source="as rnp", ge=0, le=1
    )


@defense(
    "otbr",
    config=OTBRConfig,
    paper="arXiv:2408.15861",
    presets={"held-out": {"choice": "held-out"}},
    quick={"batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: OTBRConfig, *, run: Run) -> Purified:
    """Unlearn noise, prune what moved most in a copy, and fuse the copy into the network."""
    require_learner(model)
    head = head_name(model)
    sites = unit_sites(model, skip=(head,))
    if not sites:
        raise UnsupportedModel("the network has no neuron besides the outputs of its head", where=head)
    changes = weight_changes(model, without_noise(model, cfg, run), sites)
    order = places(changes)
    evidence: dict[str, Any] = {"neurons": sum(site.shape[0] for site in sites)}
    if cfg.choice == "fixed":
        pruned = sum(int((place <= cfg.share).sum()) for place in order.values())
        return Purified(fused(model, sites, changes, order, cfg.share, cfg), {**evidence, "pruned": pruned})
    if not len(data.select) or data.select.labels is None:
        raise InputError(
            "there are no held-out images to choose the share with",
            expected="clean images with labels",
            got="none",
            remedy="Give labelled images, or leave the choice fixed",
        )
    shares = [0.01, *(float(share) for share in np.arange(0.02, 0.3 + 1e-9, 0.02))]
    choice = harshest_within(
        model,
        shares,
        lambda share: fused(model, sites, changes, order, share, cfg),
        data,
        run,
        tolerance=cfg.tolerance,
    )
    return Purified(choice.model.copy(), {**evidence, "choice": choice.evidence()})


def without_noise(model: Classifier, cfg: OTBRConfig, run: Run) -> Classifier:
    """Return a copy that climbed the loss on noise with random labels for a few steps."""
    out = model.copy()
    optimizer = torch.optim.SGD(out.parameters(), lr=cfg.lr, momentum=cfg.momentum)
    with mode(out, training=False):
        for step in run.progress(range(cfg.steps), "unlearning noise"):
            draws = run.generator("noise", step)
            pixels = torch.rand(cfg.batch_size, *model.input_shape, generator=draws).to(run.device)
            labels = torch.randint(0, model.classes, (cfg.batch_size,), generator=draws).to(run.device)
            loss = -F.cross_entropy(logits_of(out, pixels, run), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    out.zero_grad(set_to_none=True)
    return out


@torch.no_grad()
def fused(
    model: Classifier, sites: list[Site], changes: Scores, order: Scores, share: float, cfg: OTBRConfig
) -> Classifier:
    """Return the network with the pruned copy transported onto it and averaged in."""
    out = model.copy()
    own = dict(out.named_parameters())
    begun = False
    for site in sites:
        cut = order[site.name] <= share  # (O,)
        begun = begun or bool(cut.any())
        if not begun:
            continue
        parts = [own[name] for name in site.parameters]
        flat = torch.cat([part.reshape(site.shape[0], -1) for part in parts], 1).float().cpu()  # (O, D)
        copy = flat * ~cut[:, None]
        masses = changes[site.name].double()
        masses = (
            masses / masses.sum() if float(masses.sum()) > 0 else torch.full_like(masses, 1 / len(masses))
        )
        plan = transport(torch.cdist(copy, flat).double(), masses, cfg.entropy)  # (O, O)
        columns = plan.sum(0).clamp_min(1e-300)
        moved = (plan / columns).T.float() @ copy  # (O, D)
        mixed = (1 - cfg.weight) * flat + cfg.weight * moved
        widths = [part[0].numel() for part in parts]
        for part, value in zip(parts, mixed.split(widths, 1), strict=True):
            part.copy_(value.view_as(part))
    return out


def transport(costs: Tensor, masses: Tensor, entropy: float) -> Tensor:
    """Return the entropic transport plan (O, O) from equal masses to the given ones.

    Args:
        costs: (O, O) float64, from rows to columns.
        masses: (O,) float64, of the columns, with sum 1.
        entropy: In units of the mean cost.
    """
    scale = float(costs.mean()) or 1.0
    rows = torch.full((len(costs),), 1 / len(costs), dtype=costs.dtype).log()
    columns = masses.clamp_min(1e-12).log()
    left, right = torch.zeros_like(rows), torch.zeros_like(columns)
    # From much entropy to little: with little alone it takes thousands of iterations to meet the masses.
    for level in entropy * scale * _FACTOR ** torch.arange(_LEVELS, -1, -1):
        for _ in range(_ITERATIONS):
            left = level * (rows - ((right - costs) / level).logsumexp(1))
            right = level * (columns - ((left[:, None] - costs) / level).logsumexp(0))
    return ((left[:, None] + right - costs) / level).exp()
