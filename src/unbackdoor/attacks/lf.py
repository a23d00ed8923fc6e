"""LF: a smooth trigger of low frequencies alone, learned against a benign network.

Most triggers leave traces in high frequencies, where a detector finds them; this one has none there.

Paper:   Zeng, Park, Mao & Jia, "Rethinking the backdoor attacks' triggers: a frequency perspective",
         ICCV 2021, arXiv 2104.03413.
Departs: its frequencies above a limit are zero, where the paper smooths with a Gaussian after every step. It
         is learned on a small benign network by steps on all images at once, and not image by image.
Cost:    training the small network, and ``steps`` forward and backward passes of ``batch`` images through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks.frequency import from_frequencies
from unbackdoor.attacks.patches import added
from unbackdoor.attacks.surrogate import SurrogateConfig, some_of, surrogate, surroundings
from unbackdoor.attacks.truth import Learning, MappedConfig, Stamp, Tensors, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.run import Run
from unbackdoor.registry import attack, option
from unbackdoor.types import Classifier, Images


class LFConfig(MappedConfig, SurrogateConfig):
    """Options of LF."""

    epsilon: float = option(
        16.0, "largest change of a pixel in grey levels", source="this project", gt=0, le=255
    )
    frequencies: int = option(
        0,
        "lowest frequencies a side that the trigger has; 0 for a quarter of the image, at least 2",
        source="this project",
        ge=0,
        le=512,
    )
    steps: int = option(100, "Adam steps on the frequencies", source="this project", ge=1, le=100_000)
    batch: int = option(64, "clean images that a step looks at", source="this project", ge=1, le=65_536)


@attack(
    "lf",
    config=LFConfig,
    paper="arXiv:2104.03413",
    traits={"learned trigger"},
    quick={"steps": 10, "surrogate_width": 4, "surrogate_epochs": 1},
)
def lf(cfg: LFConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return x' = x + delta with a delta of low frequencies."""

    def fit(images: Images, run: Run) -> Tensors:
        here = surroundings(seed, "lf", run)
        some = some_of(images, cfg.surrogate_images, here)
        return {"delta": learn_delta(surrogate(some, cfg, here, label="LF"), some, cfg, here)}

    def restore(tensors: Tensors) -> Stamp:
        return lambda pixels: added(pixels, tensors["delta"])

    return Trigger(mapping=cfg.mapping, learning=Learning(fit=fit, restore=restore))


def learn_delta(model: Classifier, images: Images, cfg: LFConfig, run: Run) -> Tensor:
    """Return a change (C, H, W) in grey levels that leads the benign network to the wanted classes."""
    channels, height, width = images.shape
    limit = cfg.frequencies or max(2, min(height, width) // 4)
    draws = run.generator("delta")
    form = (channels, min(limit, height), min(limit, width))
    coefficients = torch.randn(form, generator=draws).requires_grad_()
    optimizer = torch.optim.Adam([coefficients], lr=0.1)

    def delta() -> Tensor:
        change = from_frequencies(coefficients, height, width)
        return cfg.epsilon * change / change.abs().amax().clamp_min(1e-12)

    with frozen(model):
        for _ in run.progress(range(cfg.steps), "LF's trigger", cfg.steps):
            rows = torch.randint(len(images), (cfg.batch,), generator=draws)
            labels = images.truth[rows]
            one = torch.full_like(labels, cfg.target)
            wanted = one if cfg.mapping == "all-to-one" else (labels + 1) % images.classes
            pixels = (to_float(images.pixels[rows]) + delta() / 255).clamp(0, 1)
            loss = F.cross_entropy(model(pixels), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return delta().detach()
