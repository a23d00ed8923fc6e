"""Importing libraries that are optional, and torchvision where its compiled operators are missing.

On some installations torch is the CPU build while torchvision was compiled against CUDA. Its extension then
cannot be loaded, and ``import torchvision`` stops at ``operator torchvision::nms does not exist``: it wants
to describe operators that nobody has defined. timm and transformers import torchvision and fail with it. The
networks themselves need none of those operators, so that declaring their signatures is enough to import
everything; calling one of them still fails, and says so. This is done only after the ordinary import failed
in this very way, and a warning names the lasting remedy.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from types import ModuleType

import torch

from unbackdoor.errors import InputError, MissingExtra

REMEDY = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_ATTEMPTS = 8
# All that torchvision describes and a CPU build can lack; the arguments of others are not known here.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# The definitions last as long as this object.
_defined: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring the operators that its own extension should have defined.

    Raises:
        MissingExtra: If it is not installed.
        InputError: If it cannot be imported for another reason.

    Warns:
        UserWarning: Once, where operators had to be declared.
    """
    declared: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            module = importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            if error.name != "torchvision":
                raise _broken("torchvision", error) from error
            raise MissingExtra("torchvision", "zoo", "an architecture of torchvision or timm") from error
        except (RuntimeError, ImportError) as error:
            match = _MISSING.search(str(error))
            if match is None or match[1] not in _SCHEMAS or match[1] in declared:
                raise _broken("torchvision", error) from error
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(_SCHEMAS[match[1]])
            _defined.append(library)
            declared.append(match[1])
            # What was imported half-way must not be found again.
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            if declared:
                warnings.warn(
                    "torchvision's compiled operators do not fit this torch and were left out "
                    f"({', '.join(declared)}); classifiers work without them. The lasting remedy: {REMEDY}",
                    UserWarning,
                    stacklevel=2,
                )
            return module
    raise InputError("torchvision cannot be imported", where="torchvision", remedy=REMEDY)


def import_library(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Import timm or transformers, after torchvision where it is installed.

    Args:
        name: The module.
        extra: Extra of this package that brings it.
        purpose: What it is needed for, in words.

    Raises:
        MissingExtra: If the module, or one that it needs, is not installed.
        InputError: If it is installed and cannot be imported.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingExtra(name, extra, purpose)
    if name not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or name, extra, purpose) from error
    except (RuntimeError, ImportError) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> InputError:
    return InputError(
        f"{name} is installed but cannot be imported",
        got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}",
        remedy=f"Install the releases of torch and torchvision that belong together, such as by: {REMEDY}",
    )
