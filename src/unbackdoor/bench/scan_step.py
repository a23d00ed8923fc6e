"""The step that scans a victim, in a process of its own; see :mod:`unbackdoor.bench.steps`."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from unbackdoor.bench.steps import ARTEFACTS, EVIDENCE, MODEL, clean_data_of, cost_of, model_of, run_of
from unbackdoor.engine.canonical_form import CanonicalForm, form_for_checks
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import atomic_write, finite, write_json
from unbackdoor.types import Classifier, CleanData


def scan_step(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a scanner on the model and the clean images of its folder, and leave its findings there."""
    spec, run, clean = task["spec"], run_of(task, folder), clean_data_of(folder, task)
    model = model_of(folder / MODEL)
    report = scan(
        spec["scanner"],
        model,
        clean,
        form=_form(model, clean, run),
        options=spec["options"],
        seed=run.seed,
        device=run.device,
        precision=run.precision.name,
        progress=run.show,
    )
    plain = (asdict(replace(one, artefacts={}, trigger=None)) for one in report.findings)
    findings = [{name: value for name, value in one.items() if name != "trigger"} for one in plain]
    facts = {"findings": findings, "errors": dict(report.errors), "skipped": dict(report.skipped)}
    write_json(folder / EVIDENCE, finite(facts))
    tensors = {
        f"{n}.{name}": value.contiguous()
        for n, one in enumerate(report.findings)
        for name, value in {**one.artefacts, **(one.trigger.tensors() if one.trigger else {})}.items()
    }
    if tensors:
        with atomic_write(folder / ARTEFACTS) as draft:
            save_file(tensors, draft)
    strongest = report.findings[0] if report.findings else None
    return {
        "verdict": report.verdict,
        "classes": sorted(strongest.classes) if strongest else [],
        "statistic": strongest.statistic if strongest else "",
        "value": strongest.value if strongest and math.isfinite(strongest.value) else None,
        "p_value": strongest.p_value if strongest else None,
        **cost_of(report.seconds, clean, run),
    }


def _form(model: Classifier, clean: CleanData, run: Run) -> CanonicalForm | None:
    """Return the form in which `unbackdoor scan` shows a model to its checks; None where there is none."""
    try:
        return form_for_checks(model, clean, run)
    except UnbackdoorError:
        return None  # the scanner says itself why it cannot work
