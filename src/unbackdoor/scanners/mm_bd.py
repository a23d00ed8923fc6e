"""Maximum margin without images: how far any input at all can drive the logit of each class above the others.

Training with a backdoor teaches the network that one small thing alone decides for the target class. The
logit of that class then can be driven farther above all others than that of any other class, by inputs that
need not look like anything. So no image is needed. The other margins decide whether the largest of the K
is too large: a gamma law is fitted to them, and the whole rule is repeated on numbers drawn from it.

Paper:   Wang, Xiang, Miller & Kesidis, "MM-BD", S&P 2024, arXiv 2205.06900.
Needs:   nothing but the model.
Departs: the paper takes the p-value from the fitted law as if the law were known; here the fit is part of
         what is simulated, because ten classes determine it poorly. Steps are those of Adam, fewer
         starts, and a class ends when its margin has settled.
Cost:    at most steps x classes x starts x (1 forward + 1 backward).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode
from unbackdoor.engine.row_adam import RowAdam
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.exact_tests import largest_of_gamma
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport

_GROUP = 1 << 26  # numbers in the inputs of the classes that are sought together; bounds memory
_CHECK_EVERY = 10  # steps between two checks whether a margin has settled


class MMBDConfig(Config):
    """Options of the search."""

    starts: int = option(
        8, "random inputs for each class", source="the paper has 30; this one is cheaper", ge=1
    )
    steps: int = option(300, "steps at most", source="the paper", ge=1)
    lr: float = option(0.05, "step size of Adam, in units of the pixel range", source="this project", gt=0)
    settled: float = option(
        1e-3,
        "a class ends when its margin grew by less than this share in ten steps",
        source="the paper: 1e-5 a step",
        ge=0,
    )
    level: float = option(0.05, "largest p-value that counts", source="the paper", gt=0, lt=1)


@scanner(
    "mm_bd",
    config=MMBDConfig,
    paper="arXiv:2205.06900",
    needs=set(),
    question="Can one class be made far more certain than the others, by any input at all?",
    cost=30,
    quick={"steps": 20, "starts": 2},
)
def scan(model: Classifier, data: CleanData, cfg: MMBDConfig, *, run: Run) -> ScanReport:
    """Maximise the margin of every class over inputs, and test the largest one."""
    margins, best_input = maximum_margins(model, cfg, run)
    k = int(margins.argmax())
    p_value = None
    if model.classes >= FEWEST:
        p_value = largest_of_gamma(margins.double())
    finding = Finding(
        statistic="largest maximum margin",
        value=float(margins[k]),
        direction="large: some input drives this class farther above the others than any does another",
        threshold=cfg.level,
        threshold_source="p-value of the largest of as many numbers of one gamma law, the fit simulated too"
        if p_value is not None
        else f"none: a law cannot be fitted to fewer than {FEWEST} classes",
        p_value=p_value,
        classes=(k,),
        per_class=tuple(margins.tolist()),
        artefacts={"input": best_input},
    )
    if p_value is None:
        skipped = {"outlier test": f"fewer than {FEWEST} classes; the margins are reported"}
        return ScanReport("undecided", (finding,), skipped=skipped, coverage=("maximum margins",))
    significant = p_value <= cfg.level
    return ScanReport(
        "backdoor found" if significant else "no evidence found",
        (finding,),
        coverage=("maximum margins", "outlier test"),
    )


def maximum_margins(model: Classifier, cfg: MMBDConfig, run: Run) -> tuple[Tensor, Tensor]:
    """Return the largest margin (K,) found for every class, and the input (C, H, W) of the largest of them.

    Raises:
        MethodFailed: If a margin is not finite.
    """
    size = max(1, _GROUP // (cfg.starts * math.prod(model.input_shape)))
    margins: list[Tensor] = []
    best_input, highest = torch.zeros(model.input_shape), -math.inf
    for group in torch.arange(model.classes).split(size):
        best, inputs = _maximum_margins(model, group.tolist(), cfg, run)
        if float(best.max()) > highest:
            highest, best_input = float(best.max()), inputs[best.argmax()]
        margins.append(best)
    return torch.cat(margins), best_input


def _maximum_margins(
    model: Classifier, labels: Sequence[int], cfg: MMBDConfig, run: Run
) -> tuple[Tensor, Tensor]:
    """Return the margins (G,) and inputs (G, C, H, W) of some classes, which are the rows below."""
    shape = (cfg.starts, *model.input_shape)
    draws = [torch.rand(shape, generator=run.generator("maximum margin", k)) for k in labels]
    x = torch.stack(draws).to(run.device)  # (G, S, C, H, W)
    del draws
    optimizer = RowAdam(x, cfg.lr)
    best = torch.full((len(labels),), -torch.inf)
    inputs = x[:, 0].cpu().clone()  # (G, C, H, W)
    before, active = best.clone(), torch.arange(len(labels))
    targets = torch.tensor(labels)
    with frozen(model), mode(model, training=False):
        for step in run.progress(range(1, cfg.steps + 1), "maximum margins"):
            margins, gradient = _ascend(model, x, active, targets, run)  # (A, S), (A, S, C, H, W)
            if not bool(torch.isfinite(margins).all()):
                raise MethodFailed("the search for a margin met a logit that is not finite")
            top, start = margins.max(1)  # (A,)
            better = top > best[active]
            rows = active[better]
            best[rows] = top[better]
            inputs[rows] = x[rows.to(x.device), start[better].to(x.device)].cpu()
            optimizer.step(active, -gradient)
            x.clamp_(0, 1)
            if step % _CHECK_EVERY == 0:
                grown = best - before
                done = grown[active] <= cfg.settled * best[active].abs()
                before = best.clone()
                active = active[~done]
                if not len(active):
                    break
    return best, inputs


def _ascend(model: Classifier, x: Tensor, active: Tensor, labels: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Return the margins of the inputs of the active rows towards their classes, and their gradients."""
    margins, gradients = [], []
    starts = x.shape[1]
    for part in active.split(max(1, images_per_pass(model.input_shape) // starts)):
        own = x[part.to(x.device)].requires_grad_()  # (G, S, C, H, W)
        logits = logits_of(model, own.flatten(0, 1), run).unflatten(0, (len(part), starts))  # (G, S, K)
        targets = labels[part].to(logits.device)[:, None, None].expand(-1, starts, 1)  # (G, S, 1)
        rest = logits.scatter(2, targets, -torch.inf).amax(2)  # (G, S)
        margin = logits.gather(2, targets)[:, :, 0] - rest
        (gradient,) = torch.autograd.grad(margin.sum(), own)
        margins.append(margin.detach().cpu())
        gradients.append(gradient)
    return torch.cat(margins), torch.cat(gradients)
