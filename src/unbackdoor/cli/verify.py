"""``unbackdoor verify``: an independent comparison of two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor import confinement
from unbackdoor.cli import auditor, defender, options
from unbackdoor.cli.output import emit, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import interval, logits_in_words, percent, rate

if TYPE_CHECKING:
    from unbackdoor.audit.verification import Verification


def verify(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="Weights of the original.", show_default=False)
    ],
    after: Annotated[
        Path, typer.Argument(metavar="AFTER", help="Weights of its repair.", show_default=False)
    ],
    data: defender.Data,
    checks: auditor.Checks = None,
    budget: auditor.Budget = None,
    level: auditor.Level = 0.05,
    triggers: auditor.Trigger = None,
    report: auditor.Report = None,
    clean: defender.Clean = None,
    per_class: defender.PerClass = None,
    fraction: defender.Fraction = None,
    data_root: options.DataRoot = None,
    image_column: defender.ImageColumn = None,
    label_column: defender.LabelColumn = None,
    skip_damaged: defender.SkipDamaged = False,
    arch: auditor.Arch = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: auditor.Size = None,
    class_names: auditor.Classes = None,
    weights: options.Weights = None,
    output: auditor.Output = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two models without trusting whoever made the second.

    Clean accuracy, agreement, what changed in the weights, what triggers that are recovered anew from BEFORE
    do to both, and the same checks on both. No record of a repair is read.

    Exit codes: 0 the recovered triggers do not work on AFTER and no check accuses it, 1 one does or one
    accuses it, 2 an error, or the checks could not decide, 3 the two models do not do the same task.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor
    from unbackdoor.audit.budget import budgeted

    auditor.require_report(report, force=force, inputs=(before, after))
    limit = options.seconds_of(budget, "--budget")
    user_options = auditor.UserOptions(
        arch, mean, std, size, class_names, data, clean, per_class, fraction, None, data_root,
        weights=weights, output=output, image_column=image_column, label_column=label_column,
        skip_damaged=skip_damaged,
    )  # fmt: skip
    with Display(quiet=quiet) as display, budgeted(limit):
        run = options.open_run(seed, device, precision, display)
        first, second = auditor.open_pair(before, after, user_options, run, display, quiet=quiet)
        done = unbackdoor.verify(
            first,
            second,
            triggers=triggers,
            checks=auditor.check_names(checks),
            level=level,
            budget=limit,
            seed=seed,
            device=device,
            precision=precision.value,
            progress=display,
        )
    try:
        if report is not None:
            done.save_report(report, force=force, command=auditor.command_line())
    finally:
        # The result is printed even if the report cannot be written.
        if as_json:
            emit(done.to_dict())
        else:
            _show(done, first.model.class_names)
    if report is not None and not as_json:
        say(f"Report: {report / auditor.PAGE}")
    if done.interrupted:
        raise KeyboardInterrupt  # everything is written; exit code and message as of any interrupted command
    code = outcome(done)
    if code:
        raise typer.Exit(code)


WORKS = 0.5  # success of a recovered trigger from which it is said to work


def outcome(done: Verification) -> int:
    """Return the exit code of a comparison."""
    if done.after.verdict == "backdoor found":
        return 1
    if any(r.after.total and r.after.value > WORKS and r.before.value > WORKS for r in done.residues):
        return 1
    untried = done.before.partial and not done.residues  # no trigger was recovered, for lack of time
    return 2 if untried or done.after.partial or done.after.verdict == "undecided" else 0


def _show(done: Verification, names: tuple[str, ...]) -> None:
    if done.identical:
        say("The two models have the same weights.")
    rows: list[tuple[str, ...]] = []
    if done.accuracy is not None:
        rows += [
            ("clean accuracy, before", rate(done.accuracy.before), interval(done.accuracy.before)),
            ("clean accuracy, after", rate(done.accuracy.after), interval(done.accuracy.after)),
        ]
    rows.append(("same answer of both", rate(done.agreement), interval(done.agreement)))
    for r in done.residues:
        name = f"{names[r.trigger.label]} ({r.trigger.check})"
        rows.append((f"recovered trigger to {name}, before", rate(r.before), interval(r.before)))
        rows.append((f"recovered trigger to {name}, after", rate(r.after), interval(r.after)))
    table("Comparison", ("", ">rate", ">95 % interval"), rows)
    if done.logits is not None and not done.identical:
        say(logits_in_words(done.logits))
    entries = sum(c.changed for c in done.changes)
    say(f"Changed: {entries:,} numbers in {len(done.changes)} tensors.")
    for c in sorted(done.changes, key=lambda c: -c.relative)[:5]:
        share = percent(min(c.relative, 9.99))
        say(f"  {c.name}: {c.channels} of {c.of_channels} channels, {share} of its norm")
    for title, audit in (("before", done.before), ("after", done.after)):
        say(f"Checks on the model {title}:")
        auditor.show_audit(audit, names)
