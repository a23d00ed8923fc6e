"""``unbackdoor scan``: is this model backdoored?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unbackdoor import confinement
from unbackdoor.cli import auditor, defender
from unbackdoor.cli import options as shared
from unbackdoor.cli.output import emit, say
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError

BACKDOOR_FOUND, PARTIAL, UNSUPPORTED = 1, 2, 3


def scan(
    model: defender.Model,
    data: auditor.MaybeData = None,
    checks: auditor.Checks = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="CHECK.KEY=VALUE",
            help="Option of a check, see: unbackdoor list scanners CHECK; may be repeated.",
            rich_help_panel="Method",
        ),
    ] = None,
    references: Annotated[
        list[Path] | None,
        typer.Option(
            help="Record of a scan of a clean model of the same kind (result.json), for checks that have no "
            "null of their own; may be repeated.",
            show_default=False,
            rich_help_panel="Method",
        ),
    ] = None,
    budget: auditor.Budget = None,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough",
            help="Go on after a check has answered the question, for more evidence and triggers.",
            rich_help_panel="Method",
        ),
    ] = False,
    level: auditor.Level = 0.05,
    report: auditor.Report = None,
    sarif_file: Annotated[
        Path | None,
        typer.Option("--sarif", help="Write a SARIF log.", show_default=False, rich_help_panel="Output"),
    ] = None,
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
    device: shared.Device = "cpu",
    precision: shared.PrecisionOption = shared.PrecisionPolicy.auto,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Look for a backdoor in a model that somebody else trained.

    MODEL is only read, and never executed. The checks run from the cheapest to the dearest; each gives a
    p-value that it calibrated on this model itself, and all of them together are held against --level. What
    is said is "backdoor found", "no evidence found" or "undecided", and never "clean".

    Exit codes: 0 no evidence found, 1 backdoor found, 2 an error, or the scan could not decide, did not
    finish, or could not examine the file's own program, 3 the model is of a kind that no check can work on,
    130 interrupted with Ctrl-C or SIGTERM: what had ended by then is printed and written all the same.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor
    from unbackdoor.audit.budget import budgeted
    from unbackdoor.audit.references import read_references

    auditor.require_report(
        report,
        () if sarif_file is None else (sarif_file,),
        triggers=True,
        force=force,
        inputs=(shared.existing_model(model), *(references or ())),
    )
    limit = shared.seconds_of(budget, "--budget")
    named = auditor.check_names(checks)
    check_options = _options_by_check(options, named)
    read_references(references or ())  # a wrong path is an error before the scan, not after it
    user_options = auditor.UserOptions(
        arch, mean, std, size, class_names, data, clean, per_class, fraction, augmentation, data_root,
        weights=weights, output=output, image_column=image_column, label_column=label_column,
        skip_damaged=skip_damaged,
    )  # fmt: skip
    with Display(quiet=quiet) as display, budgeted(limit):
        run = shared.open_run(seed, device, precision, display)
        audit = unbackdoor.scan(
            auditor.open_case(model, user_options, run, display, quiet=quiet),
            checks=named,
            options=check_options,
            references=references,
            level=level,
            thorough=thorough,
            budget=limit,
            seed=seed,
            device=device,
            precision=precision.value,
            progress=display,
        )
    try:
        if report is not None:
            audit.save_report(report, force=force, command=auditor.command_line())
        if sarif_file is not None:
            unbackdoor.save_sarif(audit, sarif_file, force=force)
    finally:
        # The result is printed even if the report cannot be written.
        if as_json:
            emit(audit.to_dict())
        else:
            assert audit.case is not None
            auditor.show_audit(audit, audit.case.model.class_names)
    if report is not None and not as_json:
        say(f"Report: {report / auditor.PAGE}")
    if audit.interrupted:
        raise KeyboardInterrupt  # everything is written; exit code and message as of any interrupted command
    if audit.verdict == "backdoor found":
        raise typer.Exit(BACKDOOR_FOUND)
    if audit.unsupported and not audit.partial:
        raise typer.Exit(UNSUPPORTED)
    if audit.partial or audit.verdict == "undecided":
        raise typer.Exit(PARTIAL)


def _options_by_check(texts: list[str] | None, names: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return options by check from texts such as ``rnp_vote.repeats=4``.

    Raises:
        ConfigError: If one has another form or does not fit.
        InputError: If a check is unknown or not asked for.
    """
    from unbackdoor.audit.checks import plan_checks
    from unbackdoor.registry import SCANNERS

    pairs: dict[str, dict[str, str]] = {}
    for key, value in shared.pairs(texts or [], "--set").items():
        check, dot, name = key.rpartition(".")
        if not dot:
            raise ConfigError("the option --set", [f"expected CHECK.KEY=VALUE, got {key}={value}"])
        pairs.setdefault(check, {})[name] = value
    planned = {check.name: check for check in plan_checks(names, {check: {} for check in pairs})}
    out = {}
    for check, check_texts in pairs.items():
        config = SCANNERS[planned[check].scanner].configure_text(check_texts)
        out[check] = {name: getattr(config, name) for name in check_texts}
    return out
