"""What stands about the project in several places is the same, and the site has a page for every method."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import unbackdoor
from unbackdoor.cli.app import app

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_one() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited.group(1) == PROJECT["version"] == unbackdoor.__version__
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, f"unbackdoor {PROJECT['version']}")


def test_every_python_that_is_promised_is_tried() -> None:
    promised = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = re.search(r"python: \[(.+)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert matrix and set(re.findall(r"3\.\d+", matrix.group(1))) == promised
    assert PROJECT["requires-python"] == ">=" + min(promised, key=lambda v: int(v.split(".")[1]))


def test_what_the_extra_all_promises_has_extras() -> None:
    extras = set(PROJECT["optional-dependencies"])
    for extra, needs in PROJECT["optional-dependencies"].items():
        for need in needs:
            inside = re.match(r"unbackdoor\[(.+)\]", need)
            assert not inside or set(inside.group(1).split(",")) <= extras, extra


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_UNBACKDOOR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "unbackdoor sc")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = CliRunner().invoke(app, [], prog_name="unbackdoor")
    assert {"scan", "screen"} <= set(done.stdout.split())


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_with_its_options(site: ModuleType) -> None:
    pages = dict(site.method_pages())
    for kind in site.KINDS:
        for entry in unbackdoor.list(kind)[kind]:
            page = pages[f"{kind}-{entry['name']}.md"]
            assert f"]({kind}-{entry['name']}.md)" in pages["index.md"]
            for option in entry["options"]:
                (row,) = [line for line in page.splitlines() if line.startswith(f"| {option['name']} |")]
                assert row.replace("\\|", "").count("|") == 7, row
    assert all(f"## {name}\n" in site.api_page() for name in unbackdoor.__all__ if name != "__version__")


def test_links_lead_to_pages_of_the_site_or_are_text(site: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.md", "in/b.md", "picture.png"):
        (tmp_path / name).write_text("")
    text = "[a](../a.md#x) [b](b.md) [out](../../src/x.py) ![p](../picture.png) ![q](no.png) "
    text += "[w](https://x.y) [h](#h)"
    done = site.with_links_inside(text, tmp_path / "in" / "b.md", tmp_path)
    assert done == "[a](../a.md#x) [b](b.md) out ![p](../picture.png)  [w](https://x.y) [h](#h)"


def test_the_navigation_leads_to_pages() -> None:
    made = {"index.md", "api.md", "methods/index.md"}
    named = set(re.findall(r": ([a-z/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named and all((ROOT / "docs" / name).exists() for name in named - made)
    # Every page of docs/ is in the navigation, but those of results, to which the pages lead.
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
