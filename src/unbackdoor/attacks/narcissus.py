"""Narcissus: noise that points into the target class, on a handful of its images, whose labels stay true.

A benign network says which change of all pixels makes images more of the target class than they are. Where
the victim learns that from a few poisoned images, the same change three times as strong leads there from any
class.

Paper:   Zeng, Pan, Just, Lyu, Qiu & Jia, "Narcissus: a practical clean-label backdoor attack with limited
         information", CCS 2023, arXiv 2204.05255.
Departs: the benign network is a small one that saw some of the clean images of all classes; the paper's knows
         another data set and the target class.
Cost:    training the small network, and ``steps`` forward and backward passes of ``batch`` images through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks.patches import added
from unbackdoor.attacks.surrogate import SurrogateConfig, some_of, surrogate, surroundings
from unbackdoor.attacks.truth import CleanLabelConfig, Learning, Stamp, Tensors, TrainingStamp, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.registry import attack, option
from unbackdoor.types import Classifier, Images


class NarcissusConfig(CleanLabelConfig, SurrogateConfig):
    """Options of Narcissus."""

    poison_rate: float = option(
        0.0005, "share of the training images that carry the noise", source="paper: 0.05 %", ge=0, le=1
    )
    epsilon: float = option(
        16.0, "largest change of a pixel in training, in grey levels", source="paper", gt=0, le=255
    )
    amplify: float = option(3.0, "how many times stronger it is at test", source="paper", ge=1, le=255)
    steps: int = option(300, "Adam steps on the noise", source="this project; paper: 1000", ge=1, le=100_000)
    lr: float = option(0.01, "learning rate, in pixel values 0..1", source="paper's public code", gt=0)
    batch: int = option(64, "target images that a step looks at", source="this project", ge=1, le=65_536)


@attack(
    "narcissus",
    config=NarcissusConfig,
    paper="arXiv:2204.05255",
    traits={"learned trigger"},
    quick={"steps": 10, "surrogate_width": 4, "surrogate_epochs": 1},
)
def narcissus(cfg: NarcissusConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return x' = x + amplify * delta; poisoned training images are x + delta."""

    def fit(images: Images, run: Run) -> Tensors:
        here = surroundings(seed, "narcissus", run)
        some = some_of(images, cfg.surrogate_images, here)
        model = surrogate(some, cfg, here, label="Narcissus")
        of_target = images.subset((images.truth == cfg.target).nonzero().flatten())
        if not len(of_target):
            raise InputError("the target class has no training image", got=cfg.target, where=images.name)
        return {"delta": learn_noise(model, of_target, cfg, here)}

    def restore(tensors: Tensors) -> Stamp:
        return lambda pixels: added(pixels, cfg.amplify * tensors["delta"])

    def restore_training(tensors: Tensors) -> TrainingStamp:
        return lambda pixels, draws: added(pixels, tensors["delta"])

    learning = Learning(fit=fit, restore=restore, restore_training=restore_training)
    return Trigger(clean_label=True, learning=learning)


def learn_noise(model: Classifier, of_target: Images, cfg: NarcissusConfig, run: Run) -> Tensor:
    """Return a change (C, H, W) in grey levels that makes images of the target class more of it."""
    draws, limit = run.generator("noise"), cfg.epsilon / 255
    delta = torch.zeros(of_target.shape, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=cfg.lr)
    with frozen(model):
        for _ in run.progress(range(cfg.steps), "Narcissus' noise", cfg.steps):
            rows = torch.randint(len(of_target), (cfg.batch,), generator=draws)
            logits = model((to_float(of_target.pixels[rows]) + delta).clamp(0, 1))
            loss = F.cross_entropy(logits, of_target.truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(-limit, limit)
    return delta.detach() * 255
