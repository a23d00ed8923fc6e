"""Rows as CSV for other programs, and as Markdown and LaTeX tables to read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from unbackdoor.bench.rows import Row
from unbackdoor.files import atomic_write
from unbackdoor.text import printable

# What a table to read shows; the other columns are in the forms for programs.
_READ = (
    "dataset", "architecture", "width", "attack", "poison_rate", "victim_seed", "defense", "scanner",
    "preset",
    "clean_images", "altered", "acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der",
    "verdict", "p_value", "right", "target_found", "error",
)  # fmt: skip
_PERCENT = {"acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der"}
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
        "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)  # fmt: skip
_MARKDOWN = str.maketrans({"|": r"\|", "\\": r"\\", "<": "&lt;", ">": "&gt;", "_": r"\_", "*": r"\*"})


def write_csv(path: Path, rows: Sequence[BaseModel], kind: type[BaseModel] = Row) -> None:
    """Write rows of a kind as CSV, atomically; lists as JSON, and nothing where there is no value."""
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(kind.model_fields))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.model_dump().items()})


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    if isinstance(value, str):
        text = printable(value)
        # A spreadsheet takes what begins so as a formula, and runs it.
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return value


def write_table(
    path: Path, rows: Sequence[BaseModel], kind: type[BaseModel] = Row, *, latex: bool = False
) -> None:
    """Write the columns that are read, as a Markdown table or a LaTeX tabular with the rules of booktabs.

    Rates are in percent. Columns without any value are left out.
    """
    columns = [name for name in _READ if name in kind.model_fields]
    values = [[_text(name, getattr(row, name)) for name in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in values)]
    names = [columns[i].replace("_", " ") + (" (%)" if columns[i] in _PERCENT else "") for i in used]
    table = [names, *([row[i] for i in used] for row in values)]
    with atomic_write(path) as draft:
        draft.write_text(_latex(table) if latex else _markdown(table), encoding="utf-8")


def _text(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{100 * value:.1f}" if name in _PERCENT else f"{value:.4g}"
    return printable(value)[:80]


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.translate(_MARKDOWN) for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def _latex(table: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in table]
    head = [rf"\begin{{tabular}}{{{'l' * len(table[0])}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"
