"""``unbackdoor screen``: look at images of unknown origin instead of the model. It knows no attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import auditor, defender
from unbackdoor.cli import options as shared
from unbackdoor.cli.output import emit, note, say, table
from unbackdoor.cli.progress import Display

if TYPE_CHECKING:
    from unbackdoor.audit.screening import ScreenedImages

_MAX_ROWS = 20  # images; all stand in the JSON and the CSV


def screen(
    model: defender.Model,
    images: Annotated[
        Path,
        typer.Option(
            help="Images to look at: a folder, a .parquet or an .npz file. A method for training sets needs "
            "their labels: a folder of class folders or with labels.csv, or labels in the file.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str, typer.Option(help="Screener, see: unbackdoor list screeners.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Clean images to compare with: a data set's name, a folder of class folders or with "
            "labels.csv, a .parquet or an .npz file. Methods for training sets do without.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the method, see: unbackdoor list screeners NAME; may be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a CSV file with one line for each image.", show_default=False),
    ] = None,
    clean: defender.Clean = None,
    per_class: defender.PerClass = None,
    fraction: defender.Fraction = None,
    select_fraction: defender.SelectFraction = 0.3,
    data_root: shared.DataRoot = None,
    image_column: defender.ImageColumn = None,
    label_column: defender.LabelColumn = None,
    skip_damaged: defender.SkipDamaged = False,
    arch: auditor.Arch = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    size: auditor.Size = None,
    class_names: auditor.Classes = None,
    weights: shared.Weights = None,
    output: auditor.Output = None,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    precision: shared.PrecisionOption = shared.PrecisionPolicy.auto,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Look for triggered images among images of unknown origin.

    MODEL and the images are only read. Every image gets a score, a p-value (how often a clean image has so
    high a score), and is called suspicious where the p-value is at most alpha. About a share of alpha of
    clean images is called suspicious as well, so that the count must be held against the number of images.
    """
    import unbackdoor
    from unbackdoor.audit.cases import require_share
    from unbackdoor.audit.screening import columns_of_two, require_no_images
    from unbackdoor.registry import SCREENERS

    source, part = shared.existing_model(model), SCREENERS[method]
    config = part.configure_text(shared.pairs(options or [], "--set"))
    shared.require_writable(() if out is None else (out,), force=force, inputs=(source,))
    require_share(select_fraction)
    if data is None:
        require_no_images(part)  # before the model is opened
    columns_of_data, columns_of_images = columns_of_two(data, images, image_column, label_column)
    user_options = auditor.UserOptions(
        arch, mean, std, size, class_names, data, clean, per_class, fraction, None, data_root,
        weights=weights, output=output, **columns_of_data, skip_damaged=skip_damaged and data is not None,
    )  # fmt: skip
    with Display(quiet=quiet) as display:
        run = shared.open_run(seed, device, precision, display)
        screened = unbackdoor.screen(
            auditor.open_case(source, user_options, run, display, quiet=quiet),
            images,
            part,
            options=config,
            select_fraction=select_fraction,
            **columns_of_images,
            skip_damaged=skip_damaged,
            seed=seed,
            device=device,
            precision=precision.value,
            progress=display,
        )
    for text in screened.notes:
        note(text, quiet=quiet)
    if out is not None:
        screened.save(out, force=force)
    if as_json:
        emit(screened.to_dict())
        return
    _show(screened)
    if out is not None:
        say(out)


def _show(screening: ScreenedImages) -> None:
    assert screening.case is not None
    names, model = screening.names, screening.case.model
    predicted, suspicious = screening.predicted, screening.suspicious
    counts = [(int((predicted == k).sum()), int((suspicious & (predicted == k)).sum()))
              for k in range(model.classes)]  # fmt: skip
    expected = f"about {screening.method['options']['alpha'] * len(names):.1f} would be if all were clean"
    table(
        f"{int(screening.suspicious.sum())} of {len(names)} images are suspicious; "
        + str(screening.evidence.get("note", expected)),
        ("the model says", ">images", ">suspicious"),
        [(model.class_names[k], *count) for k, count in enumerate(counts) if count[0]],
    )
    order = screening.scores.argsort(descending=True, stable=True)
    order = order[screening.p_values[order].argsort(stable=True)][:_MAX_ROWS]
    table(
        "The most suspicious",
        ("image", "the model says", ">score", ">p-value", "suspicious"),
        [
            (
                names[i],
                model.class_names[int(screening.predicted[i])],
                f"{float(screening.scores[i]):.3f}",
                f"{float(screening.p_values[i]):.2g}",
                "yes" if bool(screening.suspicious[i]) else "",
            )
            for i in order.tolist()
        ],
    )
    if len(names) > _MAX_ROWS:
        say(f"and {len(names) - _MAX_ROWS} more; --out and --json have them all")
