"""The notebooks of the docs ran to their end, use names that exist, and show nothing of a machine."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import unbackdoor

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
_MACHINE = re.compile(r"/(home|root|tmp|work|Users)/|site-packages|[A-Z]:\\\\")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def source(cell: dict[str, Any]) -> str:
    return "\n".join(line for line in "".join(cell["source"]).split("\n") if not line.startswith("!"))


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["audit_a_model", "read_the_results", "write_a_defense"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_from_the_first_cell_to_the_last(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds and "error" not in kinds
    assert not [o for cell in code for o in cell["outputs"] if o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_name_no_machine_and_are_small(path: Path) -> None:
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            texts = [
                output.get("text", ""),
                *(v for k, v in output.get("data", {}).items() if "image" not in k),
            ]
            for text in texts:
                assert not _MACHINE.search("".join(text))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_uses_names_that_exist(path: Path) -> None:
    used = set()
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "unbackdoor"
            ):
                used.add(node.attr)
    assert used <= {*unbackdoor.__all__, "list"}
