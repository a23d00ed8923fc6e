"""Inputs of the defender: a suspicious model and clean images. Shared by the commands that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbackdoor.cli import options

_DATA = "Data"

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Weights file of the suspicious model.", show_default=False)
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL...",
        help="Weights file of the suspicious model, hf://ORG/MODEL or models:/NAME/VERSION (MLflow); or "
        "several, a folder of them, or a pattern in quotes.",
        show_default=False,
    ),
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
ImageColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the images in a .parquet file.",
        show_default="image, img or another usual name",
        rich_help_panel=_DATA,
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the labels in a .parquet file.",
        show_default="label, fine_label or another usual name",
        rich_help_panel=_DATA,
    ),
]
SkipDamaged = Annotated[
    bool,
    typer.Option("--skip-damaged", help="Leave out and count damaged images.", rich_help_panel=_DATA),
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
