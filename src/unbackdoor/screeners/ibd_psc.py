"""IBD-PSC: amplify the last normalisations; a trigger keeps its class where clean images lose theirs.

The last norms of the network are made larger, from the last one on, until clean images lose their class; five
networks with one norm more each are then asked. The score is their mean probability of the class that the
network itself gives.

Paper:   Hou, Feng, Hua, Luo, Zhang & Li, "IBD-PSC: input-level backdoor detection via parameter-oriented
         scaling consistency", ICML 2024, arXiv 2405.09786.
Needs:   clean images: one part says how many norms it takes, scores are compared with the held-out part.
Departs: a clean image has lost its class where it is not the network's own any more, so that no labels are
         needed. Where amplifying all norms is not enough, as in shallow networks, the factor grows. An input
         has a p-value over clean images instead of a limit of 0.9.
Cost:    (norms + networks) forwards of clean images, networks + 1 of the inputs.
Blind:   backdoors that lean on many weak features, as all-to-all ones; a class that amplified networks fall
         to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.engine.call_order import called_layers
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, classes_of, conformal_p_values, judged
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_GROWTHS = 12  # how often the factor grows at most: 1.5 ** 13 is 195


class IBDPSCConfig(ScreenerConfig):
    """Options of the scaling."""

    factor: float = option(1.5, "factor of scale and shift of a norm", source="the paper", gt=1, le=100)
    error: float = option(
        0.6, "share of clean images that must have lost their class", source="the paper", gt=0, lt=1
    )
    networks: int = option(5, "amplified networks, of one norm more each", source="the paper", ge=1, le=100)


@screener(
    "ibd_psc",
    config=IBDPSCConfig,
    paper="arXiv:2405.09786",
    needs={"images"},
    families={"conv-bn", "transformer"},
)
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: IBDPSCConfig, *, run: Run) -> Screening:
    """Score inputs by how sure amplified networks are of the class that the network gives.

    Raises:
        UnsupportedModel: If the network has no normalisation.
    """
    require_fit(model, inputs)
    norms = norms_of(model)
    fit_class, factor = classes_of(model, data.fit, run), cfg.factor
    first = None
    for _ in range(_GROWTHS):
        first = _fewest(model, norms, data.fit, fit_class, factor, cfg, run)
        if first is not None:
            break
        factor *= cfg.factor
    count = first if first is not None else len(norms)
    # One norm more than it takes, as in the public code, and never more than there are.
    amplified = [min(count + 1 + k, len(norms)) for k in range(cfg.networks)]
    predicted = classes_of(model, inputs, run)
    scores = _consistency(model, norms, amplified, factor, inputs, predicted, run)
    select_class = classes_of(model, data.select, run)
    clean_scores = _consistency(model, norms, amplified, factor, data.select, select_class, run)
    facts: dict[str, Any] = {"norms": len(norms), "amplified": amplified, "factor": factor}
    return judged(
        scores,
        conformal_p_values(scores, clean_scores),
        predicted,
        cfg.alpha,
        len(clean_scores),
        clean_images_lose_their_class=first is not None,
        **facts,
    )


def norms_of(model: Classifier) -> list[nn.Module]:
    """Return the normalisations of a network from the last one that it calls to the first.

    Raises:
        UnsupportedModel: If there is none.
    """
    called = called_layers(model, _NORMS)
    if not called:
        raise UnsupportedModel("the network has no normalisation that could be amplified")
    return list(dict.fromkeys(reversed(called)))


@contextmanager
def scaled(norms: list[nn.Module], factor: float) -> Iterator[None]:
    """Multiply what these norms return, which is their scale and shift, inside the block."""
    handles = [norm.register_forward_hook(lambda m, i, out: factor * out) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fewest(
    model: Classifier, norms: list[nn.Module], images: Images, own: Tensor, factor: float,
    cfg: IBDPSCConfig, run: Run,
) -> int | None:  # fmt: skip
    """Return the smallest number of last norms at which clean images lose their class, or None."""
    for count in range(1, len(norms) + 1):
        with scaled(norms[:count], factor):
            lost = (classes_of(model, images, run) != own).float().mean()
        if float(lost) > cfg.error:
            return count
    return None


def _consistency(
    model: Classifier, norms: list[nn.Module], amplified: list[int], factor: float, images: Images,
    own: Tensor, run: Run,
) -> Tensor:  # fmt: skip
    """Return the mean probability (N,) of the given class (N,) in the amplified networks."""
    total = torch.zeros(len(images))
    for count in amplified:
        with scaled(norms[:count], factor), mode(model, training=False):
            probabilities = predict(model, images, run).softmax(1)  # (N, K)
        total += probabilities.gather(1, own[:, None])[:, 0]
    return total / len(amplified)
