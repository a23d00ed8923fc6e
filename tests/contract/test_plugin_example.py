"""The plug-in of docs/plugins.md is installed as its page says, and passes the tests that the page gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unbackdoor
import unbackdoor.plugins
from unbackdoor.registry import ARCHITECTURES, ATTACKS, DEFENSES, SCANNERS, SCREENERS
from unbackdoor.testing import checks_of
from unbackdoor.testing.contract import PARAMETERS

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
USER = """
import sys
import unbackdoor.plugins
assert "unbackdoor.attacks" not in sys.modules, "a defense that imports the surface imports the attacks"

sys.modules["pytest"] = None
from unbackdoor.testing import checks_of, tiny_classifier, tiny_data
next(checks_of("defense"))("clp_shares")
del sys.modules["pytest"]

import unbackdoor
data = unbackdoor.CleanData.split(tiny_data(80))
out = unbackdoor.run("clp_shares", tiny_classifier(), data, options={"step": 0.1})
assert out.method["name"] == "clp_shares" and out.evidence["channels"] == 48

import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_clp.py"]))
"""
SURFACE = {
    "attacks": {"AttackConfig", "Learning", "Stamp", "Tensors", "Trigger"},
    "channels": {"lipschitz_bounds", "mean_activations", "prunable_sites"},
    "data": {"augment", "batches", "resident", "to_float"},
    "decorators": {"architecture", "attack", "defense", "scanner", "screener"},
    "errors": {
        "ConfigError", "InputError", "MethodFailed", "TooFewImages", "UnbackdoorError", "UnsupportedModel",
    },
    "heads": {"AffineHead", "Head", "find_affine_head", "find_head"},
    "inference": {"accuracy", "frozen", "logits_of", "mode", "predict"},
    "masks": {
        "Masks", "Site", "channel_sites", "fold", "keep_above", "norm_sites", "removed", "unit_sites",
        "weight_sites",
    },
    "options": {"Config", "option", "FAMILIES", "INPUT_LABELS", "ONE_A_CLASS", "SUSPICION"},
    "run": {"Run", "run_defense", "run_scanner", "run_screener"},
    "screening": {"ScreenerConfig", "conformal_p_values", "features", "judged"},
    "selection": {"Choice", "harshest_within"},
    "statistics": {"Outlier", "Outliers", "smallest_few", "smallest_outlier"},
    "training": {"Recipe", "Trained", "train"},
    "types": {
        "Augmentation", "Classifier", "CleanData", "Finding", "Geometry", "Images", "Purified",
        "RecoveredTrigger", "ScanReport", "Screening", "Suspicion", "Verdict",
        "require_fit", "require_labels", "require_one_a_class",
    },
}  # fmt: skip


def test_the_surface_for_authors_is_the_one_that_was_promised() -> None:
    assert set(unbackdoor.plugins.__all__) == set.union(*SURFACE.values())
    assert set(dir(unbackdoor.plugins)) >= set(unbackdoor.plugins.__all__)
    for name in unbackdoor.plugins.__all__:
        assert getattr(unbackdoor.plugins, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'heal'"):
        unbackdoor.plugins.heal  # noqa: B018


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_runs_as_it_stands_on_the_page(tmp_path: Path) -> None:
    """In a process of its own, which finds it by its entry point, and needs pytest for its own test only."""
    plugin, test = blocks("python")
    (project,) = blocks("toml")
    facts = tomllib.loads(project)["project"]
    ((group, entries),) = facts["entry-points"].items()
    ((name, module),) = entries.items()
    (tmp_path / f"{module}.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "test_clp.py").write_text(test, encoding="utf-8")
    installed = tmp_path / f"clp_plugin-{facts['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {facts['name']}\nVersion: {facts['version']}\n", encoding="utf-8"
    )
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n", encoding="utf-8")
    surroundings = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USER],
        cwd=tmp_path,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_every_contract_and_every_group() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for kind in ("attack", "defense", "scanner", "screener"):
        for check in checks_of(kind):
            assert f"| {check.name} | {check.meaning} |" in text
        assert all(parameter in text for parameter in PARAMETERS[kind])
    for registry in (ARCHITECTURES, ATTACKS, DEFENSES, SCANNERS, SCREENERS):
        assert f"`{registry._package}`" in text
