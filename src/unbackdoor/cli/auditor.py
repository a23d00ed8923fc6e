"""Inputs of the auditor: an untrusted model and images. Shared by scan, purify and verify."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import note
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.files import is_there, read_text

if TYPE_CHECKING:
    from unbackdoor.audit.cases import Case
    from unbackdoor.audit.scanning import Audit
    from unbackdoor.engine.run import Run
    from unbackdoor.types import Progress
    from unbackdoor.weights.source import Source

PAGE, RECORD = "report.html", "result.json"
_MAX_NAMES_FILE = 10 << 20  # bytes
_MAX_NAMED = 10  # suspected classes that a sentence lists; the record has all
_MODEL, _DATA = "Models without a card", "Data"

Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        "--architecture",
        help="Network: unbackdoor:NAME\\[width=..], timm:NAME, torchvision:NAME, hf:FOLDER, or "
        "file.py:callable, which runs that file.",
        show_default="the card's, else guessed from the weights",
        rich_help_panel=_MODEL,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Input size as H,W or one number.",
        show_default="the model's, else the images'",
        rich_help_panel=_MODEL,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--class-names",
        help="Names in the order of the outputs, separated by commas, or a text file with one on each line.",
        show_default="the card's, else the data's",
        rich_help_panel=_MODEL,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which of several outputs of an ONNX graph gives the logits.",
        show_default="the only one",
        rich_help_panel=_MODEL,
    ),
]
MaybeData = Annotated[
    str | None,
    typer.Option(
        help="Clean images: a data set's name, a folder of class folders or with labels.csv, a .parquet or "
        ".npz file, a folder of images without labels, or hf://datasets/ORG/NAME.",
        show_default="none: only the checks that need no images",
        rich_help_panel=_DATA,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Time for the checks: seconds, or such as 90s, 10m or 1h.",
        show_default="none",
        rich_help_panel="Method",
    ),
]
Checks = Annotated[
    str | None,
    typer.Option(
        help="Names of checks, separated by commas.",
        show_default="all",
        rich_help_panel="Method",
    ),
]
Level = Annotated[
    float,
    typer.Option(help="Accepted probability of accusing a clean model.", rich_help_panel="Method"),
]
Trigger = Annotated[
    list[str] | None,
    typer.Option(
        "--trigger",
        help="Trigger of a scan's report, trigger.safetensors; or a picture, FILE.png,class=NAME, "
        "with ,place=ROWxCOLUMN ,size=HxW ,mask=FILE.png ,strength=0.5 or ,add behind it; may be repeated.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
CheckOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="CHECK.KEY=VALUE",
        help="Option of a check, see: unbackdoor list scanners CHECK; may be repeated.",
        rich_help_panel="Method",
    ),
]
References = Annotated[
    list[Path] | None,
    typer.Option(
        help="Record of a scan of a clean model of the same kind (result.json), for checks that have no "
        "null of their own; may be repeated.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(
        help="Promise: points of clean accuracy (of 100) that may be lost at most, on images that the "
        "method does not get.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
Proof = Annotated[
    Path | None,
    typer.Option(
        help="Further clean images, for measuring the accuracy alone: a file or a folder.",
        show_default="a part of the images, kept from the method",
        rich_help_panel="Data",
    ),
]


class Rule(StrEnum):
    """When a promise counts as broken."""

    evidence = "evidence"
    strict = "strict"


PromiseRule = Annotated[
    Rule,
    typer.Option(
        help="The promise is broken: evidence, where the 95 % interval of the loss lies above it; "
        "strict, unless the interval lies below it.",
        rich_help_panel="Method",
    ),
]
Scan = Annotated[
    Path | None,
    typer.Option(
        "--scan",
        metavar="DIR",
        help="Report of a scan of this model: the classes that it suspects, and the triggers that it "
        "recovered towards them, lead the method.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
SearchBudget = Annotated[
    str | None,
    typer.Option(
        help="Time for the searches that judge the repair: seconds, or such as 90s or 10m.",
        show_default="2m",
        rich_help_panel="Method",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write report.html, result.json and the recovered triggers into this folder.",
        show_default=False,
        rich_help_panel="Output",
    ),
]


@dataclass(frozen=True)
class UserOptions:
    """The user's options about a model and its images, as typed."""

    architecture: str | None
    mean: str | None
    std: str | None
    size: str | None
    class_names: str | None
    data: str | None
    clean: int | None = None
    per_class: int | None = None
    fraction: float | None = None
    augmentation: options.AugmentationName | None = None
    data_root: Path | None = None
    proof: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    skip_damaged: bool = False
    weights: str | None = None
    output: str | None = None


def open_case(
    model: Path | Source, user_options: UserOptions, run: Run, progress: Progress, *, quiet: bool = False
) -> Case:
    """Open a model and load the images in the form that it takes, and say what should not be overlooked.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or options contradict each other.
    """
    from unbackdoor.audit import cases
    from unbackdoor.data.clean_images import ambiguity
    from unbackdoor.data.datasets import dataset_names

    for text in (
        ambiguity(user_options.data, user_options.data_root) if user_options.data in dataset_names() else ()
    ):
        note(f"mind: {text}")
    case = cases.open_case(
        model,
        user_options.data,
        run=run,
        **model_options(user_options),
        clean=user_options.clean,
        per_class=user_options.per_class,
        fraction=user_options.fraction,
        augmentation=None if user_options.augmentation is None else user_options.augmentation.value,
        data_root=user_options.data_root,
        proof=user_options.proof,
        image_column=user_options.image_column,
        label_column=user_options.label_column,
        skip_damaged=user_options.skip_damaged,
    )
    show_notes(case, quiet=quiet)
    return case


def open_pair(
    before: Path, after: Path, user_options: UserOptions, run: Run, progress: Progress, *, quiet: bool = False
) -> tuple[Case, Case]:
    """Open two models that are compared, the second under the same assumptions unless it has a card."""
    from unbackdoor.audit import cases

    typed = model_options(user_options)
    first_file, second_file = cases.open_pair_sources(before, after, typed)
    fitting = cases.options_for(first_file, typed)
    assert not isinstance(first_file, Path)
    options_of_first = replace(user_options, weights=fitting["weights"], output=fitting["output"])
    first = open_case(first_file, options_of_first, run, progress, quiet=quiet)  # type: ignore[arg-type]
    second = cases.open_second(second_file, first, run=run, **typed)
    for warning in second.opened.provenance.in_file.warnings if second.opened is not None else ():
        note(f"mind, of the second model: {warning}", quiet=quiet)
    return first, second


def show_notes(case: Case, *, quiet: bool) -> None:
    """Print what was done to the images, and what should not be overlooked, before anything is computed."""
    for text in case.images.notes if case.images is not None else ():
        note(f"mind: {text}", quiet=quiet)
    if case.opened is not None:
        for text in case.opened.provenance.images:
            note(text, quiet=quiet)
        for warning in case.opened.warnings:
            note(f"mind: {warning}", quiet=quiet)


def model_options(user_options: UserOptions) -> dict[str, Any]:
    """Return the options of a model as :func:`unbackdoor.open_model` takes them."""
    return model_options_of(
        user_options.architecture,
        user_options.mean,
        user_options.std,
        user_options.size,
        user_options.class_names,
        user_options.weights,
        user_options.output,
    )


def model_options_of(
    arch: str | None,
    mean: str | None,
    std: str | None,
    size: str | None,
    names: str | None,
    weights: str | None,
    output: str | None,
) -> dict[str, Any]:
    """Return the same of the texts that were typed."""
    return {
        "arch": arch,
        "mean": options.numbers(mean, "--mean"),
        "std": options.numbers(std, "--std"),
        "size": image_size(size),
        "class_names": class_names(names),
        "weights": weights,
        "output": output,
    }


def class_names(text: str | None) -> tuple[str, ...] | None:
    """Return class names from a comma-separated text or from a file with one on each line."""
    if text is None:
        return None
    path = Path(text)
    if is_there(path) and not path.is_dir():  # a list of names may be longer than the name of a file may be
        content = read_text(path, "the file of class names", limit=_MAX_NAMES_FILE)
        names = tuple(line.strip() for line in content.splitlines() if line.strip())
        if not names:
            raise InputError("the file of class names is empty", expected="a name on each line", where=path)
        return names
    return tuple(name.strip() for name in text.split(",") if name.strip())


def image_size(text: str | None) -> tuple[int, int] | None:
    """Return (H, W) of a text such as ``32`` or ``32,24``; raises ConfigError of another."""
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError("the option --size", [f"expected a number or H,W, got {text!r}"])
    return (sides[0], sides[-1])


def check_names(checks: str | None) -> list[str] | None:
    """Return names of checks from a comma-separated text."""
    return None if checks is None else [name.strip() for name in checks.split(",") if name.strip()]


def command_line() -> str:
    """Return what was typed, so that a reader can do it again."""
    return shlex.join(["unbackdoor", *sys.argv[1:]])


def require_report(
    folder: Path | None,
    others: Sequence[Path] = (),
    *,
    triggers: bool = False,
    force: bool,
    inputs: Sequence[Path] = (),
) -> None:
    """Check, before the work, that a report and other files can be written and that nothing is lost.

    Args:
        folder: Of the report; None where none was asked for.
        others: Further files that will be written.
        triggers: Whether the report may hold recovered triggers.
        force: Whether files that exist may be replaced.
        inputs: Files that are not replaced even then.

    Raises:
        InputError: See :func:`unbackdoor.files.require_writable`.
    """
    from unbackdoor.report.saving import report_files

    files = () if folder is None else report_files(folder, triggers=triggers)
    options.require_writable(files, force=force, inputs=inputs, below=folder)
    options.require_writable((*others, *files), force=force, inputs=inputs)  # no two of one name


def require_audit_folder(folder: Path, model: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Check, before the work, that all files of an audit can be written into a folder."""
    from unbackdoor.report.saving import audit_files

    files = audit_files(folder, model.suffix)
    options.require_writable(files, force=force, inputs=(model, *inputs), below=folder)


def named(label: int, names: Sequence[str]) -> str:
    """Return the name of a class with its number."""
    return f"{names[label]} ({label})" if label < len(names) and names[label] != str(label) else str(label)


def options_by_check(texts: list[str] | None, names: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return options by check from texts such as ``rnp_vote.repeats=4``.

    Raises:
        ConfigError: If one has another form or does not fit.
        InputError: If a check is unknown or not asked for.
    """
    from unbackdoor.audit.checks import plan_checks
    from unbackdoor.registry import SCANNERS

    pairs: dict[str, dict[str, str]] = {}
    for key, value in options.pairs(texts or [], "--set").items():
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


def say_written(what: str, path: Path, *, as_json: bool) -> None:
    """Name a file that was written; beside JSON that is on standard error."""
    from unbackdoor.cli.output import say

    if as_json:
        note(f"{what}: {path}")
    else:
        say(f"{what}: {path}")


def show_audit(audit: Audit, names: Sequence[str]) -> None:
    """Print a scan as a table and a sentence."""
    from unbackdoor.cli.output import say, table
    from unbackdoor.report.words import duration

    rows = []
    for c in audit.checks:
        result = c.status if c.report is None else c.report.verdict
        suspects = ", ".join(named(k, names) for k in c.classes[:3]) if c.p_value is not None else ""
        numbers = ["" if p is None else f"{p:.3g}" for p in (c.p_value, c.adjusted)]
        rows.append((c.check.name, result, suspects, *numbers, duration(c.seconds) if c.seconds else ""))
    table("Checks", ("check", "result", "strongest class", ">p", ">adjusted", ">time"), rows)
    for c in audit.checks:
        if c.reason:
            say(f"{c.check.name}: {c.reason}")
    suspects = ", ".join(named(k, names) for k in audit.classes[:_MAX_NAMED])
    if len(audit.classes) > _MAX_NAMED:
        suspects += f" and {len(audit.classes) - _MAX_NAMED} more"
    say(f"Verdict: {audit.verdict}" + (f", towards {suspects}" if suspects else ""))
    for reason in audit.reasons:
        say(reason)
