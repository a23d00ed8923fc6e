"""Fine-tune all weights, at a learning rate that does not destroy the network.

The published rates are for networks that SGD trained. One that AdamW trained, as transformers are, often lies
in a minimum too sharp for them: the loss rises from the first steps on, and the network falls to chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Objective, Recipe, train
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Augmentation, Classifier, Images

LOWER = 0.1  # factor from one learning rate to the next
TRIES = 4
TOLERANCE = 0.1  # largest fall of the accuracy on the very images that are trained on, in 0..1


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model and the learning rate that was used.

    Attributes:
        model: A copy; the model that was passed in is unchanged.
        lr: Peak learning rate that was used.
        losses: Mean training loss of each epoch.
    """

    model: Classifier
    lr: float
    losses: tuple[float, ...]


def fine_tune(
    model: Classifier,
    images: Images,
    recipe: Recipe,
    run: Run,
    *,
    augmentation: Augmentation = "none",
    objective: Callable[[Classifier], Objective] | None = None,
) -> FineTuned:
    """Train all weights of a copy, and start again at a tenth of the learning rate where that destroyed it.

    Destroyed means that the loss is no longer finite, or that the accuracy on the very images that were
    trained on has fallen by more than ``TOLERANCE``. No other images are used. Where the
    recipe's own rate works, the weights are those of :func:`unbackdoor.engine.training.train`.

    Args:
        model: On the run's device.
        images: Labelled.
        recipe: Its ``lr`` is tried first.
        run: Seed, device, precision and progress.
        augmentation: What ``auto`` in the recipe stands for.
        objective: Makes what is minimised of the copy that is trained; None: the recipe's cross-entropy.

    Raises:
        MethodFailed: If every learning rate destroys the network.
    """
    before = accuracy(model, images, run)
    tried = []
    for attempt in range(TRIES):
        rate = recipe.lr * LOWER**attempt
        out = model.copy()
        try:
            trained = train(
                out,
                images,
                recipe.model_copy(update={"lr": rate}),
                run,
                augmentation=augmentation,
                label="fine-tuning" if attempt == 0 else f"fine-tuning at {rate:g}",
                objective=None if objective is None else objective(out),
            )
        except MethodFailed as error:  # it diverged
            tried.append(f"{rate:g}: {error.problem}")
            continue
        after = accuracy(out, images, run)
        if after >= before - TOLERANCE - 1e-6:  # the last term is for rounding
            return FineTuned(out, rate, trained.losses)
        tried.append(f"{rate:g}: accuracy {after:.3f}")
    raise MethodFailed(
        "fine-tuning destroys the network at every learning rate",
        expected=f"at least {before - TOLERANCE:.3f} of the images trained on classified rightly",
        got="; ".join(tried),
        remedy="Set a lower learning rate, or more epochs",
    )
