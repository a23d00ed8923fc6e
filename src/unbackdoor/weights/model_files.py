"""The models that a path, a pattern or a folder means; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from unbackdoor.errors import InputError
from unbackdoor.files import is_there
from unbackdoor.weights.model_folder import INDEX, USUAL_NAMES

# What other programs would load weights from, so that a file that cannot be read is told and not passed over.
SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".th", ".tar", ".ckpt", ".pt2", ".ptl", ".onnx",
    ".pkl", ".pickle", ".joblib", ".dill", ".h5", ".hdf5", ".keras", ".pb",
})  # fmt: skip
MAX_DEPTH = 16  # folders below the one that was given
MAX_ENTRIES = 100_000  # files and folders that are looked at
MAX_MODELS = 10_000
_PATTERN = frozenset("*?[")


def is_several(path: Path) -> bool:
    """Tell whether a path means models one by one: a pattern, or a folder that is no model itself."""
    if is_there(path):
        return path.is_dir() and not _is_model(path)
    return bool(_PATTERN & set(str(path)))


def model_files(path: Path | str) -> tuple[Path, ...]:
    """Return the models that a path means, sorted by name.

    A file is itself, and so is a model folder: one with weights of a usual name, or with one file of weights
    and nothing else to choose from. Of another folder, the models in it and in its folders, hidden ones and
    links to folders left out. Of a pattern such as ``models/**/*.pth``, what it matches.

    Args:
        path: A file, a folder, or a pattern where there is no file of that name.

    Raises:
        InputError: If there is no model, or there are more than can be looked through.
    """
    path = Path(path)
    if not is_several(path):
        return (path,)
    found = _matching(path) if not is_there(path) else sorted(_below(path, [0], 0))
    if not found:
        raise InputError(
            "there is no model",
            expected="files such as " + ", ".join(sorted(SUFFIXES)[:6]) + ", or folders with weights",
            where=path,
        )
    if len(found) > MAX_MODELS:
        raise InputError("there are too many models", expected=f"at most {MAX_MODELS}", where=path)
    return tuple(found)


def _entries(folder: Path, looked_at: list[int]) -> list[os.DirEntry[str]]:
    entries = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                looked_at[0] += 1
                if looked_at[0] > MAX_ENTRIES:
                    raise InputError(
                        "there are too many files to look through",
                        expected=f"at most {MAX_ENTRIES}",
                        where=folder,
                        remedy="Give a folder inside",
                    )
                entries.append(entry)
    except OSError as error:
        raise InputError("the folder cannot be read", got=error.strerror, where=folder) from error
    return sorted(entries, key=lambda entry: entry.name)


def _is_model(folder: Path) -> bool:
    """Tell whether a folder is a model: usual names, or a single file of weights and no folder with more."""
    entries = _entries(folder, [0])
    names = {entry.name for entry in entries}
    if names & set(USUAL_NAMES) or any(name.endswith(INDEX) for name in names):
        return True
    if sum(_has_suffix(name) for name in names) != 1:
        # Without any weights it is no folder of models either; whoever opens it says what is missing.
        return not any(_has_suffix(name) for name in names) and not any(_below(folder, [0], 0))
    return not any(any(_below(Path(e.path), [0], 1)) for e in entries if _is_open_folder(e))


def _below(folder: Path, looked_at: list[int], depth: int) -> Iterator[Path]:
    if depth > MAX_DEPTH:
        return
    entries = _entries(folder, looked_at)
    if depth and {entry.name for entry in entries} & set(USUAL_NAMES):
        yield folder
        return
    for entry in entries:
        if _is_open_folder(entry):
            yield from _below(Path(entry.path), looked_at, depth + 1)
        elif _has_suffix(entry.name) and entry.is_file():
            yield Path(entry.path)


def _is_open_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _has_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _matching(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor)
    relative = str(pattern.relative_to(anchor)) if pattern.anchor else str(pattern)
    found = []
    try:
        for count, path in enumerate(anchor.glob(relative)):
            if count >= MAX_ENTRIES:
                raise InputError("the pattern matches too many files", where=pattern)
            found.append(path)
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError("this is no pattern of files", got=str(error), where=pattern) from error
    models = [path for path in found if _has_suffix(path.name) or (path.is_dir() and _is_model_folder(path))]
    named = models or [path for path in found if path.is_file()]
    return sorted(named)


def _is_model_folder(folder: Path) -> bool:
    return any(is_there(folder / name) for name in USUAL_NAMES)


def report_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each of several models that is none of the others', for a folder of reports."""
    if not paths:
        return []
    top = Path(os.path.commonpath([path.parent for path in paths]))
    names: list[str] = []
    for path in paths:
        name = "-".join(path.relative_to(top).parts)
        whole, number = name, 2
        while whole in names:
            whole, number = f"{name}-{number}", number + 1
        names.append(whole)
    return names
