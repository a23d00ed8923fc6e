"""A cut of the shipped suite ``smoke-v1`` through every command of ``unbackdoor bench``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benching import PATIENCE, bench, cells, left_behind
from forms import require_form
from unbackdoor.bench.rows import read_rows, write_rows

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]
SUITE = "smoke-v1"
CUT = "*/badnets/[nf][ot]*"  # none and ft, each at two budgets with two draws
REPAIRS = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the cut has been run."""
    store = tmp_path_factory.mktemp("smoke")
    words = ("run", SUITE, "--store", store, "--only", CUT, "--quiet", "--json")
    out, err = bench(*words)
    told = json.loads(out)
    require_form(told, "bench run")
    assert (told["suite"], told["finished"], err) == (SUITE, True, "")
    assert (told["done"], told["failed"], told["running"]) == (1 + REPAIRS, 0, 0)
    assert left_behind(store) == []
    return store


def test_a_second_run_has_nothing_to_do(store: Path) -> None:
    bench("run", SUITE, "--store", store, "--only", CUT, "--quiet")
    assert sum(cell.tries for cell in cells(store, SUITE)) == 1 + REPAIRS


def test_status(store: Path) -> None:
    out, _ = bench("status", "--store", store, "--json")
    told = json.loads(out)
    assert told["failed"] == []
    assert told["suites"].keys() == {SUITE}
    assert told["suites"][SUITE]["done"] == 1 + REPAIRS


def test_exported_rows_are_whole_and_the_attack_took(store: Path, tmp_path: Path) -> None:
    bench("export", SUITE, "--store", store, "--out", tmp_path / "rows.jsonl")
    found = read_rows(tmp_path / "rows.jsonl")
    assert [row.defense for row in found] == ["none", "ft"] * (REPAIRS // 2)
    assert {(row.clean_images, row.defender_seed) for row in found} == {(10, 0), (10, 1), (50, 0), (50, 1)}
    for row in found:
        assert row.error is None and row.acc is not None
        assert row.acc_before is not None and row.acc_before > 0.9
        assert row.asr_before is not None and row.asr_before > 0.9
        assert row.seconds is not None and row.peak_mb is not None and "fp32" in row.device
        if row.defense == "none":
            assert (row.acc, row.asr, row.ra, row.der) == (
                row.acc_before,
                row.asr_before,
                row.ra_before,
                0.5,
            )


def test_parquet_holds_the_same_rows(store: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (extra: parquet)")
    bench("export", SUITE, "--store", store, "--out", tmp_path / "rows.jsonl")
    bench("export", SUITE, "--store", store, "--out", tmp_path / "rows.parquet", "--format", "parquet")
    # Read through memory: pyarrow's own threads outlive a test that reads a file.
    table = parquet.read_table(tmp_path / "rows.parquet", use_threads=False)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert table.to_pylist() == lines


def test_the_report_is_one_page_that_loads_nothing(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib (extra: report)")
    bench("report", SUITE, "--store", store, "--out", tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "badnets" in page and not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "badnets" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_rows_differ_from_nothing_but_others(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bench("export", SUITE, "--store", store, "--out", file)
    out, _ = bench("diff", SUITE, str(file), "--store", store)
    assert out == "0 differences\n"
    first, *others = read_rows(file)
    write_rows(file, [first.model_copy(update={"acc": 0.5}), *others])
    out, _ = bench("diff", SUITE, str(file), "--store", store, "--json", code=1)
    (one,) = json.loads(out)["differences"]
    assert one["columns"] == {"acc": [first.acc, 0.5]}


def test_nothing_of_it_would_be_cleaned_away(store: Path) -> None:
    before = sorted(store.rglob("*"))
    out, _ = bench("clean", "--store", store, "--dry-run")
    assert out == "0 folders would go\n"
    assert sorted(store.rglob("*")) == before
