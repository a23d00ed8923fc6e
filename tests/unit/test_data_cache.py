"""The cache: used when whole, rebuilt when damaged, never left half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError

from unbackdoor.data import cache
from unbackdoor.errors import InputError
from unbackdoor.types import Images

KEY = "0" * 64


def images(value: int = 3) -> Images:
    pixels = torch.full((4, 3, 2, 2), value, dtype=torch.uint8)
    return Images(pixels, torch.tensor([0, 1, 0, 1]), ("cat", "dög"), "pets")


def refuse() -> NoReturn:
    raise AssertionError("the set must come from the cache")


def same(a: Images, b: Images) -> bool:
    return a.fingerprint() == b.fingerprint() and a.name == b.name


def test_a_hit_does_not_build(tmp_path: Path) -> None:
    cache.cached("pets", KEY, images, cache=tmp_path)
    assert same(cache.cached("pets", KEY, refuse, cache=tmp_path), images())


def test_a_set_without_labels_comes_back_without(tmp_path: Path) -> None:
    bare = Images(images().pixels, None, (), "bare")
    cache.cached("bare", KEY, lambda: bare, cache=tmp_path)
    assert cache.cached("bare", KEY, refuse, cache=tmp_path).labels is None


def test_another_key_builds(tmp_path: Path) -> None:
    cache.cached("pets", KEY, images, cache=tmp_path)
    assert same(cache.cached("pets", "1" * 64, lambda: images(5), cache=tmp_path), images(5))


def test_keys_depend_on_every_fact() -> None:
    base = {"source": "a", "size": (1, 2)}
    keys = {cache.cache_key(facts) for facts in (base, {**base, "size": (2, 1)}, {**base, "source": "b"})}
    assert len(keys) == 3 and cache.cache_key(dict(reversed(base.items()))) in keys


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 40)


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_empty, damage_header])
def test_a_damaged_file_is_rebuilt(tmp_path: Path, damage: Any) -> None:
    cache.cached("pets", KEY, images, cache=tmp_path)
    damage(cache.cache_path("pets", KEY, cache=tmp_path))
    calls = []

    def build() -> Images:
        calls.append(1)
        return images()

    assert same(cache.cached("pets", KEY, build, cache=tmp_path), images()) and calls == [1]
    assert same(cache.cached("pets", KEY, refuse, cache=tmp_path), images())


@pytest.mark.parametrize("failure", [RuntimeError("inside"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(cache, "save_file", half)
    with pytest.raises(type(failure)):
        cache.cached("pets", KEY, images, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_is_explained_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device\. Free some space"):
        cache.cached("pets", KEY, images, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def build() -> Images:
        raise InputError("bad source")

    with pytest.raises(InputError):
        cache.cached("pets", KEY, build, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_abandoned_drafts_are_swept_and_fresh_ones_are_not(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".a.safetensors.tmp-1-ab", tmp_path / ".b.safetensors.tmp-2-cd"
    for draft in (old, fresh):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.store(images(), cache.cache_path("pets", KEY, cache=tmp_path))
    assert not old.exists() and fresh.exists()


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../../evil", "a/b", "..", "", "x" * 300):
        path = cache.cache_path(name, KEY, cache=tmp_path)
        assert path.parent == tmp_path and not path.name.startswith(".") and len(path.name) < 250


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNBACKDOOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache() == tmp_path / ".cache" / "unbackdoor"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_cache() == tmp_path / "xdg" / "unbackdoor"
    monkeypatch.setenv("UNBACKDOOR_CACHE", str(tmp_path / "own"))
    assert cache.default_cache() == tmp_path / "own"
