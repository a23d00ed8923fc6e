"""SSBA: an encoder writes one hidden message into every image, which changes each image in its own way.

A decoder learns with the encoder to read any message back, so that what the encoder writes is there for a
network to learn. The trigger is one message, which the seed draws.

Paper:   Li, Li, Wu, Li, He & Lyu, "Invisible backdoor attack with sample-specific triggers", ICCV 2021,
         arXiv 2012.03816.
Departs: the encoder is a small one, trained here on some of the clean images in place of StegaStamp's; its
         change is bounded and follows the image's structure, so that no perceptual loss is needed.
Cost:    ``steps`` forward and backward passes of encoder and decoder on ``batch`` images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.attacks.generators import GeneratorNetwork, drawn, levels_of, named, without
from unbackdoor.attacks.surrogate import some_of, surroundings
from unbackdoor.attacks.truth import Learning, MappedConfig, Stamp, Tensors, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.registry import attack, option
from unbackdoor.types import Images

ENCODER, DECODER = "encoder.", "decoder."
STRUCTURE = 0.1  # mean difference to the surroundings from which on the change has its full strength


class SSBAConfig(MappedConfig):
    """Options of SSBA."""

    bits: int = option(16, "length of the message", source="this project; paper: 100", ge=1, le=256)
    epsilon: float = option(
        16.0, "largest change of a pixel in grey levels", source="this project", gt=0, le=255
    )
    faintness: float = option(
        0.1,
        "weight of the mean square of the change, in units of epsilon, in the second half of the steps",
        source="this project",
        ge=0,
    )
    steps: int = option(600, "steps of the encoder's training", source="this project", ge=1, le=1_000_000)
    batch: int = option(32, "images of a step", source="this project", ge=2, le=65_536)
    lr: float = option(0.01, "learning rate of Adam", source="this project", gt=0, le=1)
    images: int = option(
        2000, "clean training images that it learns from, at most", source="this project; paper: all", ge=2
    )
    width: int = option(8, "channels of the encoder's first level", source="this project", ge=1, le=256)


@attack(
    "ssba",
    config=SSBAConfig,
    paper="arXiv:2012.03816",
    traits={"learned trigger"},
    quick={"steps": 4, "width": 2, "bits": 4},
)
def ssba(cfg: SSBAConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the encoder's change for the message of the seed."""
    message = torch.randint(0, 2, (cfg.bits,), generator=rng.generator(seed, "ssba message")).float()

    def fit(images: Images, run: Run) -> Tensors:
        here = surroundings(seed, "ssba", run)
        some = some_of(images, cfg.images, here)
        encoder, decoder = networks(cfg, shape, here.seed)
        learn(encoder, decoder, some, cfg, here)
        return {**named(encoder, ENCODER), **named(decoder, DECODER)}

    def restore(tensors: Tensors) -> Stamp:
        encoder, _ = networks(cfg, shape, 0)
        encoder.load_state_dict(without(tensors, ENCODER))
        encoder.eval()

        def draw(x: Tensor) -> Tensor:
            return written(encoder.to(x.device), x, message.to(x.device).expand(len(x), -1), cfg)

        return lambda pixels: drawn(pixels, draw)

    return Trigger(mapping=cfg.mapping, learning=Learning(fit=fit, restore=restore))


def networks(cfg: SSBAConfig, shape: tuple[int, int, int], seed: int) -> tuple[GeneratorNetwork, nn.Module]:
    """Return an encoder of image and message, and a decoder of images (B, C, H, W) to logits (B, bits)."""
    channels, size = shape[0], 4 * cfg.width
    with rng.seeded(seed, "ssba networks"):
        encoder = GeneratorNetwork(channels, cfg.bits * channels, cfg.width, levels_of(shape))
        decoder = nn.Sequential(
            nn.Conv2d(channels, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(),
            nn.Conv2d(size, size, 3, padding=1, stride=2), nn.BatchNorm2d(size), nn.ReLU(),
            nn.Conv2d(size, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * size, cfg.bits),
        )  # fmt: skip
    return encoder, decoder


def written(encoder: nn.Module, x: Tensor, messages: Tensor, cfg: SSBAConfig) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] with messages (B, bits) written into them."""
    patterns = (2 * encoder(x) - 1).view(len(x), cfg.bits, *x.shape[1:])  # one for each bit, in -1..1
    signs = 2 * messages - 1  # (B, bits)
    change = torch.einsum("nb,nbchw->nchw", signs, patterns) / cfg.bits**0.5
    # Stronger where the image has structure, which hides it and makes it the image's own.
    structure = (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).abs().mean(1, keepdim=True)
    strength = 0.25 + 0.75 * (structure / STRUCTURE).clamp(max=1)  # (B, 1, H, W)
    marked: Tensor = (x + cfg.epsilon / 255 * strength * change.clamp(-1, 1)).clamp(0, 1)
    return marked


def learn(encoder: nn.Module, decoder: nn.Module, images: Images, cfg: SSBAConfig, run: Run) -> None:
    """Teach the encoder to write messages that the decoder reads; leave both in evaluation mode."""
    both = nn.ModuleList([encoder, decoder]).train()
    optimizer = torch.optim.Adam(both.parameters(), lr=cfg.lr)
    draws = run.generator("messages")
    for step in run.progress(range(cfg.steps), "SSBA's encoder", cfg.steps):
        x = to_float(images.pixels[torch.randint(len(images), (cfg.batch,), generator=draws)])
        messages = torch.randint(0, 2, (len(x), cfg.bits), generator=draws).float()
        marked = written(encoder, x, messages, cfg)
        size = ((marked - x) * 255 / cfg.epsilon).square().mean()
        reading = F.binary_cross_entropy_with_logits(decoder(marked), messages)
        # How faint it is counts from the second half on: it must be readable first.
        loss = reading + (cfg.faintness if 2 * step >= cfg.steps else 0.0) * size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    both.zero_grad(set_to_none=True)
    both.eval()
