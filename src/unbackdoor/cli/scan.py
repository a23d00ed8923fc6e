"""``unbackdoor scan``: is this model backdoored?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor import confinement
from unbackdoor.cli import auditor, defender, several
from unbackdoor.cli import options as shared
from unbackdoor.cli.output import emit, say
from unbackdoor.cli.progress import Display

if TYPE_CHECKING:
    from unbackdoor.audit.scanning import Audit

BACKDOOR_FOUND, PARTIAL, UNSUPPORTED = 1, 2, 3


def scan(
    model: defender.Models,
    data: auditor.MaybeData = None,
    checks: auditor.Checks = None,
    options: auditor.CheckOptions = None,
    references: auditor.References = None,
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
    device: shared.Device = "auto",
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

    Of a folder of models, of a pattern such as 'models/**/*.pth', or of several names, each is scanned in
    turn within its own --budget, --report gets a folder for each, and the exit code is that of the worst: 1,
    else 2, else 3, else 0.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor
    from unbackdoor.audit.budget import budgeted
    from unbackdoor.audit.references import read_references

    models, apart = several.models_of(model)
    inputs = (*map(shared.existing_model, models), *(references or ()))
    logs = () if sarif_file is None else (sarif_file,)
    reports = _reports(report, models, apart=apart)
    for folder in reports.values():
        auditor.require_report(folder, logs, triggers=True, force=force, inputs=inputs)
    limit = shared.seconds_of(budget, "--budget")
    named = auditor.check_names(checks)
    check_options = auditor.options_by_check(options, named)
    read_references(references or ())  # a wrong path is an error before the scan, not after it
    user_options = auditor.UserOptions(
        arch, mean, std, size, class_names, data, clean, per_class, fraction, augmentation, data_root,
        weights=weights, output=output, image_column=image_column, label_column=label_column,
        skip_damaged=skip_damaged,
    )  # fmt: skip

    def scanned(path: Path, display: Display) -> Audit:
        with budgeted(limit):
            run = shared.open_run(seed, device, precision, display)
            return unbackdoor.scan(
                auditor.open_case(path, user_options, run, display, quiet=quiet),
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

    def save(audit: Audit, path: Path) -> None:
        folder = reports[path]
        if folder is not None:
            audit.save_report(folder, force=force, command=auditor.command_line())

    if apart:
        code = _several(models, scanned, save, sarif_file, as_json=as_json, quiet=quiet, force=force)
        if report is not None and not as_json:
            say(f"Reports: {report}")
        if sarif_file is not None:
            auditor.say_written("SARIF log", sarif_file, as_json=as_json)
        if code:
            raise typer.Exit(code)
        return
    with Display(quiet=quiet) as display:
        audit = scanned(models[0], display)
    try:
        save(audit, models[0])
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
    if sarif_file is not None:
        auditor.say_written("SARIF log", sarif_file, as_json=as_json)
    if audit.interrupted:
        raise KeyboardInterrupt  # everything is written; exit code and message as of any interrupted command
    if code := outcome(audit):
        raise typer.Exit(code)


def outcome(audit: Audit) -> int:
    """Return the exit code of a scan that was not interrupted."""
    if audit.verdict == "backdoor found":
        return BACKDOOR_FOUND
    if audit.unsupported and not audit.partial:
        return UNSUPPORTED
    return PARTIAL if audit.partial or audit.verdict == "undecided" else 0


def _reports(report: Path | None, models: Sequence[Path], *, apart: bool) -> dict[Path, Path | None]:
    """Return the folder of the report of each model; of several, each has one of its own inside."""
    from unbackdoor.weights.model_files import report_names

    if report is None or not apart:
        return dict.fromkeys(models, report)
    return dict(zip(models, (report / name for name in report_names(models)), strict=True))


def _several(
    models: Sequence[Path],
    scanned: Callable[[Path, Display], Audit],
    save: Callable[[Audit, Path], None],
    sarif_file: Path | None,
    *,
    as_json: bool,
    quiet: bool,
    force: bool,
) -> int:
    """Scan several models, and return the exit code of the worst; all of them are in one SARIF log."""
    from unbackdoor.report.sarif import Scanned
    from unbackdoor.report.saving import save_sarif_log

    log: list[Scanned] = []

    def work(path: Path) -> tuple[dict[str, Any], str, int]:
        with Display(quiet=quiet) as display:
            audit = scanned(path, display)
        assert audit.case is not None and audit.case.source is not None
        names, source = audit.case.model.class_names, audit.case.source
        log.append(Scanned(replace(audit, case=None), source.path, names, source.sha256))
        save(audit, path)
        towards = ", ".join(names[k] for k in audit.classes[:3])
        line = audit.verdict + (f", towards {towards}" if towards else "")
        return audit.to_dict(), line, several.INTERRUPTED if audit.interrupted else outcome(audit)

    def failed(path: Path, why: str) -> None:
        if all(one.path != path for one in log):
            log.append(Scanned(None, path, failure=why))

    try:
        return several.one_by_one(models, work, as_json=as_json, failed=failed)
    finally:
        if sarif_file is not None:
            save_sarif_log(log, sarif_file, force=force)
