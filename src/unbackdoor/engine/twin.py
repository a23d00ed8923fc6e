"""The re-learned twin of a suspicious network: the same task, and mostly without what its weights hide.

All weights of a copy are trained on clean images while its head starts anew and is pushed away from the old
one at an unchanged norm (feature-shift tuning). A backdoor lives in features that clean images do not ask
for, so it mostly goes; accuracy goes as well, which is why nobody would deploy the twin. It is good for one
thing: what moves the network and not its twin is not of the task.

Paper:   Min et al., "Towards stable backdoor purification through feature shift tuning", NeurIPS 2023.
Departs: the head starts at the mean features of the classes, where a random one costs a wide head most of
         its accuracy; targets are half the label and half the network's own answer; the strength is the
         strongest at which the twin still agrees with the network on images it was not trained on; epochs
         grow as images get few; gradients are clipped.
Cost:    strengths tried x max(12, 12 x 350 / N) passes, 60 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.feature_shift import HeadRelearning, relearn_head
from unbackdoor.engine.inference import mode, predict, require_learner
from unbackdoor.engine.run import Run
from unbackdoor.types import Classifier, CleanData, Images

# The paper's strength of 0.2 is for the sum of products with a head whose squared norm is about 58; here it
# is divided by that norm, so that a strength means the same for every head.
STRENGTHS = (11.5, 3.0, 1.0, 0.3, 0.1)
AGREEMENT = 0.75  # share of held-out images on which a twin must agree with the network
USABLE = 0.6  # below this a twin says nothing
_BATCH, _LR, _CLIP = 64, 0.01, 5.0


@dataclass(frozen=True)
class Twin:
    """A twin and how far it may be trusted.

    Attributes:
        model: The twin, in evaluation mode.
        strength: How strongly the head was pushed.
        agreement: Share of held-out images on which it gives the network's answer.
        tried: (strength, agreement) of all that were trained.
    """

    model: Classifier
    strength: float
    agreement: float
    tried: tuple[tuple[float, float], ...]

    @property
    def usable(self) -> bool:
        """Whether it still knows the task well enough to be compared with."""
        return self.agreement >= USABLE


def relearned_twin(
    model: Classifier,
    data: CleanData,
    run: Run,
    *,
    number: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Twin:
    """Train the twin of a network.

    Args:
        model: The suspicious network; not changed.
        data: Clean images with labels.
        run: Seed, device, precision and progress.
        number: Which of several twins this is; each has draws of its own.
        strengths: How strongly the head is pushed, in the order they are tried.

    Raises:
        UnsupportedModel: If no layer makes the logits, or nothing can learn.
        MethodFailed: If the network's answers are not finite.
    """
    require_learner(model)
    targets = _targets(model, data.fit, run)
    with mode(model, training=False):
        held_out = predict(model, data.select, run).argmax(1)
    best: Twin | None = None
    tried: list[tuple[float, float]] = []
    for strength in strengths:
        one = _relearned(model, data, targets, strength, run, number)
        with mode(one, training=False):
            same = float((predict(one, data.select, run).argmax(1) == held_out).float().mean())
        tried.append((strength, same))
        if best is None or same > best.agreement:
            best = Twin(one, strength, same, ())
        if same >= AGREEMENT:
            break
    assert best is not None
    return Twin(best.model, best.strength, best.agreement, tuple(tried))


def _relearned(
    model: Classifier,
    data: CleanData,
    targets: Tensor,
    strength: float,
    run: Run,
    number: int,
) -> Classifier:
    count = len(data.fit)
    settings = HeadRelearning(
        epochs=max(12, min(60, round(12 * 350 / count))),
        min_steps=0,
        batch_size=max(2, min(_BATCH, count)),
        lr=_LR,
        weight_decay=5e-4,
        clip=_CLIP,
        strength=strength,
        relative=True,
        initial="prototypes",
        fresh_statistics=True,
    )
    seeded = replace(run, seed=int(torch.randint(1 << 31, (), generator=run.generator("twin", number))))
    return relearn_head(
        model,
        data.fit,
        settings,
        seeded,
        targets=targets,
        augmentation=data.augmentation,
        label=f"re-learning a twin, strength {strength:g}",
    )


def _targets(model: Classifier, images: Images, run: Run) -> Tensor:
    """Return half the network's own answer and half the label, (N, K)."""
    with mode(model, training=False):
        answers = predict(model, images, run).softmax(1).clone()  # (N, K)
    return answers / 2 + F.one_hot(images.truth.cpu(), model.classes) / 2
