"""Repair a class that the network no longer gives to any clean image.

An attacker who poisons a whole class without changing a label makes the network read the trigger, and not
the class: clean images of it are given to other classes. No change of the input shows that; the share of the
class's own images that it recognises does. The twin, which learned the class anew, is trained on towards the
network's own answers, and to the labels where the network is wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.descent import Batch, descend
from unbackdoor.engine.inference import logits_of, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.types import Classifier, CleanData, Images

_HALF = 0.5  # share of the median recall below which a class counts as lost
_FEWEST = 5  # images of a class below which its recall says nothing
_OWN, _OWN_WRONG = 0.3, 0.09  # weight of the network's answer, and of a wrong one


def recalls(model: Classifier, images: Images, run: Run) -> Tensor:
    """Return the share of each class's images that the network recognises, (K,); NaN without images."""
    with mode(model, training=False):
        right = predict(model, images, run).argmax(1) == images.truth
    count = torch.bincount(images.truth, minlength=model.classes).double()
    return torch.bincount(images.truth[right], minlength=model.classes).double() / count.where(
        count > 0, torch.nan
    )


def lost_classes(model: Classifier, images: Images, run: Run) -> list[int]:
    """Return the classes that the network recognises less than half as well as the class in the middle."""
    shares = recalls(model, images, run)
    count = torch.bincount(images.truth, minlength=model.classes)
    low = (shares < _HALF * float(shares.nanmedian())) & (count >= _FEWEST)
    return [int(k) for k in low.nonzero().flatten()]


def relearned(model: Classifier, twin: Classifier, data: CleanData, run: Run) -> Classifier:
    """Return the twin, trained on towards the network's answers and the labels.

    Args:
        model: The network as it was received.
        twin: Its twin.
        data: Clean images with labels.
        run: Seed, device, precision and progress.
    """
    with mode(model, training=False):
        answers = predict(model, data.fit, run).softmax(1).clone()  # (N, K)
    truth = F.one_hot(data.fit.truth.cpu(), model.classes).float()
    right = answers.argmax(1) == data.fit.truth.cpu()
    own = torch.where(right, _OWN, _OWN_WRONG)[:, None]
    targets = (own * answers + (1 - own) * truth).to(run.device)
    out = twin.copy().to(run.device)

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(logits_of(out, batch.pixels, run), targets[batch.rows])

    recipe = Recipe(epochs=12, batch_size=64, lr=3e-4, optimizer="adamw", weight_decay=0.0, schedule="cosine")
    descend(
        out, data.fit, recipe, loss, run, augmentation=data.augmentation, label="relearning a class", clip=1.0
    )
    return out
