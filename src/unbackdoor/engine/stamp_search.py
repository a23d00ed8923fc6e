"""The small patch that serves each class best, found by forward passes alone.

A few patches (white, black, two checkers, two of noise) are laid on a few images at all positions. For each
class, the patches that serve it best go on, and are measured again on more images.

Paper:   this project; black-box searches over patches as in Popovic et al., "DeBackdoor", arXiv 2503.21305.
Departs: DeBackdoor anneals one trigger a class; here all patches are tried, and shared by all classes.
Cost:    forward only: patches x positions x first images, then finalists of each class on more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import images_per_pass, logits_of, mode, predict, require_several_classes
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, Images

_POSITIONS = 16  # of a patch in one direction at first; in between, only about the best of each class
_NEIGHBOURS = 4  # stamps of each class that are moved about
_SHARED = 400  # stamps of all classes together that go on; half as many are moved about


@dataclass(frozen=True)
class Stamp:
    """A patch at a place.

    Attributes:
        patch: (C, S, S) in [0, 1].
        top: Row of its first pixel.
        left: Column of its first pixel.
    """

    patch: Tensor
    top: int
    left: int

    def on(self, pixels: Tensor) -> Tensor:
        """Return pixels (B, C, H, W) in [0, 1] with the patch on them."""
        out, side = pixels.clone(), self.patch.shape[1]
        out[:, :, self.top : self.top + side, self.left : self.left + side] = self.patch.to(pixels)
        return out

    def trigger(self, label: int, shape: tuple[int, int, int]) -> RecoveredTrigger:
        """Return it as a trigger towards a class, for images (C, H, W)."""
        mask = self.on(torch.zeros(1, *shape).sub(1)).amax(1)[0] >= 0  # (H, W), where the patch is
        return RecoveredTrigger(label, self.on(torch.zeros(1, *shape))[0], mask.float())


@dataclass(frozen=True)
class BestStamps:
    """The stamp that serves each class best.

    Attributes:
        losses: (K,) mean loss towards each class under its best stamp, over images of other classes.
        stamps: K of them.
    """

    losses: Tensor
    stamps: tuple[Stamp, ...]


def best_stamps(
    model: Classifier,
    images: Images,
    run: Run,
    *,
    side: int = 0,
    first: int = 3,
    finalists: int = 8,
    final: int = 32,
) -> BestStamps:
    """Try all stamps.

    Args:
        model: The classifier; not changed.
        images: Clean images; labels are not looked at.
        run: Seed, device, precision and progress.
        side: Pixels of a patch's side; 0: a tenth of the image's shorter side, at least 2.
        first: Images that all stamps are tried on.
        finalists: Stamps of each class that go on; of many classes fewer.
        final: Images that these are measured on.

    Raises:
        InputError: If the patch does not fit.
        MethodFailed: If the model gives all images to one class, or logits that are not finite.
    """
    side = side or max(2, round(min(model.input_shape[1:]) / 10))
    if side >= min(model.input_shape[1:]):
        raise InputError("the patch does not fit", expected=f"below {min(model.input_shape[1:])}", got=side)
    with mode(model, training=False):
        answers = require_several_classes(predict(model, images, run))
        if not bool(torch.isfinite(answers).all()):
            raise MethodFailed("the model gives clean images logits that are not finite")
        predicted = answers.argmax(1)
        order = torch.randperm(len(images), generator=run.generator("images of the stamps"))
        stamps = library(model.input_shape, side, run)
        rows = _in_turns(order, predicted, first)
        trial = images.subset(rows), predicted[rows]
        losses = _losses(model, stamps, *trial, run)  # (L, K)
        moved = min(_NEIGHBOURS, _SHARED // 2 // model.classes)
        near = _near(_best(losses, moved), stamps, model.input_shape) if moved else []
        if near:
            stamps, losses = stamps + near, torch.cat([losses, _losses(model, near, *trial, run)])
        chosen = _best(losses, max(1, min(finalists, _SHARED // model.classes)))  # (K, F)
        unique, places = chosen.unique(return_inverse=True)  # (U,), (K, F)
        going_on = [stamps[i] for i in unique.tolist()]
        rest = [i for i in order.tolist() if i not in set(rows.tolist())] or order.tolist()
        second = _in_turns(torch.tensor(rest), predicted, final)
        losses = _losses(model, going_on, images.subset(second), predicted[second], run)  # (U, K)
    own = losses.T.gather(1, places)  # (K, F): of a class, the finalists that were chosen for it
    best = places.gather(1, own.argmin(1, keepdim=True))[:, 0]
    return BestStamps(own.amin(1), tuple(going_on[i] for i in best.tolist()))


def library(shape: tuple[int, int, int], side: int, run: Run) -> list[Stamp]:
    """Return every patch at the positions of images (C, H, W) that are tried first."""
    channels, height, width = shape
    checker = (torch.arange(side)[:, None] + torch.arange(side)) % 2  # (S, S)
    draws = run.generator("patches")
    patches: list[Tensor] = [
        *(level * torch.ones(channels, side, side) for level in (1.0, 0.0)),
        *(one.float().expand(channels, -1, -1) for one in (checker, 1 - checker)),
        *(torch.randint(2, (channels, side, side), generator=draws).float() for _ in range(2)),
    ]
    tops, lefts = (_positions(length - side + 1) for length in (height, width))
    return [Stamp(patch, top, left) for patch in patches for top in tops for left in lefts]


def _positions(count: int) -> list[int]:
    """Return all of so many positions, or as many as are tried, evenly, both ends among them."""
    if count <= _POSITIONS:
        return list(range(count))
    spread: list[int] = torch.linspace(0, count - 1, _POSITIONS).round().int().tolist()
    return spread


def _best(losses: Tensor, count: int) -> Tensor:
    """Return the stamps (K, F) with the smallest losses (L, K) towards each class."""
    return losses.topk(min(count, len(losses)), dim=0, largest=False).indices.T


def _near(chosen: Tensor, stamps: Sequence[Stamp], shape: tuple[int, int, int]) -> list[Stamp]:
    """Return the chosen stamps moved to positions that were passed over, a pixel away."""
    side, tried = stamps[0].patch.shape[1], {(id(s.patch), s.top, s.left) for s in stamps}
    out = []
    for stamp in (stamps[i] for i in chosen.unique().tolist()):
        for top, left in product(range(stamp.top - 1, stamp.top + 2), range(stamp.left - 1, stamp.left + 2)):
            inside = 0 <= top <= shape[1] - side and 0 <= left <= shape[2] - side
            place = (id(stamp.patch), top, left)
            if inside and place not in tried:
                tried.add(place)
                out.append(Stamp(stamp.patch, top, left))
    return out


def _in_turns(order: Tensor, predicted: Tensor, count: int) -> Tensor:
    """Return so many images, of as many classes of the model as there are."""
    places: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []  # place within the class, place in the order, image
    for i in order.tolist():
        k = int(predicted[i])
        places[k] = places.get(k, -1) + 1
        turns.append((places[k], len(turns), i))
    return torch.tensor([i for _, _, i in sorted(turns)[:count]])


@torch.inference_mode()
def _losses(
    model: Classifier, stamps: Sequence[Stamp], images: Images, predicted: Tensor, run: Run
) -> Tensor:
    """Return the mean loss (L, K) towards every class under every stamp, over the images of other classes."""
    pixels = to_float(images.pixels, run.device, channels_last=False)  # (B, C, H, W)
    own = F.one_hot(predicted, model.classes).bool()  # (B, K)
    outside = (~own).sum(0)  # (K,)
    group = max(1, images_per_pass(model.input_shape) // len(images))
    out = []
    for start in run.progress(range(0, len(stamps), group), "stamps"):
        part = stamps[start : start + group]
        stamped = torch.cat([stamp.on(pixels) for stamp in part])
        losses = -logits_of(model, stamped, run).log_softmax(1).cpu().double()  # (G * B, K)
        losses = losses.unflatten(0, (len(part), -1)).masked_fill(own, 0)  # (G, B, K)
        out.append(losses.sum(1) / outside.clamp_min(1))
    table = torch.cat(out)
    # A class of which all these images are has no loss here, and no stamp.
    return table.where(outside > 0, table.max())
