"""Compare two models without trusting whoever made the second from the first.

No record of the repair is read: the triggers are recovered anew from the first model, and the same checks
run on both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unbackdoor.audit.budget import seconds_left
from unbackdoor.audit.cases import Case
from unbackdoor.audit.checks import Check, plan_checks
from unbackdoor.audit.comparison import (
    Accuracy,
    LogitDifference,
    TensorChange,
    agree_on,
    changed_tensors,
    compare_accuracy,
    compare_logits,
    trigger_success,
)
from unbackdoor.audit.purifying import Residue, before_and_after, change_rows, split_proof
from unbackdoor.audit.result import Result
from unbackdoor.audit.scanning import LEVEL, Audit, scan, unscanned
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import UnsupportedModel
from unbackdoor.metrics import Rate
from unbackdoor.result_views import Bars
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Images, Progress, as_images, require_classifier, silent


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """The comparison of two models.

    Attributes:
        identical: True where all weights are the same.
        accuracy: Clean accuracy of both; None without labels.
        agreement: Share of images to which both give the same class.
        changes: Tensors that differ.
        residues: Success on both models of triggers that were recovered from the first, on images that were
            not used to recover them.
        before: The scan of the first model.
        after: The same scan of the second.
        seconds: Wall time.
        facts: JSON-ready: hashes and numbers of images.
        cases: The two models and the images as the caller gave them.
        logits: How far their logits lie apart.
    """

    identical: bool
    accuracy: Accuracy | None
    agreement: Rate
    changes: tuple[TensorChange, ...]
    residues: tuple[Residue, ...]
    before: Audit
    after: Audit
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[Case, Case] | None = field(default=None, repr=False)
    logits: LogitDifference | None = None

    def headline(self) -> str:
        """Return the comparison in one line."""
        if self.identical:
            return "the two models have the same weights"
        works = sum(r.after.total > 0 and r.after.value > 0.5 for r in self.residues)
        same = f"{self.agreement.value:.1%}" if self.agreement.total else "no"
        return (
            f"before: {self.before.verdict}; after: {self.after.verdict}; "
            f"same answer on {same} of the images; "
            f"{works} of {len(self.residues)} recovered triggers still work"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each tensor that differs."""
        return change_rows(self.changes)

    def bars(self) -> Bars | None:
        """Return clean accuracy, and the success of recovered triggers, of both models."""
        return before_and_after(self.accuracy, self.residues)

    @property
    def interrupted(self) -> bool:
        """True where Ctrl-C or SIGTERM ended one of the scans; the checks that had ended count."""
        return self.before.interrupted or self.after.interrupted


def verify(
    before: Classifier,
    after: Classifier,
    images: Images | CleanData,
    *,
    triggers: tuple[RecoveredTrigger, ...] = (),
    reservations: tuple[Sequence[str], Sequence[str]] = ((), ()),
    doubts: tuple[Sequence[str], Sequence[str]] = ((), ()),
    checks: Sequence[Check | str] | None = None,
    scanned: Audit | None = None,
    proof: Images | None = None,
    level: float = LEVEL,
    budget: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Verification:
    """Compare two models on clean images.

    Args:
        before: The original.
        after: What is said to be its repair; of the same input and classes.
        images: Clean images, with or without labels; a part is kept for trying the triggers.
        triggers: Known triggers to try beside the recovered ones.
        reservations: What no check can see in the first, and in the second model.
        doubts: Why the first, and the second model may have been opened wrongly.
        checks: Checks to run on both; None is :func:`unbackdoor.audit.checks.default_checks`, so that all
            that a scan can find in the original is also checked on the repair. On the repair, those that
            accuse the original come first: they are repeated even where the budget ends the others.
        scanned: A scan of the original on all these images, if it was made already; then only the checks
            that are evidence there are repeated on the repair.
        proof: Images, among these or not, that the triggers are tried and the accuracies measured on; None
            keeps a part for the triggers and measures the accuracies on all.
        level: Accepted probability of a false alarm in each scan.
        budget: Seconds for both scans together; None is no limit.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Raises:
        UnsupportedModel: If the two do not take the same images or do not know the same classes.
    """
    require_classifier(before)
    require_classifier(after)
    images = as_images(images)
    if before.input_shape != after.input_shape or before.classes != after.classes:
        raise UnsupportedModel(
            "the two models do not do the same task",
            expected=f"input {before.input_shape}, {before.classes} classes",
            got=f"input {after.input_shape}, {after.classes} classes",
        )
    start = time.monotonic()
    whole = seconds_left(budget)
    scan_images, trigger_images, _ = split_proof(images, seed=seed)
    if proof is not None:
        scan_images, trigger_images = images, proof
    measured = images if proof is None else proof
    data = CleanData.split(scan_images, seed=seed)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)

    planned = plan_checks([checks] if isinstance(checks, str) else checks, classes=before.classes)

    def scan_model(model: Classifier, order: Sequence[Check], place: int) -> Audit:
        left = None if whole is None else whole / 2
        return scan(
            model,
            data,
            reservations=reservations[place],
            doubts=doubts[place],
            checks=order,
            level=level,
            thorough=True,  # every trigger of the first is tried on both
            budget=left,
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
        )

    first = scanned or scan_model(before, planned, 0)
    if scanned is not None:
        accusers = tuple(c.check for c in scanned.checks if scanned.accuses(c))
        planned = accusers or tuple(c.check for c in scanned.checks)
    second = (
        unscanned(after, planned, level, reservations[1], doubts[1])
        if first.interrupted
        else scan_model(after, planned if scanned is not None else _accusers_first(first), 1)
    )
    places = {check.name: place for place, check in enumerate(planned)}
    second = replace(second, checks=tuple(sorted(second.checks, key=lambda c: places[c.check.name])))
    all_triggers = (*triggers, *first.triggers)
    residues = tuple(
        Residue(t, *(trigger_success(m, trigger_images, t, run) for m in (before, after)))
        for t in all_triggers
    )
    hashes = before.sha256(), after.sha256()
    return Verification(
        hashes[0] == hashes[1],
        compare_accuracy(before, after, measured, run),
        agree_on(before, after, measured, run),
        tuple(changed_tensors(before.network.state_dict(), after.network.state_dict())),
        residues,
        first,
        second,
        time.monotonic() - start,
        {
            "before_sha256": hashes[0],
            "after_sha256": hashes[1],
            "images": len(measured),
            "images_sha256": measured.fingerprint(),
            "seed": seed,
        },
        logits=compare_logits(before, after, images, run),
    )


def _accusers_first(audit: Audit) -> list[Check]:
    """Return the checks of a scan, those that are evidence before the others."""
    return [c.check for c in sorted(audit.checks, key=lambda c: not audit.accuses(c))]
