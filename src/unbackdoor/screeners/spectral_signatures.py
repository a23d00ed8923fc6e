"""Spectral signatures: in a poisoned class, one direction of the features tells the poisoned images apart.

For every label, the features of its images are centred; the score is the length along the direction in
which they vary most, in robust deviations so that classes can be compared.

Paper:   Tran, Li & Madry, "Spectral signatures in backdoor attacks", NeurIPS 2018, arXiv 1811.00636.
Needs:   the labels that the images were, or are to be, trained with. Clean labelled images make the p-values
         exact; without them they rest on the robust deviations of the class and a normal law.
Departs: the paper removes 1.5 times the share that the attacker is supposed to have poisoned, which nobody
         knows. Here every image has a p-value.
Cost:    1 forward over all images, one singular value decomposition a class.
Blind:   attacks whose features agree with those of clean images of the class; a class of which the poisoned
         are about half, whose centre lies between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import (
    ScreenerConfig,
    conformal_p_values,
    features,
    judged,
    normal_p_values,
    standardised,
)
from unbackdoor.registry import INPUT_LABELS, option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening


class SpectralConfig(ScreenerConfig):
    """Options of the signatures."""

    fewest: int = option(10, "images of a class below which it is not looked at", source="this project", ge=3)


@screener("spectral_signatures", config=SpectralConfig, paper="arXiv:1811.00636", needs={INPUT_LABELS})
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: SpectralConfig, *, run: Run) -> Screening:
    """Score the images of a labelled set by how far they lie along their class's main direction."""
    latent, logits = features(model, inputs, run)
    clean = data.all if len(data) and data.fit.labels is not None else None
    clean_latent = features(model, clean, run)[0] if clean is not None else torch.zeros(0, latent.shape[1])
    scores, clean_scores, shares = torch.zeros(len(inputs)), [], {}
    for k in range(model.classes):
        rows = (inputs.truth == k).nonzero().flatten()
        if len(rows) < cfg.fewest:
            continue
        own = latent[rows].double()  # (n, D)
        centre = own.mean(0)
        values, direction = _main(own - centre)
        shares[str(k)] = float(values[0] ** 2 / (values**2).sum().clamp_min(1e-300))
        others = clean_latent[clean.truth == k].double() if clean is not None else own[:0]  # (m, D)
        scores[rows], compared = standardised(
            ((own - centre) @ direction).abs(), ((others - centre) @ direction).abs()
        )
        clean_scores.append(compared)
    pooled = torch.cat(clean_scores) if clean_scores else torch.zeros(0)
    p_values = conformal_p_values(scores, pooled) if len(pooled) else normal_p_values(scores)
    return judged(scores, p_values, logits.argmax(1), cfg.alpha, len(pooled), share_of_main_direction=shares)


def _main(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values and the first right singular vector (D,)."""
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    return values, directions[0]
