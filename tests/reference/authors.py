"""Take single functions and classes out of a checkout of the authors' code, to run them on our tensors.

Nothing of that code is kept here. A script of this folder is given the folder of a checkout, reads the named
definitions from it, runs them, and stores what they return.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def definitions(file: Path, names: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Execute the named top-level functions and classes of a file, and nothing else of it.

    Args:
        file: Source file of the checkout.
        names: What is wanted.
        given: Names that the definitions expect to find in their module, such as ``torch`` and ``args``.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]
    missing = names - {node.name for node in body}
    if missing:
        sys.exit(f"{file} does not define {', '.join(sorted(missing))}")
    space = dict(given)
    exec(compile(ast.Module(body, type_ignores=[]), str(file), "exec"), space)
    return space


def checkout() -> Path:
    """Return the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER-OF-A-CHECKOUT")
    return Path(sys.argv[1])


class FormerConv2d(nn.Conv2d):
    """A convolution as it was when the code was written: its product took no bias, but found it itself."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return super()._conv_forward(input, weight, self.bias)
