"""The version of the code that a cell runs: a hash over every module of the package that it reaches.

A module counts by its syntax: comments, layout and documentation are left out, and so is what only a type
checker reads. It is read as text and never imported, so that a version can be made of any copy of the
package, and is the same under every version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from unbackdoor.errors import InputError
from unbackdoor.registry import ARCHITECTURES, ATTACKS, DEFENSES, SCANNERS, SCREENERS, Part, Registry

OWN = "unbackdoor"
CONTROL = "none"  # the attack of networks that were trained clean
IMPORTED = "imported "  # before the version of a victim that was taken over and is pinned by its weights
TRAINING, SCANNING = f"{OWN}.bench.train_step", f"{OWN}.bench.scan_step"
PROBES = f"{OWN}.bench.probes"
STEPS, SPLITS = f"{OWN}.bench.steps", f"{OWN}.data.splits"
# Modules at which a closure ends, because no change behind them can alter a number unnoticed:
ENDS = frozenset(
    {
        OWN,  # names that are imported at their first use, of all rooms
        f"{OWN}.errors",  # the words and classes of failures
        f"{OWN}.files",  # writes files whole or not at all
        f"{OWN}.confinement",  # lets a process of its own read first; it refuses, or passes on the same
        f"{OWN}.bench.machine",  # memory and device of a cell
        f"{OWN}.weights.source",  # and this, by which they read the card
        f"{OWN}.opening.classifier_files",  # the steps check the weights against the hash of their card
        f"{OWN}.data.datasets",  # the steps check the images against the hashes of the specification
        f"{OWN}.networks.sources",  # networks of other libraries, which no suite can name
    }
)


class Sources:
    """The source files of some packages, each parsed at most once.

    Args:
        packages: Folder of each package by its name; None searches for installed ones.
    """

    def __init__(self, packages: Mapping[str, Path] | None = None) -> None:
        self._packages = None if packages is None else {name: (path,) for name, path in packages.items()}
        self._files: dict[str, Path | None] = {}
        self._trees: dict[str, ast.Module | None] = {}
        self._imports: dict[str, frozenset[str]] = {}
        self._digests: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}

    def file(self, module: str) -> Path | None:
        """Return the file of a module; None where there is no such module."""
        if module not in self._files:
            self._files[module] = self._locate(module)
        return self._files[module]

    def members(self, package: str) -> list[str]:
        """Return a package and all modules in its folder, with those of its subfolders."""
        if package not in self._members:
            file = self.file(package)
            folder = file.parent if file is not None and file.stem == "__init__" else None
            inside = [] if folder is None else [p.relative_to(folder) for p in sorted(folder.rglob("*.py"))]
            names = [[part for part in p.with_suffix("").parts if part != "__init__"] for p in inside]
            self._members[package] = [".".join([package, *name]) for name in names or [[]]]
        return self._members[package]

    def imports(self, module: str) -> frozenset[str]:
        """Return what a module imports at any depth of its code: modules, and names that may be modules.

        Names that only a type checker imports are left out.
        """
        if module not in self._imports:
            tree, file = self._tree(module), self.file(module)
            assert file is not None  # only existing modules get here
            package = module if file.stem == "__init__" else module.rpartition(".")[0]
            self._imports[module] = frozenset(imported(tree, package)) if tree else frozenset()
        return self._imports[module]

    def closure(self, start: Iterable[str], *, ends: frozenset[str] = frozenset()) -> list[str]:
        """Return all modules that some modules import, at any depth, in order; only of their own packages.

        Args:
            start: Names of modules.
            ends: Modules that are left out, with what only they import.

        Raises:
            InputError: If one of the first modules has no source.
        """
        todo = list(start)
        packages = {name.partition(".")[0] for name in todo}
        for name in todo:
            if self.file(name) is None:
                raise InputError("a method's code cannot be found", expected="a module in a file", got=name)
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if name in seen or name in ends or name.partition(".")[0] not in packages:
                continue
            if self.file(name) is None:
                continue  # a name inside a module
            seen.add(name)
            todo += self.imports(name)
        return sorted(seen)

    def version(self, start: Iterable[str], *, ends: frozenset[str] = ENDS, also: str = "") -> str:
        """Return the hash of a closure, as 16 hex digits.

        Args:
            start: See :meth:`closure`.
            ends: See :meth:`closure`.
            also: What is hashed with it.
        """
        lines = [f"{name} {self._digest(name)}" for name in self.closure(start, ends=ends)]
        return hashlib.sha256("\n".join([also, *lines]).encode()).hexdigest()[:16]

    def _locate(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        for folder in _places(top) if self._packages is None else self._packages.get(top, ()):
            if not rest and folder.is_file():
                return folder
            path = folder.joinpath(*rest)
            for suffix in (".py", *EXTENSION_SUFFIXES):
                for file in (path / f"__init__{suffix}", path.with_name(path.name + suffix)):
                    if file.is_file():
                        return file
        return None

    def _tree(self, module: str) -> ast.Module | None:
        """Return the syntax of a module without what runs nothing; None where it is machine code."""
        if module not in self._trees:
            file = self.file(module)
            assert file is not None  # only existing modules get here
            source = file.suffix == ".py"
            self._trees[module] = _Bare().visit(ast.parse(file.read_bytes())) if source else None
        return self._trees[module]

    def _digest(self, module: str) -> str:
        if module not in self._digests:
            tree, file = self._tree(module), self.file(module)
            assert file is not None  # only existing modules get here
            content = file.read_bytes() if tree is None else _text(tree).encode()
            self._digests[module] = hashlib.sha256(content).hexdigest()
        return self._digests[module]


def imported(tree: ast.AST, package: str) -> set[str]:
    """Return the full names that a syntax tree imports, and of ``from`` the names with and without the last.

    Args:
        tree: Of a module.
        package: That relative imports start from.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            names |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return names


def victim_version(attack: str, architecture: str, sources: Sources | None = None) -> str:
    """Return the version of the code that trains and measures a victim.

    Args:
        attack: Registered name.
        architecture: Registered name.
        sources: Where the code is read from; by default where it is installed.
    """
    return _version(TRAINING, (ATTACKS[attack], _family(architecture)), sources)


def repair_version(defense: str, attack: str, architecture: str, sources: Sources | None = None) -> str:
    """Return the version of the code that repairs and measures; see :func:`victim_version`.

    The attack is in it, because the judge puts its trigger on the test images.
    """
    parts = (DEFENSES[defense], ATTACKS[attack], _family(architecture))
    return _version(STEPS, parts, sources)


def scan_version(scanner: str, attack: str, architecture: str, sources: Sources | None = None) -> str:
    """Return the version of the code that scans; see :func:`repair_version`."""
    parts = (SCANNERS[scanner], ATTACKS[attack], _family(architecture))
    return _version(SCANNING, parts, sources)


def probe_version(attack: str, architecture: str, sources: Sources | None = None) -> str:
    """Return the version of the code that probes a repair; see :func:`repair_version`.

    The repair has a version of its own, which is no part of this one.
    """
    return _version(PROBES, (ATTACKS[attack], _family(architecture)), sources)


def sample_version() -> str:
    """Return the version of the code that draws a defender's images."""
    return _cached_version((SPLITS,), "")


# Columns of the rows of scripts that name a method.
_METHODS: Mapping[str, Registry[Any]] = {"method": DEFENSES, "system": DEFENSES, "screener": SCREENERS}


def script_version(script: Path, row: Mapping[str, Any], sources: Sources | None = None) -> str:
    """Return the version of the code that makes a row of a script.

    It is of the script itself, of what it imports of the package, and of the methods that the row names: in
    its column ``method``, ``system`` or ``screener``; a row of a ``scan`` is of all scanners.

    Args:
        script: The file.
        row: The row, as far as it says what was run.
        sources: See :func:`victim_version`.
    """
    sources_of = sources or _INSTALLED
    parts = [registry[row[column]] for column, registry in _METHODS.items() if row.get(column) in [*registry]]
    if row.get("what") == "scan":
        parts += [SCANNERS[name] for name in SCANNERS]
    tree = _Bare().visit(ast.parse(script.read_bytes()))
    names = {name for name in imported(tree, "") if name.partition(".")[0] == OWN and sources_of.file(name)}
    names |= {name for part in parts for name in _modules(part, sources_of)}
    also = " ".join(
        [hashlib.sha256(_text(tree).encode()).hexdigest(), *(str(part.version) for part in parts)]
    )
    start = tuple(sorted(names))
    return _cached_version(start, also) if sources is None else sources.version(start, also=also)


def is_current_of(script: Path) -> Callable[[Any], bool]:
    """Return what tells whether a row of a script was made by the code that is there; see ``is_current``."""
    return lambda row: bool(row.get("code")) and row["code"] == script_version(script, row)


def is_current(row: Any) -> bool:
    """Return whether a row was measured by the code that is installed.

    The victim of the row must be of that code too, or one that was taken over: it is pinned by its weights.
    Of probes, the repair and the clean network beside it must be so as well.

    Args:
        row: A row of a repair, a scan or probes, or the same as a mapping. A row without a version was
            measured by older code, and so was one whose method, attack or architecture is not there any more.
    """
    of: Callable[[str], Any] = row.get if isinstance(row, Mapping) else lambda name: getattr(row, name, None)
    attack, architecture = str(of("attack")), str(of("architecture"))
    probed = of("repair_code") is not None
    code, victim, control = of("repair_code" if probed else "code"), of("victim_code"), of("control_code")
    if not code or not victim:
        return False
    try:
        if probed and of("code") != probe_version(attack, architecture):
            return False
        by, name = (scan_version, of("scanner")) if of("scanner") else (repair_version, of("defense"))
        return (
            code == by(str(name), attack, architecture)
            and _is_current_victim(str(victim), attack, architecture)
            and (not control or _is_current_victim(str(control), CONTROL, architecture))
        )
    except InputError:
        return False


def _is_current_victim(code: str, attack: str, architecture: str) -> bool:
    return code.startswith(IMPORTED) or code == victim_version(attack, architecture)


def _family(architecture: str) -> Part[Any]:
    return ARCHITECTURES[architecture.removeprefix(f"{OWN}:").partition("[")[0]]


def _version(entry: str, parts: Iterable[Part[Any]], sources: Sources | None) -> str:
    sources_of = sources or _INSTALLED
    start = tuple(sorted({entry, *(name for part in parts for name in _modules(part, sources_of))}))
    also = " ".join(str(part.version) for part in parts)
    return _cached_version(start, also) if sources is None else sources.version(start, also=also)


@cache
def _cached_version(start: tuple[str, ...], also: str) -> str:
    return _INSTALLED.version(start, also=also)  # a suite asks once for every cell


def _modules(part: Part[Any], sources: Sources) -> Iterator[str]:
    """Yield the modules of a part: its own, that of its options, and all of its folder where it has one."""
    module: str = part.function.__module__
    yield from {module, part.config.__module__}
    top, *rest = module.split(".")
    if top == OWN and len(rest) > 2:  # a method that is a folder of its room
        yield from sources.members(".".join([top, *rest[:2]]))


@cache
def _places(top: str) -> tuple[Path, ...]:
    """Return the folders of an installed package, or the file of a module that is in none."""
    module = sys.modules.get(top)
    spec = importlib.util.find_spec(top) if module is None else getattr(module, "__spec__", None)
    if spec is not None and spec.submodule_search_locations is not None:
        return tuple(Path(folder) for folder in spec.submodule_search_locations)
    file = getattr(module, "__file__", None) if spec is None else spec.origin
    return (Path(file),) if file else ()


class _Bare(ast.NodeTransformer):
    """Removes what runs nothing: documentation, and what only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        names = (getattr(node.test, "id", ""), getattr(node.test, "attr", ""))
        return node.orelse if "TYPE_CHECKING" in names else node


def _text(node: object) -> str:
    """Return a syntax tree as text.

    Not as :func:`ast.dump` writes it, nor as it is unparsed: both differ between versions of Python, which
    give new nodes fields that are empty in older code.
    """
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields if name != "kind")
        words = (f"{name}={_text(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({','.join(words)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return ascii(node)


_INSTALLED = Sources()
