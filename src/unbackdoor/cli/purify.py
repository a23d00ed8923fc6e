"""``unbackdoor purify``: repair a model with a few clean images. It knows no attack."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor import confinement
from unbackdoor.cli import auditor, defender
from unbackdoor.cli import options as shared
from unbackdoor.cli.auditor import Rule
from unbackdoor.cli.output import emit, note, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import InputError
from unbackdoor.report.words import duration, interval, loss_in_words, percent, rate

if TYPE_CHECKING:
    from unbackdoor.audit.purifying import Purification

NOT_REPAIRED = 1  # a trigger works as before, or the promise was broken
NOT_SHOWN = 4  # something was written, or nothing had to be; it is not shown that the model is repaired
_MAX_VALUE_WIDTH = 40  # characters; longer values stand in the JSON
_MAX_ENTRIES = 8  # entries; tables with more, such as one for each layer, stand in the JSON


def purify(
    model: defender.Model,
    out: Annotated[
        Path,
        typer.Option(
            help="Weights file of the repaired model: .safetensors with a card, or .pt, .pth, .th, .tar, "
            ".ckpt, .bin with the names of the original; .onnx where the original is ONNX.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Defense, see: unbackdoor list defenses; or FILE.py:FUNCTION, which runs that file.",
            show_default="auto",
            rich_help_panel="Method",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Clean images: a data set's name, a folder of class folders, a .parquet or an .npz file.",
            show_default="none: for a method that needs no images, such as clp",
            rich_help_panel="Data",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named set of options of the method.", show_default=False, rich_help_panel="Method"
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the method; may be repeated.",
            rich_help_panel="Method",
        ),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Promise: points of clean accuracy (of 100) that may be lost at most, on images that the "
            "method does not get. If it is broken, no model is written and the exit code is 1.",
            show_default=False,
            rich_help_panel="Method",
        ),
    ] = None,
    promise: Annotated[
        Rule,
        typer.Option(
            help="The promise is broken: evidence, where the 95 % interval of the loss lies above it; "
            "strict, unless the interval lies below it.",
            rich_help_panel="Method",
        ),
    ] = Rule.evidence,
    scan: auditor.Scan = None,
    triggers: auditor.Trigger = None,
    patch: Annotated[
        Path | None,
        typer.Option(
            help="Also write the repair as a patch that can be applied and reverted.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    proof: Annotated[
        Path | None,
        typer.Option(
            help="Further clean images, for measuring the accuracy alone: a file or a folder.",
            show_default="a part of the images, kept from the method",
            rich_help_panel="Data",
        ),
    ] = None,
    search_budget: auditor.SearchBudget = None,
    report: auditor.Report = None,
    clean: defender.Clean = None,
    per_class: defender.PerClass = None,
    fraction: defender.Fraction = None,
    select_fraction: defender.SelectFraction = 0.3,
    augmentation: defender.AugmentationChoice = None,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize", help="Images are resized to the model's input; kept for old scripts.", hidden=True
        ),
    ] = False,
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
    """Remove a backdoor from a model with a few clean images.

    MODEL is only read, and never executed. From a named data set, images are drawn that no model trained by
    this program has seen, and more of them for the proof; of images from a path, a part is kept from the
    method for the proof where there are enough. On these the accuracy before and after is measured.

    A scan's report (--scan) or recovered triggers (--trigger) lead a method that can use them. Whether a
    backdoor is gone cannot be told for certain from clean images: triggers are searched for anew, before and
    after, and the outcome is "repaired" only if more than one kind of search finds none any more.
    Where the attack is on record, unbackdoor evaluate measures the rest.

    Exit codes: 0 repaired, 1 not repaired, or the promise was broken and no model written, 2 an error, 3 the
    model is of a kind that the method cannot work on, 4 it is not shown that it is repaired: weakened,
    undecided, or nothing was done.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor
    from unbackdoor.audit.cases import require_share
    from unbackdoor.audit.own_methods import defense_of
    from unbackdoor.audit.purifying import DEFAULT_METHOD
    from unbackdoor.audit.verbs import require_points
    from unbackdoor.opening.write_back import output_name, require_places

    if max_accuracy_drop is not None:
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            require_points(max_accuracy_drop)
        for one in noticed:
            note(f"mind: {one.message}")
    part = defense_of(DEFAULT_METHOD if method is None else method)
    config = part.configure_text(shared.pairs(options or [], "--set"), preset=preset)
    require_share(select_fraction)
    limit = shared.seconds_of(search_budget, "--search-budget")
    user_options = auditor.UserOptions(
        arch, mean, std, size, class_names, data, clean, per_class, fraction, augmentation, data_root, proof,
        weights=weights, output=output, image_column=image_column, label_column=label_column,
        skip_damaged=skip_damaged,
    )  # fmt: skip
    # Checked before the repair as far as possible, because the repair may take an hour.
    source = shared.existing_model(model)
    others = () if patch is None else (patch,)
    records = () if scan is None else (scan, scan / auditor.RECORD)  # the folder, or the record itself
    _require_outputs(out, others, report, source, records, force=force)
    with Display(quiet=quiet) as display:
        run = shared.open_run(seed, device, precision, display)
        case = auditor.open_case(source, user_options, run, display, quiet=quiet)
        out = output_name(out, case.opened)
        require_places(out, case.opened)
        _require_outputs(out, others, report, source, records, force=force)
        try:
            done = unbackdoor.purify(
                case,
                method=part,
                preset=preset,
                options=config,
                max_accuracy_drop=max_accuracy_drop,
                promise=promise.value,
                scan=scan,
                triggers=triggers,
                search_budget=limit,
                select_fraction=select_fraction,
                seed=seed,
                device=device,
                precision=precision.value,
                progress=display,
            )
        except unbackdoor.PromiseBroken as error:
            note(f"not kept: {error}")
            _refused(error.refused, part.name, preset, report, force=force, as_json=as_json)
            raise typer.Exit(NOT_REPAIRED) from None
        done.save(out, force=force)
        if patch is not None:
            try:
                done.save_patch(patch, force=force)
            except InputError as error:  # the repair is complete without the patch
                raise InputError(f"the repaired model was written, the patch was not: {error}") from error
        if report is not None:
            done.save_report(report, force=force, command=auditor.command_line())
    if as_json:
        emit(done.to_dict())
    else:
        _show(part.name, preset, done)
        for text in done.left_behind:
            say(f"Mind: {text}.")
        say(f"Written model: {out}" + (f", patch: {patch}" if patch is not None else ""))
        _show_report(report)
    if done.outcome.verdict != "repaired":
        raise typer.Exit(NOT_REPAIRED if done.outcome.verdict == "not repaired" else NOT_SHOWN)


def _refused(
    refused: Purification,
    method: str,
    preset: str | None,
    report: Path | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Write and print what was measured of a repair that broke its promise; its model is thrown away."""
    try:
        if report is not None:
            refused.save_report(report, force=force, command=auditor.command_line())
    finally:
        # The result is printed even if the report cannot be written.
        if as_json:
            emit(refused.to_dict())
        else:
            _show(method, preset, refused)
    if not as_json:
        _show_report(report)


def _show_report(report: Path | None) -> None:
    if report is not None:
        say(f"Report: {report / auditor.PAGE}")


def _require_outputs(
    out: Path,
    others: Sequence[Path],
    report: Path | None,
    source: Path,
    records: Sequence[Path] = (),
    *,
    force: bool,
) -> None:
    from unbackdoor.opening.write_back import ONNX, SUFFIXES

    if out.suffix not in SUFFIXES:  # the most likely name; the format of the opened file decides
        out = out.with_name(out.name + (ONNX if source.suffix == ONNX else shared.SUFFIX))
    if source.resolve() == out.resolve():
        raise InputError(
            "the repaired model would replace the suspicious one", where=out, remedy="Choose another --out"
        )
    originals = (source, source.with_suffix(".json")) if shared.has_card(source) else (source,)
    files = (out, out.with_suffix(".json"), *others)
    auditor.require_report(report, files, force=force, inputs=(*originals, *records))


def _show(method: str, preset: str | None, done: Purification) -> None:
    used = method if preset is None else f"{method}, preset {preset}"
    count, seconds = done.facts["images_for_the_method"], duration(done.purified.seconds)
    title = f"{used}: {count} clean images, {seconds}"
    if done.accuracy is not None:
        rows = [
            (name, rate(value), interval(value))
            for name, value in (("before", done.accuracy.before), ("after", done.accuracy.after))
        ]
        total = done.accuracy.before.total
        table(title, ("", f">accuracy on {total} images", ">95 % interval"), rows)
        low, high = done.accuracy.drop_interval
        say(
            f"Loss: {100 * done.accuracy.drop:.1f} points (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}); {done.accuracy.lost} images were right only before, "
            f"{done.accuracy.gained} only after. One image is worth {100 / total:.2g} points."
        )
        if done.promise is not None:
            say(done.promise.in_words())
        if done.flattered:
            say("Mind: these accuracies are flattered: " + "; ".join(done.flattered) + ".")
        if done.loss_bias != "fair":
            say(loss_in_words(done.loss_bias))
    else:
        say(title)
    for remark in done.remarks:
        say(remark)
    for residue in done.residues:
        say(
            f"Recovered trigger towards class {residue.trigger.label}: {rate(residue.before)} before, "
            f"{rate(residue.after)} after, on {residue.before.total} images."
        )
    say(f"Outcome: {done.outcome.verdict}.")
    for reason in done.outcome.reasons:
        say(f"  {reason}")
    entries = sum(c.changed for c in done.changes)
    share = entries / max(sum(tensor.numel() for tensor in done.model.network.state_dict().values()), 1)
    say(f"Changed: {entries:,} numbers ({percent(share)}) in {len(done.changes)} tensors.")
    told = {name: value for name, value in done.purified.evidence.items() if name != "remarks"}
    evidence = list(scalars(told))
    if evidence:
        table("What the method says it did", ("evidence", "value"), [(n, _short(v)) for n, v in evidence])


def scalars(evidence: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a method's evidence under dotted names; of a long collection only its length."""
    for name, value in evidence.items():
        if isinstance(value, Mapping) and len(value) <= _MAX_ENTRIES:
            yield from scalars(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping | list | tuple):
            yield f"{prefix}{name}", f"{len(value)} entries"
        else:
            yield f"{prefix}{name}", value


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_VALUE_WIDTH else text[: _MAX_VALUE_WIDTH - 3] + "..."
