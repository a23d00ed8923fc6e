"""``unbackdoor screen``: look at images of unknown origin instead of the model. It knows no attack."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import auditor, defender, options
from unbackdoor.cli.output import emit, note, plain, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError, InputError

if TYPE_CHECKING:
    from unbackdoor.registry import Part
    from unbackdoor.types import Classifier, CleanData, Images, Screening

_MAX_ROWS = 20  # images; all stand in the JSON and the CSV
CSV_COLUMNS = ("image", "label", "predicted", "score", "p_value", "suspicious")


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
    settings: Annotated[
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
    data_root: options.DataRoot = None,
    architecture: auditor.Arch = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: auditor.Size = None,
    class_names: auditor.Classes = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Look for triggered images among images of unknown origin.

    MODEL and the images are only read. Every image gets a score, a p-value (how often a clean image has so
    high a score), and is called suspicious where the p-value is at most alpha. About a share of alpha of
    clean images is called suspicious as well, so that the count must be held against the number of images.
    """
    from unbackdoor.engine import trusted_caller
    from unbackdoor.registry import SCREENERS
    from unbackdoor.types import CleanData

    source, part = options.existing_model(model), SCREENERS[method]
    config = part.configure_text(options.pairs(settings or [], "--set"))
    if out is not None and out.exists() and not force:
        raise InputError(
            "the file exists", where=out, remedy="Choose another --out, or replace it with --force"
        )
    defender.require_share(select_fraction)
    if data is None:
        _require_no_data(part, clean, per_class, fraction)
    user_options = auditor.UserOptions(
        architecture, mean, std, size, class_names, data, clean, per_class, fraction, None, data_root
    )
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, device, precision, display)
        case = auditor.open_case(source, user_options, run, display, quiet=quiet)
        victim = case.model
        clean_data = CleanData.empty(victim.input_shape, victim.class_names)
        if case.images is not None:
            clean_data = CleanData.split(
                case.images,
                select_fraction=select_fraction,
                augmentation=case.augmentation,
                seed=seed,
            )
        inputs, names = _inputs(images, part, victim, display, quiet=quiet)
        screening = trusted_caller.screen(
            part,
            victim,
            clean_data,
            inputs,
            options=config,
            seed=seed,
            device=run.device,
            precision=precision.value,
            progress=display,
        )
    if out is not None:
        _write(out, screening, names, inputs, victim)
    if as_json:
        emit(_json(screening, names, inputs, source, victim, clean_data))
    else:
        _show(screening, names, victim, config.model_dump()["alpha"])
        if out is not None:
            say(out)


def _require_no_data(
    part: Part[Any], clean: int | None, per_class: int | None, fraction: float | None
) -> None:
    if "images" in part.needs:
        raise ConfigError(
            "the clean images", [f"--method {part.name} compares with clean images; give --data"]
        )
    if clean is not None or per_class is not None or fraction is not None:
        raise ConfigError("the clean images", ["--clean, --per-class and --fraction draw from --data"])


def _inputs(
    path: Path, part: Part[Any], model: Classifier, display: Display, *, quiet: bool
) -> tuple[Images, tuple[str, ...]]:
    """Return the images in the model's form, and what each of them is called."""
    from unbackdoor.data.conform import conform
    from unbackdoor.data.loaders import load_labelled, load_unlabelled
    from unbackdoor.registry import INPUT_LABELS

    load = load_labelled if INPUT_LABELS in part.needs else load_unlabelled
    shape, classes = model.input_shape, model.class_names
    try:
        inputs, names = load(path, class_names=classes, progress=display)
    except InputError as error:
        if error.problem != "the images differ in size":
            raise
        inputs, names = load(path, class_names=classes, size=shape[1:], progress=display)
    inputs, notes = conform(inputs, input_shape=shape, class_names=classes, progress=display)
    for text in notes:
        note(text, quiet=quiet)
    return inputs, names


def _rows(screening: Screening, names: tuple[str, ...], inputs: Images, model: Classifier) -> list[list[Any]]:
    labels = [""] * len(names)
    if inputs.labels is not None:
        labels = [model.class_names[k] for k in inputs.labels.tolist()]
    columns = (screening.predicted, screening.scores, screening.p_values, screening.suspicious)
    predicted, scores, p_values, suspicious = (column.tolist() for column in columns)
    return [
        [name, labels[i], model.class_names[predicted[i]], scores[i], p_values[i], int(suspicious[i])]
        for i, name in enumerate(names)
    ]


def _write(
    out: Path, screening: Screening, names: tuple[str, ...], inputs: Images, model: Classifier
) -> None:
    from unbackdoor.files import atomic_write

    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for name, *rest in _rows(screening, names, inputs, model):
            writer.writerow([plain(name), *rest])


def _json(
    screening: Screening,
    names: tuple[str, ...],
    inputs: Images,
    source: Path,
    model: Classifier,
    clean_data: CleanData,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "model": str(source),
        "model_sha256": model.sha256(),
        "clean_images": len(clean_data),
        "method": dict(screening.method),
        "seconds": screening.seconds,
        "evidence": dict(screening.evidence),
        "names": list(names),
        "scores": screening.scores.tolist(),
        "p_values": screening.p_values.tolist(),
        "predicted": screening.predicted.tolist(),
        "suspicious": screening.suspicious.tolist(),
    }
    if inputs.labels is not None:
        result["labels"] = inputs.labels.tolist()
    return result


def _show(screening: Screening, names: tuple[str, ...], model: Classifier, alpha: float) -> None:
    predicted, suspicious = screening.predicted, screening.suspicious
    counts = [(int((predicted == k).sum()), int((suspicious & (predicted == k)).sum()))
              for k in range(model.classes)]  # fmt: skip
    expected = f"about {alpha * len(names):.1f} would be if all were clean"
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
