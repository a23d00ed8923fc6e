"""``unbackdoor evaluate``: the judge measures a model whose attack is on record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbackdoor.cli import auditor, options
from unbackdoor.cli.output import emit, say, scores_table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import percent


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Weights file to measure.", show_default=False)
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="Data set whose test images are used, or a path of labelled images (part test, or all).",
            show_default=False,
            rich_help_panel="Data",
        ),
    ],
    data_root: options.DataRoot = None,
    before: Annotated[
        Path | None,
        typer.Option(
            help="The same model before its repair; adds DER and RIR.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Record of the attack.",
            show_default="the .truth.json beside MODEL or beside --before",
            rich_help_panel="Data",
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="Picture as the trigger, where the attack is not on record: FILE.png,class=NAME, with "
            ",place=ROWxCOLUMN ,size=HxW ,mask=FILE.png ,strength=0.5 or ,add behind it.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    triggered: Annotated[
        str | None,
        typer.Option(
            help="Images that carry the trigger already, of an attack of your own: a folder, a .parquet or "
            "an .npz file; with the labels that they had, or without. Needs --target.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Class that the attacker wants for --triggered, by index or name.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    arch: auditor.Arch = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: auditor.Size = None,
    class_names: auditor.Classes = None,
    weights: options.Weights = None,
    output: auditor.Output = None,
    device: options.Device = "auto",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure ACC, ASR and RA of a model whose attack is on record.

    ACC: clean test images classified rightly. ASR: triggered images classified as the attacker wants. RA:
    triggered images classified rightly all the same. ASR and RA leave out images that are of the attacker's
    class anyway. DER and RIR, in 0 to 1, weigh the fall of ASR or the gain in RA against the loss of ACC;
    doing nothing scores 0.5.
    """
    import unbackdoor

    with Display(quiet=quiet) as display:
        options.open_run(0, device, precision, display)  # names the devices where there is none such
        done = unbackdoor.evaluate(
            model,
            dataset,
            before=before,
            truth=truth,
            trigger=trigger,
            triggered=triggered,
            target=target,
            data_root=data_root,
            arch=arch,
            mean=options.numbers(mean, "--mean"),
            std=options.numbers(std, "--std"),
            size=auditor.image_size(size),
            class_names=auditor.class_names(class_names),
            weights=weights,
            output=output,
            device=device,
            precision=precision.value,
            progress=display,
        )
    for case in (done.case_before, done.case):
        if case is not None:
            auditor.show_notes(case, quiet=quiet)
    if as_json:
        emit(done.to_dict())
        return
    rows = {"model": done.scores} if done.before is None else {"before": done.before, "after": done.scores}
    scores_table(f"{done.case.name} on {done.dataset}, attack {done.truth.attack}", rows)
    for name, value in (("DER", done.der), ("RIR", done.rir)):
        if value is not None:
            say(f"{name} {percent(value)}")
