"""What users may import is pinned, and importing it costs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import unbackdoor

SURFACE = {
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
    "__version__",
}


def test_the_surface_is_the_one_that_was_promised() -> None:
    assert set(unbackdoor.__all__) == SURFACE
    assert set(dir(unbackdoor)) >= SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_name_of_the_surface_is_there(name: str) -> None:
    assert getattr(unbackdoor, name) is not None


def test_names_are_the_things_themselves_and_not_copies() -> None:
    from unbackdoor.attacks import AttackTruth
    from unbackdoor.audit.verbs import run

    assert unbackdoor.AttackTruth is AttackTruth
    assert unbackdoor.run is run


def test_an_unknown_name_is_refused_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'heal'"):
        unbackdoor.heal  # noqa: B018


def test_every_error_is_an_unbackdoor_error() -> None:
    errors = [getattr(unbackdoor, name) for name in SURFACE]
    errors = [e for e in errors if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) == 12
    assert all(issubclass(error, unbackdoor.UnbackdoorError) for error in errors)


def test_the_version_is_the_one_of_the_distribution() -> None:
    assert unbackdoor.__version__ == version("unbackdoor")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, unbackdoor, unbackdoor.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_extra_that_an_error_names_exists() -> None:
    """Two were named and not declared, so that the remedy did nothing."""
    root = Path(unbackdoor.__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for file in (root / "src").rglob("*.py")
        for match in re.finditer(
            r'MissingExtra\(\s*"\w+",\s*"(\w+)"|import_library\([^)]*extra="(\w+)"', file.read_text()
        )
        for extra in match.groups()
        if extra
    }
    assert {"zoo", "hf", "onnx", "scan"} <= named <= set(declared)
