"""STRIP: lay clean images over an input; if the network does not waver, something in it decides alone.

The sum of two pictures shows parts of both, and a network is unsure of it. A trigger that stays visible
decides in spite of it. The score is the mean entropy of the predictions, with its sign turned.

Paper:   Gao et al., "STRIP", ACSAC 2019, arXiv 1902.06531.
Needs:   clean images: one part is laid over, the held-out part is what scores are compared with.
Departs: the limit is no quantile of a normal law fitted to the clean entropies: an input has a p-value over
         the clean ones. All inputs get the same overlays, so that a score depends on no other input.
Cost:    (inputs + held-out clean images) x overlays forwards.
Blind:   triggers that a second picture destroys, such as warps and faint blends; all-to-all attacks less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import images_per_pass, logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, classes_of, conformal_p_values, judged
from unbackdoor.registry import option, screener
from unbackdoor.types import Classifier, CleanData, Images, Screening, require_fit


class StripConfig(ScreenerConfig):
    """Options of STRIP."""

    overlays: int = option(50, "clean images laid over each input", source="the paper: 100; half of it", ge=1)
    strength: float = option(
        1.0, "weight of the overlay; the sum is clipped", source="the paper's public code: 1", gt=0, le=1
    )


@screener(
    "strip",
    config=StripConfig,
    paper="arXiv:1902.06531",
    needs={"images"},
    quick={"overlays": 5},
)
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: StripConfig, *, run: Run) -> Screening:
    """Score inputs by how sure the network stays under clean images laid over them."""
    require_fit(model, inputs)
    order = torch.randperm(len(data.fit), generator=run.generator("overlays"))[: cfg.overlays]
    overlays = to_float(data.fit.pixels[order], run.device, channels_last=False)  # (M, C, H, W)
    predicted = classes_of(model, inputs, run)
    with mode(model, training=False):
        scores = -_entropies(model, inputs, overlays, cfg, run)
        clean_scores = -_entropies(model, data.select, overlays, cfg, run)
    return judged(
        scores,
        conformal_p_values(scores, clean_scores),
        predicted,
        cfg.alpha,
        len(clean_scores),
        overlays=len(overlays),
        overlays_held_out=not data.select_is_fit,
    )


@torch.inference_mode()
def _entropies(model: Classifier, images: Images, overlays: Tensor, cfg: StripConfig, run: Run) -> Tensor:
    """Return the mean entropy (N,) of the predictions under all overlays, in nats."""
    out = []
    size = max(1, images_per_pass(images.shape) // len(overlays))
    for start in run.progress(range(0, len(images), size), "laying images over each other"):
        x = to_float(images.pixels[start : start + size], run.device, channels_last=False)
        mixed = (x[:, None] + cfg.strength * overlays).clamp_(0, 1)  # (B, M, C, H, W)
        logs = logits_of(model, mixed.flatten(0, 1), run).log_softmax(1)  # (B * M, K)
        entropy = -(logs.exp() * logs).sum(1)  # (B * M,)
        out.append(entropy.view(len(x), -1).mean(1).cpu())
    return torch.cat(out)
