"""Is this model backdoored? Several scanners, cheapest first, under a budget, and one answer from all.

Each scanner calibrates its own p-value against a null of its own making. The p-values of one scan are held
against one level together (``audit/evidence.py``), so that looking many times costs no more false alarms than
looking once, and checks that notice the same class make each other stronger. What cannot calibrate is shown
and not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from unbackdoor.audit.evidence import Agreement, agreements, holm
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, MissingExtra, TooFewImages, UnbackdoorError, UnsupportedModel
from unbackdoor.registry import SCANNERS
from unbackdoor.types import (
    Classifier,
    CleanData,
    Finding,
    Images,
    Progress,
    ScanReport,
    Verdict,
    as_clean_data,
    require_classifier,
    silent,
)

T = TypeVar("T")
LEVEL = 0.05  # accepted probability of a false alarm of the whole scan
GREY = 4.0  # times the level: up to there an adjusted p-value is neither evidence nor silence
Status = Literal["ran", "skipped", "failed", "out of budget"]


@dataclass(frozen=True)
class Check:
    """One look at the model.

    Attributes:
        name: In reports, such as ``neural_cleanse:blend``.
        scanner: Registered scanner.
        question: What it asks, in words for the report.
        options: What differs from the scanner's defaults.
    """

    name: str
    scanner: str
    question: str
    options: Mapping[str, Any] = field(default_factory=dict)


# Cheapest first. What comes later costs more and sees more.
CHECKS: tuple[Check, ...] = (
    Check("weight_statistics", "weight_statistics", "Does one class stand apart in the weights of the head?"),
    Check("tac", "tac", "Is one class reached by a much shorter shift of the features than the others?"),
    Check("mm_bd", "mm_bd", "Can one class be made far more certain than the others, by any input at all?"),
    Check(
        "neural_cleanse",
        "neural_cleanse",
        "Is there a class that an unusually small patch turns all images into?",
    ),
    Check(
        "neural_cleanse:blend",
        "neural_cleanse",
        "Is there a class that an unusually faint pattern turns all images into?",
        {"form": "blend"},
    ),
    Check("rnp_vote", "rnp_vote", "Do images fall to one class when the model forgets its task?"),
)


@dataclass(frozen=True)
class Checked:
    """What came of a check.

    Attributes:
        check: The check.
        status: Whether it came to its end.
        reason: Why it did not, in words.
        report: What the scanner said, if it ran.
        p_value: Its calibrated p-value; None where it has none or did not run.
        adjusted: The same after Holm's correction over all that counts.
        seconds: Wall time.
        unsuited: True where it was skipped because of the model, and not for lack of images or of a library.
    """

    check: Check
    status: Status
    reason: str = ""
    report: ScanReport | None = None
    p_value: float | None = None
    adjusted: float | None = None
    seconds: float = 0.0
    unsuited: bool = False

    @property
    def classes(self) -> tuple[int, ...]:
        """Classes that the strongest finding points to."""
        findings = self.report.findings if self.report is not None else ()
        return findings[0].classes if findings else ()


@dataclass(frozen=True)
class Agreed:
    """Checks that noticed the same class, each of them perhaps too weakly by itself.

    Attributes:
        label: The class.
        checks: Names of the checks, strongest first.
        adjusted: p-value of all of them together, corrected for all checks of the scan.
    """

    label: int
    checks: tuple[str, ...]
    adjusted: float


@dataclass(frozen=True)
class ShownTrigger:
    """A recovered trigger, for looking at.

    Attributes:
        label: Class that it leads to.
        pattern: (C, H, W): what is put on, or added if there is no mask.
        mask: (H, W) in [0, 1], or None for a pattern that is added to the whole image.
        check: Name of the check that found it.
        success: Share of images that were not used to find it and that it turns into the class, if measured.
    """

    label: int
    pattern: Tensor
    mask: Tensor | None
    check: str
    success: float | None = None


@dataclass(frozen=True)
class Audit:
    """The answer of a scan and everything that it rests on.

    Attributes:
        verdict: Never "clean": a scan can find evidence, or none, or be unable to tell.
        classes: Suspected target classes, strongest evidence first; empty without a finding.
        checks: All planned checks in their order.
        reasons: Sentences that explain the verdict.
        level: Accepted probability of a false alarm.
        triggers: Recovered triggers, most suspicious first.
        agreed: Classes that several checks noticed, strongest first.
        seconds: Wall time of the scan.
        facts: JSON-ready: hashes, seed, precision, numbers of images.
    """

    verdict: Verdict
    classes: tuple[int, ...]
    checks: tuple[Checked, ...]
    reasons: tuple[str, ...]
    level: float = LEVEL
    triggers: tuple[ShownTrigger, ...] = ()
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    agreed: tuple[Agreed, ...] = ()

    @property
    def partial(self) -> bool:
        """True where a planned check failed or was out of budget, so that silence proves less."""
        return any(
            c.status in ("failed", "out of budget") or (c.report is not None and c.report.partial)
            for c in self.checks
        )

    @property
    def guilty(self) -> tuple[Checked, ...]:
        """The checks that are evidence by themselves."""
        return tuple(c for c in self.checks if c.adjusted is not None and c.adjusted <= self.level)

    @property
    def joint(self) -> tuple[Agreed, ...]:
        """The agreements that are evidence."""
        return tuple(a for a in self.agreed if a.adjusted <= self.level)

    def accuses(self, checked: Checked) -> bool:
        """Return whether a check is evidence, by itself or together with others."""
        alone = any(checked is c for c in self.guilty)
        return alone or any(checked.check.name in a.checks for a in self.joint)

    @property
    def unsupported(self) -> bool:
        """True where no check ran, and those that could have run cannot work on such a model."""
        return any(c.unsuited for c in self.checks) and not any(c.status == "ran" for c in self.checks)


# Scanners whose artefacts are triggers; others show inputs that are no change of an image.
INVERTING = frozenset({"neural_cleanse", "rnp_vote"})


class _BudgetSpent(UnbackdoorError):
    """The time of the scan is over; raised inside a check by its progress display."""


def scan(
    model: Classifier,
    data: CleanData | Images | None = None,
    *,
    checks: Sequence[Check | str] | None = None,
    level: float = LEVEL,
    budget: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Audit:
    """Look for a backdoor with all checks that apply, cheapest first.

    Args:
        model: The classifier; never changed.
        data: Clean images, split already or not, with or without labels; None where there are none, which
            leaves the checks that need none.
        checks: Which checks, by themselves or by name; None is :data:`CHECKS`.
        level: Accepted probability that the whole scan accuses a clean model, in (0, 1).
        budget: Seconds after which no check is begun or goes on; None is no limit.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Returns:
        The verdict with its evidence. ``no evidence found`` is said only if every planned check that this
        model and these images allow came to its end.

    Raises:
        InputError: If a check is unknown, or the images or the weights cannot be used.
        UnsupportedModel: If the images do not fit the model.

    Example:
        >>> audit = unbackdoor.scan(model, data, budget=600)  # doctest: +SKIP
        >>> audit.verdict  # doctest: +SKIP
        'backdoor found'
    """
    if not 0 < level < 1:
        raise InputError("the level does not fit", expected="a probability in (0, 1)", got=level)
    require_classifier(model)
    Run.create(seed=seed, device=device, policy=precision)  # a missing device is told once, not by each check
    planned = _planned([checks] if isinstance(checks, str) else checks)
    given = None if data is None else as_clean_data(data, seed=seed)
    owned = given if given is not None else CleanData.empty(model.input_shape, model.class_names)
    start = time.monotonic()
    deadline = None if budget is None else start + budget
    done = []
    for check in planned:
        done.append(
            _look(check, model, owned, deadline, seed=seed, device=device, precision=precision, show=progress)
        )
    judged, agreed = _adjusted(done)
    verdict, classes, reasons = _weigh(judged, agreed, level)
    return Audit(
        verdict,
        classes,
        tuple(judged),
        tuple(reasons),
        level,
        tuple(_triggers(judged, classes)),
        time.monotonic() - start,
        {
            "model_sha256": model.sha256(),
            "architecture": model.architecture,
            "model_classes": model.classes,
            "images": len(owned),
            "images_sha256": owned.fingerprint() if len(owned) else None,
            "labelled": bool(len(owned)) and owned.fit.labels is not None,
            "seed": seed,
            "budget": budget,
        },
        tuple(agreed),
    )


def _planned(checks: Sequence[Check | str] | None) -> tuple[Check, ...]:
    if checks is None:
        return CHECKS
    known = {check.name: check for check in CHECKS}
    if not checks:
        raise InputError("no check was named", expected="one or more of " + ", ".join(known))
    out = []
    for check in checks:
        if isinstance(check, str) and check not in known:
            raise InputError(f"unknown check {check!r}", expected="one of " + ", ".join(known))
        out.append(known[check] if isinstance(check, str) else check)
    return tuple(out)


def _look(
    check: Check,
    model: Classifier,
    data: CleanData,
    deadline: float | None,
    *,
    seed: int,
    device: str,
    precision: Policy,
    show: Progress,
) -> Checked:
    """Run one check; whatever goes wrong in it is a result."""
    part = SCANNERS[check.scanner]
    lacking = _lacking(part.needs, data)
    if lacking:
        return Checked(check, "skipped", lacking)
    if deadline is not None and time.monotonic() >= deadline:
        return Checked(check, "out of budget", "the budget was spent before it began")

    def limited(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for item in show(items, f"{check.name}: {label}", total):
            if deadline is not None and time.monotonic() >= deadline:
                raise _BudgetSpent("the budget was spent while it ran")
            yield item

    start = time.monotonic()
    try:
        report = caller.scan(
            part,
            model,
            data,
            options=check.options,
            seed=seed,
            device=device,
            precision=precision,
            progress=limited,
        )
    except _BudgetSpent as error:
        return Checked(check, "out of budget", error.problem, seconds=time.monotonic() - start)
    except (UnsupportedModel, MissingExtra) as error:
        unsuited = isinstance(error, UnsupportedModel)
        return Checked(check, "skipped", str(error), seconds=time.monotonic() - start, unsuited=unsuited)
    except TooFewImages as error:
        return Checked(check, "skipped", str(error), seconds=time.monotonic() - start)
    except UnbackdoorError as error:
        return Checked(check, "failed", str(error), seconds=time.monotonic() - start)
    return Checked(check, "ran", "", report, _p_value(report), seconds=time.monotonic() - start)


def _lacking(needs: frozenset[str], data: CleanData) -> str:
    if "images" in needs and not len(data):
        return "it needs clean images, and there are none"
    if "labels" in needs and (data.fit.labels is None or data.select.labels is None):
        return "it needs labelled images, and these have no labels"
    return ""


def _p_value(report: ScanReport) -> float | None:
    """Return the p-value that counts: of the strongest finding, if the scanner was able to calibrate it."""
    if report.verdict == "undecided" or not report.findings:
        return None
    return report.findings[0].p_value


def _adjusted(done: Sequence[Checked]) -> tuple[list[Checked], list[Agreed]]:
    counted = [i for i, c in enumerate(done) if c.p_value is not None]
    p_values = [done[i].p_value or 0.0 for i in counted]
    by_place = dict(zip(counted, holm(p_values), strict=True))

    def named(one: Agreement) -> Agreed:
        return Agreed(one.label, tuple(done[counted[k]].check.name for k in one.places), one.p_value)

    together = agreements(p_values, [done[i].classes for i in counted])
    return [replace(c, adjusted=by_place.get(i)) for i, c in enumerate(done)], [named(a) for a in together]


def _weigh(
    done: Sequence[Checked], agreed: Sequence[Agreed], level: float
) -> tuple[Verdict, tuple[int, ...], list[str]]:
    """Return the verdict, the suspected classes and the reasons in words."""
    counted = sorted((c for c in done if c.adjusted is not None), key=lambda c: c.adjusted or 0.0)
    guilty = [c for c in counted if c.adjusted is not None and c.adjusted <= level]
    joint = [a for a in agreed if a.adjusted <= level]
    if guilty or joint:
        suspects = [(a.adjusted, (a.label,)) for a in joint] + [
            (c.adjusted or 0.0, c.classes) for c in guilty
        ]
        classes = tuple(dict.fromkeys(k for _, own in sorted(suspects, key=lambda s: s[0]) for k in own))
        told = [f"{c.check.name}: adjusted p = {c.adjusted:.2g}" for c in guilty]
        told += [
            f"{' and '.join(a.checks)} together, on class {a.label}: adjusted p = {a.adjusted:.2g}"
            for a in joint
        ]
        return "backdoor found", classes, ["Evidence of a backdoor in " + "; ".join(told) + "."]
    if not counted:
        return "undecided", (), ["No check came to a calibrated result."]
    reasons = []
    lost = [c for c in done if c.status in ("failed", "out of budget")]
    if lost:
        told = [f"{c.check.name} ({c.reason.rstrip('.')})" for c in lost]
        reasons.append("Not all checks came to their end: " + "; ".join(told) + ".")
    missing = [c for c in done if c.status == "skipped" and "clean images" in c.reason]
    if missing:
        reasons.append("Most checks need clean images, and there are none.")
    lowest, who = counted[0].adjusted or 0.0, counted[0].check.name
    if agreed and agreed[0].adjusted < lowest:
        lowest, who = agreed[0].adjusted, " and ".join(agreed[0].checks) + " together"
    if lowest <= GREY * level:
        reasons.append(f"What {who} noticed is no evidence yet (adjusted p = {lowest:.2g}).")
    if reasons:
        return "undecided", (), reasons
    return (
        "no evidence found",
        (),
        [f"No check sees a class that stands apart (smallest adjusted p = {lowest:.2g})."],
    )


def _triggers(done: Sequence[Checked], suspected: Sequence[int]) -> list[ShownTrigger]:
    """Return what the inversions found, for suspected classes first, then by p-value."""
    found: list[tuple[bool, float, ShownTrigger]] = []
    for c in done:
        findings: tuple[Finding, ...] = c.report.findings if c.report is not None else ()
        for finding in findings if c.check.scanner in INVERTING else ():
            if "pattern" not in finding.artefacts or not finding.classes:
                continue
            label = finding.classes[0]
            success = finding.value if finding.statistic.startswith("success") else _success(findings, label)
            added = finding.artefacts.get("perturbation")
            shown = ShownTrigger(
                label,
                finding.artefacts["pattern"] if added is None else added,
                finding.artefacts.get("mask") if added is None else None,
                c.check.name,
                success,
            )
            order = c.adjusted if c.adjusted is not None else 2.0
            found.append((label not in suspected, order, shown))
            break
    return [shown for _, _, shown in sorted(found, key=lambda item: item[:2])]


def _success(findings: Sequence[Finding], label: int) -> float | None:
    for finding in findings:
        if finding.statistic.startswith("success") and label in finding.classes:
            return finding.value
    return None
