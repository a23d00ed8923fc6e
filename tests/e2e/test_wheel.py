"""What is published works without the checkout: sdist, wheel from the sdist, an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from unbackdoor.bench.suites import SHIPPED

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytest.importorskip("matplotlib", reason="the pages need matplotlib (extra: report)")
ROOT = Path(__file__).parents[2]
VICTIM = ROOT / "victims" / "cifar10-small-v1" / "badnets-0.1-seed0-7c9a85c9"
PATIENCE = 800  # seconds; it takes seconds by itself, and minutes on a machine that is busy elsewhere


def output_of(*command: str | Path, cwd: Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command that knows nothing of the checkout, and return what it printed."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "UNBACKDOOR_"))}
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True,
        timeout=PATIENCE, cwd=cwd, env=surroundings,
    )  # fmt: skip
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


@dataclass
class Installed:
    """The command of an installed wheel.

    Attributes:
        wheel: The file.
        bin: Folder of the commands of its environment.
        cwd: Empty folder that it is run in.
    """

    wheel: Path
    bin: Path
    cwd: Path

    def __call__(self, *words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        return output_of(self.bin / "unbackdoor", *words, cwd=self.cwd, codes=codes)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, built from the sdist, in an environment that lends it the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    output_of(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    output_of(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    output_of(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=folder,
    )
    # Folders of packages alone: what such a folder says of an editable checkout is not read from here.
    lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(output_of(python, "-c", code, cwd=folder).strip())
    (site / "lent.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
    where = output_of(python, "-c", "import unbackdoor; print(unbackdoor.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(site)
    (folder / "cwd").mkdir()
    return Installed(wheel, python.parent, folder / "cwd")


def test_the_wheel_holds_all_files_of_the_package_and_nothing_else(installed: Installed) -> None:
    package = SHIPPED.parents[1]
    own = {
        str(file.relative_to(package.parent))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    assert held == own
    assert {"unbackdoor/bench/suite_files/LOCK.json", "unbackdoor/report/templates/base.html"} <= held


def test_it_scans_a_model(installed: Installed) -> None:
    shutil.copytree(VICTIM, installed.cwd / "victim")
    words = ("victim/model.safetensors", "--checks", "weight_statistics", "--report", "out", "--json")
    told = json.loads(installed("scan", *words, codes=(0, 1, 2)))
    assert [check["status"] for check in told["checks"]] == ["ran"]
    assert (installed.cwd / "out" / "report.html").exists()


def test_it_runs_a_cut_of_a_suite(installed: Installed) -> None:
    told = json.loads(installed("bench", "run", "smoke-v1", "--only", "*/badnets/none/images=10", "--json"))
    assert (told["suite"], told["finished"], told["failed"]) == ("smoke-v1", True, 0)
    assert told["done"] == 3  # a victim and two draws of the defender
    installed("bench", "export", "smoke-v1")
    assert (installed.cwd / "results" / "smoke-v1.jsonl").exists()


@pytest.mark.slow
def test_it_gives_the_demonstration(installed: Installed) -> None:
    told = json.loads(installed("demo", "--out", "report", "--json"))
    assert told["after"]["asr"] < told["before"]["asr"] - 0.5
    assert (installed.cwd / "report" / "index.html").exists()
