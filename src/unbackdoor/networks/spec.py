"""The grammar of architectures: ``name[option=value,...]`` behind the prefix of a source.

    resnet18[width=64]  or  unbackdoor:resnet18[width=64]     our own registry
    timm:vit_tiny_patch16_224[img_size=32]                    the library timm
    torchvision:resnet18                                      the library torchvision
    hf:FOLDER                                                 a config of transformers on this disk
    FILE.py:CALLABLE[argument=value]                          the user's own code

Nothing is imported or built here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from unbackdoor.errors import ConfigError

# Specs come from cards too; nothing legitimate is longer.
MAX_SPEC = 500
OWN = "unbackdoor"
PYTHON = "python"
LIBRARIES = ("timm", "torchvision")
_NAME = r"[A-Za-z0-9_.-]+"
_SPEC = re.compile(
    rf"(?:(?P<python>[^\x00-\x1f]+\.py:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
    rf"|hf:(?P<hf>[^\x00-\x1f\[\]]+)"
    rf"|(?P<library>timm|torchvision):(?P<member>{_NAME})"
    rf"|(?:{OWN}:)?(?P<own>{_NAME}))"
    r"(?:\[(?P<options>[^\[\]]*)\])?"
)
_FORMS = (
    "expected the form name or name[option=value,...], timm:NAME, torchvision:NAME, hf:FOLDER or "
    "FILE.py:CALLABLE"
)


@dataclass(frozen=True)
class Spec:
    """A spec taken apart; its values are not yet checked.

    Attributes:
        source: ``unbackdoor``, ``timm``, ``torchvision``, ``hf`` or ``python``.
        name: Registered name, the library's name, a folder, or ``FILE.py:CALLABLE``.
        options: Options as text, in the order they were written.
    """

    source: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        prefix = "" if self.source in (OWN, PYTHON) else f"{self.source}:"
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{prefix}{self.name}" + (f"[{options}]" if options else "")


def read_spec(text: str) -> Spec:
    """Take a spec apart.

    Raises:
        ConfigError: If the text has another form, with every fault at once.

    Example:
        >>> read_spec("timm:vit_tiny_patch16_224[img_size=32]").options
        {'img_size': '32'}
    """
    spec, faults = take_apart(text)
    if faults:
        raise ConfigError(f"the architecture {quoted(text)}", faults)
    return spec


def take_apart(text: str) -> tuple[Spec, list[str]]:
    """Return the spec and what is wrong with its options, in words.

    Raises:
        ConfigError: If the text as a whole has another form.
    """
    match = _SPEC.fullmatch(text.strip()) if len(text) <= MAX_SPEC else None
    if match is None:
        raise ConfigError(f"the architecture {quoted(text)}", [_FORMS])
    options, faults = split_options(match["options"] or "")
    if match["python"]:
        return Spec(PYTHON, match["python"], options), faults
    if match["hf"]:
        return Spec("hf", match["hf"], options), faults
    if match["library"]:
        return Spec(match["library"], match["member"], options), faults
    return Spec(OWN, match["own"], options), faults


def split_options(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the options of ``a=1,b=2`` and what is wrong with them, in words."""
    options: dict[str, str] = {}
    faults: list[str] = []
    for item in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            faults.append(f"expected option=value, got {item.strip()!r}")
        elif key in options:
            faults.append(f"the option {key!r} stands twice")
        else:
            options[key] = value
    return options, faults


def value_of(text: str) -> bool | int | float | str:
    """Return what a text stands for: ``true`` and ``false``, a number, or itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def quoted(text: str) -> str:
    """Return a spec quoted and cut short, for messages: it may come from a file."""
    return repr(text if len(text) <= 80 else text[:80] + "...")
