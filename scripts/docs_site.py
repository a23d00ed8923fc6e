"""Make the sources of the documentation site in build/docs: the pages of docs/, of methods and of Python.

The pages of methods come from the registry, those of Python from the docstrings, so that nothing is written
twice. Links of the README and of the pages to files outside of docs/ are turned into their names.

    python scripts/docs_site.py && mkdocs build --strict
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import unbackdoor
from unbackdoor.registry import ATTACKS, DEFENSES, SCANNERS, SCREENERS, Registry

ROOT = Path(__file__).parents[1]
KINDS: dict[str, Registry[Any]] = {
    "defenses": DEFENSES, "scanners": SCANNERS, "screeners": SCREENERS, "attacks": ATTACKS
}  # fmt: skip
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def main() -> None:
    """Write the sources of the site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out: Path = parser.parse_args().out
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(ROOT / "docs", out)
    (out / "index.md").write_text(
        (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("), "utf-8"
    )
    (out / "methods").mkdir()
    pages = dict(method_pages())
    for name, text in pages.items():
        (out / "methods" / name).write_text(text, encoding="utf-8")
    (out / "api.md").write_text(api_page(), encoding="utf-8")
    notebook_pages(out / "notebooks")
    for page in out.rglob("*.md"):
        page.write_text(with_links_inside(page.read_text(encoding="utf-8"), page, out), encoding="utf-8")


def notebook_pages(folder: Path) -> None:
    """Put a page in the place of each notebook of a folder, with what it printed and drew."""
    from nbconvert import MarkdownExporter

    for notebook in sorted(folder.glob("*.ipynb")):
        # Pictures lie beside the page, under names of their notebook.
        exporter = MarkdownExporter()
        text, found = exporter.from_filename(
            str(notebook), resources={"unique_key": notebook.stem, "output_files_dir": notebook.stem}
        )
        for name, content in found["outputs"].items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        notebook.with_suffix(".md").write_text(text, encoding="utf-8")
        notebook.unlink()


def method_pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of the page of each method, and of their index."""
    index = ["# Methods\n"]
    for kind, registry in KINDS.items():
        index += [f"\n## {kind.capitalize()}\n", "| name | what it is | paper |", "|---|---|---|"]
        entries = unbackdoor.list(kind)[kind]
        for entry in entries:
            name = f"{kind}-{entry['name']}.md"
            index.append(f"| [{entry['name']}]({name}) | {_cell(entry['summary'])} | {entry['paper']} |")
            yield name, method_page(kind, entry, registry[entry["name"]])
    yield "index.md", "\n".join(index) + "\n"


def method_page(kind: str, entry: dict[str, Any], part: Any) -> str:
    """Return the page of one method: its documentation, its options with their sources, its presets."""
    module = inspect.getmodule(part.function)
    text = inspect.getdoc(module) or inspect.getdoc(part.function) or ""
    lines = [f"# {entry['name']}", "", f"One of the [{kind}](index.md#{kind}).", ""]
    lines += [f"```text\n{text}\n```", ""]
    if entry["needs"]:
        lines += [f"Needs: {', '.join(entry['needs'])}.", ""]
    if entry["options"]:
        lines += ["## Options", "", "| name | type | default | bounds | meaning | source of the default |"]
        lines += ["|---|---|---|---|---|---|"]
        columns = ("name", "type", "default", "bounds", "meaning", "source")
        lines += ["| " + " | ".join(_cell(o[c]) for c in columns) + " |" for o in entry["options"]]
        lines.append("")
    for preset, values in entry["presets"].items():
        shown = ", ".join(f"`{key}={value}`" for key, value in values.items())
        lines += [f"Preset `{preset}`: {shown}", ""]
    return "\n".join(lines)


def api_page() -> str:
    """Return the page of everything public, with signatures and docstrings."""
    lines = ["# Python", ""]
    for name in (*sorted(n for n in unbackdoor.__all__ if not n.startswith("__")), "list"):
        thing = getattr(unbackdoor, name)
        lines += [f"## {name}", ""]
        if callable(thing):
            try:
                signature = str(inspect.signature(thing))
            except (TypeError, ValueError):
                signature = "(...)"
            lines += [f"```python\nunbackdoor.{name}{signature}\n```", ""]
        lines += [f"```text\n{inspect.getdoc(thing) or ''}\n```", ""]
    return "\n".join(lines)


def with_links_inside(text: str, page: Path, top: Path) -> str:
    """Return a page whose links lead to pages of the site alone; what they named elsewhere stays as text."""

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if target.startswith(("http://", "https://", "#", "mailto:")):
            return match.group(0)
        path = (page.parent / target.partition("#")[0]).resolve()
        if path.is_file() and path.is_relative_to(top.resolve()):
            return match.group(0)
        return words if not picture else ""

    return _LINK.sub(link, text)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("``", "`")


if __name__ == "__main__":
    main()
