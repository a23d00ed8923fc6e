"""Add newly exported rows to the committed ones.

    unbackdoor bench export SUITE --out new.jsonl
    python scripts/merge_rows.py results/SUITE.jsonl new.jsonl

A suite of many days is measured in pieces, and a method may change between two of them. An export holds only
what the present code made. This keeps the committed rows that the export has no newer one for, and those that
say which code made them, in their column ``code``, where the newer one does not. The scans and the
probes beside both files are merged too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from unbackdoor.bench.rows import ProbeRow, Row, ScanRow, read_probes, read_rows, read_scans, write_rows

R = TypeVar("R", Row, ScanRow, ProbeRow)


def main() -> None:
    """Merge rows, and scans and probes where there are some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("committed", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    write_rows(arguments.committed, merged(read_rows(arguments.committed), read_rows(arguments.new)))
    committed, new = (path.with_suffix(".scans.jsonl") for path in (arguments.committed, arguments.new))
    if new.exists():
        write_rows(committed, merged(read_scans(committed), read_scans(new)))
    committed, new = (path.with_suffix(".probes.jsonl") for path in (arguments.committed, arguments.new))
    if new.exists():
        write_rows(committed, merged(read_probes(committed), read_probes(new)))


def merged(committed: Iterable[R], new: Iterable[R]) -> list[R]:
    """Return the rows of both, newer ones in the places of older ones of the same key, others at the end.

    A newer row without ``code`` does not take the place of one with it.
    """
    rows = {row.key(): row for row in committed}
    for row in new:
        if row.code or row.key() not in rows or not rows[row.key()].code:
            rows[row.key()] = row
    return list(rows.values())


if __name__ == "__main__":
    main()
