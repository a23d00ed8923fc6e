"""Make, apply and revert repairs as small files: ``unbackdoor.patch``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import writing
from unbackdoor.opening.write_back import require_format, write_weights
from unbackdoor.weights.patch import (
    Direction,
    Patch,
    in_file_names,
    make_patch,
    read_patch,
    use_patch,
    write_patch,
)
from unbackdoor.weights.source import Source, open_source


@dataclass(frozen=True)
class MadePatch:
    """The difference between two files.

    Attributes:
        patch: The difference.
        before: The original, as it was opened.
        after: The repair, likewise.
    """

    patch: Patch
    before: Source
    after: Source

    def to_dict(self) -> dict[str, Any]:
        """Return hashes and counts as JSON."""
        return {
            "before_sha256": self.patch.before,
            "after_sha256": self.patch.after,
            "tensors": len(self.patch.entries),
            "changed": self.patch.changed,
        }

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write the patch, whole or not at all.

        Raises:
            InputError: If the file exists or cannot be written.
            IntegrityError: If one of the two files has changed since it was opened.
        """
        path = Path(path)
        with writing((path,), force=force, inputs=(self.before.path, self.after.path)):
            for source in (self.before, self.after):
                source.require_unchanged()
            write_patch(path, self.patch)
        return path


@dataclass(frozen=True)
class Patched:
    """A file's weights after a patch was applied or reverted.

    Attributes:
        state: Tensors by name.
        direction: Which of the two.
        patch: The patch.
        source: The file that it was done to, as it was opened.
        patch_file: Where the patch lay.
    """

    state: dict[str, Tensor] = field(repr=False)
    direction: Direction
    patch: Patch
    source: Source
    patch_file: Path

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Keys of the further weights of the file, which are not in what is written."""
        return tuple(self.source.contents.other_sets)

    @property
    def sha256(self) -> str:
        """Hash of the weights."""
        return self.patch.after if self.direction == "apply" else self.patch.before

    def to_dict(self) -> dict[str, Any]:
        """Return what was done as JSON."""
        return {
            "direction": self.direction,
            "sha256": self.sha256,
            "left_behind": list(self.left_behind),
            "facts": dict(self.patch.facts),
        }

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write the weights as the suffix asks, whole or not at all.

        Raises:
            InputError: If the file exists or cannot be written, or its kind is not known.
            IntegrityError: If the file has changed since it was opened.
        """
        path = Path(path)
        require_format(path)
        with writing((path,), force=force, inputs=(self.source.path, self.patch_file)):
            self.source.require_unchanged()
            contents = self.source.contents
            write_weights(path, self.state, nest=contents.nest, prefix=contents.prefix, source=self.source)
        return path


def make(before: Path | str | Source, after: Path | str | Source, *, weights: str | None = None) -> MadePatch:
    """Return the difference between two files with the same tensors.

    Args:
        before: The original.
        after: The repair.
        weights: Which of several sets of weights, by its keys; in the files that have several.

    Raises:
        InputError: If a file cannot be read, or the two differ in more than values.
        UnsafeFile: If a file would run code.
    """
    one, other = (s if isinstance(s, Source) else open_source(s) for s in (before, after))
    if weights is not None:
        has = [weights in source.contents.sets for source in (one, other)]
        one = one.choose(weights) if has[0] or not has[1] else one
        other = other.choose(weights) if has[1] else other
    return MadePatch(make_patch(one.state(), other.state()), one, other)


def apply(model: Path | str | Source, patch_file: Path | str, *, weights: str | None = None) -> Patched:
    """Return a file's weights with a patch applied.

    Args:
        model: The file.
        patch_file: The patch.
        weights: Which of several sets of weights, by its keys; None takes the one that the patch fits.

    Raises:
        IntegrityError: If the patch was not made for exactly these weights.
        InputError: If a file cannot be read.
    """
    return _use(model, patch_file, "apply", weights)


def revert(model: Path | str | Source, patch_file: Path | str, *, weights: str | None = None) -> Patched:
    """Return a file's weights as they were before a patch.

    Args:
        model: The file.
        patch_file: The patch.
        weights: As for :func:`apply`.

    Raises:
        IntegrityError: If these are not exactly the weights that the patch leads to.
        InputError: If a file cannot be read.
    """
    return _use(model, patch_file, "revert", weights)


def _use(
    model: Path | str | Source, patch_file: Path | str, direction: Direction, weights: str | None
) -> Patched:
    change = read_patch(Path(patch_file))
    source = model if isinstance(model, Source) else open_source(model)
    if weights is not None:
        source = source.choose(weights)
    elif source.contents.rivals:
        # The patch says itself by its hash which of several sets it was made for.
        for key in source.contents.sets:
            with suppress(UnbackdoorError):
                chosen = source.choose(key)
                state = use_patch(change, in_file_names(change, chosen.state()), direction)
                return Patched(state, direction, change, chosen, Path(patch_file))
    state = use_patch(change, in_file_names(change, source.state()), direction)
    return Patched(state, direction, change, source, Path(patch_file))
