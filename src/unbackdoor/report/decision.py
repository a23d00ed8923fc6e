"""The top of an audit's page: verdict, what to do, how sure, and the numbers that a reader needs first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unbackdoor.audit.assessment import Assessment
from unbackdoor.audit.outcome import OutcomeVerdict
from unbackdoor.audit.purifying import Purification
from unbackdoor.audit.scanning import Audit
from unbackdoor.audit.verification import Verification
from unbackdoor.report.class_plots import short_number
from unbackdoor.report.words import interval, logits_in_words, loss_in_words, percent, rate

Tone = Literal["good", "fair", "bad"]
Name = Callable[[int], str]
_OUTCOMES: Mapping[OutcomeVerdict, tuple[Tone, str]] = {
    "repaired": ("good", "Repaired: no trigger is found any more"),
    "weakened": ("fair", "Weakened: it is not shown that no trigger works any more"),
    "not repaired": ("bad", "Not repaired"),
    "undecided": ("fair", "Whether anything was repaired could not be decided"),
    "nothing was done": ("fair", "Nothing was done"),
}


@dataclass(frozen=True)
class Fact:
    """One of the boxes under the verdict."""

    term: str
    text: str
    small: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Decision:
    """Verdict and what follows from it.

    Attributes:
        tone: Its colour.
        headline: The verdict in plain words.
        facts: What to do, how sure, clean accuracy, repair.
        sentences: The reasons.
    """

    tone: Tone
    headline: str
    facts: Sequence[Fact]
    sentences: Sequence[str]


def decide(
    name: Name,
    *,
    audit: Audit | None = None,
    purification: Purification | None = None,
    verification: Verification | None = None,
    assessment: Assessment | None = None,
) -> Decision:
    """Return the top of the page of one or several results."""
    tone: Tone = "fair"
    headline = "The model was examined"
    sentences: list[str] = []
    if audit is not None:
        tone, headline = _verdict(audit, name)
        sentences += audit.reasons
    if purification is not None:
        if audit is None:
            tone, headline = _OUTCOMES[purification.outcome.verdict]
            headline = f"{headline}: {_method(purification)}"
        sentences += purification.outcome.reasons
        sentences += _of_the_repair(purification)
    if verification is not None:
        if assessment is None:
            tone, headline = _compared(verification)
        sentences.append(
            f"The two models give the same class to {percent(verification.agreement.value)} of the images."
        )
        if verification.logits is not None and not verification.identical and assessment is None:
            sentences.append(logits_in_words(verification.logits))
    if assessment is not None:
        tone, headline, sentences = _brought(assessment, tone, headline, sentences, name)
    scanned = audit if audit is not None else (None if verification is None else verification.before)
    facts = [Fact("What to do", *_advice(scanned, purification, verification, assessment))]
    if scanned is not None:
        facts.append(_certainty(scanned))
    facts += _accuracy(purification, verification, assessment)
    facts += _repair(purification, verification, assessment)
    return Decision(tone, headline, facts, sentences)


def _brought(
    done: Assessment, tone: Tone, headline: str, sentences: list[str], name: Name
) -> tuple[Tone, str, list[str]]:
    """Return the verdict where a trigger that the user brought works, though no check sees it."""
    working = [t for t, r in zip(done.triggers, done.success, strict=True) if r.total and r.value > 0.5]
    if done.verdict != "backdoor found" and done.purification is not None and working:
        text = f"The trigger that was brought turns images into {name(working[0].label)}"
        return "bad", text, [f"The checks by themselves say: {done.verdict}.", *sentences]
    return tone, headline, sentences


def _verdict(audit: Audit, name: Name) -> tuple[Tone, str]:
    if audit.verdict == "backdoor found":
        if not audit.classes:
            return "bad", "Evidence of a backdoor"
        named = ", ".join(name(k) for k in audit.classes[:3])
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
    if worst is None:
        return "fair", "No trigger was recovered, so that none could be tried on the second model"
    return "good", "The recovered triggers do not work on the second model"


def _method(done: Purification) -> str:
    return str(done.purified.method.get("name", "the method"))


def _of_the_repair(done: Purification) -> list[str]:
    changed = sum(c.changed for c in done.changes)
    what = f"{changed:,} numbers in {len(done.changes):,} tensors" if done.changes else "nothing"
    summary = f"{_method(done)} changed {what}"
    if done.accuracy is not None:
        then, now = percent(done.accuracy.before.value), percent(done.accuracy.after.value)
        summary += f"; clean accuracy went from {then} to {now}"
    sentences = [summary + "."]
    sentences += done.remarks
    if done.promise is not None:
        sentences.append(done.promise.in_words())
    sentences += [f"Mind: {text}." for text in done.left_behind]
    if done.flattered:
        sentences.append("These accuracies are flattered: " + "; ".join(done.flattered) + ".")
    if done.accuracy is not None and done.loss_bias != "fair":
        sentences.append(loss_in_words(done.loss_bias))
    return sentences


def _advice(
    audit: Audit | None,
    purification: Purification | None,
    verification: Verification | None,
    assessment: Assessment | None,
) -> tuple[str, str, str]:
    """Return what to do, a remark in small print, and the tone."""
    if assessment is not None and purification is not None:
        repaired = assessment.written.get("model", "")
        where = f" A repaired copy is here: {repaired.rpartition('/')[2]}." if repaired else ""
        if assessment.outcome == "repaired":
            return (
                "Do not deploy this model." + where,
                "The recovered triggers no longer work on the copy. Test it on your own task before use.",
                "bad",
            )
        return (
            "Do not deploy this model, nor the copy as it is.",
            f"The repair is not complete.{where} Ask for a model of known origin, or for more images.",
            "bad",
        )
    if purification is not None and audit is None:
        if purification.outcome.verdict != "repaired":
            return "Do not deploy the copy.", "It is not shown that it is repaired.", "bad"
        return "Compare both models with unbackdoor verify.", "A repair never marks its own work.", ""
    if verification is not None and assessment is None:
        tone, _ = _compared(verification)
        if tone == "bad":
            return "Do not deploy the second model.", "", "bad"
        return "Test the second model on your own task before you use it.", "", ""
    if audit is None:
        return "Scan the model.", "", ""
    if audit.verdict == "backdoor found":
        return "Do not deploy this model.", "Repair a copy, or ask for a model of known origin.", "bad"
    if audit.verdict == "undecided":
        return "Do not decide on this yet.", _wanting(audit), "fair"
    return (
        "Nothing here speaks against the model.",
        "That is no certificate: treat it as any model of unknown origin.",
        "good",
    )


def _wanting(audit: Audit) -> str:
    """Return what would decide it."""
    wanted = []
    if not audit.facts.get("images"):
        wanted.append("Give clean images, at best 50 of each class.")
    elif not audit.facts.get("labelled"):
        wanted.append("Give labelled images.")
    if any(c.status == "out of budget" for c in audit.checks):
        wanted.append("Give a larger budget.")
    if any(c.status == "failed" for c in audit.checks):
        wanted.append("Look at the checks that failed.")
    if audit.reservations:
        wanted.append("Ask for the weights alone: the file holds what no check can see.")
    return " ".join(wanted) or "Ask for more clean images, and see the reasons below."


def _certainty(audit: Audit) -> Fact:
    done = sum(c.status == "ran" for c in audit.checks)
    text = f"{done} of {len(audit.checks)} checks done"
    strongest = min((n.adjusted for n in audit.noticed), default=None)
    allowed = f"{100 * audit.level:g} of 100"
    if audit.verdict == "backdoor found" and strongest is not None:
        small = (
            f"Strongest evidence: adjusted p = {short_number(strongest)}. Up to {allowed} clean models "
            "would be accused wrongly."
        )
    elif audit.verdict == "no evidence found":
        small = "The checks see some kinds of backdoors, and not all."
    else:
        small = "No check came to evidence, and something is missing."
    unfinished = [c.check.name for c in audit.checks if c.status != "ran"]
    if unfinished:
        small += " Not done: " + ", ".join(unfinished) + "."
    return Fact("How sure", text, small)


def _accuracy(
    purification: Purification | None, verification: Verification | None, assessment: Assessment | None
) -> list[Fact]:
    both = verification.accuracy if verification is not None else None
    both = both or (purification.accuracy if purification is not None else None)
    if both is not None:
        low, high = (100 * end for end in both.drop_interval)
        text = f"{rate(both.before)} before, {rate(both.after)} after"
        small = f"of {both.before.total} images; loss {100 * both.drop:.1f} points ({low:.1f} to {high:.1f})"
        return [Fact("Clean accuracy", text, small)]
    if assessment is not None and assessment.accuracy is not None:
        own = assessment.accuracy
        return [Fact("Clean accuracy", rate(own), f"of {own.total} images (95 % interval {interval(own)})")]
    return []


def _repair(
    purification: Purification | None, verification: Verification | None, assessment: Assessment | None
) -> list[Fact]:
    residues: Sequence[Any] = ()
    if verification is not None:
        residues = verification.residues
    elif purification is not None:
        residues = purification.residues
    measured = [r for r in residues if r.before.total and r.after.total]
    if not measured:
        return []
    worst = max(measured, key=lambda r: float(r.after.value))
    text = f"{rate(worst.before)} before, {rate(worst.after)} after"
    outcome = assessment.outcome if assessment is not None else None
    if outcome is None and purification is not None:
        outcome = purification.outcome.verdict
    small = f"on {worst.after.total} images of other classes"
    small += f"; the repair: {outcome}" if outcome else ""
    return [Fact("Success of the trigger", text, small, _OUTCOMES[outcome][0] if outcome else "")]
