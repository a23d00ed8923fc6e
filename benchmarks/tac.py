"""The shortest latent shifts of all classes: exact programs in reduced coordinates, against plain solvers.

    python benchmarks/tac.py [--pairs 3] [--threads 2] [--json tac.json]

Ours is ``engine.latent.least_shifts``, singular value decomposition and self-check included. The plain
version is what one writes from the paper's display: one program a class in all D dimensions, without a
table of factors shared by the classes, solved by projected gradients on its dual until all constraints hold
to ``--accuracy`` of the largest gap. At the smallest size SLSQP of SciPy in D dimensions runs too. A plain
solver does only the first few classes, and seconds are per class on both sides. Where a plain solver would
take minutes there is none, and the seconds of ours stand alone.

The table of gaps is compared with subtracting all pairs at once, in batches that fit into 64 MiB. Ratios
are of wall times, taken in turn; what the programs of all classes take is given as CPU time.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from _harness import Ratio, Result, Seconds, interleave, parser
from unbackdoor.engine.latent_shift import Solution, largest_gaps, least_shifts

Array = npt.NDArray[np.float64]
SIZES = ((10, 512), (43, 512), (200, 512), (1000, 2048))
BROADCAST = 1 << 24  # numbers in one batch of pairwise differences
FLOORS = {"10 x 512": 3.0, "43 x 512": 3.0, "200 x 512": 3.0}  # the least acceptable ratios


def problem(classes: int, features: int, images: int, seed: int) -> tuple[Array, Tensor, Array]:
    """Return W (K, D), logits (N, K) and R (K, K) of a made-up head on rectified class clusters."""
    draws = np.random.default_rng(seed)
    means = np.maximum(0, draws.normal(size=(classes, features)))
    weight = (means - means.mean(0)) / np.sqrt(features) + 0.02 * draws.normal(size=(classes, features))
    labels = np.arange(images) % classes
    phi = np.maximum(0, means[labels] + 0.7 * draws.normal(size=(images, features)))
    logits = torch.from_numpy((phi @ weight.T).astype(np.float32))
    return weight, logits, largest_gaps(logits).double().numpy()


def by_projected_gradients(weight: Array, gaps: Array, k: int, accuracy: float) -> tuple[Array, int]:
    """Return the shortest shift (D,) to class k, and the steps that it took."""
    rows, margins = np.delete(weight[k] - weight, k, axis=0), np.delete(gaps[k], k)
    factors = np.zeros(len(rows))
    rate = 1 / np.linalg.norm(rows, 2) ** 2
    steps = 0
    while steps < 200_000:
        steps += 1
        shift = rows.T @ factors
        missing = margins - rows @ shift
        if missing.max() <= accuracy * margins.max() and abs(factors @ missing) <= accuracy * (shift @ shift):
            break
        factors = np.maximum(0, factors + rate * missing)
    return shift, steps


def by_slsqp(weight: Array, gaps: Array, k: int) -> float:
    """Return the norm of the shortest shift to class k."""
    from scipy.optimize import minimize

    rows, margins = np.delete(weight[k] - weight, k, axis=0), np.delete(gaps[k], k)
    solution = minimize(
        lambda s: 0.5 * s @ s,
        np.zeros(weight.shape[1]),
        jac=lambda s: s,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda s: rows @ s - margins, "jac": lambda s: rows},
        options={"maxiter": 200},
    )
    return float(np.linalg.norm(solution.x))


def all_pairs(logits: Tensor) -> Tensor:
    """Return R by subtracting all pairs of a batch at once."""
    classes = logits.shape[1]
    out = torch.full((classes, classes), -torch.inf)
    for block in logits.split(max(1, BROADCAST // classes**2)):
        out = torch.maximum(out, (block[:, None, :] - block[:, :, None]).amax(0))  # (B, K, K) -> (K, K)
    return out


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=3)
    options.add_argument("--accuracy", type=float, default=1e-4, help="of the plain solver, relative")
    options.add_argument("--plain-classes", type=int, default=3, help="classes that a plain solver does")
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    sizes = SIZES
    if arguments.quick:
        sizes, arguments.pairs, arguments.plain_classes, arguments.images = ((10, 32),), 1, 1, 200
        arguments.accuracy = 1e-2
    torch.set_num_threads(arguments.threads)

    settings = {
        "sizes": [list(size) for size in sizes],
        "images": arguments.images,
        "plain_classes": arguments.plain_classes,
        "accuracy": arguments.accuracy,
        "floors": FLOORS,
        "quick": arguments.quick,
    }
    result = Result("tac", f"shortest shifts of all classes, {arguments.images} images", settings)
    seconds: Seconds = {}
    facts: dict[str, Any] = {}
    for position, (classes, features) in enumerate(sizes):
        name = f"{classes} x {features}"
        weight, logits, gaps = problem(classes, features, arguments.images, arguments.seed)
        if classes > 200:
            start, _ = time.process_time(), largest_gaps(logits)
            middle, solutions = time.process_time(), least_shifts(weight, gaps)
            facts[name] = _said(solutions, time.process_time() - middle, middle - start)
            continue
        norms: dict[str, Any] = {}
        subset = range(min(arguments.plain_classes, classes))
        rounds = 1 if arguments.quick else max(1, 600 // classes)  # a millisecond is too short for a clock

        def ours(
            w: Array = weight, r: Array = gaps, into: dict[str, Any] = norms, rounds: int = rounds
        ) -> None:
            for _ in range(rounds):
                into["ours"] = least_shifts(w, r)

        def plain(
            w: Array = weight, r: Array = gaps, into: dict[str, Any] = norms, ks: range = subset
        ) -> None:
            into["plain"] = [by_projected_gradients(w, r, k, arguments.accuracy) for k in ks]

        def slsqp(w: Array = weight, r: Array = gaps, into: dict[str, Any] = norms) -> None:
            into["slsqp"] = by_slsqp(w, r, 0)

        def blocked(z: Tensor = logits, rounds: int = rounds) -> None:
            for _ in range(rounds):
                largest_gaps(z)

        def broadcast(z: Tensor = logits, rounds: int = rounds) -> None:
            for _ in range(rounds):
                all_pairs(z)

        contestants = {"ours": ours, "plain": plain, "blocked": blocked, "all pairs": broadcast}
        if position == 0:
            contestants["slsqp"] = slsqp
        times_of = interleave(arguments.pairs, contestants)
        per_class = [t / classes / rounds for t in times_of["ours"]]
        result.add(
            f"{name}: projected gradients : ours",
            Ratio.of([t / len(subset) for t in times_of["plain"]], per_class),
        )
        if position == 0:
            result.add(f"{name}: SLSQP : ours", Ratio.of(times_of["slsqp"], per_class))
        result.add(f"{name}: gaps of all pairs : ours", Ratio.of(times_of["all pairs"], times_of["blocked"]))
        seconds |= {f"{name}, {label}": times for label, times in times_of.items()}
        exact = [solution.norm for solution in norms["ours"]]
        start, _ = time.process_time(), [largest_gaps(logits) for _ in range(rounds)]
        middle, _ = time.process_time(), [least_shifts(weight, gaps) for _ in range(rounds)]
        spent = (time.process_time() - middle, middle - start)
        facts[name] = _said(norms["ours"], spent[0] / rounds, spent[1] / rounds) | {
            "steps_of_projected_gradients": [step for _, step in norms["plain"]],
            "disagreement": max(
                abs(float(np.linalg.norm(shift)) / exact[k] - 1)
                for k, (shift, _) in enumerate(norms["plain"])
            ),
        }
        if position == 0:
            facts[name]["disagreement_slsqp"] = abs(norms["slsqp"] / exact[0] - 1)
    result.facts["programs"] = facts
    for name, said in facts.items():
        total, table = said["all_classes_cpu_seconds"], said["gap_table_cpu_seconds"]
        result.notes.append(f"{name}: all classes in {total:.4f} s of CPU time, gaps in {table:.4f} s")
    result.show(seconds, arguments.json)


def _said(solutions: list[Solution], programs: float, table: float) -> dict[str, Any]:
    # CPU time, because on a busy machine the wall clock of a minute's work says how busy it is.
    duals = np.stack([solution.duals for solution in solutions])
    return {
        "all_classes_cpu_seconds": programs,
        "gap_table_cpu_seconds": table,
        "active_share": float((duals > 0).sum() / (len(duals) * (len(duals) - 1))),
    }


if __name__ == "__main__":
    main()
