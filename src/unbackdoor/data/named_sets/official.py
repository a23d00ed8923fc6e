"""The owners' archives as image sets.

Members are read by name into memory, one at a time; no path out of an archive is ever used, and no pickle is
opened. The checksum of an archive has been checked before it comes here.
"""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unbackdoor.data.cache import as_images
from unbackdoor.data.decode import Item, decode
from unbackdoor.data.named_sets.catalogue import Facts
from unbackdoor.errors import InputError
from unbackdoor.types import Images, Progress, silent

_MAX_MEMBER_BYTES = 1 << 24
Reader = Callable[[Mapping[str, Path], Facts, str, Progress], Images]


def read_cifar10(
    archives: Mapping[str, Path], facts: Facts, part: str, progress: Progress = silent
) -> Images:
    """Read a part of the binary version of CIFAR-10: records of one label byte and 3072 pixel bytes.

    The images are sorted by class, in the owners' order within each.

    Raises:
        InputError: If a member is missing or has the wrong size.
    """
    path = archives["cifar-10-binary.tar.gz"]
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if part == "train" else ["test_batch.bin"]
    pixel_bytes = int(np.prod(facts.shape))
    size = facts.count(part) // len(names) * (1 + pixel_bytes)
    arrays: dict[str, NDArray[np.uint8]] = {}
    with _archive_errors(path), tarfile.open(path, "r:gz") as tar:
        for member in progress(tar, f"reading {facts.name} {part}"):
            name = member.name.rsplit("/", 1)[-1]
            if name in names and member.isfile():
                _require_size(member.size, size, f"{path}, {member.name}")
                stream = tar.extractfile(member)
                assert stream is not None
                arrays[name] = np.frombuffer(stream.read(), dtype=np.uint8)
    for name in names:
        if name not in arrays:
            raise _missing(name, path)
    records = np.concatenate([arrays[name] for name in names]).reshape(-1, 1 + pixel_bytes)
    records = records[np.argsort(records[:, 0], kind="stable")]
    pixels = np.ascontiguousarray(records[:, 1:]).reshape(-1, *facts.shape)  # (N, C, H, W)
    return as_images(pixels, records[:, 0].astype(np.int64), facts.class_names, f"{facts.name} {part}")


def read_gtsrb32(
    archives: Mapping[str, Path], facts: Facts, part: str, progress: Progress = silent
) -> Images:
    """Read a part of GTSRB: whole frames, resized; of the training images every second frame of each class.

    Neighbouring frames of a track are nearly alike, so that half of them lose little.

    Raises:
        InputError: If a member is missing, damaged or too large.
    """
    if part == "train":
        path = archives["GTSRB_Final_Training_Images.zip"]
        members, labels = _gtsrb_train(path, facts)
    else:
        path = archives["GTSRB_Final_Test_Images.zip"]
        members, labels = _gtsrb_test(path, archives["GTSRB_Final_Test_GT.zip"])
    return _from_zip(path, members, labels, facts, part, progress)


def read_tinyimagenet20(
    archives: Mapping[str, Path], facts: Facts, part: str, progress: Progress = silent
) -> Images:
    """Read 20 classes of Tiny ImageNet; the test part is the official validation images of the classes.

    Raises:
        InputError: If a member is missing, damaged or too large.
    """
    path = archives["tiny-imagenet-200.zip"]
    label_of = {name.split()[0]: k for k, name in enumerate(facts.class_names)}
    pairs: list[tuple[int, str]] = []
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        if part == "train":
            for member in archive.namelist():
                pieces = member.split("/")
                if len(pieces) == 5 and pieces[1] == "train" and pieces[2] in label_of and pieces[4]:
                    pairs.append((label_of[pieces[2]], member))
        else:
            notes = _text(archive, "tiny-imagenet-200/val/val_annotations.txt", path)
            for row in csv.reader(io.StringIO(notes), delimiter="\t"):
                if len(row) > 1 and row[1] in label_of:
                    pairs.append((label_of[row[1]], f"tiny-imagenet-200/val/images/{row[0]}"))
    pairs.sort()
    return _from_zip(path, [m for _, m in pairs], [k for k, _ in pairs], facts, part, progress)


READERS: dict[str, Reader] = {
    "cifar10": read_cifar10,
    "gtsrb32": read_gtsrb32,
    "tinyimagenet20": read_tinyimagenet20,
}


def _gtsrb_train(path: Path, facts: Facts) -> tuple[list[str], list[int]]:
    label_of = {name: k for k, name in enumerate(facts.class_names)}
    by_class: list[list[str]] = [[] for _ in facts.class_names]
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            pieces = member.split("/")
            if member.endswith(".ppm") and len(pieces) >= 2 and pieces[-2] in label_of:
                by_class[label_of[pieces[-2]]].append(member)
    halves = [sorted(members)[::2] for members in by_class]
    return [m for half in halves for m in half], [k for k, half in enumerate(halves) for _ in half]


def _gtsrb_test(path: Path, truth: Path) -> tuple[list[str], list[int]]:
    with _archive_errors(truth), zipfile.ZipFile(truth) as archive:
        text = _text(archive, "GT-final_test.csv", truth)
        rows = [
            (row["Filename"], int(row["ClassId"])) for row in csv.DictReader(io.StringIO(text), delimiter=";")
        ]
    rows.sort()
    return [f"GTSRB/Final_Test/Images/{name}" for name, _ in rows], [label for _, label in rows]


def _from_zip(
    path: Path, members: list[str], labels: list[int], facts: Facts, part: str, progress: Progress
) -> Images:
    name = f"{facts.name} {part}"
    if not members:
        raise _missing("images", path)

    def items() -> Iterator[Item]:
        for member in members:
            yield f"{path}, {member}", _bytes(archive, member, path)

    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        pixels = decode(items(), len(members), name=name, size=facts.shape[1:], progress=progress)
    return as_images(pixels, np.asarray(labels, dtype=np.int64), facts.class_names, name)


def _text(archive: zipfile.ZipFile, member: str, path: Path) -> str:
    return _bytes(archive, member, path).decode("utf-8")


def _bytes(archive: zipfile.ZipFile, member: str, path: Path) -> bytes:
    try:
        info = archive.getinfo(member)
    except KeyError as error:
        raise _missing(member, path) from error
    if info.file_size > _MAX_MEMBER_BYTES:
        raise InputError(
            "a member of the archive is too large",
            expected=f"at most {_MAX_MEMBER_BYTES} bytes",
            got=info.file_size,
            where=f"{path}, {member}",
        )
    return archive.read(info)


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Turn what the archive modules raise for damage into our error."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        NotImplementedError,
    ) as error:
        raise InputError(
            "the archive is damaged",
            expected="the published archive",
            got=f"{type(error).__name__}: {error}",
            where=path,
            remedy=f"Delete {path} and let it be downloaded again",
        ) from error


def _require_size(got: int, expected: int, where: str) -> None:
    if got != expected:
        raise InputError(
            "a member of the archive has the wrong size", expected=f"{expected} bytes", got=got, where=where
        )


def _missing(member: str, path: Path) -> InputError:
    return InputError(
        f"the archive lacks {member}",
        expected="the published archive",
        where=path,
        remedy=f"Delete {path} and let it be downloaded again",
    )
