"""The address of a scheduler in a file that another program may be writing at this moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unbackdoor.bench import engines
from unbackdoor.errors import InputError

ADDRESS = "tcp://10.0.0.1:8786"
WHOLE = json.dumps({"type": "Scheduler", "address": ADDRESS, "workers": {}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scheduler.json"


def at_each_look(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Do one thing after each look at the file that found no address, instead of letting time pass."""
    left = iter(steps)
    monkeypatch.setattr(engines.time, "sleep", lambda _: next(left)())


def test_a_file_that_is_made_first_and_filled_later_is_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_each_look(
        monkeypatch,
        file.touch,
        lambda: file.write_text(WHOLE[:30], encoding="utf-8"),
        lambda: file.write_text("{}", encoding="utf-8"),
        lambda: file.write_text(WHOLE, encoding="utf-8"),
    )
    assert engines._address(str(file)) == ADDRESS


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]", b"7", b'{"address": null}', b'{"address": ""}', b"\xff\xfe", b"[" * 100_000),
        WHOLE[:30].encode(),
    ],
)
def test_what_never_becomes_an_address_is_refused_in_the_end(
    content: bytes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_CONNECT_SECONDS", 0)
    file.write_bytes(content)
    with pytest.raises(InputError, match="scheduler file cannot be read") as caught:
        engines._address(str(file))
    assert "dask scheduler --scheduler-file" in str(caught.value)


def test_a_file_that_never_comes_is_refused_and_an_address_is_taken_as_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_CONNECT_SECONDS", 0)
    with pytest.raises(InputError, match="FileNotFoundError"):
        engines._address(str(file))
    assert engines._address(ADDRESS) == ADDRESS
