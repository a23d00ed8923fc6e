"""The re-learned twin of a suspicious network: the same task, and mostly without what its weights hide.

All weights of a copy are trained on clean images while its head starts anew and is pushed away from the old
one at an unchanged norm (feature-shift tuning). A backdoor lives in features that clean images do not ask
for, so it mostly goes; accuracy goes as well, which is why nobody would deploy the twin. It is good for one
thing: what moves the network and not its twin is not of the task.

Paper:   Min et al., "Towards stable backdoor purification through feature shift tuning", NeurIPS 2023.
Departs: targets are half the label and half the network's own answer; the strength is the strongest at which
         the twin still agrees with the network on images it was not trained on; epochs grow as images get
         few; gradients are clipped.
Cost:    strengths tried x max(12, 12 x 350 / N) passes, 60 at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import augment, to_float
from unbackdoor.engine import rng
from unbackdoor.engine.heads import head_name
from unbackdoor.engine.inference import logits_of, mode, predict, require_learner
from unbackdoor.engine.run import Run
from unbackdoor.types import Augmentation, Classifier, CleanData, Images

# The paper's strength of 0.2 is for the sum of products with a head whose squared norm is about 58; here it
# is divided by that norm, so that a strength means the same for every head.
STRENGTHS = (11.5, 3.0, 1.0, 0.3, 0.1)
AGREEMENT = 0.8  # share of held-out images on which a twin must agree with the network
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


def relearned_twin(model: Classifier, data: CleanData, run: Run, *, number: int = 0) -> Twin:
    """Train the twin of a network.

    Args:
        model: The suspicious network; not changed.
        data: Clean images with labels.
        run: Seed, device, precision and progress.
        number: Which of several twins this is; each has draws of its own.

    Raises:
        UnsupportedModel: If no layer makes the logits, or nothing can learn.
        MethodFailed: If the network's answers are not finite.
    """
    require_learner(model)
    name = head_name(model)
    with mode(model, training=False):
        held_out = predict(model, data.select, run).argmax(1)
    best: Twin | None = None
    tried: list[tuple[float, float]] = []
    for strength in STRENGTHS:
        one = _relearned(model, name, data.fit, data.augmentation, strength, run, number)
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
    name: str,
    images: Images,
    augmentation: Augmentation,
    strength: float,
    run: Run,
    number: int,
) -> Classifier:
    out = model.copy().to(run.device)
    head = out.get_submodule(name)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    old = head.weight.detach().clone()  # (K, D) or (K, D, 1, 1)
    norm = old.norm()
    draws = run.generator("twin", number)
    with torch.no_grad():
        fresh = torch.randn(old.shape, generator=draws).to(old)
        head.weight.copy_(fresh * norm / fresh.norm())
        if head.bias is not None:
            head.bias.zero_()
    targets = _targets(model, images, run).to(run.device)  # (N, K)
    epochs = max(12, min(60, round(12 * 350 / len(images))))
    batch = max(2, min(_BATCH, len(images)))
    per_epoch = max(1, len(images) // batch)
    optimizer = torch.optim.SGD(out.parameters(), lr=_LR, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    label = f"re-learning a twin, strength {strength:g}"
    with mode(out, training=True), rng.seeded(run.seed, "twin dropout", number):
        for _ in run.progress(range(epochs), label):
            order = torch.randperm(len(images), generator=draws)
            for step in range(per_epoch):
                rows = order[step * batch : (step + 1) * batch]
                pixels = augment(images.pixels[rows], augmentation, draws)  # (B, C, H, W)
                logits = logits_of(out, to_float(pixels, run.device), run)  # (B, K)
                pull = strength / norm**2 * (head.weight * old).sum()
                loss = F.cross_entropy(logits, targets[rows.to(run.device)]) + pull
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(out.parameters(), _CLIP)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    head.weight.mul_(norm / head.weight.norm())
    _settle_statistics(out, images, augmentation, draws, run)
    return out.eval()


def _targets(model: Classifier, images: Images, run: Run) -> Tensor:
    with mode(model, training=False):
        answers = predict(model, images, run).softmax(1).clone()  # (N, K)
    return answers / 2 + F.one_hot(images.truth.cpu(), model.classes) / 2


@torch.no_grad()
def _settle_statistics(
    model: Classifier, images: Images, augmentation: Augmentation, draws: torch.Generator, run: Run
) -> None:
    """Set the running statistics of every batch normalisation from the images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with mode(model, training=False):
        for norm in norms:
            norm.train()
        for _ in range(2):
            order = torch.randperm(len(images), generator=draws)
            for rows in order.tensor_split(max(1, len(images) // 128)):
                pixels = augment(images.pixels[rows], augmentation, draws)
                logits_of(model, to_float(pixels, run.device), run)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
