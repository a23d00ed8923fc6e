"""The checks of a scan: what the registered scanners declare, cheapest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unbackdoor.errors import InputError
from unbackdoor.registry import SCANNERS, near_match


@dataclass(frozen=True)
class Check:
    """One look at the model.

    Attributes:
        name: In reports: that of the scanner, with that of a variant behind a colon.
        scanner: Registered scanner.
        question: What it asks, in words for the report.
        options: What differs from the scanner's defaults.
    """

    name: str
    scanner: str
    question: str
    options: Mapping[str, Any] = field(default_factory=dict)


def available_checks() -> tuple[Check, ...]:
    """Return the checks of all registered scanners and their variants, cheapest first."""
    out = []
    for part in sorted((SCANNERS[name] for name in SCANNERS), key=lambda part: part.scanning.cost):
        question = part.scanning.question or part.summary or f"What does {part.name} say?"
        out.append(Check(part.name, part.name, question))
        for key, variant in part.scanning.variants.items():
            out.append(Check(f"{part.name}:{key}", part.name, variant.question, variant.options))
    return tuple(out)


def default_checks() -> tuple[Check, ...]:
    """Return the checks of a scan for which none are named: of every scanner that declares a question."""
    return tuple(check for check in available_checks() if SCANNERS[check.scanner].scanning.question)


def plan_checks(
    checks: Sequence[Check | str] | None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Check, ...]:
    """Return the checks that are asked for.

    Args:
        checks: By themselves or by name; None is :func:`default_checks`.
        options: For checks by name: options laid over those of the check.

    Raises:
        InputError: If a name is unknown, none or one twice is given, or options are for none of them.
        ConfigError: If an option does not fit.
    """
    planned = default_checks() if checks is None else _named(checks)
    strangers = [name for name in options or () if name not in {check.name for check in planned}]
    if strangers:
        raise InputError(
            f"there are options for {strangers[0]!r}, which is no check of this scan",
            expected="one of " + ", ".join(check.name for check in planned),
        )
    laid = (replace(c, options={**c.options, **(options or {}).get(c.name, {})}) for c in planned)
    out = tuple(laid)
    for check in out:
        if check.options:
            SCANNERS[check.scanner].configure(check.options)  # a fault is told before the work
    return out


def _named(checks: Sequence[Check | str]) -> tuple[Check, ...]:
    known = {check.name: check for check in available_checks()}
    if not checks:
        raise InputError("no check was named", expected="one or more of " + ", ".join(known))
    out = []
    for check in checks:
        if isinstance(check, str) and check not in known:
            raise InputError(
                f"unknown check {check!r}{near_match(check, known)}", expected="one of " + ", ".join(known)
            )
        out.append(known[check] if isinstance(check, str) else check)
    twice = [name for name, count in Counter(check.name for check in out).items() if count > 1]
    if twice:
        # It would be counted twice, and agree with itself.
        raise InputError("a check is named twice", got=", ".join(twice), remedy="Name each check once")
    return tuple(out)
