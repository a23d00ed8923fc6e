"""The preprocessing that a source states for a network, and the options that a library accepts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from unbackdoor.errors import ConfigError
from unbackdoor.networks.spec import Spec, value_of
from unbackdoor.registry import near_match

# A number in a spec can come from an untrusted card; no real network has a dimension beyond this.
_MAX_NUMBER = 100_000


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing and the class names that a source states for a network.

    Attributes:
        mean: Per-channel mean; None where nothing is said, empty for no normalisation.
        std: Per-channel deviation, likewise.
        size: (H, W), or None where nothing is said.
        size_fixed: Whether the network takes no other size.
        class_names: Names in logit order, or None.
        classes: Number of classes, or None where nothing is said.
        for_these_weights: True if it was written for exactly these weights; False if it is what the
            library's own weights of this name use.
        source: Where it was read, as text.
        note: Something to tell the user, or empty.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    size_fixed: bool = False
    class_names: tuple[str, ...] | None = None
    classes: int | None = None
    for_these_weights: bool = False
    source: str = ""
    note: str = ""


def keywords(spec: Spec, allowed: Collection[str]) -> dict[str, bool | int | float | str]:
    """Return the options of a spec as keyword arguments.

    Only options that shape the network are let through: others of these libraries fetch or open files.

    Raises:
        ConfigError: If an option is not among them or a number is absurd; all faults at once.
    """
    faults = []
    values: dict[str, bool | int | float | str] = {}
    for key, text in spec.options.items():
        value = value_of(text)
        if key not in allowed:
            faults.append(
                f"unknown option {key!r}{near_match(key, list(allowed))}; "
                f"there are: {', '.join(sorted(allowed))}"
            )
        elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            faults.append(f"{key}: expected a number within {_MAX_NUMBER}, got {text}")
        elif isinstance(value, str) and not value.replace("_", "").isalnum():
            faults.append(f"{key}: expected a number, true, false or a word, got {text!r}")
        else:
            values[key] = value
    if faults:
        raise ConfigError(f"the architecture {str(spec)[:80]!r}", faults)
    return values
