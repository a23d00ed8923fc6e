"""Methods that misbehave, from the suite to the row: each leaves its error and its log, and nobody else's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benching import LABEL, PATIENCE, bench, cells, left_behind, rows, write_suite
from unbackdoor.bench.store import Store

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]
MODULE = Path(__file__).parents[1] / "poisoned_methods.py"
ERRORS = {
    "raises": "RuntimeError: no such luck",
    "nan": "returned weights that are not finite",
    "memory": "MemoryError",
    "writes": "PermissionError: a method may not write outside its folder",
    "store": "PermissionError: a method may not read there",
    "truth": "PermissionError: a method may not look there",
    "data_file": "PermissionError: a method may not read there",
    "test_images": "PermissionError: a method may not read there",
    "program": "PermissionError: a method may not do subprocess.Popen",
    "socket": "PermissionError: a method may not do socket",
    "leaves": "its process ended without a result: got exit status 0",
    "forges": "it answered with what is no answer",
}
HANGS = 20  # seconds that a hanging method is given: a busy machine takes some to start it
SILENT = {"leaves", "forges"}  # they end their process, and with it what would print a traceback


def install(site: Path) -> None:
    """Lay a distribution into a folder as an installer does: a module, and an entry point that names it."""
    shutil.copy(MODULE, site / "poisoned_methods.py")
    facts = site / "poisoned_methods-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: poisoned-methods\nVersion: 1.0\n", "utf-8")
    (facts / "entry_points.txt").write_text("[unbackdoor.defenses]\npoisoned = poisoned_methods\n", "utf-8")


def defense(act: str, place: Path) -> str:
    """Return the lines of a suite for a method that goes for a place."""
    return f'\n[[defense]]\nname = "poison_{act}"\noptions = {{ place = "{place}" }}\n'


def test_every_misbehaviour_is_a_row_and_nobody_else_suffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, store, root, outside = (tmp_path / name for name in ("site", "store", "root", "outside"))
    for folder in (site, root / "cifar10", outside):
        folder.mkdir(parents=True)
    install(site)
    (root / "cifar10" / "test.parquet").write_bytes(b"the images that the judge measures on")
    places = {"store": store / "results.db", "truth": store / "artefacts"}
    places |= {"data_file": root / "cifar10" / "test.parquet"}
    more = "".join(defense(act, places.get(act, outside / act)) for act in ERRORS)
    suites = write_suite(tmp_path / "suites", "poison", more=more)
    write_suite(suites, "hang", more=defense("hangs", outside / "hangs"), seconds=HANGS)
    write_suite(suites)
    # As a user has it: the folder that packages are installed in is on Python's path.
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    words = ("--suites", suites, "--store", store, "--data-root", root, "--workers", "2", "--quiet")
    bench("run", "poison-v1", *words, "--only", "*/badnets/*")
    bench("run", "hang-v1", *words, "--only", "*/badnets/poison_hangs")

    found = {row["defense"].removeprefix("poison_"): row["error"] for row in rows(store, "poison-v1")}
    assert found.pop("none") is None and found.pop("ft") is None
    assert found.keys() == ERRORS.keys()
    wrong = {act: error for act, error in found.items() if ERRORS[act] not in (error or "")}
    assert wrong == {}
    (late,) = (row["error"] for row in rows(store, "hang-v1") if row["defense"] == "poison_hangs")
    assert f"it ran out of time: expected at most {HANGS} s" in late
    for cell in [*cells(store, "poison-v1"), *cells(store, "hang-v1")]:
        if cell.state == "failed":
            act = cell.spec["defense"].removeprefix("poison_")
            assert f"about to do it: {act}" in cell.log
            assert "Traceback" in cell.log or act in SILENT | {"hangs"}
    assert list(outside.iterdir()) == []
    assert left_behind(store) == []

    # The honest ones among them did what they do when they are alone.
    alone = tmp_path / "alone"
    bench("run", LABEL, "--suites", suites, "--store", alone, "--quiet", "--only", "*/badnets/*")
    honest = [row for row in rows(store, "poison-v1") if row["error"] is None]
    assert [row | {"suite": "tiny"} for row in honest] == rows(alone)
    with Store(store) as opened:
        done = [f.name for f in opened.artefacts.glob("*/*")]
    assert len(done) == 3
