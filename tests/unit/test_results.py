"""Committed numbers: every page is what its rows say, and the rows are whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from unbackdoor.bench.rows import read_rows, read_scans

ROOT = Path(__file__).parents[2]


def imported(file: Path) -> ModuleType:
    """Import a script, which stands in no package, by its file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def foundation() -> ModuleType:
    """The script that makes the page."""
    return imported(ROOT / "scripts" / "foundation.py")


def test_the_foundation_page_is_made_from_its_rows(foundation: ModuleType) -> None:
    rows = read_rows(foundation.RESULTS)
    assert foundation.PAGE.read_text(encoding="utf-8") == foundation.render(rows)


def test_the_foundation_rows_are_whole(foundation: ModuleType) -> None:
    rows = read_rows(foundation.RESULTS)
    found = {(row.attack, row.defense, row.preset, row.defender_seed) for row in rows}
    wanted = {
        (attack, defense, preset, seed)
        for attack in foundation.ATTACKS
        for defense, preset in foundation.DEFENSES
        for seed in foundation.DEFENDER_SEEDS
    }
    assert found == wanted
    assert len(rows) == len(wanted)


OTHER_COLUMNS = {
    "foreign-models",
    "screening",
    "remedies",
}  # rows of scripts, which are no cells of a suite


@pytest.mark.parametrize(
    "file",
    [
        f
        for f in sorted((ROOT / "results").glob("*.jsonl"))
        if not {f.stem, f.suffixes[0][1:]} & {*OTHER_COLUMNS, "scans"}
    ],
    ids=lambda f: f.stem,
)
def test_rates_are_rates_and_der_follows_from_them(file: Path) -> None:
    for row in read_rows(file):
        rates = [row.acc, row.asr, row.ra, row.acc_before, row.asr_before, row.ra_before]
        assert all(rate is None or 0 <= rate <= 1 for rate in rates)
        assert (row.acc is None) == (row.error is not None)
        if row.asr is None or row.asr_before is None or row.acc is None or row.acc_before is None:
            continue
        assert row.ra is not None
        assert row.asr + row.ra <= 1 + 1e-9
        der = (max(0, row.asr_before - row.asr) - max(0, row.acc_before - row.acc) + 1) / 2
        assert row.der == pytest.approx(der)


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*-v*.jsonl")), ids=lambda f: f.stem)
def test_rows_of_versioned_code_name_their_commit_and_their_victims(file: Path) -> None:
    read = read_scans if file.suffixes[0] == ".scans" else read_rows
    for row in read(file):
        # The older rows without a commit were exported from results that did not carry one yet.
        assert not row.code or (row.commit and row.victim_code)


def test_every_suite_page_is_made_from_its_rows() -> None:
    pytest.importorskip("matplotlib", reason="the report draws charts (extra: report)")
    pages = imported(ROOT / "scripts" / "results.py")
    for label in pages.suites():
        assert (pages.PAGES / f"{label}.md").read_text(encoding="utf-8") == pages.page(label)


@pytest.mark.parametrize("script", ["foreign_models", "screening", "four_systems", "detection", "remedies"])
def test_every_other_page_is_made_from_its_rows(script: str) -> None:
    module = imported(ROOT / "scripts" / f"{script}.py")
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


def test_the_measured_table_is_made_from_its_records() -> None:
    render = imported(ROOT / "benchmarks" / "render.py")
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert page == render.readme(page, ROOT / "benchmarks" / "measured")


@pytest.mark.parametrize("attack", ["badnets", "blended", "wanet", "sig", "none"])
def test_the_training_page_quotes_its_rows(attack: str) -> None:
    row = next(row for row in read_rows(ROOT / "results" / "foundation.jsonl") if row.attack == attack)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").lower()
    line = next(line for line in page.splitlines() if line.startswith(f"| {attack}"))
    assert row.acc_before is not None
    assert f"| {100 * row.acc_before:.2f} % |" in line
    assert (f"| {100 * row.asr_before:.2f} % |" in line) if row.asr_before is not None else ("| | " in line)
