"""Every registered attack, defense, scanner and screener is held to every contract of its kind."""

from __future__ import annotations

import pytest

from unbackdoor.testing import Check, checks_of
from unbackdoor.testing.contract import REGISTRIES

CASES = [
    pytest.param(check, name, id=f"{kind}-{name}-{check}")
    for kind in ("attack", "defense", "scanner", "screener")
    for name in REGISTRIES[kind]
    for check in checks_of(kind)
]


@pytest.mark.parametrize(("check", "name"), CASES)
def test_contract(check: Check, name: str) -> None:
    check(name)
