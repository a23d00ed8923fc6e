"""Contracts on what a method returns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import FAMILIES, SUSPICION
from unbackdoor.testing.contract import METHODS, Result, Subject, contract, demand, state_of
from unbackdoor.testing.examples import block_data, clean_data, planted, tiny_classifier
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Classifier, CleanData, Finding, Images, Purified, ScanReport, Screening

# Evidence that a method must not report: the judge measures success, with a trigger that no method has.
CLAIMS = re.compile(r"\b(asr|acc|ra|attack success( rate)?|robust accuracy|test accuracy)\b")


MIN_ACCURACY = 0.7  # a repair that forgets the task is none; every tiny network starts above 0.95


@contract(
    *METHODS,
    name="any family",
    meaning="it works on every family of networks that it claims, and leaves what it was lent as it was",
)
def _any_family(subject: Subject) -> None:
    part = subject.part
    demand(part.families <= FAMILIES, f"there is no family {sorted(part.families - FAMILIES)}")
    demand(bool(part.families), "it claims no family")
    for family in sorted(FAMILIES):
        model, data = tiny_classifier(family), clean_data()
        before = state_of(model), data.fingerprint()
        try:
            result = subject.call(model, data)
        except UnsupportedModel as error:
            demand(family not in part.families, f"it claims the family {family}, and refused it: {error}")
            continue
        demand((state_of(model), data.fingerprint()) == before, f"{family}: something was left behind")
        demand(result.method["name"] == part.name and result.seconds >= 0, "the record is not its own")
        json.dumps(dict(result.method), allow_nan=False)
        if isinstance(result, Purified):
            demand(result.model.class_names == model.class_names, f"{family}: the class names changed")
            clean_accuracy = accuracy(result.model, data.all, Run.create(policy="fp32"))
            demand(
                clean_accuracy > MIN_ACCURACY,
                f"{family}: the repaired model is right on {clean_accuracy:.2f} of the clean images, "
                f"and must be on more than {MIN_ACCURACY}",
            )
        if isinstance(result, ScanReport):
            # With four classes, no law of the other classes can be calibrated.
            demand(result.verdict != "backdoor found", f"{family}: a clean network is accused")
            accounted_for = bool(result.coverage) or bool(result.skipped) or bool(result.errors)
            demand(
                accounted_for, f"{family}: the report does not say which checks ran and which were left out"
            )


@contract(
    *METHODS,
    name="same seed, same bytes",
    meaning="the seed decides, and neither earlier calls nor global generators do",
)
def _same_seed_same_bytes(subject: Subject) -> None:
    model, data = tiny_classifier(), clean_data()
    outputs = []
    for number in (1, 2):
        with rng.seeded(number):
            outputs.append(_plain(subject.call(model, data, seed=3)))
    demand(outputs[0] == outputs[1], "two calls with one seed differ")


@contract(
    *METHODS,
    name="evidence",
    meaning="what it says is plain JSON and finite, and does not judge its own success",
)
def _evidence(subject: Subject) -> None:
    # Eight classes, so that the tests of scanners run; the trigger is one that can be found.
    blocks, inputs = CleanData.split(block_data(96)), block_data(96, seed=4)
    settings: list[tuple[Classifier, CleanData, Images | None]] = [(tiny_classifier(), clean_data(), None)]
    # The planted network has no normalisation.
    most = subject.part.scanning.most_classes
    suits = most is None or planted().classes <= most
    if subject.part.kind != "defense" and "conv" in subject.part.families and suits:
        settings.append((planted((2,)), blocks, inputs))
    for model, data, screened in settings:
        result = subject.call(model, data, inputs=screened)
        if isinstance(result, ScanReport):
            demand(not result.partial, f"a check crashed: {dict(result.errors)}")
            for finding in result.findings:
                numbers = (finding.value, *finding.per_class)
                finite = all(math.isfinite(v) for v in numbers)
                finite &= all(bool(torch.isfinite(t).all()) for t in _tensors(finding))
                demand(finite, f"{finding.statistic}: a number is not finite")
                worded = finding.direction and finding.threshold_source
                demand(
                    bool(worded), f"{finding.statistic}: the direction or the threshold's source is missing"
                )
            keys = [f.statistic for f in result.findings]
        else:
            json.dumps(dict(result.evidence), allow_nan=False)
            keys = list(_keys(dict(result.evidence)))
        claims = [key for key in keys if CLAIMS.search(key.lower().replace("_", " ").replace("-", " "))]
        demand(not claims, f"it judges itself: {', '.join(claims)}")


@contract(
    "defense",
    name="a wrong suspicion",
    meaning="where it begins with what is suspected, and that is wrong, the result is sound still",
)
def _a_wrong_suspicion(subject: Subject) -> None:
    if SUSPICION not in subject.part.traits:
        return
    idle = RecoveredTrigger(3, torch.zeros(1, 8, 8), torch.zeros(8, 8))
    for suspicion in (Suspicion((3,), (0.01,)), Suspicion.of_triggers([idle])):
        result = subject.call(tiny_classifier(), clean_data(), suspicion=suspicion)
        assert isinstance(result, Purified)
        json.dumps(dict(result.evidence), allow_nan=False)
        clean_accuracy = accuracy(result.model, clean_data().all, Run.create(policy="fp32"))
        demand(clean_accuracy > MIN_ACCURACY, f"it is right on {clean_accuracy:.2f} of the clean images")


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _keys(inner)


def _plain(result: Result) -> str:
    """Return all that was said, exactly."""
    if isinstance(result, Purified):
        return result.model.sha256() + json.dumps(dict(result.evidence), sort_keys=True)
    if isinstance(result, Screening):
        columns = (result.scores, result.p_values, result.predicted, result.suspicious)
        return repr([c.tolist() for c in columns]) + json.dumps(dict(result.evidence), sort_keys=True)
    findings = [
        (f.statistic, f.value, f.p_value, f.classes, f.per_class, [t.tolist() for t in _tensors(f)])
        for f in result.findings
    ]
    return repr((result.verdict, findings, dict(result.skipped), dict(result.errors), result.coverage))


def _tensors(finding: Finding) -> list[Tensor]:
    """Return all tensors of a finding, those of its trigger included."""
    trigger = {} if finding.trigger is None else finding.trigger.tensors()
    return [*finding.artefacts.values(), *trigger.values()]
