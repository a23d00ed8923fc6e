"""The shortest latent shift that sends every clean image to a class, for each class, exactly.

With features phi, logits z = W phi + b and a class k, it is the solution of the quadratic program

    minimise |s|^2 / 2    subject to    (w_k - w_j) . s  >=  R[k, j] = max over images of z_j - z_k,   j != k.

Only the worst image of each pair of classes binds, so the images enter through the K x K table R alone: no
features are stored, no label is needed, and the bias is in it already. The program is solved as
least-distance programming by one non-negative least-squares call a class, in double precision.

Paper:   the program: Iwahana et al., arXiv 2511.08944. The solver: Lawson & Hanson, "Solving least squares
         problems", 1974, chapter 23.
Departs: the bias is used exactly; s is looked for in the row space of the centred W, where it must lie.
Cost:    N K^2 subtractions for R; K non-negative least-squares problems of (K - 1) x (rank + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.canonical_form import feature_units
from unbackdoor.engine.heads import AffineHead, find_affine_head
from unbackdoor.engine.inference import EVALUATION_BATCH, mode, predict
from unbackdoor.engine.precision import resolve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Objective
from unbackdoor.errors import InputError, MethodFailed, MissingExtra, UnsupportedModel
from unbackdoor.types import Classifier, Images, require_one_a_class

Array = npt.NDArray[np.float64]
_BLOCK = 1 << 18  # numbers; a block of logits of this size stays in the cache while K columns pass over it
# Residual of the least-squares problem; residual^2 = 1 / (1 + |s|^2) in units of the gaps. A class that needs
# a shift of a million such units is reached by the rounding of its fp32 weights only.
_INFEASIBLE = 1e-6
_EXACT = 1e-6  # largest violation that is put down to rounding, in units of the largest gap


@dataclass(frozen=True)
class Solution:
    """The solution of one quadratic program.

    Attributes:
        shift: s (D,); all infinite where no shift can win the class every image.
        norm: Its length, infinity where there is none.
        duals: Multipliers (K,), at least 0, and 0 at the class itself; s is their sum of w_k - w_j.
    """

    shift: Array
    norm: float
    duals: Array


@dataclass(frozen=True)
class Latent:
    """The shortest shifts to all classes of one network.

    Attributes:
        head: Where the shifts are added.
        gaps: R (K, K), float64.
        shifts: (K, D), float64; a row is infinite where the class cannot be reached.
        norms: (K,), float64; where they are standardised, in units of the features' spread.
    """

    head: AffineHead
    gaps: Tensor
    shifts: Tensor
    norms: Tensor

    def moved_logits(self, k: int) -> Tensor:
        """Return what the shift to class k adds to the logits, W s_k (K,), in float32."""
        weight = self.head.weight.detach()
        return weight @ self.shifts[k].to(weight)


def latent_shifts(
    model: Classifier,
    images: Images,
    run: Run,
    *,
    quantile: float = 1.0,
    head: str | None = None,
    standardised: bool = False,
) -> Latent:
    """Return the shortest latent shift to every class.

    Args:
        model: The classifier; not changed.
        images: Clean images, labelled or not, at least as many as there are classes.
        run: Device and progress; the logits are computed in fp32 whatever its precision.
        quantile: Share of the images that a gap covers; below 1, odd images are ignored pair by pair.
        head: Name of the head where it is not to be searched for.
        standardised: Measure lengths in units of the spread of each feature, in which networks that answer
            alike are alike; see :func:`unbackdoor.engine.canonical_form.feature_units`.

    Raises:
        TooFewImages: If there are fewer images than classes.
        InputError: If the logits are not finite.
        MissingExtra: If SciPy is not installed.
        UnsupportedModel: If no layer acts on the logits linearly, or it cannot tell classes apart.
        MethodFailed: If every image is of one class to the model.
    """
    nnls()  # before any work is done
    require_one_a_class(model, images)
    layer = find_affine_head(model, head)
    gaps = logit_gaps(model, images, run, quantile=quantile)
    rows, unit = layer.weight.detach().cpu().double(), None
    if standardised:
        units = feature_units(model, layer, images, run)
        rows, unit = units.rows(layer), units.unit
    solutions = least_shifts(rows.numpy(), gaps.numpy(), run)
    shifts = torch.from_numpy(np.stack([solution.shift for solution in solutions]))  # (K, D)
    if unit is not None:
        shifts = torch.where(torch.isfinite(shifts), shifts * unit, shifts)
    norms = torch.tensor([solution.norm for solution in solutions], dtype=torch.float64)
    return Latent(layer, gaps, shifts, norms)


def still_moved(model: Classifier, latent: Latent, k: int, images: Images, run: Run) -> float:
    """Return the share of the images outside class k that its shift, as it was found, sends there.

    It measures a repair against the shift only: a network can resist the shift and still obey its trigger.
    """
    with mode(model, training=False):
        logits = predict(model, images, run) + latent.moved_logits(k).cpu()  # (N, K)
    outside = images.truth != k
    return float((logits.argmax(1) == k)[outside].float().mean()) if outside.any() else 0.0


def shifted_loss(
    head: AffineHead, shifts: Tensor, target: int | None, run: Run, *, beta: float, balanced: bool
) -> Objective:
    """Return the loss CE(z, y) + beta CE(z + W s, y): right labels in spite of a shift of the features.

    As W (phi + s) + b = z + W s, one forward pass serves both terms, and nothing has to be hooked.

    Args:
        head: Of the network that learns.
        shifts: s of every class (K, D); rows that are not finite are taken as no shift.
        target: Class that is shifted to; None draws another class for every image.
        run: Seed of the draws.
        beta: Weight of the second term.
        balanced: Keep images of the class itself in the second term, unshifted, and divide by 1 + beta, so
            that beta moves the balance and not the size of the steps. Else they are left out of it.
    """
    classes = len(shifts)
    usable = shifts.where(torch.isfinite(shifts), torch.zeros((), dtype=shifts.dtype)).to(head.weight)

    def loss(logits: Tensor, labels: Tensor, step: int) -> Tensor:
        clean = F.cross_entropy(logits, labels)
        if target is None:
            draws = torch.randint(1, classes, (len(labels),), generator=run.generator("targets", step))
            aims = (labels + draws.to(labels.device)) % classes  # (B,), never the label itself
        else:
            aims = torch.full_like(labels, target)  # (B,)
        moving = aims != labels
        shifted = logits + moving[:, None] * (usable[aims] @ head.weight.T)  # (B, K)
        if balanced:
            return (clean + beta * F.cross_entropy(shifted, labels)) / (1 + beta)
        return clean + beta * F.cross_entropy(shifted[moving], labels[moving]) if moving.any() else clean

    return loss


# ---------------------------------------------------------------------------------------------------
# The table of gaps


def logit_gaps(model: Classifier, images: Images, run: Run, *, quantile: float = 1.0) -> Tensor:
    """Return R (K, K) in float64: by how much class j beats class k, at most, over the images.

    Memory is bounded by one batch of logits where the quantile is 1, and by all logits (N, K) below.

    Raises:
        InputError: If a logit is not finite.
    """
    # Gaps are differences of large numbers; with the 8 bits of bf16 they would be noise.
    exact = replace(run, precision=resolve("fp32", run.device))
    table: Tensor | None = None
    parts: list[Tensor] = []
    with mode(model, training=False):
        for start in run.progress(range(0, len(images), EVALUATION_BATCH), "logit gaps"):
            rows = range(start, min(start + EVALUATION_BATCH, len(images)))
            logits = predict(model, images.subset(rows), exact)  # (B, K)
            if not torch.isfinite(logits).all():
                raise InputError("the model returns logits that are not finite", where=images.name)
            if quantile < 1:
                parts.append(logits)
            else:
                block = largest_gaps(logits)
                table = block if table is None else torch.maximum(table, block)
    table = gap_quantiles(torch.cat(parts), quantile) if table is None else table
    return table.double()


def largest_gaps(logits: Tensor) -> Tensor:
    """Return max over the rows of z_j - z_k as (K, K) with [k, j], for logits (B, K)."""
    n, classes = logits.shape
    out = torch.full((classes, classes), -torch.inf, dtype=logits.dtype)  # [j, k]
    step = max(1, _BLOCK // classes)
    for start in range(0, n, step):
        block = logits[start : start + step].T.contiguous()  # (K, B), so that each maximum runs along memory
        for j in range(classes):
            torch.maximum(out[j], (block[j] - block).amax(1), out=out[j])
    return out.T.contiguous()


def gap_quantiles(logits: Tensor, quantile: float) -> Tensor:
    """Return a quantile over the rows of z_j - z_k as (K, K) with [k, j], for logits (N, K)."""
    # The order statistic from below, which needs no interpolation and has the maximum as its limit.
    rank = min(len(logits), max(1, int(np.ceil(quantile * len(logits)))))
    columns = logits.T.contiguous()  # (K, N)
    rows = [(column - columns).kthvalue(rank, dim=1).values for column in columns]
    return torch.stack(rows).T.contiguous()  # [j, k] -> [k, j]


# ---------------------------------------------------------------------------------------------------
# The quadratic programs


def nnls() -> Callable[..., Any]:
    """Return SciPy's non-negative least squares.

    Raises:
        MissingExtra: If SciPy is not installed.
    """
    try:
        from scipy.optimize import nnls as solver
    except ImportError as error:
        raise MissingExtra("scipy", "scan", "the search for the shortest latent shift") from error
    out: Callable[..., Any] = solver
    return out


def least_shifts(weight: Array, gaps: Array, run: Run | None = None) -> list[Solution]:
    """Solve the quadratic program of every class.

    Args:
        weight: W (K, D) of the head.
        gaps: R (K, K) with [k, j] the gap that class k must make up to class j.
        run: Shows progress; None shows none.

    Raises:
        UnsupportedModel: If all rows of W are equal.
        MethodFailed: If a class wins every image as it is, or a program cannot be solved.
    """
    solver = nnls()
    centred = weight - weight.mean(0)  # the same vector added to all rows changes nothing
    u, sizes, basis = np.linalg.svd(centred, full_matrices=False)
    nonzero = sizes > max(weight.shape) * np.finfo(np.float64).eps * max(
        float(np.abs(weight).max()), sizes[0]
    )
    if not nonzero.any():
        raise UnsupportedModel("the head gives every class the same weights")
    reduced = u[:, nonzero] * sizes[nonzero]  # (K, rank)
    classes = range(len(weight))
    steps = classes if run is None else run.progress(classes, "shortest shifts")
    return [_solve(solver, reduced, basis[nonzero], gaps[k], k) for k in steps]


def _solve(solver: Callable[..., Any], reduced: Array, basis: Array, gaps: Array, k: int) -> Solution:
    others = np.arange(len(reduced)) != k
    rows, required = (reduced[k] - reduced)[others], gaps[others]  # (K - 1, rank), (K - 1,)
    size, unit = float(np.linalg.norm(rows, axis=1).max()), float(required.max())
    if unit <= 0:
        raise MethodFailed(
            "the model gives every clean image to one class, so no other class has a boundary to measure",
            got=f"class {k} for all images",
            remedy="Give clean images of several classes, and check normalisation and weights",
        )
    # Least-distance programming: the residual of this problem points along the shortest shift. In units of
    # the largest row and the largest gap, or the residual would hold a number too small to divide by.
    system = np.vstack([rows.T / size, required / unit])  # (rank + 1, K - 1)
    target = np.zeros(len(system))
    target[-1] = 1.0
    try:
        factors, _ = solver(system, target, maxiter=30 * len(required))
    except RuntimeError as error:
        raise MethodFailed("the shortest shift was not found", got=str(error), where=f"class {k}") from error
    residual = system @ factors - target
    duals = np.zeros(len(reduced))
    if np.linalg.norm(residual) < _INFEASIBLE:
        return Solution(np.full(basis.shape[1], np.inf), float("inf"), duals)
    # Divided by the residual's own last entry, not by 1 - its square: only so the multipliers fit the shift.
    duals[others] = factors * (unit / size**2) / -residual[-1]
    short = rows.T @ duals[others]  # (rank,)
    worst = float((required - rows @ short).max()) / unit
    if worst > _EXACT:
        raise MethodFailed(
            "the shortest shift misses its constraints",
            expected=f"a violation below {_EXACT:g}",
            got=f"{worst:.2g}",
            where=f"class {k}",
        )
    return Solution(short @ basis, float(np.linalg.norm(short)), duals)
