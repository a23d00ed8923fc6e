"""Committed numbers: every page is what its rows say, and the rows are whole."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from unbackdoor.bench.code_version import is_current, is_current_of
from unbackdoor.bench.rows import (
    ProbeRow,
    Row,
    ScanRow,
    read_probes,
    read_rows,
    read_scans,
    write_rows,
)
from unbackdoor.report.tables import ABSENT, LEGEND, OLDER

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
def pages() -> ModuleType:
    """The script that makes the pages."""
    pytest.importorskip("matplotlib", reason="the report draws charts (extra: report)")
    return imported(ROOT / "scripts" / "results.py")


def test_the_foundation_rows_are_whole() -> None:
    rows = read_rows(ROOT / "results" / "foundation.jsonl")
    found = {(row.attack, row.defense, row.preset, row.defender_seed) for row in rows}
    defenses = {(row.defense, row.preset) for row in rows}
    wanted = {
        (attack, *defense, seed)
        for attack in ("badnets", "blended", "wanet", "sig", "none")
        for defense in defenses
        for seed in (0, 1)
    }
    assert found == wanted
    assert len(rows) == len(wanted) == 60


OTHER_COLUMNS = {
    "few-classes",
    "foreign-models",
    "full-size",
    "screening",
    "remedies",
}  # rows of scripts, which are no cells of a suite


@pytest.mark.parametrize(
    "file",
    [
        f
        for f in sorted((ROOT / "results").glob("*.jsonl"))
        if not {f.stem, f.suffixes[0][1:]} & {*OTHER_COLUMNS, "scans", "probes"}
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
    read = {".scans": read_scans, ".probes": read_probes}.get(file.suffixes[0], read_rows)
    for row in read(file):
        # The older rows without a commit were exported from results that did not carry one yet.
        assert not row.code or (row.commit and row.victim_code)


def names() -> list[str]:
    """Return the pages of results, by the files that are there."""
    return sorted(file.stem for file in (ROOT / "docs" / "results").glob("*.md"))


@pytest.mark.parametrize("name", names())
def test_every_page_is_made_from_its_rows(pages: ModuleType, name: str) -> None:
    assert (pages.PAGES / f"{name}.md").read_text(encoding="utf-8") == pages.page(name), (
        "python scripts/results.py makes the pages anew, with marks for rows whose code has changed since"
    )


def test_no_page_and_no_rows_are_forgotten(pages: ModuleType) -> None:
    assert sorted(pages.documents()) == names()
    files = {file.name.split(".")[0] for file in (ROOT / "results").glob("*.jsonl")}
    assert files <= set(pages.documents())


@pytest.mark.parametrize("name", names())
def test_a_page_marks_rows_of_older_code_and_no_others(pages: ModuleType, name: str) -> None:
    words = "measured by code that has changed since"  # the meaning of the mark
    fresh, old = pages.page(name, lambda row: True), pages.page(name, lambda row: False)
    assert not any(OLDER in line for line in fresh.splitlines() if words not in line)
    assert ABSENT not in "".join(line for line in fresh.splitlines() if words not in line)
    for table in tables(old):
        assert any(OLDER in line for line in table)
        assert all(OLDER in line for line in table[2:] if not line.startswith(FREE)), table
    assert old.count(LEGEND) == len(tables(old)), "one legend for each table"


ROW = {
    "suite": "s", "dataset": "d", "architecture": "a", "width": 1, "recipe": "r", "attack": "badnets",
    "poison_rate": 0.1, "victim_seed": 0, "clean_images": 1, "defender_seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "read", "ending"),
    [
        (Row, read_rows, ".jsonl"),
        (ScanRow, read_scans, ".scans.jsonl"),
        (ProbeRow, read_probes, ".probes.jsonl"),
    ],
    ids=["repairs", "scans", "probes"],
)
@pytest.mark.parametrize(("old", "new", "kept"), [("", "", 2), ("", "b", 2), ("a", "b", 2), ("a", "", 1)])
def test_a_merge_keeps_the_row_that_names_its_code(
    tmp_path: Path, old: str, new: str, kept: int, kind: Any, read: Any, ending: str
) -> None:
    """Else a row of unknown code took the place of a row whose code is known."""
    method = "scanner" if kind is ScanRow else "defense"
    lines = [kind(**ROW, **{method: name}) for name in ("none", "ft")]
    place, beside = f"rows{ending}", f"new{ending}"
    for name in ("rows.jsonl", "new.jsonl"):
        (tmp_path / name).touch()
    write_rows(tmp_path / place, [row.model_copy(update={"code": old, "seconds": 1}) for row in lines[:1]])
    write_rows(tmp_path / beside, [row.model_copy(update={"code": new, "seconds": 2}) for row in lines])
    command = [sys.executable, str(ROOT / "scripts" / "merge_rows.py"), "rows.jsonl", "new.jsonl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    merged = [(getattr(row, method), row.code, row.seconds) for row in read(tmp_path / place)]
    assert merged == [("none", new if kept == 2 else old, kept), ("ft", new, 2)]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("foreign_models", {"model": "m", "what": "scan"}),
        ("foreign_models", {"model": "m", "what": "purify", "method": "ft"}),
        ("screening", {"attack": "a", "screener": "strip"}),
        ("screening", {"attack": "a", "screener": "trigger recovery"}),
        ("remedies", {"system": "ims", "attack": "badnets", "sample": 1}),
    ],
)
def test_rows_of_scripts_name_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: dict[str, Any]
) -> None:
    """They had none, so that every such row was one of older code."""
    file = ROOT / "scripts" / f"{name}.py"
    script = imported(file)
    monkeypatch.setattr(script, "ROWS", tmp_path / "rows.jsonl")
    if name == "remedies":  # which writes all rows of a victim at once
        (tmp_path / "badnets-1-seed0-1").mkdir()
        (tmp_path / "badnets-1-seed0-1" / "model.safetensors").touch()
        monkeypatch.setattr(script, "VICTIMS", tmp_path)
        trial = SimpleNamespace(tried=lambda system: None, rows=[{"attack": "badnets"}])
        monkeypatch.setattr(script, "Trial", lambda victim, sample: trial)
        script.run("ims", "badnets", 1)
    else:
        script._add(row)
    (written,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == {**row, "code": written["code"]}
    assert is_current_of(file)(written)
    assert not is_current_of(file)(row)
    assert not is_current_of(file)({**written, "code": "0" * 16})


FREE = ("| current code ", "| before | ")  # lines that hold no row of a method


def tables(page: str) -> list[list[str]]:
    """Return the tables of a page, each as its lines."""
    blocks = [block.splitlines() for block in page.split("\n\n")]
    return [block for block in blocks if block[0].startswith("| ")]


def test_a_cell_that_is_a_row_has_its_own_mark(pages: ModuleType) -> None:
    text = pages.page("remedies", lambda row: row["attack"] != "wanet")
    for table in tables(text):
        heads = table[0].split(" | ")
        for line in table[2:]:
            for head, cell in zip(heads[1:], line.split(" | ")[1:], strict=True):
                assert (OLDER in cell) == ("wanet" in head and cell.strip(" |") != "-"), line


def test_prose_quotes_the_rows(pages: ModuleType) -> None:
    """Numbers in prose were typed by hand, and so outlived their rows."""
    named = set()
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = file.read_text(encoding="utf-8")
        names = re.findall(r"<!-- (\S+): made by scripts/results\.py -->", text)
        named |= {*names}
        assert (file in pages.QUOTING) == bool(names), file
        assert all(text.count(pages.END.format(name)) == 1 for name in names)
        # A line of text that begins with a mark is no paragraph in Markdown.
        assert not re.search(r"^<!-- detection", text, re.MULTILINE)
        assert text == pages.quoting(file), "python scripts/results.py makes it anew"
    assert named == set(pages.quotes())
    # The count of the whole scan stands between marks only.
    hits = re.search(r"found (\d+) and", pages.detection_sentence())
    assert hits is not None
    for file in pages.QUOTING:
        between = re.compile(r"<!-- \S+: made.*?<!-- end of \S+ -->", re.DOTALL)
        assert not re.search(rf"\b{hits[1]}\b.*\bfound|found {hits[1]}\b", between.sub("", file.read_text()))


def test_prose_marks_what_older_code_measured(pages: ModuleType) -> None:
    for name, make in pages.quotes().items():
        assert OLDER not in make(lambda row: True), name
        assert OLDER in make(lambda row: False), name


def test_the_guide_quotes_the_rows_and_promises_nothing(pages: ModuleType) -> None:
    guide = pages.GUIDE.read_text(encoding="utf-8")
    assert "removes the most" not in guide
    block = guide[guide.index(pages.BEGIN.format("methods")) : guide.index(pages.END.format("methods"))]
    lines = {line.split(" ")[1]: line.split(" | ") for line in block.splitlines() if line.startswith("| ")}
    head = lines["method"]
    assert set(pages.METHODS) <= {name.replace("\\", "") for name in lines}
    foreign = [
        json.loads(line) for line in (ROOT / "results" / "foreign-models.jsonl").read_text().splitlines()
    ]
    for method in ("ims", "tac", "neural_cleanse"):
        left = [100 * row["asr"] for row in foreign if row.get("method") == method]
        cell = lines[method.replace("_", "\\_")][head.index("ASR left there")]
        assert cell == f"{min(left):.1f} to {max(left):.1f} %"


@pytest.mark.parametrize("name", names())
def test_a_page_says_what_it_is_and_no_diary(pages: ModuleType, name: str) -> None:
    text = (pages.PAGES / f"{name}.md").read_text(encoding="utf-8").lower()
    assert "what a reader may conclude" in text
    for diary in ("aim |", "missed |", "at hand", "| aim", "was tried", "a machine that was busy", "todo"):
        assert diary not in text.replace("| missed | undecided |", ""), diary


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
    assert (OLDER in line) != is_current(row.model_dump())
    assert LEGEND in page or OLDER not in line
    assert (f"| {100 * row.asr_before:.2f} % |" in line) if row.asr_before is not None else ("| | " in line)
