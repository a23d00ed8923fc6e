"""Is this model backdoored? Run several scanners, cheapest first, within a budget, and combine their answers.

Each scanner calibrates its own p-value against its own null distribution. The p-values of one scan are
compared with one level together (``audit/evidence.py``): many checks cause no more false alarms than one
check, and checks that notice the same class support each other. A scanner without a calibrated p-value is
shown and not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from unbackdoor.audit.budget import BudgetSpent, end_of, watched
from unbackdoor.audit.cases import Case
from unbackdoor.audit.checks import Check, default_checks, plan_checks
from unbackdoor.audit.evidence import Agreement, agreements, holm
from unbackdoor.audit.references import calibrated, read_references
from unbackdoor.audit.result import Result
from unbackdoor.confinement import now
from unbackdoor.engine import trusted_caller
from unbackdoor.engine.canonical_form import CanonicalForm, form_for_checks
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, MissingExtra, TooFewImages, UnbackdoorError, UnsupportedModel
from unbackdoor.registry import SCANNERS
from unbackdoor.result_views import Bars
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import (
    Classifier,
    CleanData,
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
GREY = 4.0  # times the level; an adjusted p-value between the level and this is undecided
Status = Literal["ran", "skipped", "failed", "out of budget", "interrupted", "not needed"]
LOST: tuple[Status, ...] = ("failed", "out of budget", "interrupted")  # planned, and did not finish
_MAX_NAMED = 10  # classes that a sentence lists; the checks have all
_MAX_NAME = 60  # characters of a class name, which comes from a file


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        check: The check.
        status: Whether it finished.
        reason: Why it did not, in words.
        report: The scanner's report, if it ran.
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

    @property
    def class_p_values(self) -> tuple[float, ...]:
        """For every class, the p-value of the strongest finding, uncorrected; empty where it has none."""
        findings = self.report.findings if self.report is not None else ()
        return findings[0].class_p_values if findings else ()


@dataclass(frozen=True)
class Agreed:
    """Checks that noticed the same class; each of them may be too weak by itself.

    Attributes:
        label: The class.
        checks: Names of the checks, strongest first.
        adjusted: p-value of all of them together, corrected for all checks of the scan.
    """

    label: int
    checks: tuple[str, ...]
    adjusted: float


@dataclass(frozen=True)
class Noticed:
    """A result that is evidence, or close to it.

    Attributes:
        checks: Names of the checks: one, or several that noticed the same class.
        classes: The classes that they point to.
        adjusted: p-value, corrected for all checks of the scan.
    """

    checks: tuple[str, ...]
    classes: tuple[int, ...]
    adjusted: float


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """The verdict of a scan with its evidence.

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
        left_out: Default checks that were not run. With fewer checks, p-values are corrected less.
        interrupted: True where Ctrl-C or SIGTERM ended the scan; the checks that had ended count.
        case: The model and the images as the caller gave them.
        reservations: What no check can see, such as a program of the file that was not examined. With one,
            the verdict is at best ``undecided``.
        doubts: Why the model as it was opened may not be the model of the file. With one, the verdict is
            ``undecided`` whatever the checks say.
    """

    verdict: Verdict
    classes: tuple[int, ...]
    checks: tuple[Checked, ...]
    reasons: tuple[str, ...]
    level: float = LEVEL
    triggers: tuple[RecoveredTrigger, ...] = ()
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    agreed: tuple[Agreed, ...] = ()
    left_out: tuple[str, ...] = ()
    interrupted: bool = False
    case: Case | None = field(default=None, repr=False)
    reservations: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def partial(self) -> bool:
        """True where a planned check did not finish, so that finding nothing proves less."""
        return any(c.status in LOST or (c.report is not None and c.report.partial) for c in self.checks)

    @property
    def corrected_for(self) -> int:
        """Number of checks that the p-values are corrected for: those that gave one, or were not needed."""
        return sum(c.p_value is not None or c.status == "not needed" for c in self.checks)

    @property
    def noticed(self) -> tuple[Noticed, ...]:
        """All results whose corrected p-value is at most four times the level, smallest first."""
        return tuple(n for n in _ranked(self.checks, self.agreed) if n.adjusted <= GREY * self.level)

    @property
    def guilty(self) -> tuple[Checked, ...]:
        """The checks that are evidence by themselves."""
        return tuple(c for c in self.checks if c.adjusted is not None and c.adjusted <= self.level)

    @property
    def joint(self) -> tuple[Agreed, ...]:
        """The agreements that are evidence."""
        return tuple(a for a in self.agreed if a.adjusted <= self.level)

    def headline(self) -> str:
        """Return the verdict in one line."""
        ran = sum(c.status == "ran" for c in self.checks)
        towards = f", towards {', '.join(map(self._name, self.classes[:3]))}" if self.classes else ""
        return f"{self.verdict}{towards}; {ran} of {len(self.checks)} checks ran, {self.seconds:.0f} s"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each check."""
        return [
            {
                "check": c.check.name,
                "status": c.status,
                "strongest class": self._name(c.classes[0]) if c.classes else None,
                "p_value": c.p_value,
                "adjusted_p_value": c.adjusted,
                "seconds": c.seconds,
                "reason": c.reason,
            }
            for c in self.checks
        ]

    def bars(self) -> Bars | None:
        """Return the statistic of the strongest check for each class."""
        ran = [c for c in self.checks if c.report is not None and c.report.findings]
        if not ran:
            return None
        strongest = min(ran, key=lambda c: 2.0 if c.p_value is None else c.p_value)
        assert strongest.report is not None
        finding = strongest.report.findings[0]
        values = [value if math.isfinite(value) else 0.0 for value in finding.per_class]
        if not values:
            return None
        names = [self._name(k) for k in range(len(values))]
        threshold = finding.threshold if math.isfinite(finding.threshold) else None
        title = f"{strongest.check.name}: {finding.direction}"
        return Bars(title, names, values, finding.statistic, threshold, finding.classes)

    def _name(self, label: int) -> str:
        names = self.case.model.class_names if self.case is not None else ()
        return names[label] if label < len(names) else str(label)

    def accuses(self, checked: Checked) -> bool:
        """Return whether a check is evidence, by itself or together with others."""
        alone = any(checked is c for c in self.guilty)
        return alone or any(checked.check.name in a.checks for a in self.joint)

    @property
    def unsupported(self) -> bool:
        """True where no check ran, because none that could run works on such a model."""
        return any(c.unsuited for c in self.checks) and not any(c.status == "ran" for c in self.checks)


class Observer(Protocol):
    """Follows a scan from check to check."""

    def begin(self, check: Check) -> str:
        """Return why a check is left out, in words; empty where it runs."""
        ...

    def end(self, done: Sequence[Checked]) -> None:
        """Take the checks that have ended, the last one last."""
        ...


BEFORE_IT_BEGAN = "the scan was interrupted before it began"


def scan(
    model: Classifier,
    data: CleanData | Images | None = None,
    *,
    reservations: Sequence[str] = (),
    doubts: Sequence[str] = (),
    checks: Sequence[Check | str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    references: Sequence[Path] | None = None,
    level: float = LEVEL,
    thorough: bool = False,
    budget: float | None = None,
    observer: Observer | None = None,
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
        reservations: What no check can see, as sentences; with one, the verdict is at best ``undecided``.
        doubts: Why the model may have been opened wrongly, as sentences; with one, the verdict is
            ``undecided``.
        checks: Which checks, by themselves or by the name of any registered scanner, with that of a variant
            behind a colon; None is :func:`default_checks`.
        options: For checks by name: options laid over those of the check.
        references: Records of scans of clean models of the same kind (``result.json`` of a report), for the
            checks that have no null of their own and are calibrated by them.
        level: Accepted probability that the whole scan accuses a clean model, in (0, 1).
        thorough: Whether the checks go on after one has answered the question. They can add evidence and
            triggers, and not take the answer back.
        budget: Seconds after which no check is begun or goes on; None is no limit.
        observer: Hears when a check begins, and may leave it out, and when it has ended.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Returns:
        The verdict with its evidence. ``no evidence found`` is said only if every planned check that this
        model and these images allow came to its end.

    Raises:
        InputError: If a check is unknown, or the images, the weights or a reference cannot be used.
        ConfigError: If an option does not fit.
        UnsupportedModel: If the images do not fit the model.

    Example:
        >>> audit = unbackdoor.scan(model, data, budget=600)  # doctest: +SKIP
        >>> audit.verdict  # doctest: +SKIP
        'backdoor found'
    """
    if not 0 < level < 1:
        raise InputError("the level does not fit", expected="a probability in (0, 1)", got=level)
    require_classifier(model)
    # A missing device is one error, not one per check.
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    planned = plan_checks([checks] if isinstance(checks, str) else checks, options, model.classes)
    reference_records = read_references(references or ())
    empty = CleanData.empty(model.input_shape, model.class_names)
    clean = empty if data is None else as_clean_data(data, seed=seed)
    facts: dict[str, Any] = {
        "model_sha256": model.sha256(),
        "architecture": model.architecture,
        "model_classes": model.classes,
        "images": len(clean),
        "images_sha256": clean.fingerprint() if len(clean) else None,
        "image_notes": list(clean.fit.notes),
        "labelled": bool(len(clean)) and clean.fit.labels is not None,
        "setting": {
            "architecture": model.architecture,
            "input_shape": list(model.input_shape),
            "class_names": list(model.class_names),
            "clean_images": [len(clean.fit), len(clean.select)],
            "augmentation": clean.augmentation,
        },
        "seed": seed,
        "budget": budget,
    }
    planned = calibrated(planned, reference_records, facts["setting"], facts["model_sha256"])
    start = time.monotonic()
    deadline = end_of(budget)
    done: list[Checked] = []
    begun, interrupted = start, False
    form: CanonicalForm | None = None
    try:
        form = _form(model, clean, run, deadline)
        for check in planned:
            begun = time.monotonic()
            answered = "" if thorough else _answered_by(done, len(planned) - len(done), level)
            if answered:
                done.append(Checked(check, "not needed", f"{answered} had answered the question"))
                if observer is not None:
                    observer.end(done)
                continue
            unwanted = "" if observer is None else observer.begin(check)
            done.append(
                Checked(check, "out of budget", unwanted)
                if unwanted
                else _run_check(
                    check,
                    model,
                    clean,
                    form,
                    deadline,
                    seed=seed,
                    device=device,
                    precision=precision,
                    show=progress,
                )
            )
            if observer is not None:
                observer.end(done)
    except KeyboardInterrupt:
        interrupted = True
        left = planned[len(done) :]
        seconds = time.monotonic() - begun
        done += [Checked(c, "interrupted", "it was interrupted", seconds=seconds) for c in left[:1]]
        done += [Checked(c, "interrupted", BEFORE_IT_BEGAN) for c in left[1:]]
    notes = []
    if form is not None:
        facts |= {"unused_classes": list(form.unused), "equal_classes": [list(p) for p in form.equal.items()]}
        notes = [f"{what.capitalize()}: {why}." for what, why in form.left_out(model.class_names).items()]
        if form.constant:
            notes = [f"The network is constant, so that no class can stand apart: {form.constant}."]
    return _concluded(
        done,
        level,
        facts,
        model.class_names,
        seconds=time.monotonic() - start,
        interrupted=interrupted,
        notes=notes,
        reservations=reservations,
        doubts=doubts,
    )


def _answered_by(done: Sequence[Checked], left: int, level: float) -> str:
    """Return the checks whose evidence stands whatever the checks that are left say; empty for none."""
    judged, agreed = _adjusted(done, left)
    evidence = [one for one in _ranked(judged, agreed) if one.adjusted <= level]
    return " and ".join(evidence[0].checks) if evidence else ""


def _form(model: Classifier, data: CleanData, run: Run, deadline: float | None) -> CanonicalForm | None:
    """Return the form that all checks work on; None where each of them says itself why it cannot work."""

    def limited(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for item in run.show(items, label, total):
            if deadline is not None and now() >= deadline:
                raise BudgetSpent("the time of the scan is over")
            yield item

    try:
        with watched(deadline):  # a batch of a large network takes minutes
            return form_for_checks(model, data, replace(run, show=limited))
    except UnbackdoorError:
        return None


def unscanned(
    model: Classifier,
    planned: Sequence[Check],
    level: float,
    reservations: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Audit:
    """Return a scan that was interrupted before any of its checks began."""
    done = [Checked(check, "interrupted", BEFORE_IT_BEGAN) for check in planned]
    return _concluded(
        done,
        level,
        {"model_sha256": model.sha256()},
        model.class_names,
        seconds=0.0,
        interrupted=True,
        reservations=reservations,
        doubts=doubts,
    )


def _concluded(
    done: Sequence[Checked],
    level: float,
    facts: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    seconds: float,
    interrupted: bool,
    notes: Sequence[str] = (),
    reservations: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Audit:
    # A check that was not needed would have been counted: its p-value is taken for 1.
    judged, agreed = _adjusted(done, sum(c.status == "not needed" for c in done))
    names = {c.check.name for c in done}
    left_out = tuple(check.name for check in default_checks(len(class_names)) if check.name not in names)
    verdict, classes, reasons = _reach_verdict(judged, agreed, level, class_names, reservations, doubts)
    return Audit(
        verdict,
        classes,
        tuple(judged),
        (*reasons, *_mappings(judged, level, class_names), *notes, *_correction(judged, left_out, level)),
        level,
        tuple(_triggers(judged, classes)),
        seconds,
        facts,
        tuple(agreed),
        left_out,
        interrupted,
        reservations=tuple(reservations),
        doubts=tuple(doubts),
    )


def _run_check(
    check: Check,
    model: Classifier,
    data: CleanData,
    form: CanonicalForm | None,
    deadline: float | None,
    *,
    seed: int,
    device: str,
    precision: Policy,
    show: Progress,
) -> Checked:
    """Run one check; whatever goes wrong in it is a result."""
    part = SCANNERS[check.scanner]
    unmet = _unmet_needs(part.needs, data)
    if unmet:
        return Checked(check, "skipped", unmet)
    if deadline is not None and now() >= deadline:
        return Checked(check, "out of budget", "the budget was spent before it began")

    spent = False

    def note_spent() -> None:
        nonlocal spent
        spent = True

    def limited(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for item in show(items, f"{check.name}: {label}", total):
            if deadline is not None and now() >= deadline:
                note_spent()
                raise BudgetSpent("the time of the scan is over")
            yield item

    def lost() -> Checked:
        reason = "the budget was spent while it ran"
        return Checked(check, "out of budget", reason, seconds=time.monotonic() - start)

    start = time.monotonic()
    try:
        report = watched(deadline, note_spent)(trusted_caller.scan)(
            part,
            model,
            data,
            options=check.options,
            seed=seed,
            device=device,
            precision=precision,
            progress=limited,
            form=form,
        )
    except BudgetSpent:
        return lost()
    except (UnsupportedModel, MissingExtra) as error:
        unsuited = isinstance(error, UnsupportedModel)
        return Checked(check, "skipped", str(error), seconds=time.monotonic() - start, unsuited=unsuited)
    except TooFewImages as error:
        return Checked(check, "skipped", str(error), seconds=time.monotonic() - start)
    except UnbackdoorError as error:
        # A scanner may have turned BudgetSpent into an error of its own, or continued after it.
        if spent:
            return lost()
        return Checked(check, "failed", str(error), seconds=time.monotonic() - start)
    if spent:
        return lost()
    return Checked(check, "ran", "", report, _p_value(check, report), seconds=time.monotonic() - start)


def _unmet_needs(needs: frozenset[str], data: CleanData) -> str:
    if "images" in needs and not len(data):
        return "it needs clean images, and there are none"
    if "labels" in needs and (data.fit.labels is None or data.select.labels is None):
        return "it needs labelled images, and these have no labels"
    return ""


def _p_value(check: Check, report: ScanReport) -> float | None:
    """Return the p-value that counts: of the strongest finding, if the scanner was able to calibrate it."""
    references = SCANNERS[check.scanner].scanning.references
    if references is not None and not report.method.get("options", {}).get(references.option):
        # It can accuse nobody, so there is nothing that the other checks would have to be corrected for.
        return None
    if report.verdict == "undecided" or not report.findings:
        return None
    return report.findings[0].p_value


def _adjusted(done: Sequence[Checked], further: int = 0) -> tuple[list[Checked], list[Agreed]]:
    """Return the checks with corrected p-values, and where they agree.

    Args:
        done: Checks that ended.
        further: Checks that the p-values are corrected for besides, as if each had given 1.
    """
    counted = [i for i, c in enumerate(done) if c.p_value is not None]
    p_values = [done[i].p_value or 0.0 for i in counted] + [1.0] * further
    by_place = dict(zip(counted, holm(p_values), strict=False))

    def named(one: Agreement) -> Agreed:
        return Agreed(one.label, tuple(done[counted[k]].check.name for k in one.places), one.p_value)

    nothing: list[tuple[int, ...]] = [()] * further
    tables: list[tuple[float, ...]] = [done[i].class_p_values for i in counted] + [()] * further
    together = agreements(p_values, [done[i].classes for i in counted] + nothing, tables)
    return [replace(c, adjusted=by_place.get(i)) for i, c in enumerate(done)], [named(a) for a in together]


def _ranked(done: Sequence[Checked], agreed: Sequence[Agreed]) -> list[Noticed]:
    """Return all that was counted, smallest corrected p-value first; an agreement before its checks."""
    out = [Noticed(a.checks, (a.label,), a.adjusted) for a in agreed]
    out += [Noticed((c.check.name,), c.classes, c.adjusted) for c in done if c.adjusted is not None]
    return sorted(out, key=lambda noticed: noticed.adjusted)


def _reach_verdict(
    done: Sequence[Checked],
    agreed: Sequence[Agreed],
    level: float,
    names: Sequence[str],
    reservations: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> tuple[Verdict, tuple[int, ...], list[str]]:
    """Return the verdict, the suspected classes and the reasons in words."""
    ranked = _ranked(done, agreed)
    guilty = [one for one in ranked if one.adjusted <= level]
    if guilty and doubts:
        evidence = "; ".join(_sentence(one, names) for one in guilty)
        held = f"What was noticed is evidence only of the model as it was opened: {evidence}."
        return "undecided", (), [*doubts, held, *reservations]
    if guilty:
        classes = tuple(dict.fromkeys(k for one in guilty for k in one.classes))
        evidence = "; ".join(_sentence(one, names) for one in guilty)
        return "backdoor found", classes, [f"Evidence of a backdoor in {evidence}.", *reservations]
    reasons = [*doubts, *reservations]
    reasons += [] if ranked else ["No check came to a calibrated result."]
    lost = [c for c in done if c.status in LOST]
    if lost:
        unfinished = "; ".join(f"{c.check.name} ({c.reason.rstrip('.')})" for c in lost)
        reasons.append(f"Not all checks came to their end: {unfinished}.")
    if any(c.status == "skipped" and "clean images" in c.reason for c in done):
        reasons.append("Most checks need clean images, and there are none.")
    near = [one for one in ranked if one.adjusted <= GREY * level]
    if near:
        hints = "; ".join(_sentence(one, names) for one in near)
        reasons.append(f"What was noticed is no evidence yet: {hints}.")
    if reasons:
        return "undecided", (), reasons
    lowest = [one for one in ranked if one.adjusted == ranked[0].adjusted]
    smallest = f"smallest adjusted p = {lowest[0].adjusted:.2g}"
    if lowest[0].adjusted < 1:
        smallest = "the smallest p-value: " + "; ".join(_sentence(one, names) for one in lowest)
    return "no evidence found", (), [f"No check sees a class that stands apart ({smallest})."]


def _sentence(noticed: Noticed, names: Sequence[str]) -> str:
    """Return who noticed which classes, and the p-value."""
    who = " and ".join(noticed.checks) + (" together" if len(noticed.checks) > 1 else "")
    aims = [_class(k, names) for k in noticed.classes[:_MAX_NAMED]]
    if len(noticed.classes) > _MAX_NAMED:
        aims.append(f"{len(noticed.classes) - _MAX_NAMED} more")
    towards = " and ".join(aims) or "no single class"
    return f"{who}, towards {towards}: adjusted p = {noticed.adjusted:.2g}"


def _mappings(done: Sequence[Checked], level: float, names: Sequence[str]) -> list[str]:
    """Return which class is turned into which, for the checks that are evidence of a mapping."""
    sentences = []
    for c in done:
        pairs = c.report.findings[0].mapping if c.report is not None and c.report.findings else ()
        if pairs and c.adjusted is not None and c.adjusted <= level:
            shown = [f"{_class(a, names)} into {_class(b, names)}" for a, b in pairs[:_MAX_NAMED]]
            more = f", and {len(pairs) - _MAX_NAMED} more" if len(pairs) > _MAX_NAMED else ""
            sentences.append(f"The patch that {c.check.name} found turns {', '.join(shown)}{more}.")
    return sentences


def _class(label: int, names: Sequence[str]) -> str:
    name = names[label][:_MAX_NAME]
    return f"class {label}" if name == str(label) else f"{name} (class {label})"


def _correction(done: Sequence[Checked], left_out: Sequence[str], level: float) -> list[str]:
    """Return how many checks the p-values are corrected for, where they are fewer than usual."""
    count = sum(c.p_value is not None for c in done)
    sentences = []
    unneeded = [c for c in done if c.status == "not needed"]
    if unneeded:
        names = ", ".join(c.check.name for c in unneeded)
        sentences.append(f"The question was answered before the other checks began: {names} did not run.")
    if count:
        checks = "1 check that gave a p-value" if count == 1 else f"{count} checks that gave a p-value"
        more = f" and the {len(unneeded)} that did not run" if unneeded else ""
        sentences.append(f"The p-values are corrected for the {checks}{more}.")
    if left_out:
        sentences.append(
            f"Not asked for: {', '.join(left_out)}. A scan of all usual checks corrects for more of them."
        )
        judged, agreed = _adjusted(done, len(unneeded))
        usual, together = _adjusted(done, len(unneeded) + len(left_out))
        smallest, with_all = (
            min((one.adjusted for one in _ranked(*both)), default=1.0)
            for both in ((judged, agreed), (usual, together))
        )
        if smallest <= level < with_all:
            sentences.append(
                f"Corrected for those as well, the smallest p-value is {with_all:.2g}, which is no evidence: "
                "who tries one check after the other is bound to find something."
            )
    return sentences


def _triggers(done: Sequence[Checked], suspected: Sequence[int]) -> list[RecoveredTrigger]:
    """Return the first trigger of each check, those of suspected classes first, then by p-value."""
    ranked: list[tuple[bool, float, RecoveredTrigger]] = []
    for c in done:
        findings = c.report.findings if c.report is not None else ()
        trigger = next((finding.trigger for finding in findings if finding.trigger is not None), None)
        if trigger is not None:
            order = c.adjusted if c.adjusted is not None else 2.0
            ranked.append((trigger.label not in suspected, order, replace(trigger, check=c.check.name)))
    return [trigger for _, _, trigger in sorted(ranked, key=lambda item: item[:2])]
