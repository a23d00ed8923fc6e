"""NAD: fine-tune a teacher, then the network, which is to look where the teacher looks.

Where a network looks at a stage is the map of the squared activations, summed over channels. The student
learns the clean images, and the teacher's maps at the last stages.

Paper:   Li et al., "Neural attention distillation", ICLR 2021, arXiv 2101.05930.
Needs:   clean images and labels.          Changes: all weights and the stored batch statistics.
Departs: the stages are found by running the network (the last map of each of the last three resolutions; of
         networks that keep one resolution, such as transformers, three maps evenly spaced), where the paper
         names the layers of one architecture. Otherwise as in BackdoorBench; ``authors`` has the passes and
         batches of the authors' code, though not its rate of 0.1. The held-out images are trained on as well,
         since nothing is selected. A learning rate that destroys the network is lowered tenfold
         (engine/fine_tuning.py, engine/descent.py).
Cost:    (teacher epochs + epochs) x (1 forward + 1 backward) + epochs x 1 forward over the clean set.
Blind:   a strong backdoor that the teacher keeps is taught to the student.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.descent import Batch, at_bearable_rate, descend
from unbackdoor.engine.fine_tuning import fine_tune
from unbackdoor.engine.inference import logits_of, mode
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified

STAGES = 3


class NADConfig(Config):
    """Options of NAD."""

    beta1: float = option(500.0, "weight of the maps of the first stage", source="BackdoorBench, nad", ge=0)
    beta2: float = option(1000.0, "weight of those of the second", source="BackdoorBench, nad", ge=0)
    beta3: float = option(1000.0, "weight of those of the last", source="BackdoorBench, nad", ge=0)
    power: float = option(
        2.0, "p, exponent of the activations in a map", source="BackdoorBench, nad", gt=0, le=16
    )
    teacher_epochs: int = option(
        10, "passes that make the teacher", source="BackdoorBench, nad", ge=1, le=10_000
    )
    epochs: int = option(100, "passes of the student", source="BackdoorBench, nad", ge=1, le=10_000)
    lr: float = option(
        0.01, "peak learning rate of the cosine schedules", source="BackdoorBench, nad", gt=0, le=1
    )
    batch_size: int = option(256, "images a step", source="BackdoorBench, nad", ge=2)
    momentum: float = option(0.9, "momentum of SGD", source="BackdoorBench, nad", ge=0, lt=1)
    weight_decay: float = option(1e-4, "L2 penalty", source="BackdoorBench, nad", ge=0, le=1)


@defense(
    "nad",
    config=NADConfig,
    paper="arXiv:2101.05930",
    needs={"images", "labels"},
    presets={"authors": {"epochs": 20, "teacher_epochs": 5, "batch_size": 64}},
    quick={"teacher_epochs": 2, "epochs": 2, "lr": 0.001},
)
def purify(model: Classifier, data: CleanData, cfg: NADConfig, *, run: Run) -> Purified:
    """Fine-tune a teacher, and distil its attention into the network."""
    stages = attention_stages(model)
    recipe = Recipe(
        epochs=cfg.teacher_epochs, lr=cfg.lr, batch_size=cfg.batch_size, momentum=cfg.momentum,
        weight_decay=cfg.weight_decay, schedule="cosine",
    )  # fmt: skip
    tuned_teacher = fine_tune(model, data.all, recipe, run, augmentation=data.augmentation)
    teacher = tuned_teacher.model.requires_grad_(False)
    # With fewer stages the last ones have their weights.
    betas = (cfg.beta1, cfg.beta2, cfg.beta3)[-len(stages) :]

    def tuned(lr: float) -> Classifier:
        out = model.copy()

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad(), outputs_of(teacher, stages) as wanted:
                logits_of(teacher, batch.pixels, run)
            with outputs_of(out, stages) as maps:
                total = F.cross_entropy(logits_of(out, batch.pixels, run), batch.labels)
            for beta, stage in zip(betas, stages, strict=True):
                own, other = (attention(seen[stage], cfg.power) for seen in (maps, wanted))
                total = total + beta * F.mse_loss(own, other)
            return total

        student = recipe.model_copy(update={"epochs": cfg.epochs, "lr": lr})
        descend(out, data.all, student, loss, run, augmentation=data.augmentation, label="distilling")
        return out

    repaired, evidence = at_bearable_rate(model, data.all, cfg.lr, tuned, run)
    return Purified(repaired, {**evidence, "teacher_lr": tuned_teacher.lr, "stages": stages})


def attention(output: Tensor, power: float) -> Tensor:
    """Return the map (B, places) of an output (B, C, H, W) or (B, T, D): sum of |a|^p, of L2 norm 1."""
    strength = output.float().abs().pow(power)
    places = strength.sum(1).flatten(1) if output.dim() == 4 else strength.sum(2)  # (B, H * W), (B, T)
    return F.normalize(places, dim=1)


def attention_stages(model: Classifier) -> list[str]:
    """Return the names of the modules whose outputs are the stages, in the order that they end in.

    Raises:
        UnsupportedModel: If no module has an output with places, as in networks of linear layers alone.
    """
    seen: list[tuple[str, int]] = []  # modules that end, and the number of places of what they return

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() in (3, 4):
            places = output[0, 0].numel() if output.dim() == 4 else output.shape[1]
            if places > 1:
                seen.append((name, places))

    hooks = [
        module.register_forward_hook(lambda m, inputs, output, name=name: note(name, output))
        for name, module in model.network.named_modules(prefix="network")
        if name != "network"
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            model(torch.full((1, *model.input_shape), 0.5, device=model.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(name for name, _ in seen)  # one that is called twice returns another map each time
    once = [name for name, _ in seen if calls[name] == 1]
    if not once:
        raise UnsupportedModel(
            "the network has no map to look at",
            expected="a module that returns (B, C, H, W) or (B, T, D), called once",
            got=", ".join(sorted({type(m).__name__ for m in model.network.modules()})),
            where=model.architecture or type(model.network).__name__,
        )
    last = {places: name for name, places in seen if calls[name] == 1}
    if len(last) >= STAGES:
        return sorted(last.values(), key=once.index)[-STAGES:]
    blocks = [name for name in once if name.rpartition(".")[2].isdigit()]  # members of a list of modules
    ends = blocks if len(blocks) >= STAGES else once
    return list(dict.fromkeys(ends[max(0, len(ends) * part // STAGES - 1)] for part in range(1, STAGES + 1)))


@contextmanager
def outputs_of(model: Classifier, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what some modules return inside the block, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        outputs[name] = output

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
