"""A benchmark run is killed, shared, starved of disk and asked to stop, and ends with the same rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benching import (
    CELLS,
    LABEL,
    PATIENCE,
    bench,
    cells,
    database_is_sound,
    ended,
    left_behind,
    rows,
    start,
    states,
    write_suite,
)

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = pytest.mark.timeout(2 * PATIENCE)
CRASH = Path(__file__).parents[2] / "scripts" / "crash.py"


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny suite."""
    return write_suite(tmp_path_factory.mktemp("suites"))


@pytest.fixture(scope="module")
def undisturbed(suites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nothing happened to."""
    store = tmp_path_factory.mktemp("undisturbed")
    bench("run", LABEL, "--suites", suites, "--store", store, "--workers", "2")
    assert left_behind(store) == []
    return store


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(suites: Path, tmp_path: Path) -> None:
    """Eight kills; ``scripts/crash.py smoke-v1 --kills 50`` is the long form of this test."""
    done = subprocess.run(
        [sys.executable, CRASH, LABEL, "--suites", suites, "--kills", "8", "--folder", tmp_path],
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.stdout, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["faults"] == []
    assert verdict["good"] and done.returncode == 0
    assert verdict["kills"] >= 8 and verdict["cells"] == CELLS


@pytest.mark.slow
def test_two_drivers_share_a_store_and_do_each_cell_once(
    suites: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = ("run", LABEL, "--suites", suites, "--store", tmp_path, "--workers", "2")
    for driver in [start(*words), start(*words)]:
        out, _ = ended(driver)
        assert f"{LABEL}: {CELLS} cells done, 0 running, 0 failed, 0 left" in out
    assert [cell.tries for cell in cells(tmp_path)] == [1] * CELLS
    assert rows(tmp_path) == rows(undisturbed)
    assert left_behind(tmp_path) == []


def test_killed_once_it_ends_with_the_same_rows(suites: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The short form of the above for every push."""
    words = ("run", LABEL, "--suites", suites, "--store", tmp_path, "--workers", "2", "--quiet")
    driver = start(*words)
    while driver.poll() is None and not [*tmp_path.glob("work/*/task.json")]:
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    assert states(tmp_path)["done"] < CELLS
    bench(*words)
    assert rows(tmp_path) == rows(undisturbed)
    assert left_behind(tmp_path) == []
    assert database_is_sound(tmp_path)


# -- asked to stop ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_asked_to_stop_it_puts_back_what_runs_and_resumes(
    suites: Path, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    words = (LABEL, "--suites", suites, "--store", store, "--workers", "2")

    def stopped(sign: str, how: list[tuple[int, signal.Signals]]) -> None:
        """Wait for a sign of life in the store, send signals after pauses, and look at what is left."""
        before = {*store.glob(sign)}
        driver = start("run", *words)
        while driver.poll() is None and not {*store.glob(sign)} - before:
            time.sleep(0.01)
        for milliseconds, number in how:
            time.sleep(milliseconds / 1000)
            if number is signal.SIGINT:
                os.killpg(driver.pid, number)  # a terminal sends it to the whole group
            else:
                driver.send_signal(number)
        _, err = ended(driver, code=130)
        assert err.splitlines()[-1] == "interrupted"
        assert left_behind(store) == [] or all("checkpoints" in file for file in left_behind(store))
        with pytest.raises(ProcessLookupError):  # nothing of its group is left, after a moment
            for _ in range(PATIENCE * 50):
                os.killpg(driver.pid, 0)
                time.sleep(0.02)
        assert states(store)["running"] == 0

    stopped("drivers/*", [(0, signal.SIGINT)])  # the first process is just being started
    stopped("work/*", [(500, signal.SIGTERM)])
    stopped("work/*", [(300, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)])
    out, _ = bench("resume", *words)
    assert f"{CELLS} cells done" in out
    assert rows(store) == rows(undisturbed)
    assert left_behind(store) == []


# -- a full disk ------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own.

    Args:
        place: Folder that it is mounted on.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self, size: str) -> None:
        """Mount it, or skip the test where that is not permitted."""
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command")
        done = self._mount("size=" + size)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")

    def grow(self, size: str) -> None:
        """Change its size."""
        done = self._mount(f"remount,size={size}")
        assert done.returncode == 0, done.stderr

    def unmount(self) -> None:
        """Unmount it, busy or not."""
        if self.place.is_mount():
            subprocess.run(["umount", "-l", self.place], check=True)

    def free(self) -> int:
        """Return the free bytes."""
        return shutil.disk_usage(self.place).free

    def _mount(self, options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", self.place]
        return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that is always unmounted in the end."""
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    try:
        yield disk
    finally:
        disk.unmount()


@pytest.mark.slow
def test_on_a_full_disk_it_stops_with_one_sentence_and_goes_on_with_room(
    suites: Path, undisturbed: Path, disk: Disk
) -> None:
    disk.mount("32k")
    store = disk.place / "store"
    words = ("run", LABEL, "--suites", suites, "--store", store, "--workers", "2", "--quiet")
    done = []
    for size in ("32k", "160k", "256k", "352k"):
        disk.grow(size)
        _, err = bench(*words, code=2)
        assert err.startswith("error: ") and "\n\n" not in err
        assert "full" in err or "cannot be opened" in err
        if size == "32k":
            continue  # too small for an empty database
        assert database_is_sound(store)
        found = states(store)
        # No cell has failed of it, and what is called done is there as a whole.
        assert (found["failed"], found["running"]) == (0, 0) or found["failed"] == 0
        done.append(found["done"])
        assert rows(store) == [row for row in rows(undisturbed) if row in rows(store)]
    assert done == sorted(done) and done[-1] < CELLS
    disk.grow("64m")
    bench(*words)
    assert rows(store) == rows(undisturbed)
    assert left_behind(store) == []
    assert database_is_sound(store)
