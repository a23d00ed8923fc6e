"""Folders are the theory: imports point down only, and no defense can reach the truth."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unbackdoor
from unbackdoor.bench import code_version
from unbackdoor.bench.code_version import Sources

PACKAGE = Path(unbackdoor.__file__).parent
SOURCES = Sources({"unbackdoor": PACKAGE})
# From the top down; a room may import rooms below it.
ORDER = [
    "cli",
    "report",
    "bench",
    "attacks",
    "audit",
    "opening",
    "screeners",
    "scanners",
    "defenses",
    "engine",
    "data",
    "weights",
    "networks",
    "bottom",
]
SIBLINGS = {"defenses", "scanners", "screeners"}  # their members do not import each other
FORBIDDEN = {
    "audit": {"attacks", "bench"},
    "opening": {"defenses", "scanners", "screeners"},
    "weights": {"networks"},
    "screeners": {"attacks", "bench"},
    "scanners": {"attacks", "bench"},
    "defenses": {"attacks", "bench", "scanners", "screeners"},
}


def room(path: Path) -> str:
    """Return the folder that a file stands in, ``bottom`` for files at the top level."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "bottom"


def method(path: Path) -> str:
    """Return the name of the method that a file of a room of methods belongs to; it may be a folder."""
    return path.relative_to(PACKAGE).parts[1].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the full names of our own modules that a file imports anywhere, nested imports included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, f"{path} has a relative import"
    return {name for name in code_version.imported(tree, "") if name.startswith("unbackdoor.")}


FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        there = name.split(".")[1]
        if there not in ORDER:
            continue  # a file at the bottom
        assert ORDER.index(there) >= ORDER.index(here), f"{path.name} of {here} imports {name} above it"
        assert there not in FORBIDDEN.get(here, set()), f"{here} must not know {there}"
        if here in SIBLINGS and there == here and name.split(".")[2] != method(path):
            raise AssertionError(f"{path.name} imports its sibling {name}")


METHODS = [
    p
    for room in ("defenses", "scanners", "screeners")
    for p in sorted([*(PACKAGE / room).glob("[!_]*.py"), *(PACKAGE / room).glob("*/__init__.py")])
]


@pytest.mark.parametrize("path", METHODS, ids=method)
def test_no_path_from_a_method_to_the_truth(path: Path) -> None:
    start = f"unbackdoor.{room(path)}.{method(path)}"
    names = set(SOURCES.closure([start], ends=frozenset({"unbackdoor"})))
    assert start in names
    assert not [name for name in names if name.split(".")[1] in ("attacks", "bench", "cli", "report")]
    # Of the data it needs to make batches, and nothing that could open a test set.
    assert {name for name in names if name.startswith("unbackdoor.data.")} <= {"unbackdoor.data.batches"}


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        if room(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path} prints"
