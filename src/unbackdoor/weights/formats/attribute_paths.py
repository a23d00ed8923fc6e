"""Names from a file as paths of attributes of a network."""

from __future__ import annotations

import keyword
import re

from torch import fx, nn

# Parts of a name that become attributes of modules. What a module has already is never one of them.
_SEGMENT = re.compile(r"(?!__)[A-Za-z0-9_]{1,100}")
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_DEEPEST = 20


def attribute_path(name: str) -> str:
    """Return a name as a path of attributes; empty where it is none.

    No part of it may be an attribute that every module has, or a word of Python, of which the code that runs
    a graph is written: such a part gets an underscore.
    """
    parts = name.split(".")
    if not (all(_SEGMENT.fullmatch(part) for part in parts) and len(parts) < _DEEPEST):
        return ""
    return ".".join(f"{part}_" if part in _RESERVED or keyword.iskeyword(part) else part for part in parts)


class AttributePaths:
    """Paths that are taken; none lies within another."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._above: set[str] = set()

    def take(self, name: str, kind: str) -> str:
        """Return a free path, if possible the one in the name, else one of the kind and a number."""
        path = attribute_path(name)
        number = len(self._used)
        while not path or self.clashes(path):
            path = f"{kind}_{number}"
            number += 1
        self._used.add(path)
        above = path.rpartition(".")[0]
        while above:
            self._above.add(above)
            above = above.rpartition(".")[0]
        return path

    def clashes(self, path: str) -> bool:
        """Tell whether a path is taken, lies within one that is, or has one within it."""
        above = path
        while above:
            if above in self._used:
                return True
            above = above.rpartition(".")[0]
        return path in self._above
