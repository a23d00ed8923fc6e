"""The page of an audit: verdict and what to do first, then pictures, evidence, and what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor.audit.assessment import Assessment
from unbackdoor.audit.checks import Check
from unbackdoor.audit.purifying import Purification, Residue
from unbackdoor.audit.scanning import Audit, Checked
from unbackdoor.audit.standards import STANDARDS
from unbackdoor.audit.verification import Verification
from unbackdoor.engine.differential_survey import GAP
from unbackdoor.metrics import Rate
from unbackdoor.report.class_plots import DotPlot, dot_plot, short_number
from unbackdoor.report.decision import decide
from unbackdoor.report.page import render
from unbackdoor.report.trigger_strips import Example, TriggerView, trigger_view
from unbackdoor.report.words import duration, percent
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Finding
from unbackdoor.weights.triggers import MAX_KEPT

MAX_IMAGES = 6
MAX_TRIGGERS = MAX_KEPT
MAX_CHANGES = 40
MAX_NAME = 300  # characters of a name that comes from a file
_MOST_CLASSES = 200  # rows of the accuracies


@dataclass(frozen=True)
class Subject:
    """The subject of the page, in words.

    Attributes:
        title: Of the page, such as the file's name.
        class_names: In label order.
        facts: Terms and texts about the file and how it was opened.
        warnings: Warnings that the reader must see before the result.
        command: Command that repeats the audit.
        colophon: Last line of the page.
        date: When it was made.
    """

    title: str
    class_names: Sequence[str]
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    command: str = ""
    colophon: str = ""
    date: str = ""

    def name(self, label: int) -> str:
        """Return the name of a class, with its number where it is another word."""
        if label >= len(self.class_names):
            return f"class {label}"
        name = self.class_names[label][:MAX_NAME]
        return f"class {label}" if name == str(label) else f"{name} (class {label})"


@dataclass(frozen=True)
class Pair:
    """A rate before and after a repair, as a row of a chart; places in percent."""

    name: str
    small: str
    before: Rate
    after: Rate


def audit_page(
    subject: Subject,
    *,
    audit: Audit | None = None,
    purification: Purification | None = None,
    verification: Verification | None = None,
    assessment: Assessment | None = None,
    triggers: Sequence[RecoveredTrigger] | None = None,
    examples: Sequence[Sequence[Example]] = (),
) -> str:
    """Return the page as HTML that loads nothing from anywhere and runs no script.

    Args:
        subject: The subject of the page.
        audit: A scan, if one was made.
        purification: A repair, if one was made.
        verification: A comparison, if one was made.
        assessment: A whole audit, which has all three.
        triggers: The triggers that are shown; None: those of the scan.
        examples: For every trigger, images that it is drawn over, the most convincing first.
    """
    if assessment is not None:
        audit, purification = assessment.scan, assessment.purification
        verification = assessment.verification
    displayed = audit if audit is not None else (verification.before if verification is not None else None)
    if triggers is None:
        triggers = displayed.triggers if displayed is not None else ()
    success = _success(assessment)
    views = [
        trigger_view(
            trigger,
            examples[i][:MAX_IMAGES] if i < len(examples) else (),
            subject.name,
            success[i] if i < len(success) else None,
        )
        for i, trigger in enumerate(triggers[:MAX_TRIGGERS])
    ]
    decision = decide(
        subject.name,
        audit=audit,
        purification=purification,
        verification=verification,
        assessment=assessment,
    )
    accuracy = _accuracy(purification, verification)
    residues = _residues(purification, verification)
    return render(
        "audit.html",
        subject=subject,
        decision=decision,
        audit=displayed,
        checks=[_check(c, subject) for c in displayed.checks] if displayed is not None else [],
        charts=[
            *(_gaps(purification, subject) if purification is not None else []),
            *(_charts(displayed, subject) if displayed is not None else []),
        ],
        triggers=views,
        with_repaired=any(s.repaired is not None for v in views for s in v.strips),
        purification=purification,
        verification=verification,
        accuracy=accuracy,
        pairs=_pairs(accuracy, residues, subject),
        class_pairs=_class_pairs(accuracy),
        proof_is_fit=purification is not None and purification.proof_is_fit,
        residues=[_residue(r, subject) for r in residues],
        after=_after(verification, subject),
        changes=_changes(purification, verification),
        steps=_steps(assessment),
        files=list(assessment.written.items()) if assessment is not None else [],
        standards=STANDARDS if displayed is not None else (),
        limits=_limits(displayed, purification),
    )


def _success(assessment: Assessment | None) -> Sequence[Rate]:
    return () if assessment is None else assessment.success


def _steps(assessment: Assessment | None) -> list[dict[str, str]]:
    return [
        {
            "name": step.name,
            "what": step.what,
            "status": step.status,
            "result": step.result[: 2 * MAX_NAME],
            "seconds": duration(step.seconds) if step.seconds else "",
            "tone": {"failed": "bad", "left out": "fair", "interrupted": "fair"}.get(step.status, ""),
        }
        for step in (assessment.steps if assessment is not None else ())
    ]


def _check(checked: Checked, subject: Subject) -> dict[str, Any]:
    results = {
        "ran": "",
        "skipped": "not run",
        "failed": "failed",
        "out of budget": "out of budget",
        "interrupted": "interrupted",
        "not needed": "not needed",
    }
    classes = ", ".join(subject.name(k) for k in checked.classes[:3])
    if len(checked.classes) > 3:
        classes += f" and {len(checked.classes) - 3} more"
    result = results[checked.status]
    if checked.report is not None:
        result = checked.report.verdict
    notes = [checked.reason] if checked.reason else []
    if checked.report is not None:
        notes += [f"{name}: {text}" for name, text in checked.report.skipped.items()]
        notes += [f"{name} failed: {text}" for name, text in checked.report.errors.items()]
    tones = {"backdoor found": "bad", "failed": "bad", "undecided": "fair", "out of budget": "fair"}
    return {
        "name": checked.check.name,
        "question": checked.check.question,
        "result": result,
        "tone": tones.get(result, ""),
        "classes": classes if checked.p_value is not None else "",
        "p_value": short_number(checked.p_value),
        "adjusted": short_number(checked.adjusted),
        "counted": checked.p_value is not None,
        "seconds": duration(checked.seconds) if checked.seconds else "",
        "notes": [note[: 2 * MAX_NAME] for note in notes],
    }


def _charts(audit: Audit, subject: Subject) -> list[DotPlot]:
    charts = []
    order = sorted(audit.checks, key=lambda c: 2.0 if c.adjusted is None else c.adjusted)
    for checked in order:
        for finding in checked.report.findings[:1] if checked.report is not None else ():
            if len(finding.per_class) >= 2:
                suspects = finding.classes if audit.accuses(checked) else ()
                accused = audit.accuses(checked)
                charts.append(dot_plot(checked, finding, suspects, subject.name, accused=accused))
    return charts


def _gaps(purification: Purification, subject: Subject) -> list[DotPlot]:
    """Return the gap of each class where the method compared the model with a re-learned twin."""
    evidence = purification.purified.evidence
    gaps, convicted = evidence.get("gaps"), evidence.get("convicted")
    if not isinstance(gaps, list) or not isinstance(convicted, list):
        return []  # of another method
    if len(gaps) != purification.model.classes or not all(type(gap) is float for gap in gaps):
        return []
    suspects = [one.get("class", -1) for one in convicted if isinstance(one, dict)]
    finding = Finding(
        statistic="by how much larger a share of images a change moves in the model than in its twin",
        value=max(gaps),
        direction="large: a change moves the model and not a copy that learned the task anew",
        threshold=GAP,
        threshold_source="smallest gap that convicts; it must stand out from the other classes as well",
        classes=tuple(k for k in suspects if 0 <= k < len(gaps)),
        per_class=tuple(gaps),
    )
    question = "Which class do changes lead to that leave a re-learned copy of the model alone?"
    return [dot_plot(Checked(Check("auto", "auto", question), "ran"), finding, suspects, subject.name)]


def _accuracy(purification: Purification | None, verification: Verification | None) -> Any:
    if verification is not None:
        return verification.accuracy
    return purification.accuracy if purification is not None else None


def _residues(purification: Purification | None, verification: Verification | None) -> tuple[Residue, ...]:
    if verification is not None:
        return verification.residues
    return purification.residues if purification is not None else ()


def _residue(residue: Residue, subject: Subject) -> dict[str, Any]:
    return {
        "name": f"towards {subject.name(residue.trigger.label)}",
        "check": residue.trigger.check,
        "before": residue.before,
        "after": residue.after,
    }


def _pairs(accuracy: Any, residues: Sequence[Residue], subject: Subject) -> list[Pair]:
    """Return the rows of the chart: clean accuracy, and every trigger that was tried."""
    rows = [] if accuracy is None else [Pair("Clean accuracy", "", accuracy.before, accuracy.after)]
    return rows + [
        Pair(f"Trigger towards {subject.name(r.trigger.label)}", r.trigger.check, r.before, r.after)
        for r in residues
        if r.before.total and r.after.total
    ]


def _class_pairs(accuracy: Any) -> list[Pair]:
    rows = [] if accuracy is None else [Pair(name[:MAX_NAME], "", *two) for name, *two in accuracy.per_class]
    return sorted(rows, key=lambda row: row.after.value - row.before.value)[:_MOST_CLASSES]


def _after(verification: Verification | None, subject: Subject) -> list[dict[str, Any]]:
    if verification is None:
        return []
    later = {checked.check.name: checked for checked in verification.after.checks}
    return [
        {"before": _check(one, subject), "after": _check(later[one.check.name], subject)}
        for one in verification.before.checks
        if one.check.name in later
    ]


def _changes(purification: Purification | None, verification: Verification | None) -> dict[str, Any]:
    source = verification if verification is not None else purification
    if source is None:
        return {"rows": [], "more": 0, "total": ""}
    rows = [
        {
            "name": c.name[:MAX_NAME],
            "channels": f"{c.channels:,} of {c.of_channels:,}",
            "changed": f"{c.changed:,} of {c.entries:,}",
            "relative": percent(c.relative) if math.isfinite(c.relative) else "new",
        }
        for c in sorted(source.changes, key=lambda c: -c.relative)
    ]
    entries = sum(c.changed for c in source.changes)
    return {
        "rows": rows[:MAX_CHANGES],
        "more": max(0, len(rows) - MAX_CHANGES),
        "total": f"{entries:,} numbers in {len(source.changes):,} tensors" if source.changes else "nothing",
    }


def _limits(audit: Audit | None, purification: Purification | None) -> list[str]:
    limits = []
    if audit is not None:
        limits.append(
            "A scan finds the kinds of backdoors that its checks look for. One that is built against them, "
            "or whose trigger is neither small nor faint nor moves the features in one direction, can go "
            "unseen; so silence is not a certificate."
        )
        limits.append(
            f"Of clean models, {percent(audit.level)} are accused wrongly: this is what the level means, and "
            "it holds as far as the nulls of the checks do."
        )
        limits.append(
            "A recovered trigger is a pattern that works, not necessarily the attacker's: every network has "
            "patterns that fool it, and only unusually small or faint ones are evidence."
        )
    if purification is not None:
        limits.append(
            "That a recovered trigger no longer works does not prove that the attacker's does not. Without "
            "the trigger itself nobody can measure that."
        )
        if purification.proof_is_fit:
            limits.append(
                "There were too few images to keep any from the method, so the accuracies are flattered."
            )
    return limits


__all__ = ["Example", "Pair", "Subject", "TriggerView", "audit_page"]
