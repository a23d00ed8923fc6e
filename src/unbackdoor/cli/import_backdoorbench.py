"""``unbackdoor import-backdoorbench``: an attack result of BackdoorBench as a model and a test set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbackdoor.cli import auditor, options
from unbackdoor.cli.output import emit, note, say
from unbackdoor.cli.progress import Display


def import_backdoorbench(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="attack_result.pt of BackdoorBench.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of model.safetensors, model.json, triggered.npz and attack.json.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the triggered test images, CLASS/INDEX.png.",
            show_default="bd_test_dataset beside RESULT, or RESULT itself",
            rich_help_panel="Data",
        ),
    ] = None,
    arch: auditor.Arch = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: auditor.Size = None,
    class_names: auditor.Classes = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn an attack result of BackdoorBench into a model and a judged test set.

    Nothing of RESULT is executed: its pickle is read by a reader that calls nothing, and paths in it are not
    followed. The model gets a card with BackdoorBench's normalisation of the data set; the triggered test
    images keep the labels that they had, where RESULT says so.
    """
    import unbackdoor
    from unbackdoor.bench.backdoorbench import files_of

    options.require_writable(files_of(out), force=force, inputs=(result,))
    with Display(quiet=quiet) as display:
        done = unbackdoor.import_backdoorbench(
            result,
            images=images,
            arch=arch,
            mean=options.numbers(mean, "--mean"),
            std=options.numbers(std, "--std"),
            size=auditor.image_size(size),
            class_names=auditor.class_names(class_names),
            progress=display,
        )
    done.save(out, force=force)
    for warning in done.warnings:
        note(f"mind: {warning}", quiet=quiet)
    if as_json:
        emit(done.to_dict())
        return
    labels = "with" if done.triggered.labels is not None else "without"
    say(f"{done.written['model']}: {done.opened.model.architecture}, {done.opened.model.classes} classes")
    say(f"{done.written['triggered']}: {len(done.triggered):,} triggered images, {labels} labels")
    say(f"Judge it with: {done.command()}")
