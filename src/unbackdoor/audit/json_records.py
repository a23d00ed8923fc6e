"""Audits, purifications and verifications as JSON; tensors go to files of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unbackdoor.audit.assessment import Assessment
from unbackdoor.audit.cases import Case
from unbackdoor.audit.comparison import Accuracy, TensorChange, rate_facts
from unbackdoor.audit.outcome import Outcome
from unbackdoor.audit.purifying import Purification, Residue
from unbackdoor.audit.scanning import Audit, Checked
from unbackdoor.audit.standards import identifiers
from unbackdoor.audit.verification import Verification
from unbackdoor.files import finite
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Finding, ScanReport


def record(result: Audit | Purification | Verification | Assessment) -> dict[str, Any]:
    """Return what a verb returned as JSON, with what it is about and when it was made."""
    return {"date": result.date, **_record(result)}


def _record(result: Audit | Purification | Verification | Assessment) -> dict[str, Any]:
    if isinstance(result, Assessment):
        names = _names(result.case)
        return {
            **_subject(result.case, "model", "file_sha256"),
            **assessment_json(result, names),
            **_opened(result.case),
        }
    if isinstance(result, Audit):
        names = _names(result.case)
        return {
            **_subject(result.case, "model", "file_sha256"),
            **audit_json(result, names),
            **_opened(result.case),
        }
    if isinstance(result, Purification):
        return {
            **result.written,
            "sha256": result.facts["after_sha256"],
            **_subject(result.case, "source", "source_file_sha256"),
            "source_sha256": result.facts["before_sha256"],
            "clean_images": result.facts["images_for_the_method"],
            **purification_json(result, _names(result.case)),
            **_opened(result.case),
        }
    cases = result.cases
    before, after = (None, None) if cases is None else cases
    return {
        **_subject(before, "before", "before_file_sha256"),
        **_subject(after, "after", "after_file_sha256"),
        "comparison": verification_json(result, _names(before)),
        "opened": {"before": _opened(before)["opened"], "after": _opened(after)["opened"]},
    }


def _subject(case: Case | None, path: str, digest: str) -> dict[str, Any]:
    source = case.source if case is not None else None
    if source is None:
        return {path: None, digest: None}
    others = {file.path.name: file.sha256 for file in source.files[1:]}
    return {path: str(source.path), digest: source.sha256, f"{path}_other_files": others}


def _opened(case: Case | None) -> dict[str, Any]:
    opened = case.opened if case is not None else None
    return {"opened": None if opened is None else opened.provenance.to_dict()}


def _names(case: Case | None) -> Sequence[str]:
    return case.model.class_names if case is not None else ()


def audit_json(audit: Audit, class_names: Sequence[str]) -> dict[str, Any]:
    """Return a scan's answer as JSON."""
    return {
        "verdict": audit.verdict,
        "classes": [_class(k, class_names) for k in audit.classes],
        "reasons": list(audit.reasons),
        "reservations": list(audit.reservations),
        "doubts": list(audit.doubts),
        "partial": audit.partial,
        "interrupted": audit.interrupted,
        "level": audit.level,
        "corrected_for": audit.corrected_for,
        "left_out": list(audit.left_out),
        "noticed": [
            {
                "checks": list(n.checks),
                "classes": [_class(k, class_names) for k in n.classes],
                "adjusted_p_value": n.adjusted,
            }
            for n in audit.noticed
        ],
        "checks": [_check(c, class_names) for c in audit.checks],
        "agreed": [
            {"class": _class(a.label, class_names), "checks": list(a.checks), "adjusted_p_value": a.adjusted}
            for a in audit.agreed
        ],
        "triggers": [trigger_json(t, class_names) for t in audit.triggers],
        "seconds": round(audit.seconds, 3),
        **audit.facts,
    }


def assessment_json(done: Assessment, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what an audit came to as JSON; its parts are as those of the single verbs."""
    ended, planned = done.checks_done
    pairs = zip(done.triggers, done.success, strict=True)
    verified = done.verification
    return {
        "verdict": done.verdict,
        "classes": [_class(k, class_names) for k in done.classes],
        "reasons": list(done.reasons),
        "outcome": done.outcome,
        "partial": done.partial,
        "interrupted": done.interrupted,
        "planned_only": done.planned_only,
        "checks_done": ended,
        "checks_planned": planned,
        "accuracy": rate_facts(done.accuracy),
        "budget": done.budget,
        "seconds": round(done.seconds, 3),
        "seconds_per_image": done.cost,
        "steps": [step.to_dict() for step in done.steps],
        "triggers": [{**trigger_json(t, class_names), "success_before": rate_facts(r)} for t, r in pairs],
        "inspection": None if done.inspection is None else done.inspection.to_dict(),
        "scan": None if done.scan is None else audit_json(done.scan, class_names),
        "repair": None if done.purification is None else purification_json(done.purification, class_names),
        "comparison": None if verified is None else verification_json(verified, class_names),
        "written": dict(done.written),
        "answers_to": identifiers(),
    }


def purification_json(done: Purification, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what a repair did as JSON."""
    return {
        "method": dict(done.purified.method),
        "seconds": round(done.purified.seconds, 3),
        "accuracy": accuracy_json(done.accuracy),
        "accuracy_on_the_method's_images": done.proof_is_fit,
        "accuracy_flattered_because": list(done.flattered),
        "accuracy_loss_is": done.loss_bias,
        "outcome": _outcome(done.outcome, class_names),
        "promise": None if done.promise is None else done.promise.to_dict(),
        "suspicion": _suspicion(done, class_names),
        "remarks": list(done.remarks),
        "left_behind": list(done.left_behind),
        "changes": [change_json(c) for c in done.changes],
        "residual_triggers": [_residue(r, class_names) for r in done.residues],
        "evidence": finite(dict(done.purified.evidence)),
        **done.facts,
    }


def verification_json(done: Verification, class_names: Sequence[str]) -> dict[str, Any]:
    """Return a comparison of two models as JSON."""
    return {
        "identical": done.identical,
        "accuracy": accuracy_json(done.accuracy),
        "agreement": rate_facts(done.agreement),
        "logits": None if done.logits is None else done.logits.to_dict(),
        "changes": [change_json(c) for c in done.changes],
        "residual_triggers": [_residue(r, class_names) for r in done.residues],
        "before": audit_json(done.before, class_names),
        "after": audit_json(done.after, class_names),
        "seconds": round(done.seconds, 3),
        **done.facts,
    }


def accuracy_json(accuracy: Accuracy | None) -> dict[str, Any] | None:
    """Return a paired comparison of accuracies as JSON; None where there are no labels."""
    if accuracy is None:
        return None
    low, high = accuracy.drop_interval
    return {
        "before": rate_facts(accuracy.before),
        "after": rate_facts(accuracy.after),
        "drop": accuracy.drop,
        "drop_low": low,
        "drop_high": high,
        "lost": accuracy.lost,
        "gained": accuracy.gained,
        "agreement": rate_facts(accuracy.agreement),
        "per_class": [
            {"class": name, "before": rate_facts(before), "after": rate_facts(after)}
            for name, before, after in accuracy.per_class
        ],
    }


def change_json(change: TensorChange) -> dict[str, Any]:
    """Return what changed in a tensor as JSON."""
    return {
        "tensor": change.name,
        "entries": change.entries,
        "changed": change.changed,
        "channels": change.channels,
        "of_channels": change.of_channels,
        "relative": change.relative if math.isfinite(change.relative) else None,
    }


def trigger_json(trigger: RecoveredTrigger, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what is known of a recovered trigger, without its tensors."""
    facts: dict[str, Any] = {
        "class": _class(trigger.label, class_names),
        "check": trigger.check,
        "success": trigger.success,
        "form": "added to the image" if trigger.mask is None else "mixed in by a mask",
        "pattern_l2": float(trigger.pattern.double().norm()),
    }
    if trigger.mask is not None:
        facts["mask_l1"] = float(trigger.mask.double().sum())
    return facts


def report_json(report: ScanReport) -> dict[str, Any]:
    """Return a scanner's report as JSON; limits that nothing can reach are None."""
    return {
        "verdict": report.verdict,
        "partial": report.partial,
        "options": finite(dict(report.method.get("options", {}))),
        "findings": [finding_json(one) for one in report.findings],
        "errors": dict(report.errors),
        "skipped": dict(report.skipped),
        "coverage": list(report.coverage),
    }


def finding_json(one: Finding) -> dict[str, Any]:
    """Return one finding as JSON, without its tensors."""
    return {
        "statistic": one.statistic,
        "value": one.value if math.isfinite(one.value) else None,
        "direction": one.direction,
        "threshold": one.threshold if math.isfinite(one.threshold) else None,
        "threshold_source": one.threshold_source,
        "p_value": one.p_value,
        "classes": list(one.classes),
        "per_class": [value if math.isfinite(value) else None for value in one.per_class],
        "class_p_values": [value if math.isfinite(value) else None for value in one.class_p_values],
        "mapping": [list(pair) for pair in one.mapping],
    }


def _check(checked: Checked, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "check": checked.check.name,
        "question": checked.check.question,
        "status": checked.status,
        "reason": checked.reason,
        "p_value": checked.p_value,
        "adjusted_p_value": checked.adjusted,
        "classes": [_class(k, class_names) for k in checked.classes],
        "seconds": round(checked.seconds, 3),
        "report": None if checked.report is None else report_json(checked.report),
    }


def _residue(residue: Residue, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        **trigger_json(residue.trigger, class_names),
        "success_before": rate_facts(residue.before),
        "success_after": rate_facts(residue.after),
    }


def _outcome(outcome: Outcome, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "verdict": outcome.verdict,
        "reasons": list(outcome.reasons),
        "searches": [
            {
                "search": one.search,
                "found_before": [_class(k, class_names) for k in one.before],
                "found_after": [_class(k, class_names) for k in one.after],
                "as_easily_as_before": [_class(k, class_names) for k in one.as_easily],
                "failed": one.failed or None,
                **one.facts,
            }
            for one in outcome.searches
        ],
    }


def _suspicion(done: Purification, class_names: Sequence[str]) -> dict[str, Any] | None:
    if done.suspicion is None:
        return None
    pairs = zip(done.suspicion.classes, done.suspicion.p_values, strict=True)
    return {
        "classes": [{**_class(k, class_names), "p_value": p_value} for k, p_value in pairs],
        "triggers": len(done.suspicion.triggers),
        "led_the_method": done.led,
    }


def _class(label: int, class_names: Sequence[str]) -> dict[str, Any]:
    return {"index": label, "name": class_names[label] if label < len(class_names) else str(label)}
