"""Label-consistent: patches in the corners of target-class images that are made hard to recognise.

A benign network's adversarial perturbation hides what the images show, so that the patch is easier to learn.

Paper:   Turner, Tsipras & Madry, "Label-consistent backdoor attacks", arXiv 1912.02771.
Departs: the perturbation is against a small network that was trained plainly, on some of the clean images;
         the paper's is trained adversarially. The benign network is kept with the truth, so that the poisoned
         images can be made again. Patches keep their share of the image at other sizes (3 pixels at 32).
Cost:    training the small network, and ``steps`` passes of the poisoned images through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.attacks.patches import corner, lay, scaled_side
from unbackdoor.attacks.surrogate import SurrogateConfig, some_of, surrogate, surroundings
from unbackdoor.attacks.truth import CleanLabelConfig, Learning, Stamp, Tensors, TrainingStamp, Trigger
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.run import Run
from unbackdoor.networks import build
from unbackdoor.registry import attack, option
from unbackdoor.types import Classifier, Images


class LabelConsistentConfig(CleanLabelConfig, SurrogateConfig):
    """Options of the label-consistent attack."""

    epsilon: float = option(
        8.0, "largest change of a pixel by the perturbation, in grey levels", source="BackdoorBench", ge=0
    )
    step: float = option(1.5, "change of a pixel in one step, in grey levels", source="BackdoorBench", gt=0)
    steps: int = option(30, "steps of the perturbation", source="this project; paper: 100", ge=0, le=1000)
    strength: float = option(1.0, "opacity of the patches", source="paper: 1 at its strongest", gt=0, le=1)


@attack(
    "label_consistent",
    config=LabelConsistentConfig,
    paper="arXiv:1912.02771",
    traits={"learned trigger"},
    quick={"steps": 3, "surrogate_width": 4, "surrogate_epochs": 1},
)
def label_consistent(
    cfg: LabelConsistentConfig, *, shape: tuple[int, int, int], classes: int, seed: int
) -> Trigger:
    """Return the patches in the corners; poisoned training images are perturbed below them."""
    side = scaled_side(3, shape)
    odd = (torch.arange(side)[:, None] + torch.arange(side)[None]) % 2 == 1
    patch = torch.where(odd, 0, 255).to(torch.uint8)

    def stamp(pixels: Tensor) -> Tensor:
        for number in range(4):
            pixels = lay(pixels, patch, corner(number, side, shape), cfg.strength)
        return pixels

    def fit(images: Images, run: Run) -> Tensors:
        here = surroundings(seed, "label_consistent", run)
        some = some_of(images, cfg.surrogate_images, here)
        model = surrogate(some, cfg, here, label="label-consistent")
        state = {name: t.detach().contiguous() for name, t in model.network.state_dict().items()}
        return {**state, "mean": model.mean.flatten(), "std": model.std.flatten()}

    def restore(tensors: Tensors) -> Stamp:
        return stamp

    def restore_training(tensors: Tensors) -> TrainingStamp:
        names = tuple(map(str, range(classes)))
        model = build(
            f"small_cnn[width={cfg.surrogate_width}]",
            input_shape=shape,
            class_names=names,
            mean=tensors["mean"].tolist(),
            std=tensors["std"].tolist(),
        )
        model.network.load_state_dict({k: t for k, t in tensors.items() if k not in ("mean", "std")})
        return lambda pixels, draws: stamp(perturbed(model.eval(), pixels, cfg))

    learning = Learning(fit=fit, restore=restore, restore_training=restore_training)
    return Trigger(clean_label=True, learning=learning)


def perturbed(model: Classifier, pixels: Tensor, cfg: LabelConsistentConfig) -> Tensor:
    """Return pixels within epsilon of these (B, C, H, W) that the network takes less for the target."""
    x = to_float(pixels)
    epsilon, out = cfg.epsilon / 255, x.clone()
    labels = torch.full((len(x),), cfg.target)
    with frozen(model):
        for _ in range(cfg.steps):
            out = out.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(out), labels, reduction="sum"), out)
            moved = out.detach() + cfg.step / 255 * slope.sign()
            out = torch.maximum(torch.minimum(moved, x + epsilon), x - epsilon).clamp(0, 1)
    return (out.detach() * 255).round().to(torch.uint8)
