"""Where a network can come from other than our own registry: one file a prefix.

A source builds a bare, untrained network from the rest of a spec, and may state a normalisation, an input
size and class names. This module also decides which sources a file may name, and which only the user: a model
card is untrusted, so it may name a network of a library, but never a folder or a Python file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from unbackdoor.errors import UnsafeFile
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources import huggingface, python_file, timm, torchvision
from unbackdoor.networks.sources.preprocessing import Preprocessing
from unbackdoor.networks.spec import OWN, PYTHON, Spec

__all__ = ["SOURCES", "Preprocessing", "Source", "require_trusted"]


@dataclass(frozen=True)
class Source:
    """One place where networks come from.

    Attributes:
        build: From a spec and a geometry to a bare network, in whatever device context it is called.
        preprocessing_of: What the source's own files state about the input of this network.
        from_card: Whether a model card may name it.
        skeleton: Whether it can be built without memory, to compare shapes first.
        names_in: From a network and the names in a file to the network's names of those that the library
            loads; what it leaves out is not among them. None where both are the same.
    """

    build: Callable[[Spec, Geometry], nn.Module]
    preprocessing_of: Callable[[Spec], Preprocessing]
    from_card: bool
    skeleton: bool = True
    names_in: Callable[[nn.Module, Iterable[str]], dict[str, str]] | None = None


SOURCES: dict[str, Source] = {
    "timm": Source(timm.build, timm.preprocessing_of, from_card=True),
    "torchvision": Source(torchvision.build, torchvision.preprocessing_of, from_card=True),
    "hf": Source(
        huggingface.build, huggingface.preprocessing_of, from_card=False, names_in=huggingface.names_in
    ),
    PYTHON: Source(python_file.build, python_file.preprocessing_of, from_card=False, skeleton=False),
}


def require_trusted(spec: Spec, where: object) -> None:
    """Raise UnsafeFile where a card names what only the user may name."""
    if spec.source != OWN and not SOURCES[spec.source].from_card:
        what = (
            "a Python file, which would be executed" if spec.source == PYTHON else "a folder on this machine"
        )
        raise UnsafeFile(
            f"the model card names {what}; nothing was executed",
            expected="an architecture of this package, timm or torchvision",
            got=repr(str(spec)[:120])[1:-1],
            where=where,
            remedy="If you trust it, name it yourself as the architecture",
        )
