"""Stamp library: does a small, common patch at some place turn images into one class?

Attackers often stamp a small patch, and a network with a backdoor answers to patches that are like it. So a
few patches (white, black, two checkers, two of noise) are laid on a few images at all positions, and the
model only answers. For each class, the patch that serves it best counts, measured again on more images: the
logarithm of the mean loss towards the class, a little lifted so that hopelessly small losses do not decide.

Paper:   this project; black-box searches over patches as in Popovic et al., "DeBackdoor", arXiv 2503.21305.
Needs:   clean images; labels are not looked at.
Departs: DeBackdoor anneals one trigger a class; here all patches are tried, and shared by all classes.
Cost:    forward only: patches x positions x `images` images, then `finalists` patches a class on more.
Blind:   faint and large patterns, warps, triggers that differ from image to image; all-to-all attacks. The
         patches are those that many attacks use: what it finds of these says little about others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import images_per_pass, logits_of, mode, predict, require_several_classes
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.class_residuals import family_p_value, residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.engine.trigger_search import success
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.registry import Config, option, scanner
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, Images, ScanReport, Verdict, require_fit

_LIFT = 0.02  # of the losses: a hundredth of it more or less is the same answer
_POSITIONS = 16  # of a patch in one direction at first; in between, only about the best of each class
_NEIGHBOURS = 4  # stamps of each class that are moved about
_SHARED = 400  # stamps of all classes together that go on; half as many are moved about


class StampLibraryConfig(Config):
    """Options of the scan."""

    side: int = option(
        0,
        "pixels of a patch's side; 0: a tenth of the image's shorter side, at least 2",
        source="this project: on digits the next size up sent clean networks astray",
        ge=0,
    )
    images: int = option(3, "images that all stamps are tried on", source="this project", ge=1)
    finalists: int = option(
        8, "stamps of each class that go on; of many classes fewer", source="this project", ge=1
    )
    final_images: int = option(32, "images that these are measured on", source="this project", ge=1)
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


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


@scanner(
    "stamp_library",
    config=StampLibraryConfig,
    paper="this project",
    needs={"images"},
    question="Does a small common patch, at some place, turn images into one class?",
    cost=28,
    quick={"images": 1, "finalists": 2, "final_images": 8},
)
def scan(model: Classifier, data: CleanData, cfg: StampLibraryConfig, *, run: Run) -> ScanReport:
    """Try all stamps, and test whether one class is served much better by its best stamp than the others."""
    require_fit(model, data.fit)
    side = cfg.side or max(2, round(min(model.input_shape[1:]) / 10))
    if side >= min(model.input_shape[1:]):
        raise InputError("the patch does not fit", expected=f"below {min(model.input_shape[1:])}", got=side)
    with mode(model, training=False):
        answers = require_several_classes(predict(model, data.fit, run))
        if not bool(torch.isfinite(answers).all()):
            raise MethodFailed("the model gives clean images logits that are not finite")
        predicted = answers.argmax(1)
        order = torch.randperm(len(data.fit), generator=run.generator("images of the stamps"))
        stamps = library(model.input_shape, side, run)
        first = _in_turns(order, predicted, cfg.images)
        trial = data.fit.subset(first), predicted[first]
        losses = _losses(model, stamps, *trial, run)  # (L, K)
        moved = min(_NEIGHBOURS, _SHARED // 2 // model.classes)
        near = _near(_best(losses, moved), stamps, model.input_shape) if moved else []
        if near:
            stamps, losses = stamps + near, torch.cat([losses, _losses(model, near, *trial, run)])
        chosen = _best(losses, max(1, min(cfg.finalists, _SHARED // model.classes)))  # (K, F)
        rows, places = chosen.unique(return_inverse=True)  # (U,), (K, F)
        finalists = [stamps[i] for i in rows.tolist()]
        rest = [i for i in order.tolist() if i not in set(first.tolist())] or order.tolist()
        second = _in_turns(torch.tensor(rest), predicted, cfg.final_images)
        losses = _losses(model, finalists, data.fit.subset(second), predicted[second], run)  # (U, K)
    own = losses.T.gather(1, places)  # (K, F): of a class, the finalists that were chosen for it
    values = (own.amin(1) + _LIFT).log()
    p_values = residual_p_values(values)
    k = int(values.argmin())
    trigger = finalists[int(places[k, int(own[k].argmin())])].trigger(k, model.input_shape)
    finding = Finding(
        statistic="loss under the best stamp",
        value=float(values[k]),
        direction="small: a small patch sends images to this class far better than any does to the others",
        threshold=cfg.level,
        threshold_source="p-value of the residual among the other classes, Student's t, times their number"
        if p_values is not None
        else f"none: a test needs {FEWEST} classes",
        p_value=None if p_values is None else family_p_value(p_values),
        classes=(k,),
        per_class=tuple(values.tolist()),
        trigger=_with_success(model, trigger, data.select, run),
        class_p_values=() if p_values is None else tuple(p_values.tolist()),
    )
    if finding.p_value is None:
        skipped = {"outlier test": f"fewer than {FEWEST} classes; the losses are reported"}
        return ScanReport("undecided", (finding,), skipped=skipped, coverage=("stamps",))
    verdict: Verdict = "backdoor found" if finding.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("stamps", "outlier test"))


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


def _with_success(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> RecoveredTrigger:
    """Return the trigger with its success on images that it was not chosen with."""
    return replace(trigger, success=success(model, trigger, images, run).value)
