"""Render the committed rows of suites into pages: results/SUITE.jsonl -> docs/results/SUITE.md.

python scripts/results.py            # all of them
"""

from __future__ import annotations

from pathlib import Path

from unbackdoor.bench.rows import read_rows, read_scans
from unbackdoor.files import atomic_write
from unbackdoor.report.bench import bench_report

ROOT = Path(__file__).parents[1]
RESULTS, PAGES = ROOT / "results", ROOT / "docs" / "results"
OTHERS = {
    "foundation",
    "foreign-models",
    "screening",
    "remedies",
}  # rows that a script of their own renders


def suites() -> list[str]:
    """Return the labels of the suites whose rows are committed."""
    names = [file.stem for file in sorted(RESULTS.glob("*.jsonl")) if not file.stem.endswith(".scans")]
    return [name for name in names if name not in OTHERS]


def page(label: str) -> str:
    """Return the Markdown page of a suite."""
    rows, scans = read_rows(RESULTS / f"{label}.jsonl"), read_scans(RESULTS / f"{label}.scans.jsonl")
    colophon = (
        f"Made by `python scripts/results.py` from the {len(rows):,} rows of `results/{label}.jsonl`; "
        f"measured by `unbackdoor bench run {label}`."
    )
    return bench_report(rows, scans=scans, colophon=colophon).markdown()


def main() -> None:
    """Write all pages."""
    for label in suites():
        with atomic_write(PAGES / f"{label}.md") as draft:
            draft.write_text(page(label), encoding="utf-8")


if __name__ == "__main__":
    main()
