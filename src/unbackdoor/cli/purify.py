"""``unbackdoor purify``: the defender repairs a model with a few clean images. It knows no attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import auditor, defender, options
from unbackdoor.cli.output import emit, note, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError
from unbackdoor.report.words import duration, interval, percent, rate

if TYPE_CHECKING:
    from unbackdoor.audit.purifying import Purification

NOT_KEPT = 1
_SHOWN_EVIDENCE = 40  # characters; longer values stand in the JSON
_LONG = 8  # entries; tables with more, such as one for each layer, stand in the JSON


def purify(
    model: defender.Model,
    data: defender.Data,
    method: Annotated[
        str,
        typer.Option(
            help="Defense; see: unbackdoor list defenses.", show_default=False, rich_help_panel="Method"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Weights file of the repaired model: .safetensors with a card, or .pt, .pth, .th, .tar with "
            "the names of the original; .onnx where the original is ONNX.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named set of options of the method.", show_default=False, rich_help_panel="Method"
        ),
    ] = None,
    settings: Annotated[
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
            help="Promise: points of clean accuracy that may be lost at most, in percent, on images that the "
            "method does not get. If it cannot be kept, nothing is written and the exit code is 1.",
            show_default=False,
            rich_help_panel="Method",
        ),
    ] = None,
    trigger: auditor.Trigger = None,
    patch: Annotated[
        Path | None,
        typer.Option(
            help="Also write the repair as a patch that can be applied and reverted.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
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
    """Remove a backdoor from a model with a few clean images.

    MODEL is only read, and never executed. From a named data set, images are drawn that no model trained by
    this program has seen, and more of them for the proof; of images from a path, a part is kept from the
    method for the proof where there are enough. On these the accuracy before and after is measured.

    Whether a backdoor is gone cannot be told from clean images alone: what is shown here is what was changed,
    how well the model still does its task, and what recovered triggers (--trigger) still do. Where the attack
    is on record, unbackdoor evaluate measures the rest.
    """
    from unbackdoor.audit.purifying import PromiseBroken
    from unbackdoor.audit.purifying import purify as repair
    from unbackdoor.opening.write_back import CHECKPOINTS, require_kind
    from unbackdoor.registry import DEFENSES

    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 100:
        raise ConfigError(
            "the option --max-accuracy-drop", [f"expected points in 0..100, got {max_accuracy_drop}"]
        )
    source = options.existing_model(model)
    out = auditor.like_its_source(out, source, architecture)
    out = auditor.new_output(out, force=force, never=source, beside=(patch, *auditor.report_files(report)))
    part = DEFENSES[method]
    config = part.configure_text(options.pairs(settings or [], "--set"), preset=preset)
    defender.require_share(select_fraction)
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, device, precision, display)
        told = auditor.Told(
            architecture,
            mean,
            std,
            size,
            class_names,
            data,
            clean,
            per_class,
            fraction,
            augmentation,
            data_root,
        )
        case = auditor.open_case(source, told, run, display, quiet=quiet)
        assert case.images is not None  # --data is required
        victim = case.opened.model
        require_kind(out, source, graph=case.opened.places is not None)
        try:
            done = repair(
                victim,
                case.images,
                part,
                preset=preset,
                options=config,
                max_accuracy_drop=None if max_accuracy_drop is None else max_accuracy_drop / 100,
                triggers=auditor.read_triggers(trigger, victim),
                proof=case.proof,
                types=auditor.stored_types(case) if out.suffix in CHECKPOINTS else None,
                select_fraction=select_fraction,
                augmentation=case.augmentation,
                seed=seed,
                device=device,
                precision=precision.value,
                progress=display,
            )
        except PromiseBroken as error:
            note(f"not kept: {error}")
            raise typer.Exit(NOT_KEPT) from None
        record = auditor.write_repair(case, done, out, patch)
        if report is not None:
            auditor.write_purification(report, case, done, record)
    if as_json:
        emit(record)
        return
    _show(method, preset, done)
    say(f"Repaired model: {out}" + (f", patch: {patch}" if patch is not None else ""))


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
        if done.proof_is_fit:
            say(
                "Too few images to keep any from the method: the accuracy of the repaired model is flattered."
            )
        low, high = done.accuracy.drop_interval
        say(
            f"Loss: {100 * done.accuracy.drop:.1f} points (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}); {done.accuracy.lost} images were right only before, "
            f"{done.accuracy.gained} only after."
        )
    else:
        say(title)
    for residue in done.residues:
        say(
            f"Recovered trigger towards class {residue.trigger.label}: {rate(residue.before)} before, "
            f"{rate(residue.after)} after, on {residue.before.total} images."
        )
    entries = sum(c.changed for c in done.changes)
    share = entries / max(sum(tensor.numel() for tensor in done.model.network.state_dict().values()), 1)
    say(f"Changed: {entries:,} numbers ({percent(share)}) in {len(done.changes)} tensors.")
    told = list(scalars(done.purified.evidence))
    if told:
        table("What the method says it did", ("evidence", "value"), [(n, _short(v)) for n, v in told])


def scalars(evidence: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the single values of a method's evidence under dotted names; what is long as its length."""
    for name, value in evidence.items():
        if isinstance(value, Mapping) and len(value) <= _LONG:
            yield from scalars(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping | list | tuple):
            yield f"{prefix}{name}", f"{len(value)} entries"
        else:
            yield f"{prefix}{name}", value


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_EVIDENCE else text[: _SHOWN_EVIDENCE - 3] + "..."
