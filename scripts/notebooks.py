"""Execute the notebooks of docs/notebooks and keep what they print and draw.

Each runs in a folder of its own that is removed afterwards, so that none leans on another or on leftovers. A
notebook that raises stops the script, and its file stays as it was.

    pip install ".[docs]" && python scripts/notebooks.py            # all of them, in their files
    python scripts/notebooks.py audit_a_model.ipynb --out build     # one, into another folder
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
SECONDS = 900  # of one cell; the longest takes about a minute of one idle core
# Two notebooks that differ in nothing else would differ in these.
_VOLATILE = ("execution", "language_info", "widgets")
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main() -> None:
    """Execute and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="files in docs/notebooks; default: all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the executed notebooks go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in [FOLDER / name for name in arguments.names] or sorted(FOLDER.glob("*.ipynb")):
        done = executed(nbformat.read(path, as_version=4))
        (arguments.out / path.name).write_text(nbformat.writes(done) + "\n", encoding="utf-8")
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in done.cells)} cells")


def executed(notebook: Any) -> Any:
    """Return the notebook with the outputs of a run in an empty folder; raise what a cell raises."""
    # A bar of progress is drawn anew with every step; a page keeps the last drawing of none of them. Pictures
    # are of the size of a column.
    os.environ["UNBACKDOOR_PROGRESS"] = "0"
    os.environ["UNBACKDOOR_CHECKOUT"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute(cwd=folder)
        for number, cell in enumerate(notebook.cells, 1):
            cell["id"] = f"cell-{number}"
            for name in _VOLATILE:
                cell.metadata.pop(name, None)
            for output in cell.get("outputs", []):
                if output.output_type == "stream":
                    output["text"] = _TERMINAL.sub("", output["text"]).replace(folder, ".")
    for name in _VOLATILE:
        notebook.metadata.pop(name, None)
    return notebook


if __name__ == "__main__":
    main()
