"""Search for changes that move a network and do not move its twin.

What moves both is a natural weakness of the task; what moves the network alone is what its weights hide.
Many changes of several forms (engine/universal_changes.py) are made better side by side in one batch, by
descending on the difference, and the poorer ones leave early. Solid and checkered squares are tried by
forward passes alone, at all places: gradients find textures and leave a plain square open.

The gap of a change is the share of images that it moves in the network less the share that it moves in the
twin: towards its class, or away from the predicted class where it has none.

Cost:    gradient searches: entries x steps x images x 2 networks x (forward + backward), where entries fall
         from all to a few; stamps: forward passes of the network, of the twin for the last few only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.engine.universal_changes import FORMS, Form, GivenChange, UniversalChange, window_side
from unbackdoor.types import Classifier, Images

_LR = 0.2  # of Adam
_IMAGES = 6  # of a step
_SHRINK = 0.75  # share of the steps over which a size falls to its last value
STEPS = 32
MEASURED = 120  # images that a gap is measured on, at most


@dataclass(frozen=True, eq=False)
class Difference:
    """A change and how far it moves the two networks.

    Attributes:
        change: The change.
        moved: Share of images that it moves in the network, in [0, 1].
        moved_twin: The same in the twin.
        towards: (K,) share, of the images that are not of a class to the network, that it then gives to it.
        twin_towards: (K,) the same in the twin.
    """

    change: UniversalChange | GivenChange
    moved: float
    moved_twin: float
    towards: Tensor
    twin_towards: Tensor

    @property
    def gap(self) -> float:
        """By how much more the network is moved, in [-1, 1]."""
        return self.moved - self.moved_twin


@dataclass(frozen=True)
class Stage:
    """So many steps, after which so many entries of a form stay.

    Attributes:
        steps: Steps of Adam.
        keep: Entries of a group that stay after them.
        twin: Whether the twin takes part yet; without it a step costs half.
        images: Images of a step, drawn anew for each.
    """

    steps: int
    keep: int
    twin: bool = True
    images: int = _IMAGES


class Opponents:
    """A network and its twin with the images they are compared on.

    Args:
        model: The suspicious network, on the run's device.
        twin: Its twin; the network itself where only what moves it is of interest.
        images: Clean images; labels are not read.
        run: Seed, device, precision and progress.
    """

    def __init__(self, model: Classifier, twin: Classifier, images: Images, run: Run) -> None:
        # Copies, because convolutions are up to twice as fast with channels innermost.
        self.model = _fast(model, run)
        self.twin = self.model if twin is model else _fast(twin, run)
        self.images, self.run = images, run
        with mode(self.model, training=False), mode(self.twin, training=False):
            self.answers = predict(self.model, images, run).argmax(1)  # (N,)
            self.twin_answers = (
                self.answers if self.twin is self.model else predict(self.twin, images, run).argmax(1)
            )

    def with_model(self, model: Classifier) -> Opponents:
        """Return the same twin and images against another state of the network."""
        return Opponents(model, self.twin, self.images, self.run)

    # -----------------------------------------------------------------------------------------------
    # Gradient searches

    def search(
        self,
        form: Form,
        labels: Sequence[int],
        *,
        starts: int = 1,
        stages: Sequence[Stage] = (Stage(12, 4), Stage(20, 4)),
        seed: str | int = 0,
        places: Sequence[tuple[int, int]] = (),
        single: bool = False,
    ) -> list[UniversalChange]:
        """Return the best changes of a form.

        Args:
            form: See engine/universal_changes.py.
            labels: Class of each group of entries; -1 for any change of the answer.
            starts: Entries a group; for windows each start has a place of its own.
            stages: See :class:`Stage`. The entries compete over all groups, or within their group.
            seed: Names the draws.
            places: Upper left corners, for windows.
            single: Whether entries compete within their group only.
        """
        shape = self.model.input_shape
        draws = self.run.generator("difference", form, seed)
        count = len(places) or starts
        goals = torch.tensor([k for k in labels for _ in range(count)])  # (G,)
        corners = torch.tensor(list(places) * len(labels) if places else [(0, 0)] * len(goals))
        raw = torch.stack([FORMS[form].start(shape, draws) for _ in goals]).to(self.run.device)
        optimizer = RowAdam(raw, _LR)
        first, last = FORMS[form].sizes(shape)
        total = sum(stage.steps for stage in stages)
        active = torch.arange(len(goals))
        done, size = 0, first
        with (
            frozen(self.model),
            frozen(self.twin),
            mode(self.model, training=False),
            mode(self.twin, training=False),
        ):
            for stage in stages:
                scores = torch.zeros(len(active))
                for step in self.run.progress(range(stage.steps), f"searching for a {form}"):
                    share = min(1.0, (done + step) / max(1.0, _SHRINK * total))
                    size = first * (last / first) ** share if first else 0.0
                    rows = torch.randint(len(self.images), (stage.images,), generator=draws)
                    gradient, loss = self._gradient(form, raw, active, goals, corners, rows, size, stage.twin)
                    optimizer.step(active, gradient)
                    scores = loss if step == 0 else 0.5 * scores + 0.5 * loss
                done += stage.steps
                active = self._kept(active, goals, scores, stage.keep, single)
        return [
            UniversalChange(
                form, int(goals[i]), raw[i].detach().cpu().clone(), size, tuple(corners[i].tolist())
            )
            for i in active.tolist()
        ]

    def _kept(self, active: Tensor, goals: Tensor, scores: Tensor, keep: int, single: bool) -> Tensor:
        order = scores.argsort()
        if not single:
            return active[order[:keep]].sort().values
        seen: dict[int, int] = {}
        out = []
        for i in active[order].tolist():
            label = int(goals[i])
            seen[label] = seen.get(label, 0) + 1
            if seen[label] <= keep:
                out.append(i)
        return torch.tensor(sorted(out))

    def _gradient(
        self,
        form: Form,
        raw: Tensor,
        active: Tensor,
        goals: Tensor,
        corners: Tensor,
        rows: Tensor,
        size: float,
        with_twin: bool,
    ) -> tuple[Tensor, Tensor]:
        pixels = to_float(self.images.pixels[rows], self.run.device, channels_last=False)[None]
        gradients, losses = [], []
        for part in active.split(max(1, images_per_pass(self.model.input_shape) // len(rows))):
            own = raw[part].requires_grad_()
            x = FORMS[form].apply(pixels, own, size, corners[part].to(raw.device))
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (G * B, C, H, W)
            loss = self._loss(self.model, x, self.answers[rows], goals[part], sign=1)
            if with_twin:
                loss = loss + self._loss(self.twin, x, self.twin_answers[rows], goals[part], sign=-1)
            (gradient,) = torch.autograd.grad(loss.sum(), own)
            gradients.append(gradient)
            losses.append(loss.detach().cpu())
        return torch.cat(gradients), torch.cat(losses)

    def _loss(self, network: Classifier, x: Tensor, answers: Tensor, goals: Tensor, sign: int) -> Tensor:
        """Return (G,) how far the network is from being moved (sign 1), or from being not moved (-1)."""
        logits = logits_of(network, x, self.run).unflatten(0, (len(goals), -1))  # (G, B, K)
        log_p = logits.log_softmax(2)
        classes = torch.where(goals[:, None] < 0, answers[None], goals[:, None]).to(log_p.device)  # (G, B)
        at = log_p.gather(2, classes[..., None])[..., 0]  # (G, B) log-probability of the class
        # To be moved is to have the class, or to have left it; -log(1 - p) is bounded away from infinity.
        wants = (goals[:, None] >= 0).to(log_p.device) == (sign > 0)
        has, has_not = -at, -torch.log((1 - at.exp()).clamp_min(1e-4))
        return torch.where(wants, has, has_not).mean(1)

    # -----------------------------------------------------------------------------------------------
    # Stamps

    def stamps(
        self, *, sides: Sequence[int] = (), checkers: bool = True, keep: int = 12, seed: str | int = 0
    ) -> list[UniversalChange]:
        """Return the best solid and checkered squares, found without a gradient.

        Args:
            sides: Sides in pixels; by default 3 and 4 of 32.
            checkers: Whether checkered squares are tried too.
            keep: Stamps that are returned.
            seed: Names the draws.
        """
        shape = self.model.input_shape
        scale = min(shape[1:]) / 32
        sides = sides or sorted({max(2, round(s * scale)) for s in (3, 4)})
        draws = self.run.generator("stamps", seed)
        order = torch.randperm(len(self.images), generator=draws)
        order = order.repeat(-(-10 // len(order)))  # few images come twice
        found: list[tuple[float, UniversalChange]] = []
        for side in sides:
            stride = max(1, side - 1)
            patterns = _stamp_patterns(shape[0], side, checkers)  # (P, C, S, S)
            tops = list(dict.fromkeys([*range(0, shape[1] - side + 1, stride), shape[1] - side]))
            lefts = list(dict.fromkeys([*range(0, shape[2] - side + 1, stride), shape[2] - side]))
            every = [(p, y, x) for p in range(len(patterns)) for y in tops for x in lefts]
            scores = self._stamp_scores(patterns, every, order[:2], f"stamps of {side} pixels")
            best = [every[i] for i in scores.argsort(descending=True)[: 6 * keep].tolist()]
            near = {
                (p, y + dy, x + dx)
                for p, y, x in best[:keep]
                for dy in range(-stride + 1, stride)
                for dx in range(-stride + 1, stride)
                if 0 <= y + dy <= shape[1] - side and 0 <= x + dx <= shape[2] - side
            }
            best = sorted(near | set(best))
            scores = self._stamp_scores(patterns, best, order[2:10], f"best stamps of {side} pixels")
            for i in scores.argsort(descending=True)[: 2 * keep].tolist():
                p, y, x = best[i]
                raw = torch.logit(patterns[p].clamp(1e-4, 1 - 1e-4))
                found.append((float(scores[i]), UniversalChange("window", -1, raw, 0.0, (y, x))))
        found.sort(key=lambda pair: -pair[0])
        return [change for _, change in found[:keep]]

    @torch.inference_mode()
    def _stamp_scores(
        self, patterns: Tensor, stamps: Sequence[tuple[int, int, int]], rows: Tensor, label: str
    ) -> Tensor:
        """Return how far each stamp moves the images: largest mean rise of the probability of a class."""
        side = patterns.shape[-1]
        pixels = to_float(self.images.pixels[rows], self.run.device, channels_last=False)
        patterns = patterns.to(self.run.device)
        out = []
        chunk = max(1, images_per_pass(self.model.input_shape) // len(rows))
        with mode(self.model, training=False):
            clean = logits_of(self.model, pixels, self.run).softmax(1)  # (B, K)
            for start in self.run.progress(range(0, len(stamps), chunk), label):
                part = stamps[start : start + chunk]
                x = pixels[None].repeat(len(part), 1, 1, 1, 1)  # (G, B, C, H, W)
                for i, (p, top, left) in enumerate(part):
                    x[i, :, :, top : top + side, left : left + side] = patterns[p]
                x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                after = logits_of(self.model, x, self.run).softmax(1).unflatten(0, (len(part), -1))
                out.append((after - clean).mean(1).amax(1).cpu())
        return torch.cat(out)

    # -----------------------------------------------------------------------------------------------
    # Measuring

    @torch.inference_mode()
    def measure(
        self, changes: Sequence[UniversalChange | GivenChange], *, count: int = MEASURED, seed: str | int = 0
    ) -> list[Difference]:
        """Return what each change does to both networks, largest gap first."""
        order = torch.randperm(len(self.images), generator=self.run.generator("measure", seed))[:count]
        pixels = to_float(self.images.pixels[order], self.run.device)
        answers, twin_answers = self.answers[order], self.twin_answers[order]
        classes = self.model.classes
        out = []
        with mode(self.model, training=False), mode(self.twin, training=False):
            for change in changes:
                x = change.apply(pixels).contiguous(memory_format=torch.channels_last)
                after = logits_of(self.model, x, self.run).argmax(1).cpu()
                twin_after = (
                    after if self.twin is self.model else logits_of(self.twin, x, self.run).argmax(1).cpu()
                )
                towards = _towards(after, answers, classes)
                twin_towards = _towards(twin_after, twin_answers, classes)
                if change.label >= 0:
                    moved, twin_moved = float(towards[change.label]), float(twin_towards[change.label])
                else:
                    moved = float((after != answers).float().mean())
                    twin_moved = float((twin_after != twin_answers).float().mean())
                out.append(Difference(change, moved, twin_moved, towards, twin_towards))
        return sorted(out, key=lambda one: -one.gap)

    def with_classes(self, differences: Sequence[Difference]) -> list[Difference]:
        """Return the differences, and those without a class once more under the class that they lead to.

        A change that was made to leave the predicted class, and brings half of what it moves into one class,
        is one towards that class.
        """
        named = []
        for one in differences:
            share, label = one.towards.max(0)
            if one.change.label < 0 and one.moved and float(share) > 0.5 * one.moved:
                assert isinstance(one.change, UniversalChange)
                change, twin_moved = replace(one.change, label=int(label)), float(one.twin_towards[label])
                named.append(replace(one, change=change, moved=float(share), moved_twin=twin_moved))
        return sorted([*differences, *named], key=lambda one: -one.gap)


def _fast(model: Classifier, run: Run) -> Classifier:
    return model.copy().to(run.device).to(memory_format=torch.channels_last)


def _towards(after: Tensor, before: Tensor, classes: int) -> Tensor:
    """Return for each class the share of images (K,) given to it, of those that were not of it before."""
    moved = torch.bincount(after[after != before], minlength=classes)
    movable = len(before) - torch.bincount(before, minlength=classes)
    return moved / movable.clamp_min(1)


def window_places(shape: tuple[int, int, int], stride: int, offset: int = 0) -> list[tuple[int, int]]:
    """Return upper left corners of windows on a grid, the last ones at the border."""
    side = window_side(shape)

    def along(length: int) -> list[int]:
        return list(dict.fromkeys([*range(offset, length - side + 1, stride), length - side]))

    return [(y, x) for y in along(shape[1]) for x in along(shape[2])]


def _stamp_patterns(channels: int, side: int, checkers: bool) -> Tensor:
    """Return solid squares of the colour cube's corners, and black-and-white checkers (P, C, S, S)."""
    if channels == 3:
        corners = torch.tensor([[(i >> c) & 1 for c in range(3)] for i in range(8)], dtype=torch.float32)
    else:
        corners = torch.tensor([[0.0] * channels, [1.0] * channels])
    solid = corners[:, :, None, None].expand(-1, -1, side, side)
    if not checkers:
        return solid.contiguous()
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    both = torch.stack([board, 1 - board]).float()[:, None].expand(-1, channels, -1, -1)
    return torch.cat([solid, both])
