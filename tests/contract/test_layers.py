"""Folders are the theory: imports point down only, and no defense can reach the truth."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

import unbackdoor
from unbackdoor.bench import code_version
from unbackdoor.bench.code_version import Sources

PACKAGE = Path(unbackdoor.__file__).parent
SOURCES = Sources({"unbackdoor": PACKAGE})
# From the top down; a room may import rooms below it.
ORDER = [
    "testing",
    "plugins",
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
FOR_AUTHORS = {"plugins", "testing"}  # a file and a folder at the top level that stand above every room
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
    if len(parts) == 1:
        return path.stem if path.stem in FOR_AUTHORS else "bottom"
    return parts[0]


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


# ---------------------------------------------------------------------------------------------------
# The graph of the imports of all modules, nested and typing-only imports included


def module(path: Path) -> str:
    """Return the full name of the module in a file."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports itself, by name, from their sources."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named = {full if full in sources else str(node.module) for full in inside}
            else:
                continue
            graph[name] |= {other for other in named if other in sources and other != name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return [set(group) for group in groups]


ROOT = "unbackdoor"
GRAPH = import_graph({module(path): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")})


def test_no_module_imports_itself_by_a_circle() -> None:
    # The root holds names of all rooms that are imported at their first use; one module alone reaches it.
    inside = {name: imports - {ROOT} for name, imports in GRAPH.items() if name != ROOT}
    assert circles(inside) == []
    outer = {"plugins", "testing", "cli", "report", "bench", "__main__"}
    users = {name for name, imports in GRAPH.items() if ROOT in imports and name.split(".")[1] not in outer}
    assert users <= {"unbackdoor.audit.result"}


def test_a_circle_is_seen_however_it_is_made() -> None:
    sources = {
        "p": "",
        "p.a": "from p import b",
        "p.b": "def later():\n    import p.c",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import X",
        "p.d": "from p.a import X",
    }
    assert circles(import_graph(sources)) == [{"p.a", "p.b", "p.c"}]


def users_of(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return who uses a module of the engine, other modules of it between: methods and rooms by name."""
    seen: set[str] = set()
    users: set[str] = set()
    todo = [other for other, imports in graph.items() if name in imports]
    while todo:
        other = todo.pop()
        if other in seen:
            continue
        seen.add(other)
        parts = [*other.split("."), ""]
        if parts[1] == "engine":
            todo += [above for above, imports in graph.items() if other in imports]
        elif parts[1] not in FOR_AUTHORS and len(parts) > 3:
            methods = parts[1] in {"attacks", "defenses", "scanners", "screeners"}
            users.add(f"{parts[1]}.{parts[2]}" if methods else parts[1])
    return users


ENGINE = [module(path) for path in FILES if room(path) == "engine" and path.name != "__init__.py"]


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_keeps_what_two_or_more_use(name: str) -> None:
    """What one method alone uses stands beside it: a method may be a folder."""
    users = users_of(name, GRAPH)
    assert len(users) >= 2, f"{name} is used by {users or 'nobody'} alone"


def test_a_part_of_the_engine_with_one_user_is_seen() -> None:
    graph = import_graph(
        {
            "u.engine.gates": "",
            "u.engine.inner": "from u.engine import gates",
            "u.defenses.ims.method": "from u.engine import inner",
            "u.defenses.ims.other": "from u.engine import gates",
            "u.plugins": "from u.engine import gates",
            "u.audit.scan": "from u.engine import shared",
            "u.cli.scan": "from u.engine import shared",
            "u.engine.shared": "",
        }
    )
    assert users_of("u.engine.gates", graph) == users_of("u.engine.inner", graph) == {"defenses.ims"}
    assert users_of("u.engine.shared", graph) == {"audit", "cli"}


def test_no_room_is_over_a_sixth_of_the_tree() -> None:
    lines: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        lines[room(path)] += len(path.read_text(encoding="utf-8").splitlines())
    limit = lines.total() / 6
    assert {name: count for name, count in lines.items() if count > limit} == {}
