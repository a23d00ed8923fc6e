"""The contract suite for attacks, defenses, scanners and screeners, those of other distributions included.

Each check holds one part to one contract, on networks of a few thousand weights, in about a second::

    from unbackdoor.testing import check_defense
    check_defense("my_defense")

or one test for each contract, with pytest::

    @pytest.mark.parametrize("check", list(checks_of("defense")), ids=str)
    def test_my_defense(check):
        check("my_defense")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Imported for the contracts that they enter.
from unbackdoor.testing import attacks, declarations, failures, results  # noqa: F401
from unbackdoor.testing.contract import Check, Kind, Method, checks_of
from unbackdoor.testing.examples import block_data, planted, tiny_classifier, tiny_data

__all__ = [
    "Check",
    "Kind",
    "block_data",
    "check_attack",
    "check_defense",
    "check_scanner",
    "check_screener",
    "checks_of",
    "planted",
    "tiny_classifier",
    "tiny_data",
]


def check_attack(attack: Method, *, options: Mapping[str, Any] | None = None) -> None:
    """Hold an attack to every contract of attacks; see :func:`check_defense`."""
    _check_all("attack", attack, options)


def check_defense(defense: Method, *, options: Mapping[str, Any] | None = None) -> None:
    """Hold a defense to every contract of defenses.

    Args:
        defense: Its registered name, the registered function, or the part.
        options: Options that make it quick; by default those of its registration.

    Raises:
        AssertionError: If it breaks one; the message names every contract that is broken, and how.

    Example:
        >>> check_defense("none")
    """
    _check_all("defense", defense, options)


def check_scanner(scanner: Method, *, options: Mapping[str, Any] | None = None) -> None:
    """Hold a scanner to every contract of scanners; see :func:`check_defense`."""
    _check_all("scanner", scanner, options)


def check_screener(screener: Method, *, options: Mapping[str, Any] | None = None) -> None:
    """Hold a screener to every contract of screeners; see :func:`check_defense`."""
    _check_all("screener", screener, options)


def _check_all(kind: Kind, method: Method, options: Mapping[str, Any] | None) -> None:
    broken: list[AssertionError] = []
    for check in checks_of(kind):
        try:
            check(method, options=options)
        except AssertionError as error:
            broken.append(error)
    if broken:
        raise AssertionError("\n".join(map(str, broken))) from broken[0]
