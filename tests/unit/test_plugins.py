"""Parts of other distributions: found by entry point, and a broken one is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unbackdoor.errors import InputError
from unbackdoor.registry import Registry

TABLE: Registry[object] = Registry("thing", "plugged_parts")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages are found in, with a package of parts that is empty by itself."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plugged_parts.py").write_text("", encoding="utf-8")
    monkeypatch.setitem(TABLE.__dict__, "_parts", {})
    monkeypatch.setitem(TABLE.__dict__, "_complete", False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(site: Path, name: str, module: str) -> None:
    """Put a distribution with one module and one entry point into a folder."""
    (site / f"{name}.py").write_text(module, encoding="utf-8")
    facts = site / f"{name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(f"[plugged_parts]\nmine = {name}\n", encoding="utf-8")


def test_a_part_of_another_distribution_is_found(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plugged_table", sys.modules[__name__])
    install(
        site,
        "plugged_one",
        "from plugged_table import TABLE\n"
        "assert 'mine' not in TABLE  # a look-up while it is imported\n"
        "@TABLE.register('mine')\n"
        "def part():\n"
        "    return 7\n",
    )
    assert list(TABLE) == ["mine"]
    assert TABLE["mine"].function() == 7  # type: ignore[operator]


def test_a_broken_one_is_named_with_its_owner_every_time(site: Path) -> None:
    install(site, "plugged_two", "raise RuntimeError('no such luck')\n")
    for _ in range(2):
        with pytest.raises(
            InputError,
            match=r"the thing plug-in 'mine' cannot be loaded \(plugged_two\): got RuntimeError: no such luck"
            r"\. Update or uninstall plugged_two\.",
        ):
            list(TABLE)
