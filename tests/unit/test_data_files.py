"""Atomic writing: the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write, sha256_file, write_json


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_whole_file_appears_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_write(target) as draft:
        assert draft.parent == target.parent and draft.name.startswith(".file.txt.tmp-")
        draft.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_file_and_leaves_no_draft(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(failure), atomic_write(target) as draft:
        draft.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with (
        pytest.raises(InputError, match=r"the disk is full .*file\.txt.*Free some space"),
        atomic_write(target) as draft,
    ):
        draft.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("not a folder")
    with pytest.raises(OSError), atomic_write(tmp_path / "folder" / "file.txt"):
        pytest.fail("the block must not run")


def test_a_refusal_names_the_place(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"cannot be written \(/locked\).*may write to"),
        atomic_write(tmp_path / "file.txt"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/locked")


def test_racing_writers_leave_one_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    texts = [str(k) * 50_000 for k in range(4)]

    def write(text: str) -> None:
        for _ in range(5):
            with atomic_write(target) as draft:
                draft.write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts
    assert names(tmp_path) == ["file.txt"]


def test_write_json(tmp_path: Path) -> None:
    target = tmp_path / "facts.json"
    write_json(target, {"name": "Zürich", "values": [1, 2.5]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"name": "Zürich", "values": [1, 2.5]}
    assert target.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError):
        write_json(target, float("nan"))
    assert names(tmp_path) == ["facts.json"]


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_can_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "plain") as draft:
        draft.write_text("x")
        draft.chmod(0o600)  # as some writers leave it
    other = tmp_path / "other"
    other.write_text("x")
    assert (tmp_path / "plain").stat().st_mode == other.stat().st_mode


def test_a_full_disk_that_a_writer_hides_says_so(tmp_path: Path) -> None:
    # torch's writer closes its archive while the system's error passes, and raises one of its own.
    with pytest.raises(InputError, match="the disk is full"), atomic_write(tmp_path / "file"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 768 vs 662")


def test_an_error_of_the_system_names_the_file_and_not_its_draft(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(tmp_path / "folder") as draft:
        draft.write_text("whole")
    assert caught.value.filename == str(tmp_path / "folder")
