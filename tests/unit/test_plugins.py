"""Parts of other distributions: found by entry point, and a broken one is named."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.errors import ConfigError, InputError
from unbackdoor.registry import ARCHITECTURES, ATTACKS, DEFENSES, SCANNERS, SCREENERS, Config, Registry

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


class Mine(Config):
    """Options of a part."""


class Other(Config):
    """Options of another part."""


def right(model: object, data: object, cfg: Mine, *, run: object) -> None: ...
def takes_base(model: object, data: object, cfg: Config, *, run: object) -> None: ...
def takes_any(model: Any, data: Any, cfg: Any, *, run: Any) -> Any: ...
def other_name(network: object, data: object, cfg: Mine, *, run: object) -> None: ...
def too_few(model: object, data: object, cfg: Mine) -> None: ...
def too_many(model: object, data: object, cfg: Mine, *, run: object, speed: int) -> None: ...
def other_order(data: object, model: object, cfg: Mine, *, run: object) -> None: ...
def keyword_model(*, model: object, data: object, cfg: Mine, run: object) -> None: ...
def positional_run(model: object, data: object, cfg: Mine, run: object, /) -> None: ...
def other_options(model: object, data: object, cfg: Other, *, run: object) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (other_name, "must be model, data, cfg, run, got network, data, cfg, run"),
        (too_few, "got model, data, cfg$"),
        (too_many, "got model, data, cfg, run, speed"),
        (other_order, "got data, model, cfg, run"),
        (keyword_model, "cannot be called with"),
        (positional_run, "cannot be called with"),
        (other_options, "takes Other as cfg, and is registered with Mine"),
    ],
)
def test_a_function_that_does_not_fit_is_refused_when_it_is_registered(
    function: Callable[..., None], words: str
) -> None:
    table: Registry[Any] = Registry(
        "defense", "plugged_parts", positional=("model", "data", "cfg"), keywords=("run",)
    )
    table.register("right", config=Mine)(right)
    table.register("base", config=Mine)(takes_base)
    table.register("any", config=Mine)(takes_any)
    with pytest.raises(ConfigError, match=r"the defense 'wrong' has .*") as caught:
        table.register("wrong", config=Mine)(function)
    assert re.search(words, "; ".join(caught.value.faults))
    assert "wrong" not in table._parts


@pytest.mark.parametrize("table", [ARCHITECTURES, ATTACKS, DEFENSES, SCANNERS, SCREENERS])
def test_every_kind_checks_what_it_registers(table: Registry[Any]) -> None:
    with pytest.raises(ConfigError, match="its parameters must be"):
        table.register("wrong", config=Mine)(lambda nothing: None)
