"""What an auditor does with a model that somebody else trained: audit, and its parts scan, purify, verify.

The room and its first verb have one name, so the module can be called: ``unbackdoor.audit(model, data)`` is
:func:`unbackdoor.audit.auditing.audit`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return _verb()(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_verb())


def _verb() -> Any:
    from importlib import import_module  # late: the verb imports torch

    return import_module("unbackdoor.audit.auditing").audit


sys.modules[__name__].__class__ = _Room
