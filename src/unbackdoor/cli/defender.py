"""What the defender brings: a suspicious model and clean images. Shared by the commands that read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import note
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.registry import near_match

if TYPE_CHECKING:
    from unbackdoor.data.datasets import DataSet
    from unbackdoor.types import Images, Progress

USUAL_CLEAN_IMAGES = 500
_DATA = "Data"

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Weights file of the suspicious model.", show_default=False)
]
Data = Annotated[
    str,
    typer.Option(
        help="Clean images: a data set's name, a folder of class folders, a .parquet or an .npz file.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Clean = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images to draw from the named data set, equally from all classes.",
        show_default="500, or all there are",
        rich_help_panel=_DATA,
    ),
]
PerClass = Annotated[
    int | None,
    typer.Option(min=1, help="Likewise: images of each class.", show_default=False, rich_help_panel=_DATA),
]
Fraction = Annotated[
    float | None,
    typer.Option(
        help="Likewise: share of the images set aside for defenders.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
SelectFraction = Annotated[
    float,
    typer.Option(help="Share of the clean images that only thresholds are chosen on.", rich_help_panel=_DATA),
]
AugmentationChoice = Annotated[
    options.AugmentationName | None,
    typer.Option(
        help="What may be done to an image without changing its class.",
        show_default="the named data set's, else none",
        rich_help_panel=_DATA,
    ),
]


def require_share(select_fraction: float) -> None:
    """Raise ConfigError unless the share lies in (0, 1)."""
    if not 0 < select_fraction < 1:
        raise ConfigError(
            "the split of the clean images", [f"--select-fraction must lie in (0, 1), got {select_fraction}"]
        )


def named(data: str, root: Path | None, progress: Progress) -> DataSet | None:
    """Return the data set of that name, or None where the text is a path."""
    from unbackdoor.data.datasets import dataset_names, load_dataset

    names, path = dataset_names(), Path(data)
    if data not in names and (path.exists() or "/" in data or "." in data):
        return None
    if data not in names:
        raise InputError(
            f"unknown data set {data!r}{near_match(data, names)}",
            expected="one of " + ", ".join(names) + ", or the path of a file or folder that exists",
        )
    # The data sets' own folder is nobody's mistake.
    if path.exists() and (root is None or root.resolve() != path.resolve().parent):
        note(
            f"mind: {data} is taken as the data set of that name; for the images in that folder, say ./{data}"
        )
    return load_dataset(data, root=root, progress=progress)


def drawn(
    data: DataSet, clean: int | None, per_class: int | None, fraction: float | None, seed: int
) -> Images:
    """Draw from the images that no model trained by this program has seen."""
    from unbackdoor.data.splits import draw_clean, reserve

    _, pool = reserve(data.train)
    if clean is None and per_class is None and fraction is None:
        smallest = int(pool.truth.bincount(minlength=pool.classes).min())
        clean = min(USUAL_CLEAN_IMAGES, smallest * pool.classes)
    return draw_clean(pool, count=clean, per_class=per_class, fraction=fraction, seed=seed)


def drawn_twice(
    data: DataSet, clean: int | None, per_class: int | None, fraction: float | None, seed: int
) -> tuple[Images, Images | None]:
    """Draw like :func:`drawn`, and up to 500 others for a proof; None where too few are left."""
    from unbackdoor.data.splits import draw_clean, reserve

    images = drawn(data, clean, per_class, fraction, seed)
    _, pool = reserve(data.train)
    taken = {row.numpy().tobytes() for row in images.pixels}
    rest = pool.subset([i for i, row in enumerate(pool.pixels) if row.numpy().tobytes() not in taken])
    count = min(USUAL_CLEAN_IMAGES, len(rest))
    if count < 2 * data.train.classes:
        return images, None
    return images, draw_clean(rest, count=count, seed=seed)


def refuse_amounts(clean: int | None, per_class: int | None, fraction: float | None) -> None:
    """Raise ConfigError if an amount was given for images from a path."""
    if clean is not None or per_class is not None or fraction is not None:
        raise ConfigError(
            "the clean set",
            [
                "--clean, --per-class and --fraction draw from a named data set; "
                "images from a path are all used"
            ],
        )
