"""The data sets known by name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbackdoor import confinement
from unbackdoor.data import apart
from unbackdoor.data.cache import as_images, cache_key, cache_path, cached, default_cache, load, store
from unbackdoor.data.named_sets.catalogue import SETS, Facts
from unbackdoor.data.named_sets.downloads import Opener, fetch_archive, find_archive, open_url
from unbackdoor.data.named_sets.official import READERS
from unbackdoor.data.sources.parquet import read_parquet
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.files import sha256_file
from unbackdoor.registry import near_match
from unbackdoor.types import Augmentation, Images, Progress, silent

PARTS = ("train", "test")
ROOT_VARIABLE = "UNBACKDOOR_DATA"


@dataclass(frozen=True)
class DataSet:
    """A data set with what a model trained on it needs to know.

    Attributes:
        name: Name in the list of sets.
        train: Official training images.
        test: Official test images.
        augmentation: What may be done to an image without changing its class.
        mean: Per-channel mean of training pixels in [0, 1].
        std: Per-channel standard deviation likewise.
    """

    name: str
    train: Images
    test: Images
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]


def dataset_names() -> list[str]:
    """Return the names that :func:`load_dataset` knows."""
    return list(SETS)


def load_dataset(
    name: str,
    *,
    root: Path | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
    download: bool = True,
    opener: Opener = open_url,
) -> DataSet:
    """Load a named data set, decoding it at the first call and reading the cache afterwards.

    ``digits`` comes with scikit-learn. The others are looked for, in this order, as ``train.parquet`` and
    ``test.parquet`` in ``root/name``, as the owners' archives in ``root/name`` and in ``downloads/name``
    of the cache, and at their official addresses.

    Args:
        name: One of :func:`dataset_names`.
        root: Data root; None takes the environment variable UNBACKDOOR_DATA, where it is set.
        cache: Cache folder; None is :func:`unbackdoor.data.cache.default_cache`.
        progress: Shows how far downloading and decoding have come.
        download: Whether the official addresses may be asked.
        opener: Opens an address; see :func:`unbackdoor.data.named_sets.downloads.fetch_archive`.

    Raises:
        InputError: If the name is unknown, the set is found nowhere, or what was found is not that set.
        IntegrityError: If an archive does not match its published checksum.
        MissingExtra: If scikit-learn or pyarrow is needed and not installed.

    Example:
        >>> digits = load_dataset("digits")
        >>> digits.train.shape, len(digits.train), len(digits.test)
        ((1, 8, 8), 1200, 597)
    """
    if name not in SETS:
        raise InputError(
            f"unknown data set {name!r}{near_match(name, SETS)}", expected="one of " + ", ".join(SETS)
        )
    facts = SETS[name]
    if name == "digits":
        return _as_dataset(facts, *_digits(facts))
    cache = cache or default_cache()
    root = _root(root)
    if root is not None and (paths := _parquet_paths(root / name)):
        train, test = (_from_parquet(facts, part, paths[part], cache, progress) for part in PARTS)
    else:
        train, test = _from_archives(facts, root, cache, progress, download, opener)
    return _as_dataset(facts, train, test)


def _as_dataset(facts: Facts, train: Images, test: Images) -> DataSet:
    return DataSet(
        name=facts.name,
        train=train,
        test=test,
        augmentation=facts.augmentation,
        mean=facts.mean,
        std=facts.std,
    )


def _root(root: Path | None) -> Path | None:
    setting = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not setting:
        return None
    root = Path(setting)
    if not root.is_dir():
        raise InputError(
            "the data root is no folder",
            where=root,
            remedy=f"Correct --data-root or the environment variable {ROOT_VARIABLE}",
        )
    return root


def _parquet_paths(folder: Path) -> dict[str, Path]:
    paths = {part: folder / f"{part}.parquet" for part in PARTS}
    there = [part for part in PARTS if paths[part].is_file()]
    if len(there) == 1:
        missing = next(part for part in PARTS if part not in there)
        raise InputError(
            f"the data set has no {missing} part",
            expected=f"{paths[missing].name} beside {paths[there[0]].name}",
            got="no such file",
            where=folder,
            remedy=f"Put {missing}.parquet there, or remove {there[0]}.parquet",
        )
    return paths if there else {}


def _from_parquet(facts: Facts, part: str, path: Path, cache: Path, progress: Progress) -> Images:
    name = f"{facts.name} {part}"
    key = cache_key({"set": facts.name, "part": part, "source": sha256_file(path)})

    def build() -> Images:
        return _checked(read_parquet(path, progress=progress, name=name), facts, part, path)

    title = f"{facts.name}-{part}"
    stored = cache_path(title, key, cache=cache)
    if not confinement.enabled():
        return cached(title, key, build, cache=cache)
    if (images := load(stored)) is not None:
        return images
    task = {"path": str(path.absolute()), "set": facts.name, "part": part}
    return apart.decoded("unbackdoor.data.datasets:decode_apart", task, stored, path.stat().st_size, progress)


def decode_apart(task: Mapping[str, Any]) -> None:
    """Decode a part of a named set in a process of its own; see :mod:`unbackdoor.data.apart`."""
    facts, part, path = SETS[task["set"]], str(task["part"]), Path(task["path"])
    images = read_parquet(path, progress=apart.reporting(task), name=f"{facts.name} {part}")
    store(_checked(images, facts, part, path), Path(task["stored"]))


def _from_archives(
    facts: Facts, root: Path | None, cache: Path, progress: Progress, download: bool, opener: Opener
) -> list[Images]:
    downloads = cache / "downloads" / facts.name
    folders = ([] if root is None else [root / facts.name]) + [downloads]
    paths: dict[str, Path] = {}

    def build(part: str) -> Images:
        # Only now: with both parts in the cache, the archives are not needed any more.
        if not paths:
            paths.update(_archives(facts, root, folders, progress, download, opener))
        return _checked(READERS[facts.name](paths, facts, part, progress), facts, part, folders[-1])

    def builder(part: str) -> Callable[[], Images]:
        return lambda: build(part)

    sums = [asdict(archive) for archive in facts.archives]
    return [
        cached(
            f"{facts.name}-{part}",
            cache_key({"set": facts.name, "part": part, "archives": sums}),
            builder(part),
            cache=cache,
        )
        for part in PARTS
    ]


def _archives(
    facts: Facts,
    root: Path | None,
    folders: list[Path],
    progress: Progress,
    download: bool,
    opener: Opener,
) -> dict[str, Path]:
    paths = {archive.filename: find_archive(archive, folders) for archive in facts.archives}
    for archive in facts.archives:
        if paths[archive.filename] is not None:
            continue
        if not download:
            raise _absent(facts, root, "downloading is switched off")
        try:
            paths[archive.filename] = fetch_archive(archive, folders[-1], progress=progress, opener=opener)
        except InputError as error:
            raise _absent(facts, root, str(error)) from error
    return {name: path for name, path in paths.items() if path is not None}


def _absent(facts: Facts, root: Path | None, reason: str) -> InputError:
    place = Path("DATA_ROOT" if root is None else root) / facts.name
    return InputError(
        f"the data set {facts.name!r} was not found",
        expected=f"train.parquet and test.parquet in {place}",
        got=f"neither there nor by download, because {reason.rstrip('.')}",
        where="no data root is set" if root is None else f"data root {root}",
        remedy=(
            f"Put the Parquet files, or {', '.join(a.url for a in facts.archives)}, into {place}, "
            f"and name the data root with --data-root or the environment variable {ROOT_VARIABLE}"
        ),
    )


def _checked(images: Images, facts: Facts, part: str, where: Path) -> Images:
    """Return the images after they have proved to be the named set."""
    differences = [
        (what, expected, got)
        for what, expected, got in (
            ("number of images", facts.count(part), len(images)),
            ("image shape (C, H, W)", facts.shape, images.shape),
            ("class names", facts.class_names, images.class_names),
        )
        if expected != got
    ]
    if differences:
        what, expected, got = differences[0]
        raise InputError(
            f"the files are not the {part} part of {facts.name!r}, judging by the {what}",
            expected=expected,
            got=got,
            where=where,
            remedy="Put the official set there, or load these files by their path",
        )
    return images


def _digits(facts: Facts) -> tuple[Images, Images]:
    table = _digits_table()  # (N, H * W + 1), 0..16 and the label
    values, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    pixels = np.rint(values * 255 / 16).astype(np.uint8)[:, None]  # (N, 1, H, W)
    train, test = _stratified(labels, facts.train)
    parts = [
        as_images(pixels[rows], labels[rows], facts.class_names, f"{facts.name} {part}")
        for part, rows in zip(PARTS, (train, test), strict=True)
    ]
    for part, images in zip(PARTS, parts, strict=True):
        _checked(images, facts, part, Path("scikit-learn"))
    return parts[0], parts[1]


def places_of_data(root: Path | None = None, cache: Path | None = None) -> list[Path]:
    """Return every file and folder that :func:`load_dataset` reads named sets from.

    Args:
        root: As there.
        cache: As there.
    """
    root = _root(root)
    folders = [] if root is None else [root / name for name in SETS]
    return [*folders, cache or default_cache(), *filter(None, [digits_file()])]


def digits_file() -> Path | None:
    """Return the file of the digits in scikit-learn, or None where it is not installed or has moved it."""
    package = importlib.util.find_spec("sklearn")  # located without importing it, which takes a second
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return file if file.is_file() else None


def _digits_table() -> NDArray[np.float64]:
    if (file := digits_file()) is not None:
        return np.loadtxt(file, delimiter=",")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "digits", "the data set 'digits'") from error
    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _stratified(labels: NDArray[np.int64], count: int) -> tuple[list[int], list[int]]:
    """Return ``count`` rows with the classes in proportion, and the rest; both in order."""

    def draw(row: int) -> bytes:
        # A hash instead of a generator: the split stays the same in every version of every library.
        return hashlib.sha256(f"unbackdoor digits {row}".encode()).digest()

    ranked = []
    for k in np.unique(labels).tolist():
        rows = sorted(np.flatnonzero(labels == k).tolist(), key=draw)
        ranked += [((place + 0.5) / len(rows), k, row) for place, row in enumerate(rows)]
    chosen = [row for _, _, row in sorted(ranked)]
    return sorted(chosen[:count]), sorted(chosen[count:])
