"""The version of a cell's code: it changes with everything that the cell runs, and with nothing else."""

from __future__ import annotations

import ast
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

import unbackdoor
from unbackdoor.bench.code_version import (
    ENDS,
    IMPORTED,
    SCANNING,
    STEPS,
    TRAINING,
    Sources,
    is_current,
    repair_version,
    sample_version,
    scan_version,
    script_version,
    victim_version,
)
from unbackdoor.bench.rows import Row, ScanRow
from unbackdoor.errors import InputError
from unbackdoor.registry import ATTACKS, DEFENSES, SCANNERS, Config

PACKAGE = Path(unbackdoor.__file__).parent
NET = "small_cnn"
Versions = dict[str, str]


@pytest.fixture(scope="module")
def pristine() -> Sources:
    """The package as it is, read once for all tests."""
    return Sources({"unbackdoor": PACKAGE})


class Changed(Sources):
    """The package with some files in other words; whatever else was read of it is not read again."""

    def __init__(self, whole: Sources, folder: Path) -> None:
        super().__init__({"unbackdoor": PACKAGE})
        self._files, self._trees = dict(whole._files), dict(whole._trees)
        self._imports, self._digests = dict(whole._imports), dict(whole._digests)
        self._folder = folder

    def write(self, file: str, text: str) -> None:
        """Give a file of the package another text."""
        module = ".".join(["unbackdoor", *Path(file).with_suffix("").parts])
        copy = self._folder / file.replace("/", "-")
        copy.write_text(text, encoding="utf-8")
        for cache in (self._trees, self._imports, self._digests):
            cache.pop(module, None)  # type: ignore[attr-defined]
        self._files[module] = copy

    def append(self, file: str) -> None:
        """Give a file one more name."""
        self.write(file, (PACKAGE / file).read_text(encoding="utf-8") + "\nCHANGED = 1\n")


@pytest.fixture
def copy(pristine: Sources, tmp_path: Path) -> Changed:
    """The package, to be changed: it is never imported."""
    return Changed(pristine, tmp_path)


def versions(sources: Sources) -> Versions:
    """Return the versions of all parts by ``kind:name``."""
    return {
        **{f"victim:{name}": victim_version(name, NET, sources) for name in ATTACKS},
        **{f"repair:{name}": repair_version(name, "none", NET, sources) for name in DEFENSES},
        **{f"scan:{name}": scan_version(name, "none", NET, sources) for name in SCANNERS},
    }


def changed(pristine: Sources, other: Sources) -> set[str]:
    """Return whose version differs in a copy."""
    before, after = versions(pristine), versions(other)
    return {name for name in before if before[name] != after[name]}


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def reaching(module: str, sources: Sources) -> set[str]:
    """Return whose own files bring a module along, by another road: the modules that Python would import."""
    tables = {"victim": ATTACKS, "repair": DEFENSES, "scan": SCANNERS}
    out = set()
    for kind, table in tables.items():
        for name in table:
            start = table[name].function.__module__
            if module in sources.closure([start], ends=ENDS):
                out.add(f"{kind}:{name}")
    return out


def test_every_part_has_a_version_of_its_own(pristine: Sources) -> None:
    found = versions(pristine)
    assert all(len(version) == 16 and int(version, 16) >= 0 for version in found.values())
    own = {name: table[name].function.__module__ for table in (DEFENSES, SCANNERS) for name in table}
    for kind, table in (("repair", DEFENSES), ("scan", SCANNERS)):
        modules = {table[name].function.__module__ for name in table}
        assert len({found[f"{kind}:{name}"] for name in table}) >= len(modules), own


def test_the_installed_code_has_the_version_of_its_files(pristine: Sources) -> None:
    assert repair_version("awm", "sig", NET) == repair_version("awm", "sig", NET, pristine)


def test_a_broken_learning_rate_changes_all_that_train_and_nothing_else(
    pristine: Sources, copy: Changed
) -> None:
    text = (PACKAGE / "engine" / "training.py").read_text(encoding="utf-8")
    assert "        return 1.0\n" in text  # the constant schedule
    copy.write("engine/training.py", text.replace("        return 1.0\n", "        return 0.0\n"))
    wanted = reaching("unbackdoor.engine.training", pristine) | {f"victim:{name}" for name in ATTACKS}
    assert changed(pristine, copy) == wanted
    assert "repair:ft" in wanted
    assert not {"repair:none", "repair:random_prune", "scan:weight_statistics"} & wanted


@pytest.mark.parametrize(
    "module", ["masks", "selection", "unlearning", "heads", "channels", "row_adam", "trigger_search"]
)
def test_a_change_of_the_engine_changes_those_who_reach_it(
    pristine: Sources, copy: Changed, module: str
) -> None:
    copy.append(f"engine/{module}.py")
    wanted = reaching(f"unbackdoor.engine.{module}", pristine)
    if f"unbackdoor.engine.{module}" in pristine.closure([SCANNING], ends=ENDS):
        wanted |= {f"scan:{name}" for name in SCANNERS}  # the form in which every scanner sees a model
    assert changed(pristine, copy) == wanted
    assert 0 < len(wanted) < len(versions(pristine))


@pytest.mark.parametrize(
    "file", ["types.py", "metrics.py", "data/splits.py", "bench/judge.py", "networks/small_cnn.py"]
)
def test_what_every_cell_runs_changes_every_cell(pristine: Sources, copy: Changed, file: str) -> None:
    copy.append(file)
    assert changed(pristine, copy) == set(versions(pristine))


@pytest.mark.parametrize(
    "file",
    [
        "report/sarif.py", "cli/bench.py", "cli/app.py", "bench/driver.py", "bench/store.py",
        "bench/engines.py", "bench/results.py", "bench/suites.py", "bench/exchange.py", "isolate.py",
        "bench/work.py", "bench/cells.py", "bench/rows.py", "bench/code_version.py", "bench/repairs.py",
        "errors.py", "networks/vgg.py", "networks/sources/timm.py", "opening/open_model.py",
        "weights/formats/onnx/graph.py", "data/loaders.py", "audit/scanning.py", "screeners/strip.py",
    ],
)  # fmt: skip
def test_what_no_cell_runs_changes_none(pristine: Sources, copy: Changed, file: str) -> None:
    copy.append(file)
    assert changed(pristine, copy) == set()


def test_a_method_changes_itself_alone(pristine: Sources, copy: Changed) -> None:
    copy.append("defenses/fp.py")
    copy.append("defenses/awm/weight_masks.py")
    assert changed(pristine, copy) == {"repair:fp", "repair:awm"}


def test_a_method_that_is_a_folder_is_all_of_it(pristine: Sources, tmp_path: Path) -> None:
    folder = tmp_path / "unbackdoor"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "defenses" / "ims" / "beside.py").write_text("NEW = 1\n", encoding="utf-8")
    whole = Sources({"unbackdoor": folder})
    for name, same in (("awm", True), ("ims", False)):
        assert (
            repair_version(name, "none", NET, whole) == repair_version(name, "none", NET, pristine)
        ) == same


def test_an_attack_changes_its_victims_and_what_is_judged_with_its_trigger(
    pristine: Sources, copy: Changed
) -> None:
    copy.append("attacks/sig.py")
    assert changed(pristine, copy) == {"victim:sig"}
    assert repair_version("ft", "sig", NET, copy) != repair_version("ft", "sig", NET, pristine)
    assert repair_version("ft", "blended", NET, copy) == repair_version("ft", "blended", NET, pristine)


def test_words_and_layout_change_nothing(pristine: Sources, copy: Changed) -> None:
    versions(pristine)
    for module in pristine.closure([TRAINING, "unbackdoor.defenses.awm.method"], ends=ENDS):
        file = pristine.file(module)
        assert file is not None
        if file.stem == "__init__":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            holds = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if holds and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant("Other words."))
        # Unparsed: all comments are gone, and the layout is another one.
        text = f"# A comment.\n{ast.unparse(ast.fix_missing_locations(tree))}\n"
        copy.write(file.relative_to(PACKAGE).as_posix(), text)
    assert changed(pristine, copy) == set()


def test_what_only_a_type_checker_imports_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "box"
    folder.mkdir()
    files = {
        "__init__.py": "",
        "method.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from box import words\nelse:\n    from box import other\n"
        "def run():\n    from .late import x\n",
        "words.py": "", "other.py": "", "late.py": "import box.deep\nx = 1\n", "deep.py": "import torch\n",
        "stranger.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    sources = Sources({"box": folder})
    names = sources.closure(["box.method"])
    assert names == ["box", "box.deep", "box.late", "box.method", "box.other"]
    version = sources.version(["box.method"])
    (folder / "words.py").write_text("y = 2\n", encoding="utf-8")
    (folder / "stranger.py").write_text("y = 2\n", encoding="utf-8")
    edit(folder / "method.py", "from box import words", "from box import words, more")
    assert Sources({"box": folder}).version(["box.method"]) == version
    edit(folder / "deep.py", "torch", "numpy")
    assert Sources({"box": folder}).version(["box.method"]) != version


def test_nothing_of_the_judge_reaches_the_code_that_trains(pristine: Sources) -> None:
    names = pristine.closure([STEPS], ends=ENDS)
    assert not [name for name in names if name.split(".")[1] in ("cli", "report", "opening", "weights")]
    assert "unbackdoor.engine.training" not in names
    assert "unbackdoor.engine.trusted_caller" in names
    assert len(names) < 25


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A package of somebody else's with a method in it, and a function that reads its version anew."""
    box = tmp_path / "their_box"
    box.mkdir()
    (box / "__init__.py").write_text("", encoding="utf-8")
    (box / "helper.py").write_text("STEP = 1\n", encoding="utf-8")
    (box / "mine.py").write_text(
        "from unbackdoor.engine import heads\nfrom their_box.helper import STEP\n"
        "def purify(model, data, cfg, *, run):\n    return STEP, heads\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(DEFENSES.__dict__, "_parts", dict(DEFENSES._loaded()))
    import their_box.mine  # type: ignore[import-not-found]

    DEFENSES.register("mine", config=Config)(their_box.mine.purify)
    yield lambda: repair_version("mine", "none", NET, Sources())
    for name in [name for name in sys.modules if name.startswith("their_box")]:
        del sys.modules[name]


def test_a_plug_in_is_its_package_and_what_it_reaches_in_ours(
    plug_in: Callable[[], str], tmp_path: Path
) -> None:
    before = plug_in()
    assert plug_in() == before
    edit(tmp_path / "their_box" / "helper.py", "STEP = 1", "STEP = 1  # words")
    assert plug_in() == before
    edit(tmp_path / "their_box" / "helper.py", "STEP = 1", "STEP = 2")
    assert plug_in() != before
    names = Sources().closure(["their_box.mine", "unbackdoor.bench.steps"])
    assert {"their_box.helper", "unbackdoor.engine.heads"} <= set(names)


def test_a_plug_in_of_machine_code_counts_by_its_bytes(tmp_path: Path) -> None:
    box = tmp_path / "box"
    box.mkdir()
    (box / "__init__.py").write_text("import box.fast\n", encoding="utf-8")
    binary = box / f"fast{EXTENSION_SUFFIXES[0]}"
    binary.write_bytes(b"\x7fELF one")
    before = Sources({"box": box}).version(["box"])
    binary.write_bytes(b"\x7fELF two")
    assert Sources({"box": box}).version(["box"]) != before


def test_a_method_without_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = types.ModuleType("ghost")
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(InputError, match="cannot be found"):
        Sources().version(["ghost"])


def row(**changes: Any) -> Row:
    """Return a row of the present code."""
    values: dict[str, Any] = {
        "suite": "s", "dataset": "digits", "architecture": NET, "width": 8.0, "recipe": "plain",
        "attack": "badnets", "poison_rate": 0.1, "victim_seed": 0, "defense": "ft", "clean_images": 4,
        "defender_seed": 0, "code": repair_version("ft", "badnets", NET),
        "victim_code": victim_version("badnets", NET),
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_rows_of_the_present_code_are_current() -> None:
    assert is_current(row())
    assert is_current(row().model_dump())
    assert is_current(row(victim_code=f"{IMPORTED}5c3a447fba22d2a9"))
    scan = row().model_dump(include=set(ScanRow.model_fields))
    scan |= {"scanner": "rnp_vote", "code": scan_version("rnp_vote", "badnets", NET)}
    assert is_current(ScanRow(**scan))


@pytest.mark.parametrize(
    "changes",
    [
        {"code": ""}, {"code": "0" * 16}, {"victim_code": ""}, {"victim_code": "0" * 16},
        {"defense": "gone"}, {"defense": "fp"}, {"attack": "gone"}, {"architecture": "gone"},
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_other_code_are_not(changes: dict[str, Any]) -> None:
    assert not is_current(row(**changes))


def test_rows_from_before_there_were_versions_are_not() -> None:
    old = row().model_dump(exclude={"code", "victim_code"})
    assert not is_current(old)
    assert not is_current(Row(**old))


def test_a_row_of_a_script_changes_with_the_script_and_what_it_runs(
    pristine: Sources, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("from unbackdoor.engine import trusted_caller, unlearning\nNAMES = 1\n")
    rows = {"ft": {"method": "ft"}, "rnp": {"system": "rnp"}, "strip": {"screener": "strip"},
            "scan": {"what": "scan"}, "none": {}}  # fmt: skip

    def versions(sources: Sources) -> Versions:
        return {name: script_version(script, row, sources) for name, row in rows.items()}

    def changed(*files: str) -> set[str]:
        other = Changed(pristine, tmp_path)
        for file in files:
            other.append(file)
        return {name for name, version in versions(other).items() if version != before[name]}

    before = versions(pristine)
    assert len(set(before.values())) == 5
    assert changed("defenses/rnp.py") == {"rnp"}
    assert changed("screeners/strip.py") == {"strip"}
    assert changed("scanners/tac.py") == {"scan"}
    assert changed("engine/trusted_caller.py") == {*rows}
    assert changed("report/html.py") == set()
    script.write_text(
        '"""Words."""\nfrom unbackdoor.engine import trusted_caller, unlearning\nNAMES = 1  # one\n'
    )
    assert versions(pristine) == before
    script.write_text("from unbackdoor.engine import trusted_caller, unlearning\nNAMES = 2\n")
    assert not set(versions(pristine).values()) & set(before.values())


def test_a_sample_has_a_version() -> None:
    assert len(sample_version()) == 16
