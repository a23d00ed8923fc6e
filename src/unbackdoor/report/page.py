"""From a template to a page that loads nothing: no script, no font, no address outside of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unbackdoor.files import atomic_write
from unbackdoor.report import words
from unbackdoor.text import printable

_LONG = 16  # letters of a word that does not fit into a column


def render(template: str, **content: Any) -> str:
    """Return the page of a template.

    Everything is escaped but ``Markup``, because names of classes, files and models come from strangers.

    Args:
        template: File name in ``templates``.
        content: Variables of the template; a missing one is an error.
    """
    environment = Environment(
        loader=PackageLoader("unbackdoor.report", "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "rate", "interval", "duration"):
        environment.filters[name] = getattr(words, name)
    environment.filters["breakable"] = breakable
    return environment.get_template(template).render(**content)


def breakable(text: str) -> Markup:
    """Let long names break at their joints, such as those of ``badnets_all_to_all``.

    Example:
        >>> breakable("airbench[expansion=2] of width 32")
        Markup('airbench<wbr>[expansion=2] of width 32')
    """
    words = re.split(r"(\s+)", str(_visible(text)))
    return Markup("").join(
        Markup("<wbr>").join(re.split(r"(?<=[_:])|(?=\[)", word)) if len(word) > _LONG else escape(word)
        for word in words
    )


def _visible(value: Any) -> Any:
    """Escape what is not to be seen in a text; ``Markup`` is our own."""
    return (
        printable(value, keep="\n\t\u00a0\u202f")
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(page, encoding="utf-8")
