"""``unbackdoor audit``: from a suspicious file to a decision, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor import confinement
from unbackdoor.cli import auditor, defender
from unbackdoor.cli import options as shared
from unbackdoor.cli.output import emit, say, table
from unbackdoor.cli.steps import StepDisplay, step_rows
from unbackdoor.report.words import duration, interval, rate

if TYPE_CHECKING:
    from unbackdoor.audit.assessment import Assessment

BACKDOOR_FOUND, UNDECIDED, UNSUPPORTED = 1, 2, 3


def audit(
    model: defender.Model,
    data: auditor.MaybeData = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of report.html, result.json, the recovered triggers, the repaired model and the "
            "patch.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for all of it, opening included: seconds, or such as 90s, 10m or 1h.",
            show_default="none",
            rich_help_panel="Method",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what would be done and how long it takes, and stop."),
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="Defense of the repair, see: unbackdoor list defenses; or FILE.py:FUNCTION, which runs it.",
            show_default="auto",
            rich_help_panel="Method",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Named set of its options.", show_default=False, rich_help_panel="Method"),
    ] = None,
    method_options: Annotated[
        list[str] | None,
        typer.Option(
            "--method-set",
            metavar="KEY=VALUE",
            help="Option of the defense; may be repeated.",
            rich_help_panel="Method",
        ),
    ] = None,
    max_accuracy_drop: auditor.MaxAccuracyDrop = None,
    promise: auditor.PromiseRule = auditor.Rule.evidence,
    triggers: auditor.Trigger = None,
    proof: auditor.Proof = None,
    checks: auditor.Checks = None,
    options: auditor.CheckOptions = None,
    references: auditor.References = None,
    level: auditor.Level = 0.05,
    clean: defender.Clean = None,
    per_class: defender.PerClass = None,
    fraction: defender.Fraction = None,
    augmentation: defender.AugmentationChoice = None,
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
    """Audit a model that somebody else trained: inspect, scan, recover the trigger, repair, verify.

    MODEL is only read, and never executed. A plan with times comes first; with --budget the checks that fit
    are made, cheapest first, and what is left out is said. Where a backdoor is found, its trigger is
    recovered, a copy of the model is repaired, and both are compared anew. --out gets all of it: one page,
    the record, the triggers, the repaired model and a patch.

    Exit codes: 0 no evidence found, 1 backdoor found, whatever became of the repair, 2 an error, or
    undecided, 3 the model is of a kind that no check can work on, 130 interrupted: what had ended is written
    all the same.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor
    from unbackdoor.audit.own_methods import defense_of
    from unbackdoor.audit.purifying import DEFAULT_METHOD

    limit = shared.seconds_of(budget, "--budget")
    named = auditor.check_names(checks)
    check_options = auditor.options_by_check(options, named)
    typed = shared.pairs(method_options or [], "--method-set")
    source = shared.existing_model(model)
    if out is not None and not plan:
        auditor.require_audit_folder(out, source, force=force, inputs=references or ())
    part = defense_of(DEFAULT_METHOD if method is None else method)
    config = part.configure_text(typed, preset=preset)
    with StepDisplay(quiet=quiet) as display:
        shared.open_run(seed, device, precision, display)  # a missing device is an error before all else
        done = unbackdoor.audit(
            source,
            data,
            part,
            preset=preset,
            method_options=config,
            max_accuracy_drop=max_accuracy_drop,
            promise=promise.value,
            triggers=triggers,
            proof=proof,
            checks=named,
            options=check_options,
            references=references,
            level=level,
            budget=limit,
            plan=plan,
            **auditor.model_options_of(arch, mean, std, size, class_names, weights, output),
            clean=clean,
            per_class=per_class,
            fraction=fraction,
            augmentation=None if augmentation is None else augmentation.value,
            data_root=data_root,
            image_column=image_column,
            label_column=label_column,
            skip_damaged=skip_damaged,
            seed=seed,
            device=device,
            precision=precision.value,
            progress=display,
        )
    assert done.case is not None
    auditor.show_notes(done.case, quiet=quiet)
    if plan:
        _show_plan(done, as_json=as_json)
        return
    try:
        if out is not None:
            done.save_report(out, force=force, command=auditor.command_line())
    finally:
        # The result is printed even if the folder cannot be written.
        if as_json:
            emit(done.to_dict())
        else:
            _show(done)
    if done.interrupted:
        raise KeyboardInterrupt  # everything is written; exit code and message as of any interrupted command
    code = outcome(done)
    if code:
        raise typer.Exit(code)


def outcome(done: Assessment) -> int:
    """Return the exit code of an audit."""
    if done.verdict == "backdoor found":
        return BACKDOOR_FOUND
    if done.scan is not None and done.scan.unsupported and not done.scan.partial:
        return UNSUPPORTED
    return UNDECIDED if done.partial or done.verdict == "undecided" else 0


def _show_plan(done: Assessment, *, as_json: bool) -> None:
    if as_json:
        emit(done.to_dict())
        return
    table("Plan", ("step", "what", ">about"), [row[:3] for row in step_rows(done.steps)])
    say(plan_in_words(done))


def plan_in_words(done: Assessment) -> str:
    """Return what the whole plan takes, as a sentence."""
    open_steps = [step for step in done.steps if step.status == "to come"]
    always = sum(s.estimate or 0 for s in open_steps if s.name not in ("trigger", "repair", "verify"))
    whole = sum(s.estimate or 0 for s in open_steps)
    text = f"About {duration(always)} for the checks, {duration(whole)} if a backdoor is found and repaired."
    if done.budget is not None and done.budget < whole:
        text += f" The budget is {duration(done.budget)}: what does not fit is left out, and named."
    return text


def _show(done: Assessment) -> None:
    table("Steps", ("step", "result", ">time"), [(row[0], row[4], row[5]) for row in step_rows(done.steps)])
    assert done.case is not None
    names = done.case.model.class_names
    if done.accuracy is not None:
        say(f"Clean accuracy: {rate(done.accuracy)} (95 % interval {interval(done.accuracy)})")
    for residue in done.residues:
        say(
            f"Recovered trigger towards {auditor.named(residue.trigger.label, names)}: "
            f"{rate(residue.before)} before, {rate(residue.after)} after, on {residue.before.total} images."
        )
    ended, planned = done.checks_done
    suspects = ", ".join(auditor.named(k, names) for k in done.classes[:3])
    towards = f", towards {suspects}" if suspects else ""
    say(f"Verdict: {done.verdict}{towards}; checks done {ended} of {planned}")
    for reason in done.reasons:
        say(reason)
    if done.outcome is not None:
        say(f"Repair: {done.outcome}")
    for what, path in done.written.items():
        say(f"{what}: {path}")
