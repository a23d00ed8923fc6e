"""Decoded image sets on disk: one safetensors file per set, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write
from unbackdoor.types import Images

# Part of every key: raise it whenever the same source would decode to other pixels.
LOADER_VERSION = 1
_ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class DecodedImages(Images):
    """Images that were decoded, with what was left out.

    Attributes:
        left_out: Rows of the source, ascending, whose images are damaged and are not among these.
    """

    left_out: tuple[int, ...] = ()


def default_cache() -> Path:
    """Return the cache folder: UNBACKDOOR_CACHE, else ``unbackdoor`` under the user's cache folder."""
    if own := os.environ.get("UNBACKDOOR_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "unbackdoor"


def cache_key(facts: Mapping[str, Any]) -> str:
    """Return 64 hex digits over everything that decides what the decoded pixels are."""
    text = json.dumps({"loader": LOADER_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(name: str, key: str, build: Callable[[], Images], *, cache: Path | None = None) -> Images:
    """Return the set from the cache; build and store it where it is absent or damaged.

    Args:
        name: First part of the file name; characters that do not suit one are replaced.
        key: From :func:`cache_key`.
        build: Decodes the set; called at most once.
        cache: Cache folder; None is :func:`default_cache`.

    Raises:
        InputError: If the set cannot be stored, for example because the disk is full.
    """
    path = cache_path(name, key, cache=cache)
    stored = load(path)
    if stored is not None:
        return stored
    images = build()
    store(images, path)
    return images


def cache_path(name: str, key: str, *, cache: Path | None = None) -> Path:
    """Return where a set of this name and key lies in the cache."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "images"
    # 80 + 64 + suffixes stay below the 255 bytes that file systems allow.
    return (cache or default_cache()) / f"{plain[:80]}-{key}.safetensors"


def store(images: Images, path: Path) -> None:
    """Write a decoded set atomically."""
    tensors = {"pixels": images.pixels.cpu().contiguous()}
    if images.labels is not None:
        tensors["labels"] = images.labels.cpu().contiguous()
    facts = {
        "version": LOADER_VERSION,
        "name": images.name,
        "class_names": list(images.class_names),
        "notes": list(images.notes),
        "left_out": list(images.left_out) if isinstance(images, DecodedImages) else [],
        "fingerprint": images.fingerprint(),
    }
    _sweep(path.parent)
    try:
        with atomic_write(path) as draft:
            save_file(tensors, draft, metadata={"unbackdoor": json.dumps(facts)})
    except SafetensorError as error:
        # The library reports a full disk in its own words only.
        raise InputError(
            "the cache cannot be written",
            where=path,
            got=str(error),
            remedy="Free some space or set UNBACKDOOR_CACHE to another folder; nothing half-written was left",
        ) from error


def load(path: Path) -> Images | None:
    """Return a stored set, or None where it is absent or does not match its recorded hash."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["unbackdoor"])
            # Copied out of the memory map: a file that is cut short later must not end the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  not a dict
        images = DecodedImages(
            pixels=tensors["pixels"],
            labels=tensors.get("labels"),
            class_names=tuple(facts["class_names"]),
            name=facts["name"],
            notes=tuple(map(str, facts.get("notes", ()))),
            left_out=tuple(map(int, facts.get("left_out", ()))),
        )
        return images if images.fingerprint() == facts["fingerprint"] else None
    except (SafetensorError, InputError, OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _sweep(folder: Path) -> None:
    """Remove drafts that a killed process left behind; a living one takes minutes, not an hour."""
    limit = time.time() - _ABANDONED_SECONDS
    for draft in folder.glob(".*.tmp-*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if draft.stat().st_mtime < limit:
                draft.unlink()


def as_images(
    pixels: Any,
    labels: Any,
    class_names: tuple[str, ...],
    name: str,
    notes: tuple[str, ...] = (),
    left_out: Iterable[int] = (),
) -> DecodedImages:
    """Return Images over numpy arrays without copying them."""
    return DecodedImages(
        pixels=torch.from_numpy(pixels),
        labels=None if labels is None else torch.from_numpy(labels),
        class_names=class_names,
        name=name,
        notes=notes,
        left_out=tuple(left_out),
    )
