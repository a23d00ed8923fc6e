"""Find backdoors in neural-network classifiers, remove them, and prove what was done.

What stands in ``__all__`` is the public surface; everything else may move. Names are imported at their
first use, so that ``import unbackdoor`` does not cost the import of torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import (
    ConfigError,
    DiskFull,
    EngineFailed,
    InputError,
    IntegrityError,
    MethodFailed,
    MissingExtra,
    TooFewImages,
    UnbackdoorError,
    UnsafeFile,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from unbackdoor.attacks import AttackTruth
    from unbackdoor.audit.assessment import Assessment
    from unbackdoor.audit.auditing import audit
    from unbackdoor.audit.comparison import Accuracy, TensorChange
    from unbackdoor.audit.json_records import record
    from unbackdoor.audit.outcome import Outcome
    from unbackdoor.audit.purifying import PromiseBroken, Purification, Residue
    from unbackdoor.audit.scanning import Audit, Checked
    from unbackdoor.audit.screening import ScreenedImages, screen
    from unbackdoor.audit.steps import Step
    from unbackdoor.audit.unlearning import Unlearning, unlearn
    from unbackdoor.audit.verbs import purify, run, scan, verify
    from unbackdoor.audit.verification import Verification
    from unbackdoor.bench.backdoorbench import ImportedAttack, import_backdoorbench
    from unbackdoor.bench.judge import Scores
    from unbackdoor.bench.listing import listing
    from unbackdoor.bench.verbs import Evaluation, Victim, evaluate, train
    from unbackdoor.data.datasets import DataSet, load_dataset
    from unbackdoor.data.loaders import load_images
    from unbackdoor.engine.run import Run
    from unbackdoor.metrics import Rate
    from unbackdoor.networks import build
    from unbackdoor.opening import patching as patch
    from unbackdoor.opening.classifier_files import load_model, save_model
    from unbackdoor.opening.inspection import Inspection, inspect
    from unbackdoor.opening.open_model import Opened, open_model
    from unbackdoor.opening.provenance import Provenance
    from unbackdoor.opening.zero_shot import zero_shot
    from unbackdoor.report import statement
    from unbackdoor.report.json_output import json_schema
    from unbackdoor.report.saving import save_report, save_sarif
    from unbackdoor.report.tracking import log_to_mlflow
    from unbackdoor.triggers import RecoveredTrigger, Suspicion
    from unbackdoor.types import (
        Augmentation,
        Classifier,
        CleanData,
        Finding,
        Images,
        Purified,
        ScanReport,
        Screening,
        Verdict,
    )
    from unbackdoor.weights.source import Source, open_source

    list = listing  # see ``_HIDING_BUILTINS``

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "Assessment",
    "AttackTruth",
    "Audit",
    "Augmentation",
    "Checked",
    "Classifier",
    "CleanData",
    "ConfigError",
    "DataSet",
    "DiskFull",
    "EngineFailed",
    "Evaluation",
    "Finding",
    "Images",
    "ImportedAttack",
    "InputError",
    "Inspection",
    "IntegrityError",
    "MethodFailed",
    "MissingExtra",
    "Opened",
    "Outcome",
    "PromiseBroken",
    "Provenance",
    "Purification",
    "Purified",
    "Rate",
    "RecoveredTrigger",
    "Residue",
    "Run",
    "ScanReport",
    "Scores",
    "ScreenedImages",
    "Screening",
    "Source",
    "Step",
    "Suspicion",
    "TensorChange",
    "TooFewImages",
    "UnbackdoorError",
    "Unlearning",
    "UnsafeFile",
    "UnsupportedModel",
    "Verdict",
    "Verification",
    "Victim",
    "__version__",
    "audit",
    "build",
    "evaluate",
    "import_backdoorbench",
    "inspect",
    "json_schema",
    "load_dataset",
    "load_images",
    "load_model",
    "log_to_mlflow",
    "open_model",
    "open_source",
    "patch",
    "purify",
    "record",
    "run",
    "save_model",
    "save_report",
    "save_sarif",
    "scan",
    "screen",
    "statement",
    "train",
    "unlearn",
    "verify",
    "zero_shot",
]

_HOMES = {
    "Accuracy": "unbackdoor.audit.comparison",
    "Assessment": "unbackdoor.audit.assessment",
    "AttackTruth": "unbackdoor.attacks",
    "Audit": "unbackdoor.audit.scanning",
    "Augmentation": "unbackdoor.types",
    "Checked": "unbackdoor.audit.scanning",
    "Classifier": "unbackdoor.types",
    "CleanData": "unbackdoor.types",
    "DataSet": "unbackdoor.data.datasets",
    "Evaluation": "unbackdoor.bench.verbs",
    "Finding": "unbackdoor.types",
    "Images": "unbackdoor.types",
    "ImportedAttack": "unbackdoor.bench.backdoorbench",
    "Inspection": "unbackdoor.opening.inspection",
    "Opened": "unbackdoor.opening.open_model",
    "Outcome": "unbackdoor.audit.outcome",
    "PromiseBroken": "unbackdoor.audit.purifying",
    "Purification": "unbackdoor.audit.purifying",
    "Purified": "unbackdoor.types",
    "Rate": "unbackdoor.metrics",
    "RecoveredTrigger": "unbackdoor.triggers",
    "Residue": "unbackdoor.audit.purifying",
    "Run": "unbackdoor.engine.run",
    "ScanReport": "unbackdoor.types",
    "Scores": "unbackdoor.bench.judge",
    "ScreenedImages": "unbackdoor.audit.screening",
    "Screening": "unbackdoor.types",
    "Step": "unbackdoor.audit.steps",
    "Suspicion": "unbackdoor.triggers",
    "TensorChange": "unbackdoor.audit.comparison",
    "Unlearning": "unbackdoor.audit.unlearning",
    "Verdict": "unbackdoor.types",
    "Verification": "unbackdoor.audit.verification",
    "Victim": "unbackdoor.bench.verbs",
    "build": "unbackdoor.networks",
    "evaluate": "unbackdoor.bench.verbs",
    "import_backdoorbench": "unbackdoor.bench.backdoorbench",
    "inspect": "unbackdoor.opening.inspection",
    "json_schema": "unbackdoor.report.json_output",
    "load_dataset": "unbackdoor.data.datasets",
    "load_images": "unbackdoor.data.loaders",
    "load_model": "unbackdoor.opening.classifier_files",
    "log_to_mlflow": "unbackdoor.report.tracking",
    "open_model": "unbackdoor.opening.open_model",
    "Provenance": "unbackdoor.opening.provenance",
    "Source": "unbackdoor.weights.source",
    "open_source": "unbackdoor.weights.source",
    "purify": "unbackdoor.audit.verbs",
    "record": "unbackdoor.audit.json_records",
    "save_report": "unbackdoor.report.saving",
    "save_sarif": "unbackdoor.report.saving",
    "run": "unbackdoor.audit.verbs",
    "save_model": "unbackdoor.opening.classifier_files",
    "scan": "unbackdoor.audit.verbs",
    "screen": "unbackdoor.audit.screening",
    "train": "unbackdoor.bench.verbs",
    "unlearn": "unbackdoor.audit.unlearning",
    "verify": "unbackdoor.audit.verbs",
    "zero_shot": "unbackdoor.opening.zero_shot",
}


# Verbs that are several functions, and the one whose room can be called.
_MODULES = {
    "audit": "unbackdoor.audit",
    "patch": "unbackdoor.opening.patching",
    "statement": "unbackdoor.report.statement",
}
# Not in ``__all__``, as the names of this kind in numpy: ``from unbackdoor import *`` leaves builtins alone.
_HIDING_BUILTINS = {"list": ("unbackdoor.bench.listing", "listing")}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return import_module(_MODULES[name])
    if name in _HIDING_BUILTINS:
        from importlib import import_module

        module, function = _HIDING_BUILTINS[name]
        return getattr(import_module(module), function)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> Iterable[str]:
    return sorted({*globals(), *__all__, *_HIDING_BUILTINS})
