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
    """One run of a scanner on the model.

    Attributes:
        name: In reports: the scanner's name; that of a variant follows after a colon.
        scanner: Registered scanner.
        question: The question that it answers, for the report.
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


def default_checks(classes: int | None = None) -> tuple[Check, ...]:
    """Return the default checks of a scan: those of every scanner that declares a question.

    Args:
        classes: Of the model; scanners for fewer are left out. None is a model that is not known yet.
    """
    every = ((check, SCANNERS[check.scanner].scanning) for check in available_checks())
    return tuple(
        check
        for check, facts in every
        if facts.question and (classes is None or facts.most_classes is None or classes <= facts.most_classes)
    )


def plan_checks(
    checks: Sequence[Check | str] | None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    classes: int | None = None,
) -> tuple[Check, ...]:
    """Return the requested checks.

    Args:
        checks: Checks or their names; None is :func:`default_checks`.
        options: By name of a check: options that override those of the check.
        classes: Of the model, where it is known; see :func:`default_checks`.

    Raises:
        InputError: If a name is unknown, none or one twice is given, or options are for none of them.
        ConfigError: If an option does not fit.
    """
    planned = default_checks() if checks is None else _named(checks)
    unplanned = [name for name in options or () if name not in {check.name for check in planned}]
    if unplanned:
        raise InputError(
            f"there are options for {unplanned[0]!r}, which is no check of this scan",
            expected="one of " + ", ".join(check.name for check in planned),
        )
    if checks is None:  # options may be for a check that this model has no use for
        planned = default_checks(classes)
    out = tuple(replace(c, options={**c.options, **(options or {}).get(c.name, {})}) for c in planned)
    for check in out:
        if check.options:
            SCANNERS[check.scanner].configure(
                check.options
            )  # an option that does not fit is an error now, before the work
    return out


def _named(checks: Sequence[Check | str]) -> tuple[Check, ...]:
    available = {check.name: check for check in available_checks()}
    if not checks:
        raise InputError("no check was named", expected="one or more of " + ", ".join(available))
    out = []
    for check in checks:
        if isinstance(check, str) and check not in available:
            raise InputError(
                f"unknown check {check!r}{near_match(check, available)}",
                expected="one of " + ", ".join(available),
            )
        out.append(available[check] if isinstance(check, str) else check)
    twice = [name for name, count in Counter(check.name for check in out).items() if count > 1]
    if twice:
        # It would be counted twice, and agree with itself.
        raise InputError("a check is named twice", got=", ".join(twice), remedy="Name each check once")
    return tuple(out)
