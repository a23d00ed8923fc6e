"""Clean unlearning: climb the loss on clean images until the network has almost forgotten its task.

A backdoor is hardly touched by it, because no clean image carries the trigger. What is left behind serves
pruning (RNP, TSBD), label detection and trigger recovery.

Paper:   Li et al., "Reconstructive neuron pruning", ICML 2023, arXiv 2305.14876, equation (U).
Departs: the gradient is clipped after the backward pass (before it, clipping does nothing), the stop is
         checked after every step in evaluation mode and not once an epoch in training mode, and a step that
         overshoots is taken back and halved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import batches
from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy, logits_of, mode, require_learner
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Augmentation, Classifier, Images

Watch = Callable[[Classifier, float], None]
CHECKED = 256  # images that the stop is checked on; the standard error of the accuracy is then below 0.03
STALLED = 30  # steps without any forgetting before the rate is doubled


@dataclass(frozen=True)
class Unlearned:
    """A network that has forgotten its clean task.

    Attributes:
        model: In evaluation mode.
        accuracy: Clean accuracy of the last check, in 0..1.
        trace: (step, accuracy, learning rate) of every check.
        restarts: How often a step overshot or gave a loss that is not finite.
    """

    model: Classifier
    accuracy: float
    trace: tuple[tuple[int, float, float], ...]
    restarts: int

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record."""
        return {
            "accuracy": self.accuracy,
            "steps": self.trace[-1][0],
            "restarts": self.restarts,
            "trace": [list(check) for check in self.trace],
        }


def unlearn(
    model: Classifier,
    images: Images,
    run: Run,
    *,
    lr: float,
    batch_size: int,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    clip: float = 20.0,
    margin: float = 0.1,
    max_drop: float = 0.15,
    max_steps: int = 500,
    batch_norm: Literal["batch", "frozen"] = "frozen",
    augmentation: Augmentation = "none",
    watch: Watch | None = None,
) -> Unlearned:
    """Return a copy of the model that has unlearned the images.

    Args:
        model: The classifier; not changed.
        images: Labelled clean images.
        run: Seed, device, precision and progress.
        lr: First step size; halved after an overshoot, doubled where nothing moves.
        batch_size: Images a step.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        clip: Largest gradient norm.
        margin: Stop once the accuracy is at most chance + margin, and not below half of chance.
        max_drop: Largest fall of the accuracy in one step; a step that falls further is taken back.
        max_steps: Steps after which the attempt is given up.
        batch_norm: Whether batch statistics or the stored ones normalise during the ascent.
        augmentation: Random changes of the images.
        watch: Called after every accepted step with the network and its clean accuracy; must change nothing.

    Raises:
        MethodFailed: If the model hardly classifies the images at the start, or the stop band is not reached.
        UnsupportedModel: If no parameter learns.
    """
    require_learner(model)
    chance = 1 / model.classes
    low, high = chance / 2, chance + margin
    out = model.copy()
    checked = images.subset(torch.randperm(len(images), generator=run.generator("checked"))[:CHECKED])
    steepest = max(max_drop, 1.01 / len(checked))  # of a handful of images one must be allowed to fall
    optimizer = torch.optim.SGD(out.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    before = now = accuracy(out, checked, run)
    if before <= high:
        raise MethodFailed(
            "the model hardly classifies the clean images, so there is nothing to unlearn",
            expected=f"clean accuracy above {high:.3f}",
            got=f"{before:.3f}",
            remedy="Check labels, class order and normalisation",
        )
    trace: list[tuple[int, float, float]] = [(0, now, lr)]
    safe = _snapshot(out)
    restarts = stalled = 0
    stream = _endless(images, batch_size, run, augmentation)
    for step in run.progress(range(1, max_steps + 1), "unlearning"):
        pixels, labels = next(stream)
        with mode(out, training=batch_norm == "batch"), rng.seeded(run.seed, "unlearning dropout", step):
            loss = -F.cross_entropy(logits_of(out, pixels, run), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(out.parameters(), clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            optimizer.step()
            now = accuracy(out, checked, run)
        if not finite or now < low or now < trace[-1][1] - steepest:
            # So fast a fall would remove the backdoor as well. Go back, and take smaller steps.
            restarts += 1
            _restore(out, safe)
            optimizer.state.clear()
            _scale(optimizer, 0.5)
            now = trace[-1][1]
            continue
        safe = _snapshot(out)
        trace.append((step, now, float(optimizer.param_groups[0]["lr"])))
        if watch is not None:
            watch(out, now)
        if now <= high:
            break
        stalled = stalled + 1 if now > before - 0.02 else 0
        if stalled >= STALLED:
            # A saturated network has hardly any gradient; only a larger step moves it.
            _scale(optimizer, 2.0)
            stalled = 0
    out.zero_grad(set_to_none=True)
    if now > high:
        raise MethodFailed(
            "unlearning did not reach its stop band",
            expected=f"clean accuracy in [{low:.3f}, {high:.3f}]",
            got=f"{now:.3f} after {max_steps} steps and {restarts} restarts",
            remedy="Raise max_steps or the learning rate",
        )
    return Unlearned(out.eval(), now, tuple(trace), restarts)


def _endless(
    images: Images, batch_size: int, run: Run, augmentation: Augmentation
) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        draws = run.generator("unlearning epoch", epoch)
        for pixels, labels in batches(
            images, batch_size, generator=draws, device=run.device, augmentation=augmentation, min_batch=2
        ):
            assert labels is not None  # the caller has checked them
            yield pixels, labels


def _snapshot(model: Classifier) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _restore(model: Classifier, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def _scale(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= factor
