"""The page of an audit: the verdict in plain words, its evidence, and what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.audit.purifying import Purification, Residue
from unbackdoor.audit.scanning import Audit, Checked
from unbackdoor.audit.verification import Verification
from unbackdoor.report.page import render
from unbackdoor.report.pictures import data_png
from unbackdoor.report.words import duration, logits_in_words, percent
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Finding, Images

UNFOLDED_CLASSES = 12  # rows of a chart that are seen at once; the others are folded
MAX_CLASSES = 200  # rows of the folded table; more would only make the page heavy
MAX_IMAGES = 6
PICTURE_SIDE = 160  # pixels; twice the width of a picture on the page, and 24 of them stay under 2 MB
MAX_TRIGGERS = 3
MAX_CHANGES = 40
MAX_NAME = 300  # characters of a name that comes from a file

Tone = Literal["good", "fair", "bad"]


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
    """

    title: str
    class_names: Sequence[str]
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    command: str = ""
    colophon: str = ""

    def name(self, label: int) -> str:
        """Return the name of a class, with its number where it is another word."""
        if label >= len(self.class_names):
            return f"class {label}"
        name = self.class_names[label][:MAX_NAME]
        return f"class {label}" if name == str(label) else f"{name} (class {label})"


@dataclass(frozen=True)
class Row:
    """One class in a chart."""

    name: str
    value: str
    share: float
    suspect: bool


@dataclass(frozen=True)
class Arrow:
    """One source class of a mapping and its target, as lines of a drawing."""

    source: str
    target: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    """The numbers of all classes under one statistic, most suspicious first."""

    check: str
    statistic: str
    direction: str
    rows: Sequence[Row]
    folded: Sequence[Row] = ()
    left_out: int = 0
    mapping: Sequence[Arrow] = ()


@dataclass(frozen=True)
class Picture:
    """A user's image without and with a recovered trigger, and what the model says to both."""

    clean: str
    triggered: str
    answers: tuple[str, str] | None = None


@dataclass(frozen=True)
class TriggerView:
    """A recovered trigger as pictures."""

    title: str
    about: str
    pattern: str
    mask: str | None
    pictures: Sequence[Picture] = field(default=())


def audit_page(
    subject: Subject,
    *,
    audit: Audit | None = None,
    purification: Purification | None = None,
    verification: Verification | None = None,
    images: Images | None = None,
    answers: Sequence[Sequence[tuple[int, int]]] = (),
) -> str:
    """Return the page as HTML that loads nothing from anywhere and runs no script.

    Args:
        subject: The subject of the page.
        audit: A scan, if one was made.
        purification: A repair, if one was made.
        verification: A comparison, if one was made.
        images: The user's images that triggers are drawn over; no more than a few are taken.
        answers: For every trigger, for each of those images, the classes without and with it.
    """
    displayed = audit if audit is not None else (verification.before if verification is not None else None)
    tone, headline, sentences = _headline(subject, audit, purification, verification)
    return render(
        "audit.html",
        subject=subject,
        tone=tone,
        headline=headline,
        sentences=sentences,
        audit=displayed,
        checks=[_check(c, subject) for c in displayed.checks] if displayed is not None else [],
        charts=_charts(displayed, subject) if displayed is not None else [],
        triggers=_views(displayed, subject, images, answers) if displayed is not None else [],
        purification=purification,
        verification=verification,
        accuracy=_accuracy(purification, verification),
        proof_is_fit=purification is not None and purification.proof_is_fit,
        residues=[_residue(r, subject) for r in _residues(purification, verification)],
        after=_after(verification, subject),
        changes=_changes(purification, verification),
        limits=_limits(displayed, purification),
    )


def _headline(
    subject: Subject,
    audit: Audit | None,
    purification: Purification | None,
    verification: Verification | None,
) -> tuple[Tone, str, list[str]]:
    sentences: list[str] = []
    tone: Tone = "fair"
    headline = "The model was looked at"
    if audit is not None:
        tone, headline = _verdict(audit, subject)
        sentences += audit.reasons
    if purification is not None:
        accuracy = purification.accuracy
        method = purification.purified.method.get("name", "the method")
        if audit is None:
            headline = f"The model was repaired by {method}"
        summary = f"{method} changed {_count(purification.changes)}"
        if accuracy is not None:
            then, now = percent(accuracy.before.value), percent(accuracy.after.value)
            summary += f"; clean accuracy went from {then} to {now}"
        sentences.append(summary + ".")
        if purification.promise is not None:
            sentences.append(purification.promise.in_words())
        sentences += [f"Mind: {text}." for text in purification.left_behind]
        if purification.flattered:
            sentences.append("These accuracies are flattered: " + "; ".join(purification.flattered) + ".")
    if verification is not None:
        tone, headline = _compared(verification)
        sentences.append(
            f"The two models give the same class to {percent(verification.agreement.value)} of the images."
        )
        if verification.logits is not None and not verification.identical:
            sentences.append(logits_in_words(verification.logits))
    return tone, headline, sentences


def _verdict(audit: Audit, subject: Subject) -> tuple[Tone, str]:
    if audit.verdict == "backdoor found":
        if not audit.classes:
            return "bad", "Evidence of a backdoor"
        named = ", ".join(subject.name(k) for k in audit.classes[:3])
        more = f" and {len(audit.classes) - 3} more" if len(audit.classes) > 3 else ""
        return "bad", f"Evidence of a backdoor towards {named}{more}"
    if audit.verdict == "no evidence found":
        return "good", "No evidence of a backdoor was found"
    return "fair", "Whether there is a backdoor could not be decided"


def _compared(done: Verification) -> tuple[Tone, str]:
    if done.identical:
        return "fair", "The two models have the same weights"
    worst = max((r.after.value for r in done.residues if r.after.total), default=None)
    drop = done.accuracy.drop if done.accuracy is not None else 0.0
    if done.after.verdict == "backdoor found":
        return "bad", "There is evidence of a backdoor in the second model"
    if worst is not None and worst > 0.5:
        return "bad", "A trigger recovered from the first model still works on the second"
    if drop > 0.05:
        return "fair", "The second model does its task noticeably worse"
    return "good", "The recovered triggers do not work on the second model"


def _check(checked: Checked, subject: Subject) -> dict[str, Any]:
    results = {
        "ran": "",
        "skipped": "not run",
        "failed": "failed",
        "out of budget": "out of time",
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
    return {
        "name": checked.check.name,
        "question": checked.check.question,
        "result": result,
        "tone": "bad" if result in ("backdoor found", "failed") else "",
        "classes": classes if checked.p_value is not None else "",
        "p_value": _number(checked.p_value),
        "adjusted": _number(checked.adjusted),
        "counted": checked.p_value is not None,
        "seconds": duration(checked.seconds) if checked.seconds else "",
        "notes": [note[: 2 * MAX_NAME] for note in notes],
    }


def _charts(audit: Audit, subject: Subject) -> list[Chart]:
    charts = []
    order = sorted(audit.checks, key=lambda c: 2.0 if c.adjusted is None else c.adjusted)
    for checked in order:
        for finding in checked.report.findings[:1] if checked.report is not None else ():
            if len(finding.per_class) >= 2:
                charts.append(_chart(checked, finding, audit, subject))
    return charts


def _chart(checked: Checked, finding: Finding, audit: Audit, subject: Subject) -> Chart:
    values = list(finding.per_class)
    finite = [value for value in values if math.isfinite(value)]
    top, bottom = max(finite, default=1.0), min(0.0, *finite, 0.0) if finite else 0.0
    span = (top - bottom) or 1.0
    suspects = set(finding.classes) if audit.accuses(checked) else set()
    # Suspects first, then by distance from the median: outliers are of interest.
    middle = sorted(finite)[len(finite) // 2] if finite else 0.0

    def place(k: int) -> tuple[bool, float]:
        return (k not in suspects, -abs(values[k] - middle) if math.isfinite(values[k]) else math.inf)

    order = sorted(range(len(values)), key=place)

    def row(k: int) -> Row:
        finite_value = math.isfinite(values[k])
        return Row(
            subject.name(k),
            _number(values[k]) if finite_value else "none",
            (values[k] - bottom) / span if finite_value else 0.0,
            k in suspects,
        )

    rows = [row(k) for k in order[:MAX_CLASSES]]
    many = len(values) > UNFOLDED_CLASSES
    return Chart(
        checked.check.name,
        finding.statistic,
        finding.direction,
        rows[:UNFOLDED_CLASSES] if many else rows,
        rows[UNFOLDED_CLASSES:] if many else (),
        max(0, len(values) - MAX_CLASSES),
        _arrows(finding, subject) if audit.accuses(checked) else (),
    )


def _arrows(finding: Finding, subject: Subject) -> list[Arrow]:
    """Return the mapping of classes as lines from the source's place to the target's."""
    pairs = sorted(finding.mapping)[:MAX_CLASSES]
    places = {k: place for place, k in enumerate(sorted({k for pair in pairs for k in pair}))}
    return [
        Arrow(subject.name(source), subject.name(target), places[source] + 0.5, places[target] + 0.5)
        for source, target in pairs
    ]


def _views(
    audit: Audit, subject: Subject, images: Images | None, answers: Sequence[Sequence[tuple[int, int]]]
) -> list[TriggerView]:
    views = []
    for i, trigger in enumerate(audit.triggers[:MAX_TRIGGERS]):
        pictures = []
        if images is not None and len(images):
            examples = images.subset(list(range(min(MAX_IMAGES, len(images)))))
            after = trigger.stamp(examples)
            for j in range(len(examples)):
                answer = answers[i][j] if i < len(answers) and j < len(answers[i]) else None
                pictures.append(
                    Picture(
                        data_png(_displayable(examples.pixels[j]), largest=PICTURE_SIDE),
                        data_png(_displayable(after.pixels[j]), largest=PICTURE_SIDE),
                        None if answer is None else (subject.name(answer[0]), subject.name(answer[1])),
                    )
                )
        views.append(
            TriggerView(
                f"Towards {subject.name(trigger.label)}",
                _about(trigger),
                data_png(_pattern(trigger), largest=PICTURE_SIDE),
                None if trigger.mask is None else data_png(_bytes(trigger.mask[None]), largest=PICTURE_SIDE),
                pictures,
            )
        )
    return views


def _about(trigger: RecoveredTrigger) -> str:
    if trigger.mask is not None:
        size = float(trigger.mask.sum())
        share = size / trigger.mask.numel()
        text = f"Its mask covers as much as {size:.1f} whole pixels ({percent(share)} of the image)."
    else:
        mean = 255 * float(trigger.pattern.abs().mean())
        text = f"It is added to every pixel, on average {mean:.1f} of 255 steps."
    if trigger.success is not None and math.isfinite(trigger.success):
        text += f" It turns {percent(trigger.success)} of images that it was not made from into the class."
    return text


def _pattern(trigger: RecoveredTrigger) -> Tensor:
    if trigger.mask is not None:
        return _bytes(_rgb(trigger.pattern * trigger.mask))
    # A faint pattern around grey, stretched so that it can be seen.
    largest = float(trigger.pattern.abs().max()) or 1.0
    return _bytes(_rgb(0.5 + trigger.pattern / (2 * largest)))


def _rgb(pattern: Tensor) -> Tensor:
    return pattern if len(pattern) in (1, 3) else pattern.mean(0, keepdim=True)


def _displayable(pixels: Tensor) -> Tensor:
    return pixels if len(pixels) in (1, 3) else pixels.float().mean(0, keepdim=True).to(torch.uint8)


def _bytes(values: Tensor) -> Tensor:
    return (values.float() * 255).round().clamp(0, 255).to(torch.uint8)


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


def _after(verification: Verification | None, subject: Subject) -> list[dict[str, Any]]:
    if verification is None:
        return []
    pairs = zip(verification.before.checks, verification.after.checks, strict=True)
    return [{"before": _check(one, subject), "after": _check(other, subject)} for one, other in pairs]


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
    return {
        "rows": rows[:MAX_CHANGES],
        "more": max(0, len(rows) - MAX_CHANGES),
        "total": _count(source.changes),
    }


def _count(changes: Sequence[Any]) -> str:
    entries = sum(c.changed for c in changes)
    return f"{entries:,} numbers in {len(changes):,} tensors" if changes else "nothing"


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


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.3g}"
