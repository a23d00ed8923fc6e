"""What the defender brings: a suspicious model and clean images. Shared by the commands that read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import note
from unbackdoor.errors import ConfigError

if TYPE_CHECKING:
    from unbackdoor.data.datasets import DataSet
    from unbackdoor.types import Augmentation, Classifier, CleanData, Images, Progress

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
Resize = Annotated[
    bool,
    typer.Option("--resize", help="Resize images from a path to the model's input.", rich_help_panel=_DATA),
]


def require_share(select_fraction: float) -> None:
    """Raise ConfigError unless the share lies in (0, 1)."""
    if not 0 < select_fraction < 1:
        raise ConfigError(
            "the split of the clean images", [f"--select-fraction must lie in (0, 1), got {select_fraction}"]
        )


def open_case(
    source: Path,
    data: str,
    cardless: options.Cardless,
    progress: Progress,
    *,
    data_root: Path | None,
    clean: int | None,
    per_class: int | None,
    fraction: float | None,
    select_fraction: float,
    augmentation: options.AugmentationName | None,
    resize: bool,
    seed: int,
) -> tuple[Classifier, CleanData]:
    """Load the suspicious model and the clean images, split into a part to fit on and one to select on.

    From a named data set, images are drawn that no model trained by this program has seen; images from a path
    are all used.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or options contradict each other.
    """
    from unbackdoor.data.clean_images import drawn, refuse_amounts
    from unbackdoor.types import CleanData

    found = named(data, data_root, progress)
    if found is not None:
        victim = options.open_model(source, found.train, cardless, default=found)
        images = drawn(found, clean, per_class, fraction, seed)
    else:
        refuse_amounts(clean, per_class, fraction)
        images, victim = _from_path(Path(data), source, resize, cardless, progress)
    own: Augmentation = found.augmentation if found is not None else "none"
    held = CleanData.split(
        images,
        select_fraction=select_fraction,
        augmentation=augmentation.value if augmentation is not None else own,
        seed=seed,
    )
    return victim, held


def named(data: str, root: Path | None, progress: Progress) -> DataSet | None:
    """Return the data set of that name, or None where the text is a path."""
    from unbackdoor.data import clean_images

    found = clean_images.named(data, root, progress)
    for text in clean_images.ambiguity(data, root) if found is not None else ():
        note(f"mind: {text}")
    return found


def _from_path(
    path: Path, model: Path, resize: bool, cardless: options.Cardless, progress: Progress
) -> tuple[Images, Classifier]:
    from unbackdoor.data.loaders import load_images

    if not options.has_card(model):
        images = load_images(path, progress=progress)
        return images, options.open_model(model, images, cardless)
    victim = options.open_model(model, None, cardless)
    _, height, width = victim.input_shape
    # The card's class names decide which label a folder's images get.
    images = load_images(
        path, class_names=victim.class_names, size=(height, width) if resize else None, progress=progress
    )
    return images, victim
