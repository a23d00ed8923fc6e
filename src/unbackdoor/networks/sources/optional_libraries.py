"""Importing timm, torchvision and transformers, which are optional: installed and sound, or a typed error.

timm and transformers import torchvision, whose compiled operators must be of the same build as torch: a
torchvision made for CUDA cannot be imported beside a torch made for the CPU, and all three fail together.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType

from unbackdoor.errors import InputError, MissingExtra

REMEDY = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu"
_LIBRARIES = ("torchvision", "timm", "transformers")


def import_library(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional library.

    Args:
        name: The module, such as ``timm`` or ``torchvision.models``.
        extra: Extra of this package that brings it.
        purpose: What it is needed for, in words.

    Raises:
        MissingExtra: If it, or another of these libraries that it needs, is not installed.
        InputError: If it is installed and cannot be imported; tells the versions that were met.
    """
    library = name.partition(".")[0]
    try:
        importlib.import_module(library)
        return importlib.import_module(name)
    # A library that does not fit its neighbours raises anything: RuntimeError, OSError, AttributeError.
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing in _LIBRARIES:
            raise MissingExtra(missing, extra, purpose) from error
        reason = (str(error).strip() or "no message").splitlines()[0][:200]
        raise InputError(
            f"{library} is installed but cannot be imported",
            expected="torch and torchvision of releases and builds that belong together, such as 2.14 and "
            "0.29, both for the CPU or both for one CUDA",
            got=f"{_versions()} ({type(error).__name__}: {reason})",
            where=purpose,
            remedy=f"Install both from one place, such as by: {REMEDY}",
        ) from error


def is_installed(library: str) -> bool:
    """Tell whether a library is there to be imported; whether that works is not tried."""
    return importlib.util.find_spec(library) is not None


def _versions() -> str:
    """Return the versions that are installed, without importing anything."""
    versions = []
    for name in ("torch", *_LIBRARIES):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(versions) or "no versions"
