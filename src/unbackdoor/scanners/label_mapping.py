"""Label mapping: is there one patch that sends every class to another one, each to its own?

In an all-to-all attack the trigger turns class 3 into 4 and 4 into 5, so that no single class draws all
images, and a search for one target finds nothing. Here a patch and an assignment of sources to targets are
found together: under the patch as it is, the assignment that the model comes nearest to (Hungarian method, no
class is its own target); under that assignment, the next steps of the patch. Any permutation can be found.

Every network has an assignment that is the easiest, and it must be far easier than others to count. So
several patches learn at once, and their assignments have no pair of classes in common: the patch that is
farthest chooses first. If the model knows a mapping, one of them has it and the others cannot. Where the
middle one has come to a stated share of its first loss, the logarithms of the losses are read. The smallest
is tested by Grubbs' test, which pays for its being the smallest.

Paper:   this project. The assignment: Kuhn, "The Hungarian method", 1955; label maps under test: Popovic et
         al., "DeBackdoor", arXiv 2503.21305.
Needs:   clean images; labels are not looked at.
Departs: DeBackdoor is given the maps that it tries; this one finds them.
Cost:    at most steps x patches x (classes x `per_class` images) x (1 forward + 1 backward).
Blind:   mappings that several classes share a target in; faint and large patterns; an attack that turns few
         images; with fewer than seven classes there are too few assignments to compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import (
    frozen,
    images_per_pass,
    logits_of,
    mode,
    predict,
    require_several_classes,
)
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import FEWEST, grubbs
from unbackdoor.engine.trigger_search import bumps
from unbackdoor.engine.universal_changes import mask_of_size, patched
from unbackdoor.errors import MethodFailed, MissingExtra
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, Images, ScanReport, Verdict, require_fit

_HIGHEST = 0.25  # share of the image that a mask covers at last; the smallest is one pixel
_FORBIDDEN = 1e9  # loss of a pair that is taken
_LIFT = 0.02  # of the losses: how much less than nothing is left does not matter
_SMOOTH = 0.4  # weight of the latest images in the table of losses


class LabelMappingConfig(Config):
    """Options of the scan."""

    steps: int = option(
        60, "steps in which the mask grows from its smallest to its largest", source="this project", ge=8
    )
    patches: int = option(
        7, "patches that learn at once, each with an assignment of its own", source="this project", ge=FEWEST
    )
    per_class: int = option(2, "images of each class and step", source="this project", ge=1)
    assigned: int = option(4, "steps between two assignments", source="this project", ge=1)
    anchor: float = option(
        0.35,
        "share of the middle patch's first loss at which the losses are compared",
        source="as neural_cleanse",
        gt=0,
        lt=1,
    )
    lr: float = option(0.3, "step size of Adam", source="as neural_cleanse", gt=0, le=10)
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@dataclass(frozen=True)
class MappingSearch:
    """What the patches came to.

    Attributes:
        losses: (R,) mean loss of each patch under its own assignment, over the classes.
        targets: (R, K) class that each source class is assigned to.
        success: (K,) share of its images that the best patch sends to the target, of each source.
        mask: (H, W) of the best patch.
        pattern: (C, H, W) of the best patch.
        steps: Steps that were taken.
    """

    losses: Tensor
    targets: Tensor
    success: Tensor
    mask: Tensor
    pattern: Tensor
    steps: int


@scanner(
    "label_mapping",
    config=LabelMappingConfig,
    paper="this project",
    needs={"images"},
    question="Is there one small patch that turns every class into another, each into its own?",
    cost=45,
    quick={"steps": 12, "patches": 6},
)
def scan(model: Classifier, data: CleanData, cfg: LabelMappingConfig, *, run: Run) -> ScanReport:
    """Find patches with disjoint assignments, and test whether one is far easier than the others."""
    require_fit(model, data.fit)
    _assign(torch.zeros(2, 2))  # before any work is done
    if model.classes <= FEWEST:
        reason = f"{model.classes} classes have too few assignments without a pair in common to compare"
        return ScanReport("undecided", skipped={"assignments": reason})
    cfg = cfg.model_copy(update={"patches": min(cfg.patches, model.classes - 1)})
    search = search_mapping(model, data.fit, cfg, run)
    values = (search.losses.double() + _LIFT).log()
    best = int(values.argmin())
    statistic, p_value = grubbs(values.tolist(), best)
    targets = search.targets[best].tolist()
    shown = ", ".join(f"{s}->{t}" for s, t in list(enumerate(targets))[:20])
    finding = Finding(
        statistic="loss of the easiest mapping below those of others",
        value=statistic,
        direction="large: one patch turns each class into another, far better than any other assignment: "
        f"{shown}{', ...' if len(targets) > 20 else ''}",
        threshold=cfg.level,
        threshold_source=f"Grubbs' test among {cfg.patches} assignments without a pair in common",
        p_value=p_value,
        classes=tuple(targets),
        per_class=tuple(search.success.tolist()),
        artefacts={"losses": search.losses, "pattern": search.pattern, "mask": search.mask},
        mapping=tuple(enumerate(targets)),
    )
    verdict: Verdict = "backdoor found" if p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("assignments", "outlier test"))


def search_mapping(model: Classifier, images: Images, cfg: LabelMappingConfig, run: Run) -> MappingSearch:
    """Let all patches learn, each under the assignment that is best for it among those that are left.

    Raises:
        MethodFailed: If the model sends all images to one class, or a loss is not finite.
    """
    with mode(model, training=False):
        predicted = require_several_classes(predict(model, images, run)).argmax(1)  # (N,)
    sources = _sources(predicted, model.classes, run)
    pixels = to_float(images.pixels, run.device, channels_last=False)  # (N, C, H, W)
    raw = _starts(model, cfg, run).to(run.device)  # (R, 1 + C, H, W)
    optimizer, everything = RowAdam(raw, cfg.lr), torch.arange(cfg.patches)
    lowest = 1 / math.prod(model.input_shape[1:])
    growth = math.log(_HIGHEST / lowest) / cfg.steps
    unit = math.prod(model.input_shape[1:])
    table = hits = torch.zeros(cfg.patches, model.classes, model.classes)
    targets = torch.zeros(cfg.patches, model.classes, dtype=torch.int64)
    first, step, losses = math.nan, 0, torch.zeros(cfg.patches)
    with frozen(model), mode(model, training=False):
        for step in run.progress(range(cfg.steps + 1), "mappings"):
            size = unit * lowest * math.exp(growth * step)
            rows = torch.cat([_draw(own, step, cfg.per_class) for own in sources])  # (B,)
            truth = predicted[rows]
            chosen = targets if step else None
            gradient, latest, hit = _evaluate(model, pixels[rows], truth, raw, size, chosen, cfg, run)
            share = _SMOOTH if step else 1.0
            table, hits = table.lerp(latest, share), hits.lerp(hit, share)  # (R, K, K), source and target
            if step % cfg.assigned == 0:
                targets = _disjoint(table)
            if step == 0:  # the gradient was of no assignment
                gradient, _, _ = _evaluate(model, pixels[rows], truth, raw, size, targets, cfg, run)
            losses = table.gather(2, targets[:, :, None])[:, :, 0].mean(1)  # (R,)
            if not bool(torch.isfinite(losses).all()):
                raise MethodFailed("the search for a mapping gave a loss that is not finite")
            middle = float(losses.median())
            first = middle if step == 0 else first
            if middle <= cfg.anchor * first:
                break
            optimizer.step(everything, gradient)
    best = int(losses.argmin())
    success = hits[best].gather(1, targets[best][:, None])[:, 0]  # (K,)
    mask = mask_of_size(raw[best : best + 1, 0], size)[0].cpu()
    return MappingSearch(losses, targets, success, mask, raw[best, 1:].sigmoid().cpu(), step)


def _evaluate(
    model: Classifier,
    pixels: Tensor,
    truth: Tensor,
    raw: Tensor,
    size: float,
    targets: Tensor | None,
    cfg: LabelMappingConfig,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient (R, ...) under the assignments (R, K), and tables (R, K, K) of losses and answers.

    A row of a table is a source class, the mean over its images; a column is a target.
    """
    classes = model.classes
    share = torch.zeros(classes, len(truth)).index_put_((truth, torch.arange(len(truth))), torch.ones(()))
    share /= share.sum(1, keepdim=True).clamp_min(1)  # (K, B)
    gradients, tables, hits = [], [], []
    for part in torch.arange(cfg.patches).split(max(1, images_per_pass(model.input_shape) // len(truth))):
        own = raw[part.to(raw.device)].requires_grad_()
        changed = patched(pixels.expand(len(part), *pixels.shape), own, size).flatten(0, 1)
        logits = logits_of(model, changed, run).unflatten(0, (len(part), -1))  # (G, B, K)
        losses = -logits.log_softmax(2)
        if targets is None:
            gradients.append(torch.zeros_like(own))
        else:
            aims = targets[part][:, truth].to(losses.device)[:, :, None]  # (G, B, 1)
            (gradient,) = torch.autograd.grad(losses.gather(2, aims).mean((1, 2)).sum(), own)
            gradients.append(gradient)
        answers = torch.nn.functional.one_hot(logits.argmax(2), classes).float().cpu()
        tables.append(share @ losses.detach().cpu())
        hits.append(share @ answers)
    return torch.cat(gradients), torch.cat(tables), torch.cat(hits)


def _disjoint(table: Tensor) -> Tensor:
    """Return assignments (R, K) without a pair in common for losses (R, K, K); the best goes first."""
    patches, classes, _ = table.shape
    taken = torch.eye(classes, dtype=torch.bool)  # no class is its own target
    out = torch.zeros(patches, classes, dtype=torch.int64)
    left = list(range(patches))
    while left:
        ends = {r: _assign(table[r].masked_fill(taken, _FORBIDDEN)) for r in left}
        best = min(left, key=lambda r: float(table[r].gather(1, ends[r][:, None]).mean()))
        out[best] = ends[best]
        taken[torch.arange(classes), ends[best]] = True
        left.remove(best)
    return out


def _assign(losses: Tensor) -> Tensor:
    """Return the column (K,) of each row in the assignment with the smallest sum."""
    return torch.from_numpy(_optimize().linear_sum_assignment(losses.double().numpy())[1])


def _starts(model: Classifier, cfg: LabelMappingConfig, run: Run) -> Tensor:
    channels, height, width = model.input_shape
    draws = run.generator("mapping starts")
    raw = 0.1 * torch.randn(cfg.patches, 1 + channels, height, width, generator=draws)
    side = math.isqrt(cfg.patches - 1) + 1
    places = torch.randperm(side * side, generator=draws)[: cfg.patches]
    raw[:, 0] += bumps(side * side, height, width)[places]
    return raw


def _sources(predicted: Tensor, classes: int, run: Run) -> list[Tensor]:
    """Return the images of each class of the model, in an order of their own; some may have none."""
    order = torch.randperm(len(predicted), generator=run.generator("mapping images"))
    return [order[predicted[order] == k] for k in range(classes)]


def _draw(own: Tensor, step: int, count: int) -> Tensor:
    count = min(count, len(own))
    return own[(step * count + torch.arange(count)) % max(1, len(own))]


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingExtra("scipy", "scan", "the assignment of sources to targets") from error
    return optimize
