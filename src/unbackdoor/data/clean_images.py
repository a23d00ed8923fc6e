"""The clean images of a defender or an auditor: from a named data set, or all of a path's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unbackdoor.data.datasets import DataSet, dataset_names, load_dataset
from unbackdoor.data.loaders import ImageFiles
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.hub import data_file, is_hub
from unbackdoor.registry import near_match
from unbackdoor.types import Augmentation, Images, Progress, silent

USUAL_CLEAN_IMAGES = 500


@dataclass(frozen=True)
class CleanImages:
    """Images as they were asked for.

    Attributes:
        images: The images, or where they lie.
        proof: Others of the same data set, for measuring a repair; None where there are too few, and for
            images from a path.
        augmentation: What may be done to them.
        data_set: Name of the data set, or None for a path.
        notes: Warnings for the user.
    """

    images: Images | ImageFiles
    proof: Images | None = None
    augmentation: Augmentation = "none"
    data_set: str | None = None
    notes: tuple[str, ...] = ()


def resolve_clean_images(
    data: str | Path,
    *,
    clean: int | None = None,
    per_class: int | None = None,
    fraction: float | None = None,
    root: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> CleanImages:
    """Return the images of a name or a path; those of a path are not loaded yet.

    Args:
        data: A data set's name, a path, or ``hf://datasets/ORG/NAME``.
        clean: Images to draw from the named data set, equally from all classes.
        per_class: Likewise: images of each class.
        fraction: Likewise: share of the images set aside for defenders.
        root: Folder that holds the data sets.
        seed: Seed of the draw.
        progress: Progress display.
        image_column: Of images from a path: see :func:`unbackdoor.data.loaders.load_images`.
        label_column: Likewise.
        skip_damaged: Likewise.

    Raises:
        InputError: If there is no such data set, file or folder.
        ConfigError: If an amount was given for images from a path, or a column for a named data set.
    """
    if is_hub(data):
        data = data_file(data)
    data_set = named_data_set(str(data), root, progress)
    if data_set is None:
        reject_amounts(clean, per_class, fraction)
        path = Path(data)
        if not path.exists():
            raise InputError("there is no such file or folder", where=path)
        return CleanImages(ImageFiles(path, image_column, label_column, skip_damaged))
    if image_column is not None or label_column is not None:
        raise ConfigError(
            "the clean images", ["columns are named of a .parquet file, not of a named data set"]
        )
    images, proof = draw_sample_and_proof(data_set, clean, per_class, fraction, seed)
    return CleanImages(images, proof, data_set.augmentation, data_set.name, tuple(ambiguity(str(data), root)))


def named_data_set(data: str, root: Path | None, progress: Progress) -> DataSet | None:
    """Return the data set of that name, or None where the text is a path."""
    names, path = dataset_names(), Path(data)
    if data not in names and (path.exists() or "/" in data or "." in data):
        return None
    if data not in names:
        raise InputError(
            f"unknown data set {data!r}{near_match(data, names)}",
            expected="one of " + ", ".join(names) + ", or the path of a file or folder that exists",
        )
    return load_dataset(data, root=root, progress=progress)


def ambiguity(data: str, root: Path | None) -> list[str]:
    """Return a remark where a data set's name is also a path."""
    path = Path(data)
    # The folder that holds the data sets carries their names on purpose.
    if not path.exists() or (root is not None and root.resolve() == path.resolve().parent):
        return []
    return [f"{data} is taken as the data set of that name; for the images in that folder, say ./{data}"]


def draw_sample(
    data: DataSet, clean: int | None, per_class: int | None, fraction: float | None, seed: int
) -> Images:
    """Draw from the images that no model trained by this program has seen."""
    _, pool = reserve(data.train)
    if clean is None and per_class is None and fraction is None:
        smallest = int(pool.truth.bincount(minlength=pool.classes).min())
        clean = min(USUAL_CLEAN_IMAGES, smallest * pool.classes)
    return draw_clean(pool, count=clean, per_class=per_class, fraction=fraction, seed=seed)


def draw_sample_and_proof(
    data: DataSet, clean: int | None, per_class: int | None, fraction: float | None, seed: int
) -> tuple[Images, Images | None]:
    """Draw like :func:`draw_sample`, and up to 500 others to measure a repair, if enough are left."""
    images = draw_sample(data, clean, per_class, fraction, seed)
    _, pool = reserve(data.train)
    in_sample = {row.numpy().tobytes() for row in images.pixels}
    rest = pool.subset([i for i, row in enumerate(pool.pixels) if row.numpy().tobytes() not in in_sample])
    count = min(USUAL_CLEAN_IMAGES, len(rest))
    if count < 2 * data.train.classes:
        return images, None
    return images, draw_clean(rest, count=count, seed=seed)


def reject_amounts(clean: int | None, per_class: int | None, fraction: float | None) -> None:
    """Raise ConfigError if an amount was given for images from a path."""
    if clean is not None or per_class is not None or fraction is not None:
        raise ConfigError(
            "the clean set",
            [
                "--clean, --per-class and --fraction draw from a named data set; "
                "images from a path are all used"
            ],
        )
